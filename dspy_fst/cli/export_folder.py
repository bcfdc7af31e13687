"""`dspy-fst export`: weights, program and model card in one folder."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dspy_fst.cli.common import Debug, Json, errors_as_text


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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a folder to share.

    It holds Hugging Face weights, the program for DSPy and a model card. transformers, `vllm serve` and dspy_fst.load
    read it. The weights are complete: a LoRA adapter is merged into its base, in float32.
    """
    with errors_as_text(debug):
        from dspy_fst.saving.export import export as write

        written = write(source, out, lora=lora, predictor=predictor, base=base)
        files = sorted(path.name for path in written.iterdir())
        if as_json:
            typer.echo(json.dumps({"out": str(written), "files": files}))
        else:
            typer.echo(f"exported to {written}: {', '.join(files)}")
