"""`dspy-fst export`: weights, program and model card in one folder, and that folder on a hub."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from dspy_fst.cli.common import Debug, Json, errors_as_text
from dspy_fst.errors import ConfigurationError


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_DIR_OR_COMPILED", help="A finished run, or a saved program.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    lora: Annotated[
        bool, typer.Option("--lora", help="The LoRA adapters as peft folders, without their base.")
    ] = False,
    predictor: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose weights to merge, where predictors have LoRA adapters of their own."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="With --lora: the base's hub name or folder, if not the run's own model."),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(metavar="TYPE|FILE", help="Also for llama.cpp: f16, bf16, q8_0, f32, auto, or a name.gguf."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload OUT to this repository of the Hugging Face hub.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; else its owner's default, mostly public.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push-to-hub: list what would be uploaded, and write nothing.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a folder to share.

    It holds Hugging Face weights, the program for DSPy and a model card. transformers, `vllm serve` and dspy_fst.load
    read it. The weights are complete: a LoRA adapter is merged into its base, in float32.
    """
    with errors_as_text(debug):
        _refuse(push_to_hub, private=private, dry_run=dry_run)
        content = {"lora": lora, "predictor": predictor, "base": base, "gguf": gguf}
        if dry_run:
            assert push_to_hub is not None, "it was refused"
            told = _listed(source, out, content, push_to_hub)
        else:
            told = _written(source, out, content, push_to_hub, private or None)
        text = told.pop("text")
        typer.echo(json.dumps(told) if as_json else text)


def _refuse(repo: str | None, *, private: bool, dry_run: bool) -> None:
    """Refuse flags that mean nothing together, and a hub that would refuse, before any work."""
    from dspy_fst.saving.hub_upload import upload_faults

    flags = {"--private": private, "--dry-run": dry_run}
    faults = [f"{flag} belongs to --push-to-hub ORG/NAME" for flag, given in flags.items() if given and repo is None]
    if repo is not None:
        faults += upload_faults(repo, sends=not dry_run)
    if faults:
        raise ConfigurationError(faults)


def _written(
    source: Path, out: Path, content: dict[str, Any], repo: str | None, private: bool | None
) -> dict[str, Any]:
    from dspy_fst.saving.export import export as write
    from dspy_fst.saving.hub_upload import push_to_hub, refuse_local_base

    written = write(source, out, **content, finish=refuse_local_base if repo else None)
    files = sorted(path.name for path in written.iterdir())
    told: dict[str, Any] = {"out": str(written), "files": files, "text": f"exported to {written}: {', '.join(files)}"}
    if repo is not None:
        told["commit"] = push_to_hub(written, repo, private=private)
        told["text"] += f"\nuploaded: {told['commit']}"
    return told


def _listed(source: Path, out: Path, content: dict[str, Any], repo: str) -> dict[str, Any]:
    """What would be uploaded. The folder is made beside OUT, as its sizes are not known before, and removed."""
    from dspy_fst.saving.export import export as write
    from dspy_fst.saving.hub_upload import files_in, refuse_local_base

    if (out := out.resolve()).exists():
        raise ConfigurationError([f"{out} exists; name a new folder"])
    there = next(folder for folder in out.parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=there) as scratch:
        files = files_in(write(source, Path(scratch) / out.name, **content, finish=refuse_local_base))
    lines = [f"would be uploaded to {repo} ({len(files)} files, {sum(files.values()):,} bytes):"]
    lines += [f"{size:>15,}  {name}" for name, size in files.items()]
    return {"repo": repo, "files": files, "text": "\n".join([*lines, "nothing was written or uploaded"])}
