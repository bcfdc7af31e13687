"""What `dspy-fst eval` measures: population and weights of a run or a saved program, the metric and the examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_fst.cli.code_source import project_for
from dspy_fst.errors import ConfigurationError

if TYPE_CHECKING:
    import dspy

    from dspy_fst.config import FSTConfig
    from dspy_fst.evaluation.run_reader import RunReader
    from dspy_fst.policy_lm import PolicyLM
    from dspy_fst.project.project_file import Opened, Project
    from dspy_fst.project.recorded import Recorded
    from dspy_fst.rollout.rollouter import Rollouter
    from dspy_fst.types import Candidate, Population


@dataclass(frozen=True)
class EvalTarget:
    """A population with its weights, ready to make rollouts."""

    rollouter: "Rollouter"
    policy: "PolicyLM"
    seed: "Candidate"
    """The texts of the program as its class makes it."""
    population: "Population"
    cycle: int | None
    past: "RunReader | None"
    """The run that they belong to; None for a saved program outside of a run."""
    trusted: "dspy.Module | None"
    """The program as its class makes it: only its sources may be executed. None when all sources are trusted."""
    warnings: tuple[str, ...] = ()
    """Why the figures cannot be compared with the run's."""

    @property
    def weights(self) -> str:
        return self.policy.checkpoint.version


def project_and_past(
    path: Path, file: Path | None, flags: Mapping[str, object], split: str
) -> "tuple[Project, Recorded, RunReader | None]":
    """The project, what the run or the saved program recorded, and the run if there is one."""
    from dspy_fst.evaluation.run_reader import RunReader
    from dspy_fst.project.recorded import Recorded
    from dspy_fst.saving.format import is_saved

    run_dir = path.parent if is_saved(path) else path
    past = RunReader.of(run_dir) if not is_saved(path) or (run_dir / "events.jsonl").is_file() else None
    recorded = Recorded(path, past.run_dir if past else None)
    of_split = {"val": "valset", "train": "trainset"}.get(split)
    wanted = ["program", "metric", *([of_split] if of_split else [])]
    return project_for(recorded, file, flags, wanted, examples=None if of_split else split), recorded, past


def unlike(recorded: "Recorded", opened: "Opened", path: Path) -> list[str]:
    """A sentence for each difference between the program and the run's, which make its figures incomparable."""
    from dspy_fst.policy_lm import policy_of
    from dspy_fst.saving.format import is_saved
    from dspy_fst.training.fingerprints import program_fingerprint
    from dspy_fst.types import Population

    recipe, policy = recorded.recipe, policy_of(opened.program)
    differing = []
    # A run that went on from a compiled program began with its texts, and the class alone makes other texts.
    comparable = recipe.get("population") is None or isinstance(getattr(opened.program, "population", None), Population)
    if comparable and recipe.get("program") not in (None, program_fingerprint(opened.program)):
        differing.append("its instructions, fields or demos differ from those that the run began with")
    if not is_saved(path):  # a saved program brings its own settings
        sampled = {"temperature": policy.sampling_temperature, "max_tokens": policy.reply_limit}
        differing += [
            f"it samples with {name}={now}, the run did with {recipe[name]}"
            for name, now in sampled.items()
            if name in recipe and recipe[name] != now
        ]
    return [f"this is not the program that {recorded.run_dir} trained: {difference}" for difference in differing]


def config_of(project: "Project", seed: int) -> "FSTConfig":
    """The project's recipe with this seed."""
    from dspy_fst.config import make_config

    recipe = project.recipe.model_dump(exclude_unset=True, exclude={"auto"}) if project.recipe else {}
    config, faults = make_config({**recipe, "seed": seed})
    if config is None:
        raise ConfigurationError(faults)
    return config


def name_of(split: str) -> str:
    """The split as it is stored. A report may be shared, so it names no folder of this machine."""
    return Path(split).name if split.endswith(".jsonl") else split


