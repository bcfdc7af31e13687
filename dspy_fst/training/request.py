"""From a user's arguments to a request for a run: everything is checked, nothing is loaded or started.

`check` tells every fault at once. `dspy_fst.training.open_run` takes what it returns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import dspy
from dspy.teleprompt import Teleprompter

from dspy_fst.config import AUTO_CYCLES, FSTConfig, make_config
from dspy_fst.engine.machine import launch_faults
from dspy_fst.errors import ConfigurationError
from dspy_fst.fast.evolve import GEPAOptions
from dspy_fst.fast.fast_optimizer import FastOptimizer
from dspy_fst.fast.gepa_adapter import Propose, ProposeCode
from dspy_fst.fast.search_settings import own_texts
from dspy_fst.fast.teleprompter_search import Maker, lms_of
from dspy_fst.memory import (
    Available,
    plan_memory,
    shape_faults,
    with_chosen_micro_batch,
    with_recorded_micro_batch,
    writable_fault,
)
from dspy_fst.model_files.hub import hub_warnings
from dspy_fst.model_files.reach import ANSWER_S
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.argument_checks import search_faults
from dspy_fst.preflight.cluster_checks import cluster_faults, rank_faults, transfer_rank_faults
from dspy_fst.preflight.data_checks import data_faults, input_faults
from dspy_fst.preflight.demo_checks import demo_faults, demo_warnings
from dspy_fst.preflight.engine_checks import engine_faults
from dspy_fst.preflight.fast_checks import fast_faults, fast_identity, fast_warnings
from dspy_fst.preflight.library_checks import library_faults
from dspy_fst.preflight.model_checks import lora_faults, lora_warnings, model_faults, with_demo_tokens
from dspy_fst.preflight.precision import precision_warnings
from dspy_fst.preflight.program_checks import adapters_faults, policies_of, program_faults, trained_faults
from dspy_fst.preflight.ray_checks import room_faults
from dspy_fst.preflight.reply_limits import limit_faults
from dspy_fst.preflight.restarts import restart_warnings
from dspy_fst.preflight.template_checks import template_warnings
from dspy_fst.preflight.text_checks import text_faults
from dspy_fst.preflight.unreachable_parts import part_faults, part_warnings
from dspy_fst.preflight.warm_start_checks import (
    warm_start_faults,
    warm_start_rank_faults,
    warm_start_warnings,
    warm_start_words,
)
from dspy_fst.recipe.lora_settings import adapter_of
from dspy_fst.rollout.chat_adapters import differing_adapter, identity
from dspy_fst.rollout.components import carried_by
from dspy_fst.rollout.reward import Metric
from dspy_fst.run.directory import directory_fault
from dspy_fst.run.recipes import WHERE_DEMOS_EVOLVE
from dspy_fst.run.secrets import Redactor
from dspy_fst.saving.program_state import without_lms
from dspy_fst.training.anchors import anchor_warnings, fewest_anchors, origin_of
from dspy_fst.training.attached import attached_server_faults
from dspy_fst.training.continuing import optimizer_faults
from dspy_fst.training.fingerprints import files_fingerprint, fingerprint, program_fingerprint
from dspy_fst.training.opening import new_run_dir
from dspy_fst.training.step_problems import trainset_warnings
from dspy_fst.training.stored import storage_faults
from dspy_fst.training.validating import patience_warnings, valset_faults, valset_warnings
from dspy_fst.training.without_effect import settings_without_effect
from dspy_fst.types import Candidate, Population

NOT_IDENTITY = {
    *("num_threads", "rollout_timeout_s", "micro_batch_tokens", "gradient_checkpointing", "sharding"),
    *("checkpoint_every", "keep_states", "keep_weights", "storage", "ray", "ranks"),
    *("max_masked_share", "max_skipped_updates", "min_effective_share", "parse_warning_share", "parse_trial"),
    *("sync_tolerance", "max_unmoved_steps", "recorded_samples", "validate_every", "patience", "return_best"),
}
"""Settings that may differ between a run and its continuation: they change its cost, when it ends, gives up or warns,
or which of its states is returned, and not what a step does."""


@dataclass(frozen=True)
class Proposers:
    """Who proposes new texts in a search."""

    reflection_lm: dspy.LM | None = None
    """A strong, frozen LM that reflects."""
    propose: Propose | None = None
    """A proposer that needs no LM."""
    code_proposer: ProposeCode | None = None
    """A proposer of sources for dspy.Flex modules."""
    fast: "FastOptimizer | Teleprompter | Maker | None" = None
    """Searches in GEPA's place; None: GEPA searches."""
    gepa: GEPAOptions = field(default_factory=GEPAOptions)
    alone: bool = True
    """Whether the proposer needs no reflection LM beside it (``propose``), or may ask it (``instruction_proposer``)."""

    @property
    def of_search(self) -> dict[str, object]:
        """The arguments of a search."""
        given = {"propose": self.propose, "code_proposer": self.code_proposer, "reflection_lm": self.reflection_lm}
        return {**given, "options": self.gepa}

    @property
    def lms(self) -> list[object]:
        """The reflection LM, and those that an optimizer in GEPA's place holds."""
        return [self.reflection_lm, *lms_of(self.fast)]


