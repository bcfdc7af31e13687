"""Program x candidate x problem -> Rollout, many at once.

A rollout in which the policy failed gets a failure score: a reply does not parse, a prompt overflows the context, or
the program cannot go on with a reply. A rollout that did not measure the policy is masked: the engine or a tool failed,
the time was over, or the metric is broken. Both are counted. `dspy_fst.rollout.outcome_rules` alone decides which.
"""

import contextvars
import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from dspy_fst.errors import TrainingError, is_signal
from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.rollout.call_recorder import SETTING, Recording, parallel_calls_once, tag_predictors
from dspy_fst.rollout.components import UnboundError, demo_marks, hide_demos, with_texts
from dspy_fst.rollout.copying import Copier
from dspy_fst.rollout.dspy_release import DEFAULT_ADAPTER
from dspy_fst.rollout.outages import Outages
from dspy_fst.rollout.outcome_rules import Blame, Judge
from dspy_fst.rollout.parse_failures import Entry, ParseFailures
from dspy_fst.rollout.rendering import CallListener
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.worker_pool import run_all
from dspy_fst.types import Candidate, Group, Population, Problem, Rollout, WeightsVersion


@dataclass(frozen=True)
class Task:
    """One rollout to make: of this candidate on this problem, with ``sample`` as its number among equal ones."""

    problem: Problem
    candidate: Candidate
    sample: int = 0


@dataclass(frozen=True)
class _Bound:
    """The program under one candidate."""

    copier: Copier[dspy.Module]
    demo_marks: frozenset[str]
    """Of the problems that its demos were made of."""


