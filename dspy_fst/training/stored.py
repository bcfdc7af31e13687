"""What the setting `storage` does before a run: the storage is looked at, and a run that lies there is fetched."""

from collections.abc import Mapping
from pathlib import Path

from dspy_fst.config import FSTConfig
from dspy_fst.errors import RunDirectoryError
from dspy_fst.run.files import to_jsonable
from dspy_fst.run.recipes import WHERE_DEMOS_EVOLVE, differences
from dspy_fst.run.storage import PROBE_S, Storage, url_fault


def storage_faults(config: FSTConfig, recipe: Mapping[str, object], run_dir: Path) -> list[str]:
    """Why a run of this recipe cannot be copied to its storage, or go on from there; it writes a file and removes it.

    Args:
        recipe: What makes the run this run.
    """
    if (url := config.storage) is None:
        return []
    if fault := url_fault(url):
        return [fault]
    try:
        storage = Storage(url, tries=1, call_s=PROBE_S)
        storage.probe()
        manifest = storage.newest()
        if manifest is None:
            return []
        # The limit of a demo's tokens may follow from what the directory recorded, which is fetched later.
        wanted = {key: value for key, value in to_jsonable(recipe).items() if key not in WHERE_DEMOS_EVOLVE}
        differing = differences(manifest["recipe"], wanted, to_jsonable(FSTConfig().model_dump()))
        if differing:
            return [
                f"storage={url!r} holds a run of another configuration: {'; '.join(differing)}. Name another storage, "
                "or go back to that configuration to continue it"
            ]
        fault = storage.diverged(run_dir, manifest)
    except RunDirectoryError as error:
        return [str(error)]
    return [fault] if fault else []


def fetch(config: FSTConfig, run_dir: Path) -> bool:
    """Put what lies in the storage into a directory that is empty or behind; whether it did.

    Raises:
        RunDirectoryError: the storage does not answer or is damaged, or the directory is in use.
    """
    return config.storage is not None and Storage(config.storage).pull(run_dir)
