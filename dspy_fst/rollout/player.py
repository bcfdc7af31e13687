"""Program x candidate x problem -> Rollout, many at once.

A failure of the policy (a reply that does not parse, a context that overflows, a program that trips over
its own LM's output) is scored. A run that never measured the policy (engine gone, tool outage, time-out,
metric crash) is masked. Both are counted; the boundary is drawn once, in `_play`.
"""

import contextvars
import hashlib
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.predict.flex.bridge import BridgeRuntime
from dspy.primitives.code_interpreter import CodeExecutionError, CodeInterpreterError
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMError

from dspy_fst.errors import is_signal
from dspy_fst.rollout.crew import run_all
from dspy_fst.rollout.parses import FailedParses
from dspy_fst.rollout.recording import OUTSIDE, SETTING, Recording, is_recorded, tag_predictors
from dspy_fst.rollout.reward import Reward, UnmeasuredError
from dspy_fst.rollout.texts import UnboundError, with_texts
from dspy_fst.types import PREDICTOR_TAG, Candidate, Group, Population, Problem, Rollout

STARTS = ("_create_interpreter", "install")
"""What dspy.Flex 3.4 calls before it gives its source to the interpreter."""


@dataclass(frozen=True)
class Task:
    """One rollout to be made: the ``sample``-th of this candidate on this problem."""

    problem: Problem
    candidate: Candidate
    sample: int = 0


@dataclass(frozen=True)
class PlayerSettings:
    """How rollouts are made and failures scored."""

    threads: int = 64
    """Rollouts in flight."""
    timeout_s: float = 600.0
    """Seconds one rollout may take before it is masked. Those in which its call queues for a batch do not count."""
    failure_score: float = 0.0
    """Reward of a rollout in which the program failed through the policy's doing."""
    format_failure_score: float = 0.0
    """Reward of a reply that could not be parsed (mmGRPO uses a value below ``failure_score``)."""
    seed: int = 0