@dataclass(frozen=True)
class Arguments:
    """What a user gave, unchecked: the types are those that are meant, and anything may be of another."""

    student: dspy.Module
    trainset: Sequence[dspy.Example]
    metric: Metric
    valset: Sequence[dspy.Example] | None = None
    teacher: object = None
    """A program whose traces a warm start learns from."""
    proposers: Proposers = field(default_factory=Proposers)
    run_dir: str | Path | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    """Fields of FSTConfig, and ``auto``."""


@dataclass(frozen=True)
class Request:
    """A run that may begin: no fault was found in it."""

    student: dspy.Module
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example]
    """Empty where none was given."""
    teacher: dspy.Module | None
    metric: Metric
    proposers: Proposers
    config: FSTConfig
    run_dir: Path
    """Absolute."""
    identity: Mapping[str, object]
    """What makes the run this run (`run_identity`)."""
    warnings: tuple[str, ...]
    """What does not stop the run and would go unnoticed."""
    trained: str
    """What is trained, and why, in words (`MemoryPlan.choice`); empty where the model's size is not known."""
    warm_start: str | None
    """What the run learns before its first search, in words; None: nothing."""

    @property
    def policy(self) -> PolicyLM:
        """The student's; all of its trained predictors speak with it."""
        return next(iter(policies_of(self.student).values()))

    @property
    def redactor(self) -> Redactor:
        """Hides the secrets of the program's LMs and of those that propose."""
        return Redactor.of(self.student, *self.proposers.lms)


def check(given: Arguments, room: Available | None = None, hub_s: float = ANSWER_S) -> Request:
    """Find all that is wrong with a run before it begins.

    Args:
        given: What the user gave.
        room: A machine to imagine instead of this one; then a config is enough of the model. None: this machine.
        hub_s: Seconds that a model hub has to answer.

    Raises:
        ConfigurationError: with every fault that was found.
    """
    config, faults = recipe_of(given.settings)
    faults += _faults_of_arguments(given, config, room, hub_s)
    run_dir = (Path(given.run_dir) if given.run_dir else new_run_dir()).resolve()
    faults += [fault] if (fault := writable_fault(run_dir)) else []
    if faults or config is None:
        raise ConfigurationError(faults)
    return _checked_together(given, config, run_dir, room)


def recipe_of(given: Mapping[str, object]) -> tuple[FSTConfig | None, list[str]]:
    """The recipe of settings that may hold ``auto``, or None; and what is wrong with them."""
    settings = dict(given)
    auto = settings.pop("auto", None)
    faults = []
    if auto is not None:
        if auto not in list(AUTO_CYCLES):  # what was given may have no hash
            faults.append(f"auto={auto!r}: use one of {', '.join(map(repr, AUTO_CYCLES))}, or cycles=...")
        elif "cycles" in settings:
            faults.append("auto: it sets cycles; give one of auto=... and cycles=..., not both")
        else:
            settings["cycles"] = AUTO_CYCLES[auto]
    config, config_faults = make_config(settings)
    return config, [*faults, *config_faults]


