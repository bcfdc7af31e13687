"""A run that learns nothing: what to do about it, with what helped when it was tried on this model and task.

Where replies do not parse, or all are wrong, the trial of other forms (`parse_trial`) answers it: the one that was made
before the start, else one that is made now. Other causes are answered in words.
"""

from collections.abc import Mapping
from dataclasses import replace

from dspy_fst.errors import NothingLearnedError
from dspy_fst.preflight.parse_trial import try_forms
from dspy_fst.run.form_advice import form_advice
from dspy_fst.run.learning import Cause, Standstill
from dspy_fst.run.rollout_rules import ALL_ALIKE, ALL_WRONG
from dspy_fst.session import Session

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
    """Say why no further step is made (see `dspy_fst.run.ending`), and where nothing was learnt what helps.

    Raises:
        NothingLearnedError: the run is at ``max_unmoved_steps``, and not because every problem is solved.
    """
    still, stopped = session.observer.standstill, session.stopped
    if still is None or still.cause == "solved":
        session.tell_end()
    elif stopped is not None and stopped.kind == "nothing_learned":
        advice = what_helps(session, still)
        error = NothingLearnedError(still.words, session.run.path, len(still.steps), still.cause, advice)
        session.stopped = replace(stopped, text=str(error))
        session.tell_end()
        raise error
    else:
        session.tell_end()
        if session.observer.ending.nothing_learned:
            text = f"{session.observer.ending.words}.\n{what_helps(session, still)}"
            session.run.emit("warning", step=still.steps[-1].step, text=text)


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
