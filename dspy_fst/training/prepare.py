"""From a user's arguments to an open session: validate, print the plan, start what a run needs."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy

from dspy_fst.config import AUTO_CYCLES, FSTConfig, make_config
from dspy_fst.engine.portable import portable_options
from dspy_fst.errors import ConfigurationError
from dspy_fst.memory import (
    Available,
    plan_memory,
    shape_faults,
    with_chosen_micro_batch,
    with_recorded_micro_batch,
    writable_fault,
)
from dspy_fst.model_files.hub import hub_warnings
from dspy_fst.model_files.reach import ANSWER_S, IN_A_RUN_S
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.argument_checks import search_faults
from dspy_fst.preflight.data_checks import data_faults, input_faults
from dspy_fst.preflight.engine_checks import engine_faults
from dspy_fst.preflight.model_checks import model_faults
from dspy_fst.preflight.precision import precision_warnings
from dspy_fst.preflight.program_checks import policies_of, program_faults, trained_faults
from dspy_fst.preflight.restarts import restart_warnings
from dspy_fst.preflight.template_checks import template_warnings
from dspy_fst.preflight.text_checks import text_faults
from dspy_fst.preflight.unreachable_parts import part_faults, part_warnings
from dspy_fst.rollout.adapters import adapter_in_force, differing_adapter, identity, kept_by
from dspy_fst.rollout.components import carried_by, read_texts
from dspy_fst.run.directory import RunDirectory, directory_fault
from dspy_fst.run.halted import tell_halted
from dspy_fst.run.interrupts import interruption_named
from dspy_fst.run.secrets import Redactor
from dspy_fst.run.state import moved_at
from dspy_fst.saving.program_state import without_lms
from dspy_fst.slow.environment import environment_faults
from dspy_fst.slow.trainer import Trainer, TrainerSettings
from dspy_fst.training.continuing import optimizer_faults, take_over
from dspy_fst.training.fingerprints import files_fingerprint, fingerprint, program_fingerprint
from dspy_fst.training.first_rollouts import Spent, try_first
from dspy_fst.training.opening import new_run_dir, open_player, starting_population, trainable_copy
from dspy_fst.training.plan import Plan
from dspy_fst.training.publisher import recoveries
from dspy_fst.training.session import Session
from dspy_fst.training.validating import (
    CHANGED,
    NO_VALSET,
    Validation,
    patience_warnings,
    valset_faults,
    valset_warnings,
)
from dspy_fst.types import Candidate, Population, version_of

if TYPE_CHECKING:
    from dspy_fst.optimizer import FSTOptimizer

logger = logging.getLogger(__name__)
NOT_IDENTITY = {
    *("num_threads", "rollout_timeout_s", "micro_batch_tokens"),
    *("checkpoint_every", "keep_states", "keep_weights"),
    *("max_masked_share", "max_skipped_updates", "min_effective_share", "parse_warning_share", "parse_trial"),
    *("sync_tolerance", "max_unmoved_steps", "recorded_samples", "validate_every", "patience", "return_best"),
}
"""Settings that may differ between a run and its continuation: they change its cost, when it ends, gives up or warns,
or which of its states is returned, and not what a step does."""


@contextmanager
def open_session(
    optimizer: "FSTOptimizer",
    student: dspy.Module,
    trainset: Sequence[dspy.Example],
    valset: Sequence[dspy.Example] | None,
    teacher: dspy.Module | None,
    listeners: tuple[Callable[[Mapping[str, Any]], None], ...],
) -> Iterator[Session]:
    """Check everything, then start the trainer and the engine.

    The engine is stopped when the run fails; a finished run hands it to the compiled program.

    Raises:
        ConfigurationError: with every fault that was found.
    """
    config, run_dir, recipe, warnings = checked(optimizer, student, trainset, valset, teacher, hub_s=IN_A_RUN_S)
    original = next(iter(policies_of(student).values()))
    original.release()  # its engine would hold memory beside the training one; it starts again when called
    policy = original.fork()
    clean = Redactor.of(student, optimizer.reflection_lm).clean
    run = RunDirectory(run_dir, recipe, listeners, keep_states=config.keep_states, clean=clean)
    try:
        for warning in warnings:
            run.tell({"event": "note", "text": f"warning: {warning}"})
        session = _assemble(optimizer, student, trainset, valset or (), config, run, policy)
        if not run.state and (words := take_over(session.trainer, config, student, original)):
            run.emit("note", text=words)
        session.publish(moved_at(run.state))
        session.prune_weights()  # a kill may have come between a commit and this
        with dspy.context(lm=_configured(policy), adapter=kept_by(student) or adapter_in_force()):
            spent = None if run.state else try_first(session)
            _announce(session, spent)
            if not run.state:
                session.commit_start()  # a process that dies in the validation has lost no more than that
            if session.validation.start_is_due(run.state):
                session.validate_start()
            yield session
        # The compiled program lives on: its restarts are no business of this run, and must not hold its trainer.
        policy.handle.engine.on_recovery(logger.warning, None)
    except BaseException as error:
        try:
            if name := interruption_named(error):
                text = f"{name}: stopping; {_what_is_saved(run)}"
                if isinstance(error, KeyboardInterrupt):
                    error.args = (text,)  # for whoever shows it in the end
                with suppress(Exception):  # a terminal that is gone must not keep the server alive
                    run.tell({"event": "note", "text": text})
            tell_halted(run, error)
        finally:  # a second Ctrl-C may come while the first is told
            try:
                policy.release()
            finally:
                run.abandon()
        raise
    run.close()


def _configured(policy: PolicyLM) -> Any:
    """DSPy's configured LM; a PolicyLM speaks through the run's engine, for predictors made while the program runs."""
    lm = dspy.settings.lm
    return lm.on(policy.handle) if isinstance(lm, PolicyLM) else lm


def _what_is_saved(run: RunDirectory) -> str:
    if not run.state:
        return "nothing was saved yet"
    step, searches = run.state["step"], run.state["searched"] + 1
    return f"saved: {step} updates, {searches} searches. Compile again with run_dir={str(run.path)!r} to go on"


def _assemble(
    optimizer: "FSTOptimizer",
    student: dspy.Module,
    trainset: Sequence[dspy.Example],
    valset: Sequence[dspy.Example],
    config: FSTConfig,
    run: RunDirectory,
    policy: PolicyLM,
) -> Session:
    """Load the trainer, at the committed state when there is one, and put the session together."""
    trainer = Trainer(policy.checkpoint.path, trainer_settings(config))
    run.drop_weights_from(version_of(moved_at(run.state)))
    if run.state:
        trainer.load_state(run.trainer_state)
    program = trainable_copy(student, policy)
    seed = read_texts(student, tools=config.tool_descriptions == "evolved")
    player = open_player(program, optimizer.metric, config, policy.handle.engine.expect, trainset)
    problems = fingerprint([example.toDict() for example in valset])
    samples = config.validation_samples
    return Session(
        config=config,
        plan=Plan(config, len(trainset), origin=_origin(student, policy)),
        trainset=trainset,
        valset=valset,
        program=program,
        policy=policy,
        trained=frozenset(config.trained or policies_of(student)),
        player=player,
        trainer=trainer,
        run=run,
        validation=Validation(run, player, valset, samples, problems, lambda: recoveries(policy)),
        population=starting_population(student, seed, config.population_size, run.state),
        propose=optimizer.propose,
        code_proposer=optimizer.code_proposer,
        reflection_lm=optimizer.reflection_lm,
    )


def checked(
    optimizer: "FSTOptimizer",
    student: Any,
    trainset: Any,
    valset: Any,
    teacher: Any,
    room: Available | None = None,
    hub_s: float = ANSWER_S,
) -> tuple[FSTConfig, Path, dict[str, Any], list[str]]:
    """Recipe, run directory, identity and warnings of what was given.

    Args:
        room: A machine to imagine instead of this one; then a config is enough of the model. None: this machine.
        hub_s: Seconds that a model hub has to answer.

    Raises:
        ConfigurationError: with every fault that was found.
    """
    settings = dict(optimizer.recipe)
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
    faults += config_faults
    if teacher is not None:
        faults.append("teacher: nothing is learnt from a teacher program here; leave it out")
    faults += environment_faults() + program_faults(student) + part_faults(student) + trained_faults(student, config)
    faults += [*data_faults(trainset, valset, config), *valset_faults(config, valset)]
    faults += input_faults(student, trainset, valset)
    if config is not None:
        try:
            trainer_settings(with_chosen_micro_batch(config, None))
        except ConfigurationError as error:
            faults += error.faults
    faults += search_faults(config, optimizer.metric, optimizer.reflection_lm, optimizer.propose)
    faults += text_faults(config, student, optimizer.reflection_lm, optimizer.code_proposer)
    policies = policies_of(student) if isinstance(student, dspy.Module) else {}
    for policy in {id(policy.handle): policy for policy in policies.values()}.values():
        faults += model_faults(policy, hub_s) + engine_faults(policy) if room is None else shape_faults(policy)
    run_dir = (Path(optimizer.run_dir) if optimizer.run_dir else new_run_dir()).resolve()
    faults += [fault] if (fault := writable_fault(run_dir)) else []
    recipe: dict[str, Any] = {}
    warnings: list[str] = []
    if config is not None and not faults:
        policy = next(iter(policies.values()))
        redactor = Redactor.of(student, optimizer.reflection_lm)
        faults += [
            f"student: {place} holds a secret (an API key, or an environment variable's value); remove it"
            for place in redactor.places(without_lms(student).dump_state())
        ]
        faults += optimizer_faults(config, student, policy, run_dir)
        recipe = redactor.clean(run_identity(config, student, trainset, policy))
        faults += [fault] if (fault := directory_fault(run_dir, recipe)) else []
        config = with_recorded_micro_batch(config, run_dir)
        if fit := plan_memory(policy, config, run_dir, room):
            faults += fit.faults()
            warnings = fit.warnings()
        config = with_chosen_micro_batch(config, fit)
        warnings += [*patience_warnings(config), *valset_warnings(valset), *differing_adapter(student)]
        warnings += _model_warnings(policy, config) if room is None else []
        warnings += part_warnings(student)
        warnings += _left_out(student, read_texts(student, tools=config.tool_descriptions == "evolved"))
    if faults or config is None:
        raise ConfigurationError(faults)
    return config, run_dir, recipe, warnings


def _model_warnings(policy: PolicyLM, config: FSTConfig) -> list[str]:
    """What about the model's files and its engine would go unnoticed."""
    path, engine = policy.checkpoint.path, (policy.handle.resolved_kind, policy.handle.options)
    return [
        *hub_warnings(str(path)),
        *template_warnings(path),
        *restart_warnings(path, *engine),
        *precision_warnings(config.precision, *engine),
    ]


