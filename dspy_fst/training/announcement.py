"""What a run says before it spends anything: its plan, or where it goes on."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.engine.portable import portable_options
from dspy_fst.preflight.program_checks import policies_of
from dspy_fst.training.first_rollouts import FirstLook
from dspy_fst.training.plan import Budget
from dspy_fst.training.session import Session
from dspy_fst.training.validating import CHANGED, NO_VALSET


def announce(session: Session, look: FirstLook | None) -> None:
    """Say what the run will spend, or how far it is.

    Args:
        look: What the first rollouts measured; None for a run that goes on.
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
    for line in _plan_in_words(session, budget, look):
        session.recorder.note(line)
    if not session.validation:
        session.recorder.note(NO_VALSET)
    if 0 < budget.updates <= session.config.warmup_steps:
        note = f"warning: the {budget.updates} updates all lie in the warm-up; lower warmup_steps or raise cycles"
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
        f"fast: {budget.searches} searches, up to {search} rollouts "
        f"+ {budget.scoring_rollouts} to score carried candidates"
    )
    yield (
        f"slow: {budget.updates} updates, {budget.training_rollouts} rollouts "
        f"({config.problems_per_step} problems x {_played(config)}), "
        f"learning rate {config.learning_rate:g} after {config.warmup_steps} warm-up updates"
    )
    yield (
        f"in all at most {rollouts} rollouts and about {rollouts * tokens:,.0f} sampled tokens "
        f"({look.calls_per_rollout:.1f} calls, {tokens:.0f} tokens a rollout); "
        f"{budget.validation_rollouts} validation rollouts outside the budget, "
        f"and {look.spent.rollouts} were made before the start"
    )


def _played(config: FSTConfig) -> str:
    """The rollouts of a problem in a step, in words."""
    held = config.rollouts_per_problem - (0 if config.method == "distill" else config.group_size)
    group = f"{config.group_size} over {config.population_size} candidates"
    under_seed = f"{held} under the program's own texts"
    if config.method == "distill":
        return under_seed
    return f"{group} + {under_seed}" if held else group


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
        "metric": session.rollouter.reward.identity,
        "examples": {"trainset": len(session.trainset), "valset": len(session.valset)},
    }
