"""A compiled program as a folder for others: a Hugging Face model that is also a DSPy program.

    OUT/config.json, *.safetensors, tokenizer...   the weights: transformers and vllm serve OUT
    OUT/program.json                               DSPy's own state: program.load(OUT/program.json)
    OUT/population.json, policy.json               with these, dspy_fst.load(OUT, program)
    OUT/README.md                                  a model card; it may be edited
    OUT/manifest.json                              checksums of all the others

The weights are complete. A LoRA adapter is merged into its base, in float32. Where predictors speak through several
LoRA adapters, a folder holds the weights of those that share one, without policy.json and the manifest; or, without
their base, the adapters themselves (see `dspy_fst.saving.lora_folders`).
"""

import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import dspy

from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.run.files import flush, scratch_beside, writing
from dspy_fst.run.secrets import Redactor, secret_faults
from dspy_fst.saving.card import Facts, model_card
from dspy_fst.saving.facts import facts_of
from dspy_fst.saving.format import CARD, DOCUMENTS, POPULATION, PROGRAM, WEIGHTS, saved_in, weights_in
from dspy_fst.saving.gguf_file import gguf_faults, write_gguf
from dspy_fst.saving.lora_card import lora_card
from dspy_fst.saving.lora_folders import base_of, through, write_adapters
from dspy_fst.saving.manifest import MANIFEST, read_document, seal, verify, weights_faults

TEXTS = (PROGRAM, POPULATION)
"""The documents of a folder that `dspy_fst.load` does not read."""


def export(
    source: str | Path,
    out: str | Path,
    *,
    lora: bool = False,
    predictor: str | None = None,
    base: str | None = None,
    gguf: str | None = None,
    finish: Callable[[Path], object] | None = None,
) -> Path:
    """Write the folder. The program's code is not imported: everything is read from the saved program and its run.

    Args:
        source: A run's directory that holds ``compiled/``, or a folder written by `dspy_fst.save`. If that folder is in
            its run's directory, the card describes the training.
        out: The new folder.
        lora: Write the LoRA adapters as peft folders, without their base.
        predictor: Whose weights to write, where predictors speak through several LoRA adapters.
        base: With ``lora``, the base's name for others: a hub name, or a folder with the same numbers. None: the model
            that the run started from.
        gguf: Convert the weights too, see `dspy_fst.saving.gguf_file.write_gguf`.
        finish: Given the complete folder before it gets its name; whatever it raises leaves nothing behind.

    Raises:
        ConfigurationError: ``out`` exists (nothing is ever overwritten), a document holds a secret, or the program has
            not what the arguments ask for.
        RunDirectoryError: there is no saved program, it is damaged, or the disk refused to write.
        ExportError: llama.cpp's converter failed.
    """
    saved, out = _saved_in(Path(source).resolve()), Path(out).resolve()
    if out.exists():
        raise ConfigurationError([f"{out} exists; name a new folder"])
    if out.is_relative_to(saved):
        raise ConfigurationError([f"{out} lies in the saved program itself; name a folder elsewhere"])
    verify(saved)
    if faults := weights_faults(saved / WEIGHTS):
        raise RunDirectoryError(f"{saved} is not exported: {'; '.join(faults)}")
    facts, checkpoint = facts_of(saved), Checkpoint.at("exported", saved / WEIGHTS)
    faults = gguf_faults(gguf, lora=lora) if gguf is not None else []
    if faults := [*faults, *_argument_faults(facts, checkpoint, lora=lora, predictor=predictor, base=base)]:
        raise ConfigurationError(faults)
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch_beside(out) as scratch:
            if lora:
                _fill_with_adapters(scratch, saved, facts, checkpoint, base)
            else:
                _fill(scratch, saved, facts, checkpoint, predictor)
            if finish is not None:
                finish(scratch)
            if gguf is not None:
                write_gguf(scratch, gguf, out.name)
            scratch.rename(out)
            flush(out.parent)
    return out


def _saved_in(source: Path) -> Path:
    saved = saved_in(source)
    if weights_in(saved) == saved:
        raise RunDirectoryError(f"{source} was exported already; copy it as it is, or name what it was exported from")
    return saved