def examples_of(project: "Project", split: str, limit: int | None) -> "tuple[Opened, list[dspy.Example]]":
    """What the project names, and the split's examples."""
    from dspy_fst.project.names import examples_in

    project = project.model_copy(update={"reflection_lm": None})  # nothing reflects here, so its key may be missing
    if split in ("val", "train"):
        opened = project.open()
        examples = opened.valset if split == "val" else opened.trainset
    else:
        if split.endswith(".jsonl"):
            project = project.model_copy(update={"valset": str(Path(split).resolve())})
        else:
            try:
                project = project.model_copy(update={"valset": examples_in(split)})
            except ValueError as error:
                raise ConfigurationError([f"--split {split}: {error}"]) from error
        opened = project.open()
        examples = opened.valset
        if split.endswith(".jsonl") and not project.inputs:
            examples = _with_inputs(examples or [], opened.trainset, split)
    if not examples:
        raise ConfigurationError(
            [f"--split {split}: there are no examples; use train, a .jsonl file or module:attribute"]
        )
    return opened, examples[:limit]


def _with_inputs(examples: "list[dspy.Example]", trainset: "list[dspy.Example]", split: str) -> "list[dspy.Example]":
    """The examples of a file with the inputs of the trainset, which Python code made and no setting describes."""
    if not trainset:
        raise ConfigurationError(
            [f"--split {split}: the trainset is empty, so nothing says which fields are inputs; use module:attribute"]
        )
    inputs = sorted(trainset[0].inputs().keys())
    for place, example in enumerate(examples, start=1):
        if lacking := [name for name in inputs if name not in example]:
            raise ConfigurationError(
                [f"--split {split}: example {place} has no {lacking[0]!r}, an input of the trainset"]
            )
    return [example.with_inputs(*inputs) for example in examples]


def subject_of(
    path: Path,
    past: "RunReader | None",
    opened: "Opened",
    cycle: int | None,
    weights: str | None,
    config: "FSTConfig",
    trust_code: bool,
    warnings: Sequence[str] = (),
) -> EvalTarget:
    """
    Raises:
        ConfigurationError, RunDirectoryError: the program, the cycle or the weights are not this run's.
    """
    from dspy_fst.fast.search_settings import own_texts
    from dspy_fst.policy_lm import policy_of
    from dspy_fst.rollout.chat_adapters import keep, make_adapter
    from dspy_fst.rollout.components import texts_like
    from dspy_fst.saving.format import is_saved, refuse_code
    from dspy_fst.saving.save_load import load
    from dspy_fst.training.opening import open_rollouter, starting_population, trainable_copy

    if is_saved(path):
        if cycle is not None or weights is not None:
            raise ConfigurationError([f"--cycle, --weights: {path} holds one population; name the run's directory"])
        program = load(path, opened.program, trust_code=trust_code)
        policy, population = policy_of(program), program.population
    else:
        assert past is not None, "what is no saved program is a run"
        if cycle is not None:
            past.require_cycle(cycle)
        checkpoint = past.checkpoint(weights or past.version(cycle))
        policy = policy_of(opened.program).fork(checkpoint)
        program = trainable_copy(opened.program, policy)
        if (adapter := past.adapter) is not None:
            keep(program, make_adapter(adapter, None))
        seed = own_texts(opened.program, config)
        population = past.population(cycle) or starting_population(program, seed, config.population_size, {})
        if not trust_code:
            refuse_code(path, opened.program, [member.texts for member in population.members])
        if cycle is None and weights is None:  # weights that were named may be of any cycle, or of none
            cycle = past.returned_cycle
    seed = texts_like(population.best, opened.program)
    if differing := sorted(population.best.texts.keys() ^ seed.texts.keys()):
        raise ConfigurationError([f"program: {path} is of another program; predictors that differ: {differing}"])
    rollouter = open_rollouter(program, opened.optimizer.metric, config, policy.handle.engine.expect, opened.trainset)
    trusted = None if trust_code else opened.program
    return EvalTarget(rollouter, policy, seed, population, cycle, past, trusted, tuple(warnings))
