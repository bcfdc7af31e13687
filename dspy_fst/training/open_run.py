"""From a checked request to an open session: print the plan, start what the run needs, and let go of it at the end."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.engine.options import portable_options
from dspy_fst.errors import DiskError, RankError
from dspy_fst.fast.search_settings import own_texts
from dspy_fst.formatting.numbers import counted
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.program_checks import policies_of
from dspy_fst.recipe.lora_settings import adapter_of
from dspy_fst.rollout.chat_adapters import adapter_in_force, kept_by
from dspy_fst.run.directory import Listener, RunDirectory
from dspy_fst.run.ending import emit_halted
from dspy_fst.run.interrupts import interruption_named
from dspy_fst.run.state import moved_at, to_publish_from
from dspy_fst.run.storage import Storage
from dspy_fst.slow.ranks.ranks import ALONE, Ranks
from dspy_fst.slow.ranks.roles import make_trainer
from dspy_fst.slow.trainer import Trainer
from dspy_fst.training.anchors import origin_of
from dspy_fst.training.continuing import take_over
from dspy_fst.training.fingerprints import fingerprint
from dspy_fst.training.first_rollouts import FirstLook, try_first
from dspy_fst.training.opening import cluster_of, open_rollouter, starting_population, trainable_copy
from dspy_fst.training.plan import Budget, Plan
from dspy_fst.training.publisher import recoveries
from dspy_fst.training.request import Request
from dspy_fst.training.session import Session
from dspy_fst.training.validating import CHANGED, NO_VALSET, Validation
from dspy_fst.training.warm_start import is_due, is_untold, told_after, warm_start
from dspy_fst.types import WARM_START

logger = logging.getLogger(__name__)
Listeners = Sequence[Listener]


@contextmanager
def open_run(request: Request, listeners: Listeners = (), together: Ranks | None = None) -> Iterator[Session]:
    """Start the trainer and the engine, at the committed state where there is one.

    The engine is stopped when the run fails; a finished run hands it to the compiled program.

    Args:
        request: What `check` returned.
        listeners: Functions that are told every event.
        together: The processes that a launcher started; None: this one alone.

    Raises:
        RankError: another rank failed or died.
        ClusterError: the Ray cluster does not take this process, or the other ranks.
        ConfigurationError: the cluster lacks something, or the first rollouts showed faults.
    """
    original = request.policy
    original.release()  # its engine would hold memory beside the training one; it starts again when called
    policy = original.fork()
    keep, clean = request.config.keep_states, request.redactor.clean
    run = RunDirectory(
        request.run_dir,
        request.identity,
        tuple(listeners),
        keep_states=keep,
        clean=clean,
        defaults=FSTConfig().model_dump(),
        storage=Storage(url, keep) if (url := request.config.storage) else None,
    )
    try:
        with _joined(request, together or ALONE) as (ranks, cluster):
            _tell_begin(run, request, ranks, cluster)
            session = _assemble(request, run, policy, ranks, cluster)
            if not run.state and (words := take_over(session.trainer, request.config, request.student, original)):
                run.emit("note", text=words)
            session.publish(moved_at(run.state))
            session.prune_weights()  # a kill may have come between a commit and this
            with dspy.context(lm=_configured(policy), adapter=kept_by(request.student) or adapter_in_force()):
                parsed = _begin(session, request)
                if is_due(session, request.teacher):
                    warm_start(session, request.teacher, _lora_adapters(request), original)
                    del session  # and the trainer with it
                    session = _warm_started(request, run, policy, ranks, cluster, parsed)
                yield session
        # The compiled program lives on: its restarts are no business of this run, and must not hold its trainer.
        policy.handle.engine.on_recovery(logger.warning, None)
    except BaseException as error:
        try:
            _tell_stopped(run, error)
        finally:  # a second Ctrl-C may come while the first is told
            try:
                policy.release()
            finally:
                run.abandon()
        raise
    run.close()


@contextmanager
def _joined(request: Request, launched: Ranks) -> Iterator[tuple[Ranks, ExitStack | None]]:
    """The block in which all ranks of a run train, those on its Ray cluster or those of a launcher, and the cluster is
    connected."""
    config = request.config
    with launched.naming_lost(), cluster_of(config, request.policy, request.run_dir) as cluster:
        if config.ranks == 1:
            yield launched, cluster
            return
        from dspy_fst.cluster.trainer_ranks import ranks_on_ray  # imports Ray

        with ranks_on_ray(config.ranks, request.run_dir, request.policy.checkpoint.folder) as ranks:
            yield ranks, cluster


def _tell_begin(run: RunDirectory, request: Request, ranks: Ranks, cluster: ExitStack | None) -> None:
    for warning in request.warnings:
        run.tell({"event": "note", "text": f"warning: {warning}"})
    for place in _places(request.config, ranks, cluster):
        run.tell({"event": "note", "text": place})
    run.tell({"event": "phase", "phase": "loading the model and starting the engine"})


def _places(config: FSTConfig, ranks: Ranks, cluster: ExitStack | None) -> Iterator[str]:
    """Where a run plays and trains, as far as it is not in this process alone."""
    if cluster is not None:
        from dspy_fst.cluster.connecting import cluster_in_words

        yield f"programs and metrics run on {cluster_in_words()}"
    if ranks.world > 1:
        held = "a part of the weights" if config.sharding else "all weights"
        yield f"{ranks.world} processes train together, and each holds {held}"


def _begin(session: Session, request: Request) -> float | None:
    """Look at the first rollouts, announce the run, and measure its start, as far as that is still due.

    Returns:
        Share of the first replies that parsed; None for a run that goes on.
    """
    fresh = not session.run.state
    look = try_first(session, warm=request.warm_start is not None) if fresh else None
    announce(session, look, request.trained, request.warm_start)
    if fresh:
        session.commit_start()  # a process that dies in the validation has lost no more than that
    session.validate_start()
    if is_untold(session):
        told_after(session, None)
    return None if look is None else look.parsed


def _warm_started(
    request: Request,
    run: RunDirectory,
    policy: PolicyLM,
    ranks: Ranks,
    cluster: ExitStack | None,
    parsed: float | None,
) -> Session:
    """The session that goes on from the weights of the warm start, as one of a later process would."""
    session = _assemble(request, run, policy, ranks, cluster)
    session.publish(0)
    told_after(session, parsed)
    session.commit_start()
    return session


def _lora_adapters(request: Request) -> dict[str, str]:
    """Trained predictor -> its LoRA adapter; empty where all share what is trained."""
    config = request.config
    return adapter_of(config.adapters, config.trained or policies_of(request.student))


def _let_writing_end(run: RunDirectory, error: BaseException) -> None:
    """Wait for the state that is being written when something stopped the run; its own failure is noted there."""
    try:
        _ = run.state
    except (DiskError, RankError) as lost:
        error.add_note(f"The newest state was not written either: {lost}")


def _tell_stopped(run: RunDirectory, error: BaseException) -> None:
    """Say what stopped the run, and what of it is saved."""
    _let_writing_end(run, error)
    if name := interruption_named(error):
        text = f"{name}: stopping; {_what_is_saved(run)}"
        if isinstance(error, KeyboardInterrupt):
            error.args = (text,)  # for whoever shows it in the end
        with suppress(Exception):  # a terminal that is gone must not keep the server alive
            run.tell({"event": "note", "text": text})
    emit_halted(run, error)


def _configured(policy: PolicyLM) -> dspy.BaseLM | None:
    """DSPy's configured LM; a PolicyLM speaks through the run's engine, for predictors made while the program runs."""
    lm = dspy.settings.lm
    return lm.on(policy.handle) if isinstance(lm, PolicyLM) else lm


def _what_is_saved(run: RunDirectory) -> str:
    if not run.state:
        return "nothing was saved yet"
    step, searches = run.state["step"], run.state["searched"] + 1
    return f"saved: {step} updates, {searches} searches. Compile again with run_dir={str(run.path)!r} to go on"


def _assemble(
    request: Request, run: RunDirectory, policy: PolicyLM, ranks: Ranks, cluster: ExitStack | None
) -> Session:
    """Load the trainer, at the committed state when there is one, and put the session together."""
    config, student = request.config, request.student
    adapters = _lora_adapters(request)
    trainer = _trainer(request, run, request.policy.checkpoint.folder, adapters, ranks)
    trainer.check_folder(run.path)
    run.drop_weights_from(to_publish_from(run.state))
    if run.state:
        trainer.load_state(run.trainer_state)
    program = trainable_copy(student, policy, adapters)
    seed = own_texts(student, config)
    expect = policy.handle.engine.expect
    rollouter = open_rollouter(program, request.metric, config, expect, request.trainset, cluster)
    problems, metric = fingerprint([example.toDict() for example in request.valset]), rollouter.reward.identity
    samples = config.validation_samples
    return Session(
        config=config,
        plan=Plan(config, len(request.trainset), origin=origin_of(student, request.policy)),
        trainset=request.trainset,
        valset=request.valset,
        program=program,
        policy=policy,
        trained=frozenset(config.trained or policies_of(student)),
        rollouter=rollouter,
        trainer=trainer,
        run=run,
        validation=Validation(run, metric, request.valset, samples, problems, lambda: recoveries(policy, rollouter)),
        population=starting_population(student, seed, config.population_size, run.state),
        proposers=request.proposers,
    )


def _trainer(request: Request, run: RunDirectory, model: Path, adapters: Mapping[str, str], ranks: Ranks) -> Trainer:
    """The trainer at the start of the run's own training, whose KL's reference that is.

    After a warm start the reference is what that left. LoRA adapters are read from there, as the trainer keeps a frozen
    copy of what it read. All weights are not: published in bfloat16 they are rounded, and a tied head is untied.
    """
    config, warm = request.config, run.weights_path(WARM_START) if run.state.get("warm_start") else None
    if config.adapter is not None:
        return make_trainer(ranks, warm or model, config, adapters=adapters, seed=config.seed)
    return make_trainer(ranks, model, config, reference=warm, adapters=adapters, seed=config.seed)


# ---- what is said before anything is spent -------------------------------------------------------


def announce(session: Session, look: FirstLook | None, trained: str, warm: str | None = None) -> None:
    """Say what the run will spend, or how far it is.

    Args:
        look: What the first rollouts measured; None for a run that goes on.
        trained: What is trained, and why; empty where that is not known.
        warm: What the warm start will be.
    """
    budget = session.plan.budget(len(session.valset))
    if look is None:
        _announce_continued(session, budget)
        return
    session.run.emit(
        "plan",
        config=session.config.model_dump(),
        budget=asdict(budget),
        tokens_per_rollout=look.tokens_per_rollout,
        before_the_start=look.spent,
        **_subject(session),
    )
    for line in filter(None, (trained, warm, *_plan_in_words(session, budget, look))):
        session.recorder.note(line)
    if not session.validation:
        session.recorder.note(NO_VALSET)
    if 0 < (updates := budget.updates * session.config.updates_per_batch) <= session.config.warmup_steps:
        steps = _optimizer_steps(session.config)
        note = f"warning: the {updates} {steps} all lie in the warm-up; lower warmup_steps or raise cycles"
        session.run.emit("note", text=note)


def _announce_continued(session: Session, budget: Budget) -> None:
    state = session.run.state
    session.run.tell({"event": "plan", "budget": asdict(budget)})
    done = f"{state['step']} of {budget.updates} updates are done"
    session.recorder.note(f"going on in {session.run.path}: {done}")
    before, now = state.get("judged_by"), session.rollouter.reward.identity
    if session.validation.left_out:
        session.recorder.note(f"warning: {CHANGED.format(count=session.validation.left_out)}")
    if before != now:
        changed = f"the metric changed since the run was stopped (was {before}, now {now})"
        session.run.emit("warning", step=state["step"], text=f"{changed}; its rewards are not comparable")


def _plan_in_words(session: Session, budget: Budget, look: FirstLook) -> Iterator[str]:
    config, tokens = session.config, look.tokens_per_rollout
    search = budget.search_rollouts + budget.overshoot_rollouts
    rollouts = search + budget.scoring_rollouts + budget.training_rollouts
    yield f"run directory {session.run.path}"
    yield (
        f"fast: {counted(budget.searches, 'search')}, up to {search} rollouts "
        f"+ {budget.scoring_rollouts} to score carried candidates"
    )
    most = "up to " if budget.resampled_rollouts or budget.reused_rollouts else ""
    several = f" of up to {n} optimizer steps each" if (n := config.updates_per_batch) > 1 else ""
    yield (
        f"slow: {counted(budget.updates, 'update')}{several}, {most}{budget.training_rollouts} rollouts "
        f"({config.problems_per_step} problems x {_played(config)}{_resampled(session.plan)}{_reused(budget)}), "
        f"learning rate {config.learning_rate:g} after {config.warmup_steps} warm-up {_optimizer_steps(config)}"
    )
    yield (
        f"in all at most {rollouts} rollouts and about {rollouts * tokens:,.0f} sampled tokens "
        f"({look.calls_per_rollout:.1f} calls, {tokens:.0f} tokens a rollout); "
        f"{budget.validation_rollouts} validation rollouts outside the budget, "
        f"and {look.spent.rollouts} were made before the start"
    )


def _optimizer_steps(config: FSTConfig) -> str:
    """What the warm-up counts."""
    return "updates" if config.updates_per_batch == 1 else "optimizer steps"


def _resampled(plan: Plan) -> str:
    more = plan.replaceable
    return f"; up to {more} more groups a step in place of flat ones" if more else ""


def _reused(budget: Budget) -> str:
    count = budget.reused_rollouts
    return f"; up to {count} of the rollouts are those of the searches, and are not paid for again" if count else ""


def _played(config: FSTConfig) -> str:
    """The rollouts of a problem in a step, in words."""
    held = config.rollouts_per_problem - (0 if config.method == "distill" else config.group_size)
    group = f"{config.group_size} over {config.population_size} candidates"
    under_seed = f"{held} under the program's own texts"
    if config.method == "distill":
        return under_seed
    return f"{group} + {under_seed}" if held else group


def _subject(session: Session) -> dict[str, object]:
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
        "metric": session.rollouter.reward.identity,
        "examples": {"trainset": len(session.trainset), "valset": len(session.valset)},
    }