class Rollouter:
    """Makes rollouts of one program, whose predictors already hold the policy.

    Args:
        program: The program. Each rollout runs a copy.
        reward: The metric.
        settings: How rollouts are made and failures scored; a run hands in its FSTConfig.
        in_flight: Called with the number of rollouts that run at once (an engine's ``expect``).
        seed: Of every draw, together with the draw's name.
    """

    def __init__(
        self,
        program: dspy.Module,
        reward: Reward,
        settings: RolloutSettings,
        in_flight: Callable[[int], None] = lambda count: None,
        *,
        seed: int = 0,
    ):
        self.program, self.reward, self.settings, self.seed = program, reward, settings, seed
        self._in_flight = in_flight
        self._blame = Blame(reward)
        parallel_calls_once()

    def groups(
        self,
        problems: Sequence[Problem],
        population: Population,
        group_size: int,
        draw: str,
        on_rollout: Callable[[Rollout], None] = lambda rollout: None,
        known: Sequence[Rollout] = (),
    ) -> list[Group]:
        """G rollouts for each problem: exactly G/K under each of the K members.

        Args:
            problems: One group is made for each.
            population: Its members share a group evenly, and a repeated member counts each time.
            group_size: G, a multiple of K.
            draw: Name of the random draw, e.g. ``"step-12"``. The same name gives the same seeds.
            on_rollout: Called with each rollout as it ends.
            known: Rollouts under the same weights. Each takes the place of the first one of its problem and candidate;
                the others have the seeds that they would have without it.
        """
        each = group_size // len(population.members)
        tasks = [
            Task(problem, member, position * each + repeat)
            for problem in problems
            for position, member in enumerate(population.members)
            for repeat in range(each)
        ]
        places = _places(known, tasks)
        fresh = iter(self.rollout([task for i, task in enumerate(tasks) if i not in places], draw, on_rollout))
        rollouts = [places[i] if i in places else next(fresh) for i in range(len(tasks))]
        size = each * len(population.members)
        return [Group(problem.index, tuple(rollouts[i * size : (i + 1) * size])) for i, problem in enumerate(problems)]

    def rollout(
        self,
        tasks: Sequence[Task],
        draw: str,
        on_rollout: Callable[[Rollout], None] = lambda rollout: None,
        *,
        anew: bool = False,
    ) -> list[Rollout]:
        """One rollout for each task, in the order of the tasks.

        What goes wrong inside a rollout is its outcome and never an exception.

        Args:
            tasks: The rollouts to make.
            draw: Name of the random draw. The same name gives the same seeds.
            on_rollout: Called with each rollout as it ends.
            anew: Whether prompts of these rollouts will be rendered again under other texts. Only then is each call
                recorded in ``Rollout.asked``, with its predictor, inputs and adapter.
        """
        candidates = {task.candidate.digest: task.candidate for task in tasks}
        programs = {digest: self._bound(candidate) for digest, candidate in candidates.items()}
        recordings = [Recording(self._seed(task, draw)) for task in tasks]
        formatted = None if anew else FormattedOnce()

        def job(index: int) -> Callable[[], Rollout]:
            task = tasks[index]
            context = contextvars.copy_context()  # the caller's dspy.context applies in the worker threads
            program = programs[task.candidate.digest]
            return lambda: context.run(self._rollout_one, task, program, recordings[index], formatted)

        def timed_out(index: int) -> Rollout:
            task, calls = tasks[index], recordings[index].close()
            return Rollout(task.problem.index, task.candidate, calls, None, Outcome("masked", "timeout"))

        try:
            with _quiet():
                return run_all(
                    [job(index) for index in range(len(tasks))],
                    threads=self.settings.num_threads,
                    timeout_s=self.settings.rollout_timeout_s,
                    on_timeout=timed_out,
                    in_flight=self._in_flight,
                    on_result=on_rollout,
                    queued_s=lambda index: recordings[index].queue_time.seconds,
                )
        finally:  # after an interrupt, threads that still run must not call the policy
            for recording in recordings:
                recording.close()

    def take_counts(self) -> Counter[str]:
        """Rollouts that were lost and made again since the last call, by reason; in this process none is."""
        return Counter()

    def _bound(self, candidate: Candidate) -> "_Bound | UnboundError":
        """The program under a candidate, with tagged predictors; the error if there is no such program."""
        try:
            program = with_texts(self.program, candidate)
        except UnboundError as error:
            return error
        tag_predictors(program)
        return _Bound(Copier(program), demo_marks(program))

    def _seed(self, task: Task, draw: str) -> int:
        entropy = repr((self.seed, draw, task.problem.index, task.candidate.digest, task.sample))
        return int.from_bytes(hashlib.sha256(entropy.encode()).digest()[:8], "big")

    def _rollout_one(
        self,
        task: Task,
        bound: "_Bound | UnboundError",
        recording: Recording,
        formatted: "FormattedOnce | None",
    ) -> Rollout:
        if isinstance(bound, UnboundError):
            outcome = Outcome("failed", "unbound source", f"The source could not be read: {bound}")
            return Rollout(task.problem.index, task.candidate, (), self.settings.failure_score, outcome)
        program = bound.copier.copy(lean=True)
        hide_demos(program, task.problem.example, bound.demo_marks)
        trace: list[Entry] = []
        parse_failures, outages = ParseFailures(trace), Outages()
        call_listeners = [CallListener()] if formatted is None else []
        judge = Judge(
            recording, parse_failures, outages, self.settings.failure_score, self.settings.format_failure_score
        )
        settings = {
            SETTING: recording,
            "callbacks": [*dspy.settings.callbacks, Listeners(parse_failures, outages, *call_listeners)],
            "trace": trace,
            "disable_history": True,
            **({} if formatted is None else formatted.settings()),
        }
        try:
            with dspy.context(**settings):
                prediction = program(**task.problem.example.inputs())
        except BaseException as error:  # also exit() in the model's code, a cancelled task, a panic of a Rust library
            if is_signal(error):
                raise
            judgement = judge.raised(error)
        else:  # outside of the rollout's settings, as the metric is no part of the run
            judgement = judge.returned(task.problem.example, prediction, trace, self.reward, self._blame)
        calls, whole_trace = recording.close(), parse_failures.in_trace()
        judge.forget()
        asked = tuple(call for listener in call_listeners for call in listener.asked)
        return judgement.rollout(task.problem, task.candidate, calls, whole_trace, asked)


