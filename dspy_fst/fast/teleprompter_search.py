"""DSPy's optimizers in the fast seat. Only this module knows what dspy 3.4 calls their arguments.

Every teleprompter that returns a program fits: it is given the anchors as trainset and valset, the seat's metric in
place of its own, and the run's reflection LM where it has no LM of its own for prompts.
"""

import copy
import functools
import inspect
import io
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO, cast

import dspy
from dspy.teleprompt import Teleprompter

from dspy_fst.fast.fast_optimizer import FastOptimizer, Seat
from dspy_fst.rollout.call_recorder import is_recorded

Maker = Callable[..., Teleprompter]
"""A teleprompter's class, or another function that makes one: ``metric`` and what else of the seat it takes by name are
given to it."""
DEMOS = {
    "max_bootstrapped_demos": "max_bootstrapped_demos",
    "max_demos": "max_bootstrapped_demos",
    "max_labeled_demos": "max_labeled_demos",
    "k": "max_labeled_demos",
}
"""What dspy's optimizers call the most demos of a predictor (``max_demos`` is SIMBA's, ``k`` LabeledFewShot's) -> the
run's limit of such demos."""


class TeleprompterSearch:
    """A DSPy optimizer as a `FastOptimizer`.

    >>> import dspy
    >>> TeleprompterSearch(dspy.COPRO, breadth=4, eval_kwargs={}).name
    'COPRO'

    Args:
        teleprompter: The optimizer, or its class; a class is made with ``metric`` and the LMs that it takes.
        arguments: Further arguments of its ``compile``, e.g. MIPROv2's ``num_trials``. For a class also those of the
            class itself.
    """

    def __init__(self, teleprompter: Teleprompter | Maker, **arguments: Any):
        self.teleprompter, self.arguments = teleprompter, arguments

    @property
    def name(self) -> str:
        """The optimizer's class, or the function that makes it."""
        made = unwrapped(self.teleprompter)
        return str(getattr(made, "__name__", type(made).__name__))

    @property
    def all_settings(self) -> dict[str, object]:
        """What it was given, by name."""
        return {**settled(self.teleprompter), **self.arguments}

    @property
    def settings(self) -> dict[str, object]:
        """The same as far as a record can hold it: another search has other settings."""
        plain = (str, int, float, bool, type(None))
        return {name: value for name, value in sorted(self.all_settings.items()) if isinstance(value, plain)}

    @property
    def compile_arguments(self) -> set[str] | None:
        """What its ``compile`` takes; None for a function, of which that is not known before it is called."""
        compiles = getattr(unwrapped(self.teleprompter), "compile", None)
        return None if compiles is None else {*inspect.signature(compiles).parameters}

    def search(self, seat: Seat) -> list[dspy.Module]:
        """The compiled program, then the candidates that the optimizer kept beside it, best first."""
        with quiet():
            teleprompter = self._teleprompter(seat)
            compiled: dspy.Module = teleprompter.compile(seat.program, **self._arguments(teleprompter, seat))
        kept = getattr(compiled, "candidate_programs", None) or ()
        programs = [each["program"] if isinstance(each, Mapping) else each[-1] for each in kept]
        return [compiled, *(program for program in programs if isinstance(program, type(seat.program)))]

    def _arguments(self, teleprompter: Teleprompter, seat: Seat) -> dict[str, Any]:
        """Of its ``compile``."""
        taken = inspect.signature(teleprompter.compile).parameters
        arguments = {name: value for name, value in self.arguments.items() if name in taken}
        given = {"trainset": seat.examples, "valset": seat.examples, "seed": seat.seed}
        arguments |= {name: value for name, value in given.items() if name in taken}
        if "eval_kwargs" in taken:  # of COPRO, whose evaluations else run with DSPy's own number of threads
            arguments["eval_kwargs"] = {"num_threads": seat.num_threads, **(arguments.get("eval_kwargs") or {})}
        return arguments

    def made(self, known: Mapping[str, object]) -> Teleprompter:
        """One of its own: a copy of the user's, or made with what it takes of ``known`` and was not given.

        Args:
            known: ``metric``, ``task_model``, ``prompt_model``, ``num_threads``, ``seed``, and the run's limits of
                demos under their names in `DEMOS`.
        """
        if isinstance(self.teleprompter, Teleprompter):
            copied = copy.copy(self.teleprompter)
            vars(copied).update({name: _own(value) for name, value in vars(copied).items()})
            return copied
        taken, fixed = taken_by(self.teleprompter), settled(self.teleprompter)
        taken -= DEMOS.keys() - demo_names(self.name)
        ours = {name: value for name, value in known.items() if name in taken and name not in fixed}
        return self.teleprompter(**{**ours, **{n: v for n, v in self.arguments.items() if n in taken}})

    def _teleprompter(self, seat: Seat) -> Teleprompter:
        """One for this search: the user's own is left as it is."""
        task_lm = seat.program.predictors()[0].lm
        known = {"metric": seat.metric, "task_model": task_lm, "prompt_model": seat.reflection_lm}
        known |= {"num_threads": seat.num_threads, "seed": seat.seed}
        with quiet():
            made = self.made(known | run_limits(seat.max_bootstrapped_demos, seat.max_labeled_demos))
        for name, value in {"metric": seat.metric, "task_model": task_lm}.items():
            if hasattr(made, name):
                setattr(made, name, value)
        if has_prompt_model(made) and seat.reflection_lm is not None and not own_prompt_model(made):
            setattr(made, "prompt_model", seat.reflection_lm)  # noqa: B010 (mypy knows no such attribute)
        if getattr(made, "num_threads", 0) is None:
            setattr(made, "num_threads", seat.num_threads)  # noqa: B010
        return made


