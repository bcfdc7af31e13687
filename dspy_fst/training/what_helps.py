"""A run that learns nothing: what to do about it, with what helped when it was tried on this model and task.

Where replies do not parse, or all are wrong, the trial of other forms (`parse_trial`) answers it: the one that was made
before the start, else one that is made now. Other causes are answered in words.
"""

from collections.abc import Mapping
from dataclasses import replace

from dspy_fst.errors import NothingLearnedError
from dspy_fst.monitoring.rules import ALL_ALIKE, ALL_WRONG, form_advice
from dspy_fst.run.ending import StopReason
from dspy_fst.run.learning import Cause, Standstill
from dspy_fst.training.parse_trial import try_forms
from dspy_fst.training.session import Session

IN_WORDS: Mapping[Cause, str] = {
    "failed": "Mend what the rollouts fail by, or shorten the prompts",
    "floor": ALL_WRONG,
    "alike": ALL_ALIKE,
    "unmeasured": "Mend what the rollouts are masked for: nothing can be learnt from what was not measured",
    "untrained": "Let the program call a predictor that holds the PolicyLM, at a temperature above 0, on every path",
    "not finite": "Lower learning_rate or set max_grad_norm",
}
"""Cause -> what to do; where replies do not parse, that depends on how the program asks."""


def end_alternation(session: Session) -> None:
    """Where nothing was learnt any more: say what helps. The end itself is told with the outcome (`Session.tell_end`).

    Raises:
        NothingLearnedError: the run is at ``max_unmoved_steps`` with steps of its plan left, no update changed the
            weights, and not because every problem is solved. Its end is told here.
    """
    still, stopped = session.observer.standstill, session.schedule.stopped
    if still is None or still.cause == "solved":
        return
    if stopped is not None and stopped.kind == "nothing_learned":
        _end_early(session, still, stopped)
    elif session.observer.ending.nothing_learned:
        text = f"{session.observer.ending.words}.\n{what_helps(session, still)}"
        session.run.emit("warning", step=still.steps[-1].step, text=text)


def _end_early(session: Session, still: Standstill, stopped: StopReason) -> None:
    """An error where no update of the run changed the weights; else a warning, as its program is worth having."""
    helps, count = what_helps(session, still), len(still.steps)
    if session.observer.ending.nothing_learned:
        error = NothingLearnedError(still.words, session.run.path, count, still.cause, helps)
        session.schedule.stopped = replace(stopped, advice=str(error).removeprefix(f"{still.words}.").strip())
        session.tell_end()
        raise error
    advice = (
        f"{helps}.\nTo go on, raise max_unmoved_steps above {count}, or set it to None, which never stops, and compile "
        "again with the same run_dir"
    )
    session.schedule.stopped = replace(stopped, advice=advice)
    done = (
        f"The run ends here, after {stopped.step} of {session.plan.updates} steps (max_unmoved_steps). Earlier updates "
        "changed the weights, so its program is returned and saved"
    )
    session.run.emit("warning", step=still.steps[-1].step, text=f"{still.words}.\n{done}.\n{advice}")


def what_helps(session: Session, still: Standstill) -> str:
    """Sentences without a last full stop: what was tried and what came of it, or what to try."""
    observer = session.observer
    if still.cause == "unparsed":
        if observer.tried is not None:
            return str(observer.tried["told"])
        if observer.went_on and (found := try_forms(session, 0.0)):
            return found.told()
        return form_advice(observer.form)
    if still.cause == "floor" and observer.went_on:
        rewards = [report.reward for report in still.steps if report.reward is not None]
        if found := try_forms(session, 0.0, sum(rewards) / len(rewards)):
            return f"{IN_WORDS['floor']}.\n{found.told()}"
    return IN_WORDS[still.cause]
