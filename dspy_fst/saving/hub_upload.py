"""An exported folder on a Hugging Face hub, by huggingface_hub.

As with transformers' ``push_to_hub``, a new repository is public unless its owner's default is private, or the caller
asks for a private one. Files that the repository has beside the folder's are left as they are.
"""

from pathlib import Path

from dspy_fst.errors import ConfigurationError, ExportError, briefly
from dspy_fst.model_files.hub import hub_silence, means_a_path
from dspy_fst.model_files.lora_folder import CONFIG
from dspy_fst.model_files.reach import IN_A_RUN_S
from dspy_fst.saving.lora_folders import NAMES_BASE
from dspy_fst.saving.manifest import read_document

NO_TOKEN = (
    "push_to_hub needs a token that may write: log in with `hf auth login`, or set HF_TOKEN; tokens are made at {hub}"
    "/settings/tokens"
)


def upload_faults(repo: str, *, sends: bool = True) -> list[str]:
    """Why nothing can be uploaded, before any work.

    Args:
        repo: ``ORG/NAME``, or ``NAME`` for a repository of the token's owner.
        sends: Whether the hub will be asked; else only the name is checked.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    faults = []
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        faults.append(f"push_to_hub={repo!r}: {briefly(error)}")
    if not sends:
        return faults
    if get_token() is None:
        faults.append(NO_TOKEN.format(hub=constants.ENDPOINT))
    elif silence := hub_silence(IN_A_RUN_S):
        faults.append(f"push_to_hub={repo!r}: {silence}; export without it, and upload the folder later")
    return faults


def refuse_local_base(folder: Path) -> None:
    """Refuse LoRA adapters whose base is a folder of this machine: nobody else could load them.

    Raises:
        ConfigurationError: they name one.
    """
    for config in folder.rglob(CONFIG):
        base = str(read_document(config).get(NAMES_BASE))
        if means_a_path(base):
            raise ConfigurationError(
                [
                    f"push_to_hub: the base of the LoRA adapters is the folder {base}, which others do not have; give "
                    "the name that it has on the hub with --base ORG/NAME (base=... in Python)"
                ]
            )


def files_in(folder: Path) -> dict[str, int]:
    """Path below the folder -> bytes, for each file that is uploaded."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }


def push_to_hub(folder: Path, repo: str, *, private: bool | None = None, message: str | None = None) -> str:
    """Make the repository where it does not exist, and upload the folder in a commit.

    Args:
        folder: Written by `dspy_fst.saving.export.export`.
        repo: See `upload_faults`.
        private: Of a new repository; None: as its owner's default is.
        message: Of the commit.

    Returns:
        The commit's address.

    Raises:
        ConfigurationError: see `upload_faults` and `refuse_local_base`.
        ExportError: the hub refuses it, or cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if faults := upload_faults(repo):
        raise ConfigurationError(faults)
    refuse_local_base(folder)
    api = HfApi(library_name="dspy_fst")
    try:
        named = api.create_repo(repo, private=private, exist_ok=True).repo_id
        made = api.upload_folder(
            repo_id=named, folder_path=folder, commit_message=message or "Upload a program and its weights (dspy_fst)"
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise ExportError(
            f"{folder} is complete, and was not uploaded to {repo}: {briefly(error)}. To upload it later: "
            f"hf upload {repo} {folder}"
        ) from error
    return str(made.commit_url)