def _faults_of_arguments(
    given: Arguments, config: FSTConfig | None, room: Available | None, hub_s: float
) -> Iterator[str]:
    """What is wrong with each argument by itself."""
    student, proposers = given.student, given.proposers
    yield from launch_faults()
    yield from library_faults(config) if config is not None and room is None else ()
    if config is not None and room is None:
        yield from rank_faults(config)
        yield from cluster_faults(config.ray, student, given.metric, given.trainset, given.valset)
    yield from program_faults(student)
    yield from part_faults(student)
    yield from trained_faults(student, config)
    yield from adapters_faults(student, config)
    yield from warm_start_faults(config, student, given.trainset, given.teacher)
    anchors = _anchors(config, student, given.trainset)
    yield from demo_faults(config, student, given.trainset, anchors)
    yield from limit_faults(student, config)
    yield from data_faults(given.trainset, given.valset, config)
    yield from valset_faults(config, given.valset)
    yield from input_faults(student, given.trainset, given.valset)
    beside = proposers.alone or proposers.propose is None
    lm = proposers.reflection_lm
    yield from search_faults(config, given.metric, lm, proposers.propose, proposers.fast, exclusive=beside)
    yield from text_faults(config, student, proposers.reflection_lm or proposers.fast, proposers.code_proposer)
    if proposers.fast is not None:
        anchors = _anchors(config, student, given.trainset, by_inputs=True)
        yield from fast_faults(config, proposers.fast, lm, proposers.propose, proposers.code_proposer, student, anchors)
    policies = policies_of(student) if isinstance(student, dspy.Module) else {}
    for policy in {id(policy.handle): policy for policy in policies.values()}.values():
        yield from [*model_faults(policy, hub_s), *engine_faults(policy)] if room is None else shape_faults(policy)
        yield from transfer_rank_faults(config, policy) if config is not None else ()
        if config is not None and config.adapter is not None:
            yield from lora_faults(policy, config.adapter, config.adapters)


def _anchors(config: FSTConfig | None, student: object, trainset: object, *, by_inputs: bool = False) -> int | None:
    """Anchors of the search with the fewest; None where what is wrong with the arguments leaves that open."""
    if config is None or not isinstance(student, dspy.Module) or data_faults(trainset, None, config):
        return None
    policies = [*policies_of(student).values()]
    origin = origin_of(student, policies[0]) if policies else ""
    return fewest_anchors(config, cast(Sequence[dspy.Example], trainset), origin, by_inputs=by_inputs)


def _checked_together(given: Arguments, config: FSTConfig, run_dir: Path, room: Available | None) -> Request:
    """What is wrong with arguments that are right by themselves: the directory is another run's, the memory is too
    small, a text of the program holds a secret.

    Raises:
        ConfigurationError: with every fault that was found.
    """
    student = given.student
    policy = next(iter(policies_of(student).values()))
    redactor = Redactor.of(student, *given.proposers.lms)
    faults = [
        f"student: {place} holds a secret (an API key, or an environment variable's value); remove it"
        for place in redactor.places(without_lms(student).dump_state())
    ]
    faults += optimizer_faults(config, student, policy, run_dir)
    config = with_demo_tokens(config, policy, run_dir)
    faults += warm_start_rank_faults(config, given.teacher, run_dir)
    identity = run_identity(config, student, given.trainset, policy, given.teacher)
    recipe = redactor.clean({**identity, **fast_identity(given.proposers.fast)})
    faults += [fault] if (fault := directory_fault(run_dir, recipe, FSTConfig().model_dump())) else []
    if room is None:
        faults += [*storage_faults(config, recipe, run_dir), *attached_server_faults(policy, run_dir)]
    if room is None and config.ray is None:  # with it the cluster is asked once this process is connected
        faults += room_faults(policy, config, run_dir)
    config = with_recorded_micro_batch(config, run_dir)
    warnings: list[str] = []
    if plan := plan_memory(policy, config, run_dir, room, adapters=adapter_count(config, student)):
        faults += plan.faults()
        warnings = [*plan.warnings(), *([f"gradient_checkpointing: it is on; {plan.needed}"] if plan.needed else [])]
    config = with_chosen_micro_batch(config, plan)
    if faults:
        raise ConfigurationError(faults)
    warnings += _warnings(given, config, room)
    return Request(
        student=student,
        trainset=given.trainset,
        valset=given.valset or (),
        teacher=given.teacher if isinstance(given.teacher, dspy.Module) else None,
        metric=given.metric,
        proposers=given.proposers,
        config=config,
        run_dir=run_dir,
        identity=recipe,
        warnings=tuple(warnings),
        trained="" if plan is None else plan.choice,
        warm_start=warm_start_words(config, given.trainset, given.teacher),
    )


