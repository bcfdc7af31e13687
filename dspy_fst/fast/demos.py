"""Demos as texts that a search changes: where they come from, and the draws that add, swap and drop them.

Bootstrapped demos are calls of rollouts that scored well in this search, under any candidate (DSPy's BootstrapFewShot
takes them from a teacher's). Labeled demos are examples of the trainset (DSPy's LabeledFewShot). No reflection LM is
asked, and none can change a demo: a proposal is a draw whose seed is the search's and the reflection's key, so a
continued search draws the same. Demos without a mark of their problem are the user's; they stay, and stay first.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dspy
from gepa.core.state import GEPAState
from gepa.proposer.reflective_mutation.base import ReflectionComponentSelector
from gepa.strategies.component_selector import (
    AllReflectionComponentSelector,
    RoundRobinReflectionComponentSelector,
)

from dspy_fst.fast.reflective_dataset import CHARACTERS
from dspy_fst.fast.search_settings import SearchSettings
from dspy_fst.formatting.demo_texts import AUGMENTED, MADE_OF, is_demos
from dspy_fst.rollout.chat_adapters import adapter_in_force
from dspy_fst.rollout.components import Demo, demos_in, marked, predictor_of, written_demos
from dspy_fst.rollout.dspy_release import in_words
from dspy_fst.rollout.parse_failures import parsed_calls
from dspy_fst.types import Candidate, Problem, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOOTSTRAPPED, LABELED = "bootstrapped", "labeled"


@dataclass(frozen=True)
class DemoSource:
    """What searches need for demos beside their own rollouts. A run has one, which counts each demo's tokens once."""

    trainset: Sequence[dspy.Example] = ()
    tokenizer: "PreTrainedTokenizerBase | None" = None
    """The policy's; None: tokens are estimated."""
    _counted: dict[tuple[str, str], int] = field(default_factory=dict)
    """(predictor, demo's text) -> tokens. A run's signatures and adapter stay the same."""

    def tokens(self, predictor: str, signature: type[dspy.Signature], demo: Demo) -> int:
        """What a demo adds to a prompt of the predictor."""
        key = predictor, written_demos([demo])
        if (counted := self._counted.get(key)) is None:
            counted = self._counted[key] = tokens_of_demo(demo, signature, self.count_tokens)
        return counted

    def count_tokens(self, text: str) -> int:
        if self.tokenizer is None:
            return -(-len(text) // CHARACTERS)
        return len(self.tokenizer.encode(text, add_special_tokens=False))


def labeled_demo(signature: type[dspy.Signature], example: dspy.Example) -> Demo | None:
    """The fields that an example holds of a predictor; None unless it holds every input and an output.

    An output that is missing, such as a chain of thought, is shown by DSPy's adapters as not supplied.

    >>> labeled_demo(dspy.Signature("question -> reasoning, answer"), dspy.Example(question="6 * 7", answer="42"))
    {'question': '6 * 7', 'answer': '42'}
    """
    known = {name: example[name] for name in signature.fields if name in example and example[name] is not None}
    holds_inputs = all(name in known for name in signature.input_fields)
    return known if holds_inputs and any(name in known for name in signature.output_fields) else None


def within_budget(demos: Sequence[Demo], tokens_of: Callable[[Demo], int], most: int) -> list[Demo]:
    """The demos without the last of those that evolve, as far as these are longer than ``most`` tokens."""
    kept = list(demos)
    tokens = [tokens_of(demo) if MADE_OF in demo else 0 for demo in demos]
    while sum(tokens) > most:
        last = max(place for place, count in enumerate(tokens) if count)
        del kept[last], tokens[last]
    return kept


def demos_differ(one: Candidate, other: Candidate) -> bool:
    """Whether a predictor shows other demos."""
    return any(is_demos(name) and text != other.texts.get(name) for name, text in one.texts.items())


def tokens_of_demo(demo: Demo, signature: type[dspy.Signature], count_tokens: Callable[[str], int]) -> int:
    """What a demo adds to a prompt: the messages that the adapter in force writes for it."""
    try:
        text = in_words(adapter_in_force().format_demos(signature, [dict(demo)]))
    except Exception:  # an adapter may be any code
        text = written_demos([demo])
    return max(1, count_tokens(text))


class DemoDraws:
    """Draws new demos for a predictor.

    Args:
        program: Names the predictors and their fields.
        problems: Those that the search's rollouts are of.
        scored: The search's rollouts so far; the list grows.
        settings: How many demos, and of how many tokens.
        seed: Of the search.
    """

    def __init__(
        self,
        program: dspy.Module,
        problems: Sequence[Problem],
        scored: Sequence[Rollout],
        settings: SearchSettings,
        source: DemoSource,
        seed: int,
    ):
        self._settings, self._seed, self._source = settings, seed, source
        self._signatures = {name: predictor.signature for name, predictor in program.named_predictors()}
        self._examples = {problem.index: problem.example for problem in problems}
        self._scored, self._read = scored, 0
        self._most = {BOOTSTRAPPED: settings.max_bootstrapped_demos, LABELED: settings.max_labeled_demos}
        self._pools: dict[tuple[str, str], dict[str, _Sized]] = {}
        """(predictor, kind) -> demo's text -> demo. Those that are too long are in it too, so each is counted once."""
        self.counts: Counter[str] = Counter()
        for example in source.trainset if settings.max_labeled_demos else ():
            for name, signature in self._signatures.items():
                if (demo := labeled_demo(signature, example)) is not None:
                    self._add(name, LABELED, demo, example)

    def can_change(self, component: str, text: str) -> bool:
        """Whether there is a demo to drop, or another one to show that fits ``max_demo_tokens``."""
        return bool(self._moves(predictor_of(component), demos_in(text)))

    def drawn(self, component: str, text: str, key: str) -> str | None:
        """Other demos in the place of these; None if nothing can change.

        Args:
            text: The demos' component in the candidate that the proposal starts from.
            key: Names the draw.
        """
        rng = random.Random(f"{self._seed} demos {key} {component}")
        name, demos = predictor_of(component), demos_in(text)
        moves = self._moves(name, demos)
        if not moves:
            return None
        self.counts["demo_proposals"] += 1
        return written_demos(_moved(rng, demos, moves))

    # ---- the pools -------------------------------------------------------------------------------

    def _unused(self, predictor: str, kind: str, demos: Sequence[Demo]) -> "list[_Sized]":
        """Demos of this kind that are made of other problems than those shown."""
        self._take_in_rollouts()
        shown = {demo.get(MADE_OF) for demo in demos}
        return [each for each in self._pools.get((predictor, kind), {}).values() if each.demo[MADE_OF] not in shown]

    def _take_in_rollouts(self) -> None:
        """Make demos of the rollouts that scored well since the last time."""
        if not self._settings.max_bootstrapped_demos:
            return
        for rollout in self._scored[self._read :]:
            if rollout.reward is None or rollout.failure or rollout.reward < self._settings.demo_score:
                continue
            for name, demo in _calls(rollout, self._signatures):
                self._add(name, BOOTSTRAPPED, {AUGMENTED: True, **demo}, self._examples[rollout.problem])
        self._read = len(self._scored)

    def _add(self, predictor: str, kind: str, demo: Demo, example: dspy.Example) -> None:
        try:
            text = written_demos([marked(demo, example)])
        except TypeError:  # the value of a call; those of examples were checked before the run
            self.counts["demos_not_written"] += 1
            return
        pool = self._pools.setdefault((predictor, kind), {})
        if text not in pool:
            (written,) = demos_in(text)
            pool[text] = _Sized(written, self._tokens(predictor, written))
            if pool[text].tokens > self._settings.demo_tokens:
                self.counts["demos_cut"] += 1

    # ---- the draw --------------------------------------------------------------------------------

    def _tokens(self, predictor: str, demo: Demo) -> int:
        return self._source.tokens(predictor, self._signatures[predictor], demo)

    def _moves(self, predictor: str, demos: Sequence[Demo]) -> "list[_Move]":
        """What can be done to these demos within ``max_demo_tokens``."""
        moves: list[_Move] = []
        own = {place: self._tokens(predictor, demo) for place, demo in enumerate(demos) if MADE_OF in demo}
        left = self._settings.demo_tokens - sum(own.values())
        for kind, most in self._most.items():
            places = [place for place in own if _kind(demos[place]) == kind]
            unused = self._unused(predictor, kind, demos)
            if (room := most - len(places)) > 0 and (fitting := _fitting(unused, left)):
                moves.append(_Move("add", unused=fitting, room=room, left=left))
            swaps = {place: fitting for place in places if (fitting := _fitting(unused, left + own[place]))}
            if swaps:
                moves.append(_Move("swap", swaps))
        return [*moves, _Move("drop", dict.fromkeys(own, ()))] if own else moves


@dataclass(frozen=True)
class _Sized:
    """A demo, and the tokens that it adds to a prompt."""

    demo: Demo
    tokens: int


@dataclass(frozen=True)
class _Move:
    """One kind of change that is possible."""

    name: str
    """``"add"``, ``"swap"`` or ``"drop"``."""
    places: Mapping[int, tuple[_Sized, ...]] = field(default_factory=dict)
    """Place of a demo that it may take out -> those that it may put there."""
    unused: tuple[_Sized, ...] = ()
    """Demos that it may add, each of which fits."""
    room: int = 1
    """How many it may add, at most."""
    left: int = 0
    """How many tokens it may add, at most."""


def _fitting(unused: Sequence[_Sized], tokens: int) -> tuple[_Sized, ...]:
    return tuple(each for each in unused if each.tokens <= tokens)


def _moved(rng: random.Random, demos: Sequence[Demo], moves: Sequence[_Move]) -> list[Demo]:
    """The demos after one move. Each possible one is equally likely."""
    move = rng.choice(moves)
    if move.name == "add":
        return [*demos, *_added(rng, move)]
    place = rng.choice(list(move.places))
    put_in = [rng.choice(move.places[place]).demo] if move.name == "swap" else []
    return [*demos[:place], *put_in, *demos[place + 1 :]]


def _added(rng: random.Random, move: _Move) -> list[Demo]:
    """At least one demo, and one of a problem. Each number is equally likely; fewer are added where they do not fit
    together."""
    number, left = rng.randint(1, min(move.room, len({each.demo[MADE_OF] for each in move.unused}))), move.left
    added: list[Demo] = []
    for each in rng.sample(move.unused, len(move.unused)):
        new = all(each.demo[MADE_OF] != demo[MADE_OF] for demo in added)
        if len(added) < number and new and each.tokens <= left:
            added.append(each.demo)
            left -= each.tokens
    return added


def _kind(demo: Demo) -> str:
    return BOOTSTRAPPED if demo.get(AUGMENTED) else LABELED


def _calls(rollout: Rollout, signatures: Mapping[str, type[dspy.Signature]]) -> Iterator[tuple[str, Demo]]:
    """(predictor, inputs and outputs) of a rollout's calls. A call that lacks a field gives no demo."""
    for name, inputs, said in parsed_calls(rollout):
        known = {**inputs, **dict(said.items())}
        if name in signatures and all(known.get(field) is not None for field in signatures[name].fields):
            yield name, {field: known[field] for field in signatures[name].fields}


class DemosTakeTurns(ReflectionComponentSelector):
    """gepa's choice of the components to change, without demos of which there are no others."""

    def __init__(self, components: ReflectionComponentSelector | str, draws: DemoDraws):
        kinds = {"all": AllReflectionComponentSelector, "round_robin": RoundRobinReflectionComponentSelector}
        self._select = kinds[components]() if isinstance(components, str) else components
        self._draws = draws

    def __call__(
        self,
        state: GEPAState,
        trajectories: list[Any],
        subsample_scores: list[float],
        candidate_idx: int,
        candidate: dict[str, str],
    ) -> list[str]:
        for _ in candidate:
            names = self._select(state, trajectories, subsample_scores, candidate_idx, candidate)
            able = [name for name in names if not is_demos(name) or self._draws.can_change(name, candidate[name])]
            if able:
                return able
        return names
