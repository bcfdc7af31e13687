"""A compiled program as a folder: written completely or not at all, and checked before it is used.

    OUT/manifest.json     size and checksum of every other file
    OUT/program.json      DSPy's own state of the program, without LMs
    OUT/population.json   the K candidates and their scores
    OUT/policy.json       how the weights are sampled, by which predictors, and the adapter
    OUT/weights/          a Hugging Face folder; or lora.json, LoRA adapters, and their base in base/

A folder may come from somebody else: loading it runs no code and reads nothing outside it. Keys, addresses and frozen
LMs belong to the machine and are neither saved nor loaded.
"""

import importlib.metadata
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dspy

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.making import resolve_kind
from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.model_files.lora_folder import INDEX, INSIDE, index_of
from dspy_fst.policy_lm import PolicyLM, policy_of
from dspy_fst.preflight.sampling_settings import sampling_faults
from dspy_fst.report.results import attach, results_beside
from dspy_fst.rollout.chat_adapters import describe, keep, kept_by, make_adapter
from dspy_fst.rollout.components import carry, set_tools, speakers
from dspy_fst.rollout.copying import copied
from dspy_fst.rollout.program_graph import all_speakers
from dspy_fst.run.files import flush, population_to_json, scratch_beside, write_json
from dspy_fst.run.secrets import Redactor, secret_faults
from dspy_fst.saving.format import (
    POLICY,
    POPULATION,
    PROGRAM,
    WEIGHTS,
    SavedPolicy,
    read_saved,
    refuse_other_folders,
    unread_in,
    weights_in,
)
from dspy_fst.saving.manifest import read_document, seal, verify
from dspy_fst.saving.program_state import take_state, write_state
from dspy_fst.saving.reconfigure import clear_own_sampling, own_sampling, set_own_sampling
from dspy_fst.types import Population

logger = logging.getLogger(__name__)


def save(compiled: dspy.Module, path: str | Path) -> Path:
    """Write a compiled program: instructions and demos, the population, and the Hugging Face weights together.

    Frozen LMs are not saved, nor engine options that belong to the machine (see `dspy_fst.engine.options`).

    Raises:
        FileExistsError: ``path`` exists; nothing is ever overwritten.
        ValueError: the program was not compiled by FSTOptimizer, or one of its texts holds a secret.
        RunDirectoryError: the folder could not be loaded again, e.g. because of a file among the weights.
    """
    path = Path(path).resolve()
    if not isinstance(getattr(compiled, "population", None), Population):
        raise ValueError("the program has no population; compile it with FSTOptimizer first")
    if path.exists():
        raise FileExistsError(f"{path} exists; name a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path, compiled) as scratch:
        scratch.rename(path)
        flush(path.parent)
    return path


@contextmanager
def written_beside(
    path: Path, compiled: dspy.Module, copy: Callable[[str, str], object] = shutil.copy2
) -> Iterator[Path]:
    """A scratch folder beside ``path`` with the saved program, complete and checked. The block renames it to ``path``.

    Args:
        copy: Copies one file of the weights.

    Raises:
        ValueError, RunDirectoryError: as `save` has it.
    """
    with scratch_beside(path) as scratch:
        _copy_weights(policy_of(compiled).checkpoint, scratch / WEIGHTS, copy)
        for name, document in documents_of(compiled).items():
            write_json(scratch / name, document)
        write_state(compiled, scratch / PROGRAM)
        documents = {path.name: read_document(path) for path in scratch.glob("*.json")}
        if faults := secret_faults(Redactor.of(compiled), documents):
            raise ValueError("; ".join(faults))
        seal(scratch, _package_version())
        read_saved(scratch, compiled, trust_code=True)  # whatever it holds is this program's own
        yield scratch


def _copy_weights(checkpoint: Checkpoint, folder: Path, copy: Callable[[str, str], object]) -> None:
    """Copy weights; those with LoRA adapters together with their base, so that the folder needs no other one."""
    if not checkpoint.adapters:
        shutil.copytree(checkpoint.path, folder, copy_function=copy)
        return
    shutil.copytree(checkpoint.path, folder / INSIDE, copy_function=copy)
    for adapter in checkpoint.adapters:
        shutil.copytree(adapter.path, folder / adapter.name, copy_function=copy)
    names = [adapter.name for adapter in checkpoint.adapters]
    write_json(folder / INDEX, index_of(INSIDE, names, checkpoint.predictors))


def documents_of(compiled: dspy.Module) -> dict[str, object]:
    """File -> document, apart from DSPy's own state of the program."""
    return {POPULATION: population_to_json(compiled.population), POLICY: _policy_document(compiled)}


def load(
    path: str | Path,
    program: dspy.Module,
    *,
    trust_code: bool = False,
    adapter: dspy.Adapter | None = None,
    **policy_settings: object,
) -> dspy.Module:
    """A copy of ``program`` with the saved instructions, population, adapter and trained weights.

    The copy has ``population.scores`` and ``candidate_programs``. Its ``summary()`` and ``detailed_results`` describe
    the run if the folder is in the run's directory, as ``RUN_DIR/compiled`` is; otherwise they say that it is not.

    Args:
        path: A folder written by `save` or `dspy_fst.saving.export.export`.
        program: A fresh program of the same class; it is not changed. Its frozen LMs are kept.
        trust_code: Accept sources of dspy.Flex modules that are not this program's own: evolution wrote them, or
            whoever made the folder. They run in the interpreter of the program's dspy.Flex.
        adapter: Replaces the adapter of the training, with a log message. Required where the training's is not one of
            DSPy's own and so cannot be made from its name.
        **policy_settings: Override the saved settings, e.g. ``engine="vllm"``; ``engine_options`` are added to the
            saved ones.

    Raises:
        RunDirectoryError: the folder is damaged, is no saved program, belongs to another program, or sets what only
            this machine may decide.
        ConfigurationError: an argument cannot work; or a frozen LM, or an adapter that is not DSPy's own, is missing.
    """
    if faults := sampling_faults(adapter, policy_settings):
        raise ConfigurationError(faults)
    path = Path(path).resolve()
    refuse_other_folders(path)
    verify(path, unread_in(path))
    saved, population, state = read_saved(path, program, trust_code=trust_code)
    _require_frozen_lms(saved.frozen, program)
    speaks_through = adapter if saved.adapter is None else make_adapter(saved.adapter, adapter)
    policies = _policies(saved, weights_in(path), policy_settings)
    loaded: dspy.Module = copied(program)
    try:
        take_state(loaded, state)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, SyntaxError, RuntimeError) as error:
        raise RunDirectoryError(f"{path / PROGRAM}: DSPy cannot load it: {error}") from error
    originals = speakers(program)
    for name, speaker in speakers(loaded).items():
        speaker.lm = policies.get(name, originals[name].lm)
        if (sampling := saved.predictors.get(name)) is not None and sampling.own is not None:
            set_own_sampling(speaker, sampling.own.model_dump(exclude_none=True))
    named = {id(speaker) for speaker in speakers(loaded).values()}
    for predictor in all_speakers(loaded):  # predictors that DSPy does not name
        if id(predictor) not in named and isinstance(predictor.lm or dspy.settings.lm, PolicyLM | None):
            predictor.lm = next(iter(policies.values()))
        if isinstance(predictor.lm, PolicyLM):
            clear_own_sampling(predictor, policy_settings)
    set_tools(loaded, population.best)  # DSPy's state holds no tools
    if speaks_through is not None:
        keep(loaded, speaks_through)
    carry(loaded, population)
    attach(loaded, results_beside(path, saved.policy.version))
    return loaded


