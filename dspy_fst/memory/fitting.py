"""Whether a run fits: what its parts take, place by place, against what is free; and the micro-batch that fits.

``micro_batch_tokens="auto"`` is the largest power of two, within bounds, at which an update fits *at most*. Where none
does, it is the largest that is *expected* to fit, and the doubt is told.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dspy_fst.config import FSTConfig
from dspy_fst.engine.in_process import InProcessSettings
from dspy_fst.engine.vllm.server import VLLMSettings
from dspy_fst.memory.allocations import (
    ENGINE,
    LARGEST_SHARE,
    TRAINER,
    Subject,
    Take,
    known_options,
    served_bytes,
    takes_of,
    update_range,
    writes_of,
)
from dspy_fst.memory.arithmetic import LARGEST_ON_CPU, LARGEST_ON_GPU, SMALLEST
from dspy_fst.memory.places import DISK, Room, room_now
from dspy_fst.memory.shape import ModelSize, find_size, model_size
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.run.written import MUCH_WRITTEN, Writes, shown

SPARE = 0.05
"""Share of what is left for an update that a chosen micro-batch leaves free, for what allocators lose (ours)."""


@dataclass(frozen=True)
class Need:
    """All that is taken in one place, and what is free there, in bytes."""

    place: str
    takes: tuple[Take, ...]
    free: int

    @property
    def certain(self) -> int:
        return sum(take.certain for take in self.takes)

    @property
    def at_most(self) -> int:
        """With whatever comes on top at the worst time."""
        return self.certain + self._worst.at_most

    @property
    def expected(self) -> int:
        """With what comes on top as texts usually are."""
        return self.certain + max(take.expected for take in self.takes)

    @property
    def _worst(self) -> Take:
        return max(self.takes, key=lambda take: take.at_most)

    def fault(self, model: str) -> str | None:
        """What does not fit for certain, as a sentence."""
        if self.certain <= self.free:
            return None
        shares = " and ".join(f"{shown(take.certain)} for {take.who}" for take in self.takes if take.certain)
        advice = ", ".join(dict.fromkeys(advice for take in self.takes for advice in self._advice(take)))
        return f"{self.place}: training {model} takes {shares}, and {shown(self.free)} are free; {advice}"

    @property
    def with_cuts(self) -> int:
        """What is taken for certain when every setting that makes it less is changed."""
        return sum(take.with_cuts for take in self.takes)

    def _advice(self, take: Take) -> tuple[str, ...]:
        """Settings are named only where they help: together they may still leave too much."""
        return (*take.advice, *(take.cuts if self.with_cuts <= self.free else ()))

    def warning(self, model: str) -> str | None:
        """What may not fit, as a sentence."""
        if not self.certain <= self.free < self.at_most:
            return None
        return (
            f"{self.place}: with {model} {self._worst.when} may take up to {shown(self.at_most)} in all, and "
            f"{shown(self.free)} are free; if that proves too little, {self._worst.relief}"
        )


@dataclass(frozen=True)
class Fit:
    """Whether a run fits on a machine."""

    subject: Subject
    needs: tuple[Need, ...]
    writes: Writes
    micro_batch_tokens: int
    """What the recipe says, or what was chosen for it."""
    chosen: bool = False
    """Whether it was chosen."""
    engine_fault: str | None = None
    reply_limit: int | None = None
    """Tokens of the longest reply that fits alone, where a longer one may come and does not; None: all fit."""

    @property
    def parameters(self) -> int:
        return self.subject.size.parameters

    def faults(self) -> list[str]:
        """A sentence for every place that cannot hold what is taken for certain."""
        found = [fault for need in self.needs if (fault := need.fault(self.named))]
        return [*found, *([self.engine_fault] if self.engine_fault else [])]

    def doubts(self) -> list[str]:
        """A sentence for every place that may become too small for a time, and for a size that is a guess."""
        found = [warning for need in self.needs if (warning := need.warning(self.named))]
        if assumed := self.subject.size.assumed:
            found.append(
                f"{self.named}: its config.json names no {', '.join(assumed)}, so that transformers' defaults are "
                "counted; give the whole config.json"
            )
        return found

    def warnings(self) -> list[str]:
        """The doubts, and a sentence when very much is written."""
        warnings = self.doubts()
        if self.writes.total > MUCH_WRITTEN and self.writes.states:
            warnings.append(f"{DISK}: {self.writes.words}; raise checkpoint_every to write fewer states")
        return warnings

    @property
    def expected_to_fit(self) -> bool:
        """Whether no place becomes too small with texts as they usually are; `reply_limit` is told beside it."""
        return all(need.expected <= need.free for need in self.needs)

    @property
    def named(self) -> str:
        return f"model={self.subject.model!r} ({counted(self.parameters)} parameters)"


def counted(parameters: int) -> str:
    """
    >>> counted(8_190_735_360), counted(939_904)
    ('8.2B', '0.94M')
    """
    millions = parameters / 1e6
    return f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.3g}M"


def measure_fit(policy: PolicyLM, config: FSTConfig, run_dir: Path, room: Room | None = None) -> Fit | None:
    """What a run with this model and recipe takes here. The policy's and the recipe's settings are sound already.

    Args:
        room: What is free; None looks.

    Returns:
        None when nothing is known of the model before it is downloaded.
    """
    path = policy.checkpoint.path
    size = find_size(str(path)) if room is not None and room.imagined else model_size(path)
    if size is None:
        return None
    room = room or room_now(run_dir)
    subject = _subject(policy, size, room)
    if policy.handle.engine.weights is not None:  # the student's engine runs, and is stopped before ours starts
        room = _given_back(subject, config, room)
    return fit_of(subject, config, room)


def fit_of(subject: Subject, config: FSTConfig, room: Room) -> Fit:
    """What this model and recipe take in this room."""
    auto = config.micro_batch_tokens == "auto"
    tokens = largest_that_fits(subject, config, room) if auto else int(config.micro_batch_tokens)
    needs, reply_limit = with_reply_limit(tuple(_needs(subject, config, tokens, room)), subject, config, tokens, room)
    return Fit(
        subject,
        needs,
        writes_of(subject.size, config, on_gpu=room.on_gpu),
        tokens,
        chosen=auto,
        engine_fault=_engine_fault(subject, room, needs),
        reply_limit=reply_limit,
    )


def with_reply_limit(
    needs: tuple[Need, ...], subject: Subject, config: FSTConfig, tokens: int, room: Room
) -> tuple[tuple[Need, ...], int | None]:
    """`Fit.reply_limit`, and the needs with the advice that helps against it.

    A reply that is longer than a micro-batch comes alone, so that a smaller micro-batch does not help.
    """
    own = next(need for need in needs if any(take.who == TRAINER for take in need.takes))
    trainer = next(take for take in own.takes if take.who == TRAINER)
    left = own.free - own.certain
    if not (subject.longest_reply > tokens and 0 <= left < trainer.at_most):
        return needs, None

    def at_most(length: int) -> int:
        return update_range(replace(subject, longest_reply=length), config, 1, on_gpu=room.on_gpu)[1]

    limit = bisect_right(range(1, subject.longest_reply + 1), left, key=at_most)
    too_large = config.micro_batch_tokens != "auto" and tokens > limit  # "auto" follows max_tokens by itself
    smaller = f" and micro_batch_tokens={tokens}" if too_large else ""
    relief = f"lower max_tokens={subject.longest_reply}{smaller}: it fits only if replies stay under {limit + 1} tokens"
    told = replace(trainer, relief=relief if limit else "use a smaller model")
    takes = tuple(told if take is trainer else take for take in own.takes)
    return tuple(replace(own, takes=takes) if need is own else need for need in needs), limit


def largest_that_fits(subject: Subject, config: FSTConfig, room: Room) -> int:
    """``micro_batch_tokens="auto"``, see above; `SMALLEST` when not even that is expected to fit."""
    sizes = list(_sizes(LARGEST_ON_GPU if room.on_gpu else LARGEST_ON_CPU))
    left = _left_for_updates(subject, config, room)
    ranges = {tokens: update_range(subject, config, tokens, on_gpu=room.on_gpu) for tokens in sizes}
    sure = [tokens for tokens, (_, at_most) in ranges.items() if at_most <= left]
    likely = [tokens for tokens, (expected, _) in ranges.items() if expected <= left]
    return max(sure or likely or sizes[:1])


def _left_for_updates(subject: Subject, config: FSTConfig, room: Room) -> float:
    needs = _needs(subject, config, SMALLEST, room)
    own = next(need for need in needs if any(take.who == TRAINER for take in need.takes))
    return (1 - SPARE) * (own.free - own.certain)


def _sizes(largest: int) -> Iterator[int]:
    tokens = SMALLEST
    while tokens <= largest:
        yield tokens
        tokens *= 2


def _needs(subject: Subject, config: FSTConfig, tokens: int, room: Room) -> Iterator[Need]:
    takes = takes_of(subject, config, tokens, room)
    for place, free in room.free.items():
        if here := tuple(take for take in takes if take.place == place):
            yield Need(place, here, free)


def _subject(policy: PolicyLM, size: ModelSize, room: Room) -> Subject:
    """The engine is the one that a machine like the room would have."""
    kind, options = policy.handle.resolved_kind, policy.handle.options
    if room.imagined and policy.handle.kind == "auto":
        kind = "vllm" if room.on_gpu else "in_process"
        options = known_options(VLLMSettings if kind == "vllm" else InProcessSettings, options)
    return Subject(policy.model, size, kind, options, policy.reply_limit or 0)


def _given_back(subject: Subject, config: FSTConfig, room: Room) -> Room:
    engine = next(take for take in takes_of(subject, config, SMALLEST, room) if take.who == ENGINE)
    free = {place: free + engine.certain * (place == engine.place) for place, free in room.free.items()}
    return Room(free, room.gpu_total, room.imagined)


def _engine_fault(subject: Subject, room: Room, needs: tuple[Need, ...]) -> str | None:
    """A share of the card that cannot hold the weights: the server would end while it boots."""
    if subject.kind != "vllm" or not room.on_gpu or subject.options.get("attach_url"):
        return None
    share = VLLMSettings(**subject.options).gpu_memory_utilization
    least = served_bytes(subject.size)
    if least < share * room.gpu_total:
        return None
    place = next(need for need in needs if any(take.who == ENGINE for take in need.takes))
    others = sum(take.with_cuts for take in place.takes if take.who != ENGINE)
    helps = least < LARGEST_SHARE * room.gpu_total and others + least <= place.free
    advice = "raise it" if helps else "use a smaller model, or a larger card"
    return (
        f"engine_options: gpu_memory_utilization={share:g} is {shown(int(share * room.gpu_total))} of "
        f"{shown(room.gpu_total)}, and vLLM's weights of {subject.model} alone take {shown(least)}; {advice}"
    )