class Player:
    """Plays one program. Its predictors must already hold the LM whose engine is told of the rollouts in flight.

    Args:
        in_flight: Told how many rollouts run at once (an engine's ``expect``).
    """

    def __init__(
        self,
        program: dspy.Module,
        reward: Reward,
        settings: PlayerSettings,
        in_flight: Callable[[int], None] = lambda count: None,
    ):
        self.program, self.reward, self.settings, self._in_flight = program, reward, settings, in_flight

    def groups(
        self, problems: Sequence[Problem], population: Population, group_size: int, draw: str, **watch: Any
    ) -> list[Group]:
        """G rollouts for each problem: each of the K members exactly G/K times.

        Args:
            draw: Name of the random draw, e.g. ``"step-12"``; the same name gives the same seeds.
        """
        each = group_size // len(population.members)
        tasks = [
            Task(problem, member, position * each + repeat)
            for problem in problems
            for position, member in enumerate(population.members)
            for repeat in range(each)
        ]
        rollouts = self.play(tasks, draw, **watch)
        size = each * len(population.members)
        return [Group(problem.index, tuple(rollouts[i * size : (i + 1) * size])) for i, problem in enumerate(problems)]

    def play(
        self, tasks: Sequence[Task], draw: str, on_rollout: Callable[[Rollout], None] = lambda rollout: None
    ) -> list[Rollout]:
        """Make the rollouts, in the order of the tasks. Never raises for what happens inside one."""
        programs = {task.candidate.digest: task.candidate for task in tasks}
        spoken = {digest: self._speaking(candidate) for digest, candidate in programs.items()}
        recordings = [Recording(self._seed(task, draw)) for task in tasks]

        def job(index: int) -> Callable[[], Rollout]:
            task = tasks[index]
            context = contextvars.copy_context()  # the caller's dspy.context holds inside the worker threads
            return lambda: context.run(self._play, task, spoken[task.candidate.digest], recordings[index])

        def timed_out(index: int) -> Rollout:
            calls = recordings[index].close()
            return Rollout(tasks[index].problem.index, tasks[index].candidate, calls, None, mask="timeout")

        try:
            with _quiet():
                return run_all(
                    [job(index) for index in range(len(tasks))],
                    threads=self.settings.threads,
                    timeout_s=self.settings.timeout_s,
                    on_timeout=timed_out,
                    in_flight=self._in_flight,
                    on_result=on_rollout,
                    queued_s=lambda index: recordings[index].queue_time.seconds,
                )
        finally:  # after an interrupt, threads still under way must not call any more
            for recording in recordings:
                recording.close()

    def _speaking(self, candidate: Candidate) -> dspy.Module | UnboundError:
        """The program under a candidate, its predictors tagged; or why there is none."""
        try:
            program = with_texts(self.program, candidate)
        except UnboundError as error:
            return error
        tag_predictors(program)
        return program

    def _seed(self, task: Task, draw: str) -> int:
        entropy = repr((self.settings.seed, draw, task.problem.index, task.candidate.digest, task.sample))
        return int.from_bytes(hashlib.sha256(entropy.encode()).digest()[:8], "big")

    def _play(self, task: Task, spoken: dspy.Module | UnboundError, recording: Recording) -> Rollout:
        if isinstance(spoken, UnboundError):
            feedback = f"The source could not be read: {spoken}"
            reward = self.settings.failure_score
            return Rollout(task.problem.index, task.candidate, (), reward, feedback, failure="unbound source")
        program = spoken.deepcopy()
        trace: list[Any] = []
        parses = FailedParses(trace)
        outcome: dict[str, Any]
        settings = {
            SETTING: recording,
            "callbacks": [*dspy.settings.callbacks, parses],
            "trace": trace,
            "disable_history": True,
        }
        with dspy.context(**settings):
            try:
                prediction = program(**task.problem.example.inputs())
            except (Exception, SystemExit) as error:  # a tool's argparse, or exit() in code that the model wrote
                if is_signal(error):
                    raise
                outcome = self._failure(error, recording)
            else:
                outcome = self._scored(task, prediction, trace)
        calls = recording.close()
        return Rollout(task.problem.index, task.candidate, calls, trace=parses.in_trace(), **outcome)

    def _scored(self, task: Task, prediction: Any, trace: list[Any]) -> dict[str, Any]:
        if prediction is None:  # BestOfN and Refine, when no try parsed
            feedback = "The program gave no prediction."
            return {"reward": self.settings.failure_score, "failure": "no prediction", "feedback": feedback}
        try:
            score = self.reward(task.problem.example, prediction, trace)
        except UnmeasuredError as error:
            detail = repr(error.__cause__) if error.__cause__ else ""
            return {"reward": None, "mask": str(error), "prediction": prediction, "feedback": detail}
        return {
            "reward": score.value,
            "feedback": score.feedback,
            "prediction": prediction,
            "predictor_scores": score.predictor_scores,
        }

    def _failure(self, error: BaseException, recording: Recording) -> dict[str, Any]:
        name = type(error).__name__
        failed_in, frozen = failing_predictor(error)
        where = {"failed_in": failed_in}
        if isinstance(error, AdapterParseError) and not frozen:
            feedback = f"The reply could not be parsed: {error}"
            return {"reward": self.settings.format_failure_score, "failure": "parse", "feedback": feedback, **where}
        if isinstance(error, ContextWindowExceededError) and not frozen:
            return {"reward": self.settings.failure_score, "failure": "context", "feedback": str(error), **where}
        if isinstance(error, AdapterParseError | LMError):
            who = "frozen lm" if frozen else "lm"
            cause = error.__cause__ or error
            return {"reward": None, "mask": f"{who}: {type(cause).__name__}", "feedback": str(cause)}
        if isinstance(error, OSError):  # ConnectionError and TimeoutError among them: a tool's outage
            return {"reward": None, "mask": f"outage: {name}"}
        if _is_the_source_s(error):
            return {"reward": self.settings.failure_score, "failure": "source", "feedback": f"{name}: {error}"}
        if isinstance(error, CodeInterpreterError):
            return {"reward": None, "mask": f"interpreter: {name}", "feedback": str(error)}
        if recording.last_predictor in (None, OUTSIDE):  # it failed before the policy had said anything
            return {"reward": None, "mask": f"program: {name}", "feedback": repr(error)}
        return {"reward": self.settings.failure_score, "failure": name, "feedback": f"The program failed: {error}"}


def _is_the_source_s(error: BaseException) -> bool:
    """Whether the source of a dspy.Flex is to blame: it raised, gave what dspy.Flex refuses, or ended its interpreter.

    Not where the interpreter could not be started: the source had not been given to it.
    """
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    if BridgeRuntime.forward.__code__ not in codes:
        return isinstance(error, CodeExecutionError)
    inside = codes[codes.index(BridgeRuntime.forward.__code__) + 1 :]
    return not inside or inside[0].co_name not in STARTS


def failing_predictor(error: BaseException) -> tuple[str | None, bool]:
    """Name of the innermost tagged predictor on the exception's way, found in its traceback (None: there is none), and
    whether it speaks with an LM whose calls are not recorded."""
    name, frozen = None, False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        predictor = frame.f_locals.get("self")
        if isinstance(predictor, dspy.Predict) and hasattr(predictor, PREDICTOR_TAG):
            name, frozen = getattr(predictor, PREDICTOR_TAG), not is_recorded(predictor.lm or dspy.settings.lm)
    return name, frozen


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence DSPy's warning for each truncated reply; truncation is counted from the finish reasons."""
    logger = logging.getLogger("dspy.clients.lm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