def _policy_document(compiled: dspy.Module) -> dict[str, object]:
    lms = {name: speaker.lm for name, speaker in speakers(compiled).items() if speaker.lm is not None}
    state = policy_of(compiled).dump_state()
    del state["_dspy_lm_class"]
    trained = {
        name: {**_sampling(lm), "own": own_sampling(speakers(compiled)[name])}
        for name, lm in lms.items()
        if isinstance(lm, PolicyLM)
    }
    return {
        "policy": {**state, "model": WEIGHTS},
        "predictors": trained,
        "frozen": {name: lm.model for name, lm in lms.items() if name not in trained},
        "adapter": describe(adapter).model_dump() if (adapter := kept_by(compiled)) else None,
    }


def _sampling(lm: PolicyLM) -> dict[str, object]:
    return {"temperature": lm.sampling_temperature, "max_tokens": lm.reply_limit}


def _package_version() -> str:
    try:
        return importlib.metadata.version("dspy-fst")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _require_frozen_lms(frozen: Mapping[str, str], program: dspy.Module) -> None:
    faults = []
    for name, speaker in speakers(program).items():
        lm = speaker.lm or dspy.settings.lm
        if name in frozen and lm is None:
            faults.append(
                f"program: predictor {name!r} called the frozen LM {frozen[name]!r}; its key and address are not "
                "saved, so set the predictor's lm, or dspy.configure(lm=...), before loading"
            )
        elif name in frozen and lm.model != frozen[name]:
            logger.warning(
                "predictor %s called %r when it was compiled, and now calls %r", name, frozen[name], lm.model
            )
    if faults:
        raise ConfigurationError(faults)


def _policies(saved: SavedPolicy, weights: Path, overrides: Mapping[str, Any]) -> dict[str, PolicyLM]:
    """Predictor -> its PolicyLM. All share one engine; equal settings and the same LoRA adapter share one LM, which
    ``get_lm()`` needs."""
    settings = saved.policy.settings(resolve_kind(overrides.get("engine", saved.policy.engine)))
    options = {**settings["engine_options"], **overrides.get("engine_options", {})}
    policy = PolicyLM(**{**settings, "model": weights, **overrides, "engine_options": options, "lora_adapter": None})
    through = policy.checkpoint.predictors
    lms: dict[tuple[object, ...], PolicyLM] = {}
    policies = {}
    for name, sampling in saved.predictors.items():
        saved_sampling = sampling.model_dump(exclude={"own"})
        kept = {key: value for key, value in saved_sampling.items() if key not in overrides}
        adapter = through.get(name)
        policies[name] = lms.setdefault((*kept.items(), adapter), policy.copy(**kept).on(policy.handle, adapter))
    return policies