def run_identity(config: FSTConfig, student: dspy.Module, trainset: Any, policy: PolicyLM) -> dict[str, Any]:
    """What makes a run this run: the recipe, the program, the problems and the model."""
    carried = getattr(student, "population", None)
    return {
        **{key: value for key, value in config.model_dump().items() if key not in NOT_IDENTITY},
        "model": str(policy.checkpoint.path),
        "weights": policy.checkpoint.version,
        "model_files": files_fingerprint(policy.checkpoint.path),
        "engine": policy.handle.resolved_kind,
        "temperature": policy.sampling_temperature,
        "max_tokens": policy.reply_limit,
        "adapter": identity(student),
        "program": program_fingerprint(student),
        "population": [m.digest for m in carried.members] if isinstance(carried, Population) else None,
        "trainset": f"{len(trainset)} examples, {fingerprint([example.toDict() for example in trainset])}",
    }


def _played(config: FSTConfig) -> str:
    """The rollouts of a problem in a step, in words."""
    held = config.rollouts_per_problem - (0 if config.method == "distill" else config.group_size)
    group = f"{config.group_size} over {config.population_size} candidates"
    under_seed = f"{held} under the program's own texts"
    if config.method == "distill":
        return under_seed
    return f"{group} + {under_seed}" if held else group


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