def _argument_faults(
    facts: Facts, checkpoint: Checkpoint, *, lora: bool, predictor: str | None, base: str | None
) -> list[str]:
    """Why this program cannot be exported so, one sentence each."""
    faults = []
    speak = through(checkpoint, facts.policy.predictors)
    if lora and not checkpoint.adapters:
        faults.append("lora: the program's weights are whole ones, without a LoRA adapter; leave it out")
    if lora and predictor is not None:
        faults.append(f"predictor={predictor!r} names merged weights, and lora=True exports all adapters; choose one")
    if base is not None and not lora:
        faults.append(f"base={base!r}: whole weights need no base; it belongs to lora=True")
    if predictor is not None and predictor in facts.policy.frozen:
        faults.append(
            f"predictor={predictor!r} speaks with the frozen LM {facts.policy.frozen[predictor]!r}, which is not "
            "exported"
        )
    elif predictor is not None and predictor not in speak:
        faults.append(f"predictor={predictor!r}: the program has no such predictor; there are {', '.join(speak)}")
    if not lora and predictor is None and len(checkpoint.adapters) > 1:
        listed = "; ".join(f"{name} through {adapter or 'none'}" for name, adapter in speak.items())
        faults.append(
            f"the program speaks through {len(checkpoint.adapters)} LoRA adapters ({listed}), which cannot be merged "
            "into one set of weights; write the adapters themselves with --lora (lora=True in Python), or one merged "
            "folder for each predictor with --predictor NAME (predictor=NAME)"
        )
    return faults


def _fill(folder: Path, saved: Path, facts: Facts, checkpoint: Checkpoint, predictor: str | None) -> None:
    """Write the weights, the documents and the card, and list all files in the manifest.

    With several LoRA adapters only the predictor's is merged, so that the folder is not the whole program.
    """
    speak = through(checkpoint, facts.policy.predictors)
    adapter = speak[predictor] if predictor is not None else None
    whole = len(checkpoint.adapters) < 2
    _write_weights(folder, saved, checkpoint, adapter)
    alike = () if whole else tuple(name for name, chosen in speak.items() if chosen == adapter)
    documents = [name for name in DOCUMENTS if name != MANIFEST] if whole else TEXTS
    _complete(folder, saved, documents, model_card(replace(facts, speakers=alike)))
    if whole:
        seal(folder, importlib.metadata.version("dspy-fst"))


def _write_weights(folder: Path, saved: Path, checkpoint: Checkpoint, adapter: str | None) -> None:
    weights = saved / WEIGHTS
    if taken := sorted({path.name for path in weights.iterdir()} & {*DOCUMENTS, CARD}):
        raise RunDirectoryError(
            f"{weights}: {', '.join(taken)} would be overwritten by the export's own file; remove it and save again"
        )
    if checkpoint.adapters:
        from dspy_fst.slow.checkpoint import write_merged

        write_merged(weights, folder, adapter)
    else:
        shutil.copytree(weights, folder, dirs_exist_ok=True)


def _fill_with_adapters(folder: Path, saved: Path, facts: Facts, checkpoint: Checkpoint, base: str | None) -> None:
    named = base_of(checkpoint, facts, base)
    adapters = write_adapters(folder, checkpoint, facts, named)
    _complete(folder, saved, TEXTS, lora_card(facts, adapters, named))


def _complete(folder: Path, saved: Path, documents: list[str] | tuple[str, ...], card: str) -> None:
    """Add the documents and the card to the weights."""
    for name in documents:
        shutil.copyfile(saved / name, folder / name)
    (folder / CARD).write_text(card, encoding="utf-8", errors="replace")  # a model's text may hold half a character
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # transformers may make weights readable by their owner alone
    _refuse_secrets(folder)


def _refuse_secrets(folder: Path) -> None:
    """Refuse secrets in the documents, the card and the configurations. The vocabulary is the base model's."""
    redactor = Redactor.of(dspy.Module())  # knows the environment's secrets and the shapes of keys
    read: dict[str, object] = {
        path.relative_to(folder).as_posix(): read_document(path) for path in folder.rglob("*config.json")
    }
    read |= {name: read_document(folder / name) for name in DOCUMENTS if (folder / name).is_file()}
    read |= {CARD: dict(enumerate((folder / CARD).read_text().splitlines(), start=1))}
    if faults := secret_faults(redactor, read):
        raise ConfigurationError(faults)