def _warnings(given: Arguments, config: FSTConfig, room: Available | None) -> list[str]:
    """What does not stop the run and would go unnoticed, but for memory."""
    student = given.student
    policy = next(iter(policies_of(student).values()))
    warnings = [*trainset_warnings(config, len(given.trainset)), *settings_without_effect(config)]
    warnings += anchor_warnings(config, fewest_anchors(config, given.trainset, origin_of(student, policy)))
    warnings += [*patience_warnings(config), *valset_warnings(given.valset), *differing_adapter(student)]
    warnings += _model_warnings(policy, config) if room is None else []
    warnings += [*part_warnings(student), *warm_start_warnings(config, student, given.trainset, given.teacher)]
    warnings += demo_warnings(config, student, given.trainset)
    warnings += [*_left_out(student, own_texts(student, config)), *fast_warnings(config, given.proposers.fast)]
    return warnings


def _model_warnings(policy: PolicyLM, config: FSTConfig) -> list[str]:
    """What about the model's files and its engine would go unnoticed."""
    path, engine = policy.checkpoint.path, (policy.handle.resolved_kind, policy.handle.options)
    return [
        *hub_warnings(str(path)),
        *template_warnings(path),
        *restart_warnings(path, *engine, lora=config.adapter is not None),
        *precision_warnings(config.precision, *engine),
        *lora_warnings(policy, config.adapter),
    ]


def adapter_count(config: FSTConfig, student: dspy.Module) -> int:
    """How many LoRA adapters are trained, where any is."""
    return len({*adapter_of(config.adapters, config.trained or policies_of(student)).values()}) or 1


def run_identity(
    config: FSTConfig,
    student: dspy.Module,
    trainset: Sequence[dspy.Example],
    policy: PolicyLM,
    teacher: object = None,
) -> dict[str, object]:
    """What makes a run this run: the recipe, the program, the problems, the model, and a teacher where there is one."""
    carried = getattr(student, "population", None)
    left_out = NOT_IDENTITY if config.demos_evolve else NOT_IDENTITY | WHERE_DEMOS_EVOLVE
    return {
        **({"teacher": program_fingerprint(teacher)} if isinstance(teacher, dspy.Module) else {}),
        **{key: value for key, value in config.model_dump().items() if key not in left_out},
        # Not under the name of the setting, which is the chat adapter's in recipes.
        "lora": config.adapter.model_dump() if config.adapter else None,
        "model": str(policy.checkpoint.folder),
        "weights": policy.checkpoint.version,
        "model_files": files_fingerprint(policy.checkpoint.folder),
        "engine": policy.handle.resolved_kind,
        "temperature": policy.sampling_temperature,
        "max_tokens": policy.reply_limit,
        "adapter": identity(student),
        "program": program_fingerprint(student),
        "population": [m.digest for m in carried.members] if isinstance(carried, Population) else None,
        "trainset": f"{len(trainset)} examples, {fingerprint([example.toDict() for example in trainset])}",
    }


def _left_out(student: dspy.Module, seed: Candidate) -> list[str]:
    """A sentence when the run cannot start from all of the population that the student carries."""
    carried = getattr(student, "population", None)
    if not isinstance(carried, Population):
        return []
    lost = len(carried.members) - len(carried_by(student, seed))
    if not lost:
        return []
    differing = sorted({name for member in carried.members for name in member.texts.keys() ^ seed.texts.keys()})
    return [
        f"student: {lost} of the {len(carried.members)} candidates that it carries have other components than the "
        f"program ({', '.join(differing)}) and are left out; without any, the run starts from the program's own texts"
    ]