def run_limits(bootstrapped: int, labeled: int) -> dict[str, int]:
    """A run's limits of demos, under the names that dspy's optimizers have for them."""
    limits = {"max_bootstrapped_demos": bootstrapped, "max_labeled_demos": labeled}
    return {name: limits[limit] for name, limit in DEMOS.items()}


def demo_names(optimizer: str) -> set[str]:
    """The keys of `DEMOS` that mean demos in an optimizer of this name: ``k`` does in LabeledFewShot alone."""
    return {name for name in DEMOS if name != "k" or optimizer == "LabeledFewShot"}


def demo_limits(optimizer: str, settings: Mapping[str, object]) -> dict[str, int]:
    """What an optimizer of this name has as its most demos of a predictor, by its own name of it.

    >>> demo_limits("MIPROv2", {"max_num_samples": 4, "max_labeled_demos": 16, "seed": 0, "k": 2})
    {'max_bootstrapped_demos': 4, 'max_labeled_demos': 16}
    """
    names = demo_names(optimizer)
    own = {"max_bootstrapped_demos": settings.get("max_num_samples"), **settings}  # an attribute of what draws sets
    return {name: most for name in DEMOS if name in names and isinstance(most := own.get(name), int)}


def taken_by(maker: Maker) -> set[str]:
    """The arguments that a function takes by name, or a class and those that it hands its arguments on to."""
    parameters = inspect.signature(maker).parameters
    taken, kind = {*parameters}, unwrapped(maker)
    if isinstance(kind, type) and any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        taken |= {name for base in kind.__mro__[1:-1] for name in inspect.signature(base).parameters}
    return taken


def unwrapped(maker: object) -> object:
    """What a partial function calls in the end; anything else as it is."""
    while isinstance(maker, functools.partial):
        maker = maker.func
    return maker


def seated(fast: Any) -> FastOptimizer:
    """Whatever a user put into the seat, as a `FastOptimizer`."""
    return fast if isinstance(fast, FastOptimizer) else TeleprompterSearch(fast)


def has_prompt_model(teleprompter: object) -> bool:
    """Whether an optimizer, or the class of one, asks an LM for texts."""
    if isinstance(teleprompter, Teleprompter):
        return hasattr(teleprompter, "prompt_model")
    return callable(teleprompter) and "prompt_model" in inspect.signature(teleprompter).parameters


def own_prompt_model(teleprompter: object) -> object:
    """The frozen LM that it was given for that, else None. One that fell back on a configured PolicyLM has none."""
    lm = getattr(teleprompter, "prompt_model", None) or settled(teleprompter).get("prompt_model")
    return None if is_recorded(lm) else lm


def lms_of(fast: Any) -> list[dspy.BaseLM]:
    """The LMs that whatever sits in the seat was given: their keys must not be written anywhere."""
    optimizer = seated(fast)
    held = optimizer.all_settings if isinstance(optimizer, TeleprompterSearch) else getattr(fast, "__dict__", {})
    return [value for value in held.values() if isinstance(value, dspy.BaseLM)]


def settled(teleprompter: object) -> dict[str, object]:
    """The arguments that are settled: an optimizer's attributes, a partial function's keywords."""
    if isinstance(teleprompter, Teleprompter):
        return dict(vars(teleprompter))
    return dict(teleprompter.keywords) if isinstance(teleprompter, functools.partial) else {}


def _own(value: Any) -> Any:
    """Another dict, list or set with the same values, at any depth. All else, such as locks and LMs, is shared."""
    if isinstance(value, dict):
        mapping = copy.copy(value)
        mapping.update({key: _own(each) for key, each in value.items()})
        return mapping
    if isinstance(value, list):
        sequence = copy.copy(value)
        sequence[:] = map(_own, value)
        return sequence
    return copy.copy(value) if isinstance(value, set) else value


_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)
"""Whether a thread's output is dropped. Unlike a thread's number it is never that of another thread."""


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what this thread prints, bars of progress and DSPy's log included, where `quiet_streams` are in place."""
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)


class _QuietStream(io.TextIOBase):
    """A stream that drops what quiet threads write and hands on the rest."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text) if _QUIET.get() else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _QuietStreams:
    """Replaces stdout and stderr from the first of overlapping searches to the last. Each restoring by itself, they
    would put back one another's."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._replaced: dict[str, tuple[TextIO, TextIO]] = {}
        """Name -> (stream before, ours)."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """For the thread that waits for a search: the optimizer's own may be left behind, and would restore nothing."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                for name in ("stdout", "stderr"):
                    before: TextIO = getattr(sys, name)
                    self._replaced[name] = before, cast(TextIO, _QuietStream(before))
                    setattr(sys, name, self._replaced[name][1])
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                for name, (before, ours) in self._replaced.items() if not self._users else ():
                    if getattr(sys, name) is ours:
                        setattr(sys, name, before)


quiet_streams = _QuietStreams()