def _origin(student: dspy.Module, policy: PolicyLM) -> str:
    """What a continued training starts from; empty at the base, whose shuffles are the seed's alone."""
    carried = getattr(student, "population", None)
    if not isinstance(carried, Population):
        return ""
    return fingerprint([policy.checkpoint.version, [member.digest for member in carried.members]])


def trainer_settings(config: FSTConfig) -> TrainerSettings:
    return TrainerSettings(
        learning_rate=config.learning_rate,
        betas=config.adam_betas,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        importance_cap=config.importance_cap,
        kl_coefficient=config.kl_coefficient,
        seed_kl_coefficient=config.seed_kl_coefficient,
        min_effective_share=config.min_effective_share,
        micro_batch_tokens=int(config.micro_batch_tokens),
        precision=config.precision,
    )


def _subject(session: Session) -> dict[str, Any]:
    """What is trained on what, for whoever reads the events alone."""
    lms = {name: predictor.lm or dspy.settings.lm for name, predictor in session.program.named_predictors()}
    speaking = set(policies_of(session.program))
    return {
        "program": type(session.program).__name__,
        "class": f"{type(session.program).__module__}:{type(session.program).__qualname__}",
        "model": session.policy.model,
        "engine": session.policy.handle.resolved_kind,
        "engine_options": portable_options(session.policy.handle.options),
        "trained": sorted(session.trained),
        "untrained": sorted(speaking - session.trained),
        "frozen": {name: lm.model for name, lm in lms.items() if name not in speaking and lm is not None},
        "metric": session.player.reward.identity,
        "examples": {"trainset": len(session.trainset), "valset": len(session.valset)},
    }


