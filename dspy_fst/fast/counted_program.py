"""A program whose calls are rollouts of a search, and the metric that gives their rewards.

DSPy's optimizers know two things: a program to call, and a metric. Both are replaced. A call reads the program's own
instructions and demos, and the rollout is made as every rollout of the run is: under the current weights, with seeds of
its own, its failures told apart, and recorded. So the optimizer compares what training would sample.
"""

import asyncio
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import new_class
from typing import Any

import dspy
from dspy import lm15

from dspy_fst.fast.demos import DemoSource, within_budget
from dspy_fst.fast.latex_repair import acceptable_texts
from dspy_fst.fast.requested_rollouts import RequestedRollouts
from dspy_fst.fast.search_settings import SearchSettings
from dspy_fst.rollout.components import (
    MADE_OF,
    demos_in,
    flexes,
    is_demos,
    lost_lines,
    marked,
    predictor_of,
    problem_mark,
    texts_like,
    with_texts,
    written_demos,
)
from dspy_fst.rollout.parse_failures import parsed_calls
from dspy_fst.rollout.rollouter import Task
from dspy_fst.types import Candidate, Problem, Rollout


class UnmeasuredRunError(Exception):
    """The rollout measured nothing. DSPy's optimizers give a call that raises the score 0."""


class PartCalledError(Exception):
    """An optimizer called a part of the program, or its ``forward``."""


class _Refusing:
    """The engine of a counted program, whose own calls do not reach it. The policy's replies to others would
    be neither counted nor recorded."""

    def complete(self, request: lm15.Request) -> lm15.Response:
        raise PartCalledError(
            "a predictor, another part of the program or its forward() was called; call the program itself, as only "
            "that is a rollout of the run"
        )


class _AsyncRefusing:
    async def complete(self, request: lm15.Request) -> lm15.Response:
        return _Refusing().complete(request)


class Judged(dspy.Prediction):
    """A reward, with the metric's feedback. It is true where the rollout is good enough for a demo
    (``metric_threshold``).

    DSPy takes any score but 0 for a success, and makes a demo of it.
    """

    def __init__(self, score: float, feedback: str, *, solved: bool):
        super().__init__(score=score, feedback=feedback)
        self._solved = solved

    def __bool__(self) -> bool:
        return self._solved