class Listeners(BaseCallback):
    """Several callbacks as one: DSPy's search for a callback's method takes longer than these methods do."""

    def __init__(self, *callbacks: BaseCallback):
        self._callbacks = callbacks

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        for callback in self._callbacks:
            callback.on_lm_start(call_id, instance, inputs)

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        for callback in self._callbacks:
            callback.on_lm_end(call_id, outputs, exception)

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        for callback in self._callbacks:
            callback.on_module_start(call_id, instance, inputs)

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        for callback in self._callbacks:
            callback.on_module_end(call_id, outputs, exception)

    def on_tool_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        for callback in self._callbacks:
            callback.on_tool_end(call_id, outputs, exception)


PLAIN = (str, int, float, bool, type(None))
"""Types of values of which an equal ``repr`` means an equal prompt."""


class FormattedOnce:
    """Lets DSPy's own adapters write a prompt once for the rollouts of a batch that have the same one.

    A group's rollouts under one candidate begin with the same prompt, and to write it costs DSPy as much as the rest of
    a call. The adapter in force, if it is one of `ADAPTERS`, is replaced by a copy of the same class.
    """

    ADAPTERS = (dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter)
    """DSPy's adapters whose prompts depend on signature, demos and inputs alone."""
    MOST = 512
    """Prompts that are kept (ours); the oldest goes first."""

    def __init__(self) -> None:
        self._known: dict[object, list[dict[str, str]]] = {}

    def settings(self) -> dict[str, object]:
        """The settings of DSPy's context under which prompts are written once; none where somebody listens to that."""
        adapter = dspy.settings.adapter or DEFAULT_ADAPTER  # as dspy.Predict does at each call
        if type(adapter) not in self.ADAPTERS or dspy.settings.callbacks or adapter.callbacks:
            return {}
        replaced, written = copy.copy(adapter), adapter.format

        def format(
            signature: type[dspy.Signature], demos: list[dict[str, Any]], inputs: dict[str, Any]
        ) -> list[dict[str, Any]]:
            key = _prompt_key(signature, demos, inputs)
            if (known := self._known.get(key)) is None:
                known = written(signature, demos, inputs)
                if key is None or not all(
                    isinstance(message, dict) and type(message["content"]) is str for message in known
                ):
                    return known
                while len(self._known) >= self.MOST:
                    self._known.pop(next(iter(self._known)), None)
                self._known[key] = known
            return [dict(message) for message in known]

        setattr(replaced, "format", format)  # noqa: B010 (mypy refuses a plain assignment)
        return {"adapter": replaced}


def _prompt_key(
    signature: type[dspy.Signature], demos: Sequence[Mapping[str, object]], inputs: Mapping[str, object]
) -> object:
    """Equal for calls whose prompts are equal; None where that cannot be told from the values."""
    demo_items = [list(demo.items()) for demo in demos]
    values = [*inputs.values(), *(value for items in demo_items for _, value in items)]
    if not all(type(value) in PLAIN for value in values):
        return None
    return signature, repr(demo_items), repr(list(inputs.items()))


def require_fresh(where: str, rollouts: Iterable[Rollout], published: WeightsVersion) -> None:
    """
    Raises:
        TrainingError: calls were sampled by other weights than the published ones.
    """
    sampled_by = {call.weights for rollout in rollouts for call in rollout.calls}
    if stale := sorted(sampled_by - {published}):
        raise TrainingError(
            f"{where}: calls were sampled by weights {stale} and not by {published}, which were published for it; "
            "nothing was learnt from them"
        )


def _places(known: Sequence[Rollout], tasks: Sequence[Task]) -> dict[int, Rollout]:
    """Index of a task -> the known rollout that takes its place."""
    waiting = {(rollout.problem, rollout.candidate.digest): rollout for rollout in known}
    keys = [(task.problem.index, task.candidate.digest) for task in tasks] if waiting else []
    return {i: waiting.pop(key) for i, key in enumerate(keys) if key in waiting}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence DSPy's warning on each truncated reply. Truncated replies are counted by their finish reasons."""
    logger = logging.getLogger("dspy.clients.lm")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(is_error)  # another level would have logging forget what it knows of every logger there is
    try:
        yield
    finally:
        logger.removeFilter(is_error)