def _announce(session: Session, spent: Spent | None) -> None:
    """Say what the run will spend before it is spent."""
    config, budget, state = session.config, session.plan.budget(len(session.valset)), session.run.state
    if state:
        session.run.tell({"event": "plan", "budget": asdict(budget)})
        going_on = f"going on in {session.run.path}: {state['step']} of {budget.updates} updates are done"
        session.tell_note(going_on)
        before, now = state.get("judged_by"), session.player.reward.identity
        if session.validation.left_out:
            session.tell_note(f"warning: {CHANGED.format(count=session.validation.left_out)}")
        if before != now:
            changed = f"the metric changed since the run was stopped (was {before}, now {now})"
            session.run.emit("warning", step=state["step"], text=f"{changed}; its rewards are not comparable")
        return
    fast = budget.search_rollouts + budget.overshoot_rollouts + budget.scoring_rollouts
    rollouts = fast + budget.training_rollouts
    tokens = session.tokens_per_rollout
    session.run.emit(
        "plan",
        config=config.model_dump(),
        budget=asdict(budget),
        tokens_per_rollout=tokens,
        before_the_start=spent,
        **_subject(session),
    )
    for line in (
        f"run directory {session.run.path}",
        f"fast: {budget.searches} searches, up to {budget.search_rollouts + budget.overshoot_rollouts} rollouts "
        f"+ {budget.scoring_rollouts} to score carried candidates",
        f"slow: {budget.updates} updates, {budget.training_rollouts} rollouts "
        f"({config.problems_per_step} problems x {_played(config)}), "
        f"learning rate {config.learning_rate:g} after {config.warmup_steps} warm-up updates",
        f"in all at most {rollouts} rollouts and about {rollouts * tokens:,.0f} sampled tokens "
        f"({session.calls_per_rollout:.1f} calls, {tokens:.0f} tokens a rollout); "
        f"{budget.validation_rollouts} validation rollouts outside the budget, "
        f"and {spent.rollouts if spent else 0} were made before the start",
    ):
        session.tell_note(line)
    if not session.validation:
        session.tell_note(NO_VALSET)
    if 0 < budget.updates <= config.warmup_steps:
        note = f"warning: the {budget.updates} updates all lie in the warm-up; lower warmup_steps or raise cycles"
        session.run.emit("note", text=note)