class CountedRuns:
    """Answers the calls of a counted program, and scores what they returned.

    Args:
        program: The run's program under its own texts.
        problems: The anchors, no two with the same inputs.
        seed: The components of a candidate.
        settings: Lines that every candidate keeps, tokens of its demos, and the reward that gives demos.
        requested: Makes the rollouts.
        source: Counts the tokens of demos.
    """

    def __init__(
        self,
        program: dspy.Module,
        problems: Sequence[Problem],
        seed: Candidate,
        settings: SearchSettings,
        requested: RequestedRollouts,
        source: DemoSource,
    ):
        self._seed, self._settings = seed, settings
        marks = [(problem_mark(problem.example), problem) for problem in problems]
        self._by_mark = {mark: problem for mark, problem in marks if mark is not None}
        self._unmarked = [problem for mark, problem in marks if mark is None]
        self._input_names = {tuple(problem.example.inputs().keys()): None for problem in problems}
        self._requested, self._source = requested, source
        self._kind = self._counted(type(program))
        self._program = program
        self._signatures = {name: predictor.signature for name, predictor in program.named_predictors()}
        self._returned: dict[tuple[int, int], tuple[object, Rollout]] = {}
        """(problem, id of a prediction) -> the prediction and its rollout. Holding it keeps the id its own."""
        self.counts: Counter[str] = Counter()
        """``lines_restored``, ``demos_cut``, ``demos_not_written``, ``demos_lost`` (where candidates hold none),
        ``texts_mended``, ``texts_refused``."""
        self._sources = flexes(program).keys()
        self._accepted: dict[tuple[str, str], str] = {}
        """(component, text that an optimizer wrote) -> text that is tried. Incumbents' texts stay as they are."""
        self._lock = threading.Lock()
        self._not_written: set[str] = set()
        self._lost: set[str] = set()
        self._own_demos = {_told(demo) for predictor in program.predictors() for demo in predictor.demos}
        self._read: set[str] = set()
        """Digests of the texts that were counted."""
        self._users = {
            name: [demo for demo in demos_in(seed.texts[name]) if MADE_OF not in demo]
            for name in filter(is_demos, seed.texts)
        }
        """Component -> the user's own demos."""

    def under(self, candidate: Candidate) -> dspy.Module:
        """The program under a candidate; its calls, and those of its copies, are rollouts."""
        self._accepted |= {each: each[1] for each in candidate.texts.items()}
        program = with_texts(self._program, candidate)
        program.__class__ = self._kind
        program._compiled = False  # dspy.BootstrapFewShot refuses a compiled student
        lm = program.predictors()[0].lm  # its settings tell samples apart (`_number`)
        program.set_lm(lm.copy(engine=_Refusing(), async_engine=_AsyncRefusing()))  # dspy.SIMBA wants one LM
        return program

    def candidate_of(self, program: dspy.Module) -> Candidate:
        """What the search may change of a program: with the user's demos and the protected lines that it lost, without
        demos that are too long."""
        own = self._own_texts(program)
        texts = dict(own.texts)
        cut = 0
        for name in filter(is_demos, texts):
            users = self._users[name]
            others = (demo for demo in demos_in(texts[name]) if demo not in users)
            demos = [*users, *map(self._marked, others)]
            predictor = predictor_of(name)
            tokens_of = partial(self._source.tokens, predictor, self._signatures[predictor])
            kept = within_budget(demos, tokens_of, self._settings.demo_tokens)
            texts[name], cut = written_demos(kept), cut + len(demos) - len(kept)
        lost = {name: lost_lines(texts.get(name, ""), lines) for name, lines in self._settings.protected.items()}
        if own.digest not in self._read:
            self._read.add(own.digest)
            self.counts.update(lines_restored=sum(map(len, lost.values())), demos_cut=cut)
        return Candidate({name: "\n".join([text, *lost.get(name, ())]) for name, text in texts.items()})

    def _own_texts(self, program: dspy.Module) -> Candidate:
        """The program's texts, without demos that JSON cannot hold, and with acceptable instructions."""
        without = Candidate({name: text for name, text in self._seed.texts.items() if not is_demos(name)})
        texts = {name: self._acceptable(name, text) for name, text in texts_like(without, program).texts.items()}
        predictors = dict(program.named_predictors())
        if not any(map(is_demos, self._seed.texts)):
            self._lost |= {_told(demo) for each in predictors.values() for demo in each.demos} - self._own_demos
            self.counts["demos_lost"] = len(self._lost)
        demos = {
            name: written_demos(filter(self._is_writable, predictors[predictor_of(name)].demos))
            for name in filter(is_demos, self._seed.texts)
            if predictor_of(name) in predictors
        }
        return Candidate({**texts, **demos})

    def _acceptable(self, name: str, text: str) -> str:
        """The text as GEPA's path takes it from a reflection; the seed's in place of one that is refused."""
        with self._lock:
            if (name, text) not in self._accepted:
                taken = acceptable_texts({name: text}, self._seed.texts, self._sources, self.counts)
                self._accepted[name, text] = taken.get(name, self._seed.texts.get(name, ""))
            return self._accepted[name, text]

    def _is_writable(self, demo: Mapping[str, Any] | dspy.Example) -> bool:
        """Whether JSON can hold a demo. Values of calls between predictors need not be JSON's, e.g. a set."""
        try:
            written_demos([demo])
        except TypeError:
            self._not_written.add(_told(demo))
            self.counts["demos_not_written"] = len(self._not_written)
            return False
        return True

    def _marked(self, demo: Mapping[str, Any]) -> Mapping[str, Any]:
        """The demo with the mark of its problem, which a labeled one lacks."""
        if MADE_OF in demo:
            return demo
        for names in self._input_names:
            if (problem := self._anchor({name: demo.get(name) for name in names})) is not None:
                return marked(demo, problem.example)
        return demo

    def metric(self, example: dspy.Example, prediction: object, trace: object = None, *_: object) -> Judged:
        """DSPy's metric: the reward of the rollout that returned this prediction.

        Raises:
            UnmeasuredRunError: no rollout on this example did.
        """
        problem = self._problem(dict(example.inputs()))
        found = self._returned.get((problem.index, id(prediction)))
        if found is None or (rollout := found[1]).reward is None:
            raise UnmeasuredRunError("the program returned no such prediction on this example")
        return Judged(rollout.reward, rollout.feedback, solved=rollout.reward >= self._settings.demo_score)

    def _counted(self, kind: type[dspy.Module]) -> type[dspy.Module]:
        """The program's class, with calls that are rollouts. Its name and module stay: optimizers show its source."""
        runs = self

        def call(self: dspy.Module, **inputs: Any) -> Any:
            return runs._run(self, inputs)

        async def acall(self: dspy.Module, **inputs: Any) -> Any:
            return await asyncio.to_thread(runs._run, self, inputs)

        same = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        return new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(same, __call__=call, acall=acall))

    def _run(self, program: dspy.Module, inputs: Mapping[str, object]) -> object:
        problem = self._problem(inputs)
        rollout = self._requested.request(Task(problem, self.candidate_of(program), _number(program)))
        if rollout.reward is None:
            raise UnmeasuredRunError(f"the rollout measured nothing: {rollout.mask}")
        demos_of = problem.example if any(map(is_demos, self._seed.texts)) else None
        _trace(program, rollout, demos_of, self._is_writable)
        prediction = dspy.Prediction() if rollout.prediction is None else rollout.prediction
        self._returned[problem.index, id(prediction)] = (prediction, rollout)
        return prediction

    def _problem(self, inputs: Mapping[str, object]) -> Problem:
        """The anchor with these inputs.

        Raises:
            UnmeasuredRunError: it is none.
        """
        if (problem := self._anchor(inputs)) is None:
            raise UnmeasuredRunError("the program was called on inputs of no anchor; only anchors' rollouts are scored")
        return problem

    def _anchor(self, inputs: Mapping[str, object]) -> Problem | None:
        """The anchor with these inputs. One whose inputs JSON cannot hold is known by the very objects."""
        if (mark := problem_mark(dspy.Example(dict(inputs)).with_inputs(*inputs))) is not None:
            return self._by_mark.get(mark)
        return next((problem for problem in self._unmarked if _are_inputs_of(problem, inputs)), None)


def different(problems: Sequence[Problem]) -> list[Problem]:
    """The first problem of those with the same inputs: calls tell problems apart by their inputs."""
    found: dict[str | int, Problem] = {}
    for problem in problems:
        found.setdefault(problem_mark(problem.example) or problem.index, problem)
    return list(found.values())


def _told(demo: Mapping[str, Any] | dspy.Example) -> str:
    return repr(sorted(demo.items(), key=lambda item: str(item[0])))


def _are_inputs_of(problem: Problem, inputs: Mapping[str, object]) -> bool:
    own = dict(problem.example.inputs())
    return own.keys() == inputs.keys() and all(own[name] is value for name, value in inputs.items())


def _number(program: dspy.Module) -> int:
    """Which of equal rollouts is meant. To DSPy an LM with another ``rollout_id`` gives another reply to a prompt."""
    lms = [*(predictor.lm for predictor in program.predictors()), dspy.settings.lm]
    ids = (getattr(lm, "kwargs", {}).get("rollout_id") for lm in lms)
    return next((number for number in ids if isinstance(number, int)), 0)


def _trace(
    program: dspy.Module,
    rollout: Rollout,
    demos_of: dspy.Example | None,
    is_writable: Callable[[Mapping[str, Any]], bool],
) -> None:
    """Add the rollout's trace to the one in force, as if the program's own predictors had been called.

    Args:
        demos_of: The problem, where demos evolve. DSPy makes demos of a trace's inputs and outputs, so the inputs name
            it.
        is_writable: Whether JSON can hold a demo. A call that gives none is left out where demos evolve.
    """
    trace = dspy.settings.trace
    if trace is None:
        return
    own = dict(program.named_predictors())
    mark = {} if demos_of is None else marked({}, demos_of)
    for name, inputs, output in parsed_calls(rollout):
        if name in own and (demos_of is None or is_writable({**inputs, **dict(output.items())})):
            trace.append((own[name], _interned({**inputs, **mark}), dspy.Prediction(**_interned(dict(output.items())))))


def _interned(value: Any) -> Any:
    """The value with equal texts as one object. dspy.BootstrapFewShot draws among a predictor's calls by their pickle,
    which tells a text that two calls share from two equal ones; of a rollout that was read from disk they are two."""
    if type(value) is dict:
        return {_interned(key): _interned(each) for key, each in value.items()}
    if type(value) is list:
        return [*map(_interned, value)]
    return sys.intern(value) if type(value) is str else value
