"""How the cards of a machine are shared out between trainer and engines, and which ways have room for model and recipe.

Trainer cards hold the training state in equal parts (FSDP2). An engine is a group of cards that share its weights
(tensor parallel). One card may hold both. The bytes are those of `dspy_fst.memory`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError
from dspy_fst.formatting.numbers import format_bytes
from dspy_fst.memory import GPU, ModelSize, Workload, fitting_share, imagined_machine, plan_for
from dspy_fst.memory.arithmetic import LARGEST_ON_GPU, SMALLEST
from dspy_fst.memory.available import CUDA_CONTEXT
from dspy_fst.memory.bytes_by_part import (
    FEWEST_CACHED_TOKENS,
    LARGEST_SHARE,
    VLLM_WORKINGS,
    served_bytes,
    trainer_allocations,
)
from dspy_fst.sizing.machine import NODE, CardSheet

GROUPS = (1, 2, 4, 8)
"""Cards of one engine: those of one machine at most, and as many as divide its attention heads (`_divides`)."""


@dataclass(frozen=True)
class TrainerShare:
    """What one of the trainer's cards takes, in bytes, and what its micro-batches are like."""

    held: int
    peak: int
    """Of an update, on top."""
    micro_batch_tokens: int
    recompute: bool
    """Gradient checkpointing."""


@dataclass(frozen=True)
class Layout:
    """Cards of the trainer and of the engines.

    >>> Layout(trainers=4, engines=2, group=2, trainer=TrainerShare(0, 0, 256, False), served=0).cards
    8
    """

    trainers: int
    engines: int
    group: int
    """Cards of each engine."""
    trainer: TrainerShare
    served: int
    """Bytes that an engine takes of each of its cards without keys and values."""
    cache: int = 0
    """Bytes for keys and values on each of its cards."""
    shared: bool = False
    """Whether one card holds trainer and engine."""

    @property
    def cards(self) -> int:
        return 1 if self.shared else self.trainers + self.engines * self.group

    @property
    def machines(self) -> int:
        """Machines on which any of the cards lie."""
        return -(-self.cards // NODE)

    @property
    def readers(self) -> int:
        """Machines whose engines read what is published: the trainer fills machines of its own first."""
        return self.machines - (0 if self.shared else self.trainers // NODE)


def layouts(workload: Workload, config: FSTConfig, card: CardSheet, cards: int) -> list[Layout]:
    """Every layout with room for the run on at most so many cards; those of fewer cards are among them.

    Raises:
        ConfigurationError: none has; with what is missing.
    """
    # A rank beyond a step's rollouts would have no micro-batch.
    most = min(cards, config.problems_per_step * config.rollouts_per_problem) if shares_out(config) else 1
    trainers = {count: share for count in _doublings(most) if (share := trainer_share(workload, config, card, count))}
    groups = [
        group
        for group in GROUPS
        if group <= cards and _divides(group, workload.size) and _cache(workload, config, card, group) > 0
    ]
    found = [
        Layout(count, engines, group, share, served(workload, config, group), _cache(workload, config, card, group))
        for count, share in trainers.items()
        for group in groups
        for engines in _doublings(
            min((cards - count) // group, 2 * config.num_threads - 1)
        )  # more would never be asked
    ]
    found += _on_one_card(workload, config, card)
    if not found:
        raise ConfigurationError([_fault(workload, config, card, cards)])
    return found


def _doublings(most: int) -> Iterator[int]:
    """Powers of two up to this."""
    count = 1
    while count <= most:
        yield count
        count *= 2


def shares_out(config: FSTConfig) -> bool:
    """Whether several cards may hold what is trained (`slow.training_settings` refuses ``sharding`` otherwise)."""
    return config.quantized_base is None and config.optimizer == "adamw"


def trainer_share(workload: Workload, config: FSTConfig, card: CardSheet, count: int) -> TrainerShare | None:
    """One of ``count`` trainer cards, with the largest micro-batch that has room; None where none has."""
    room = card.memory - CUDA_CONTEXT
    ways = (False, True) if config.gradient_checkpointing == "auto" else (bool(config.gradient_checkpointing),)
    tokens = LARGEST_ON_GPU if config.micro_batch_tokens == "auto" else int(config.micro_batch_tokens)
    least, of_one = min(tokens, SMALLEST), replace(workload, ranks=count)
    for recompute in ways:
        recipe = config.model_copy(update={"gradient_checkpointing": recompute})
        asked = tokens
        while asked >= least:
            part = trainer_allocations(of_one, recipe, asked, on_gpu=True)[0]
            if part.certain + part.expected <= room:
                return TrainerShare(part.certain, part.expected, asked, recompute)
            asked = asked // 2 if config.micro_batch_tokens == "auto" else 0
    return None


def served(workload: Workload, config: FSTConfig, group: int) -> int:
    """What an engine takes of each of its cards without keys and values, in bytes."""
    return -(-served_bytes(workload, config) // group) + VLLM_WORKINGS


def _divides(group: int, size: ModelSize) -> bool:
    """Whether vLLM can share out a model among so many cards: each has as many heads, and whole ones of the keys, which
    are repeated where there are fewer than cards (vLLM 0.32, `config/model.py`, `model_executor/models/qwen3.py`)."""
    of_keys = size.heads * size.keys // size.queries
    return size.heads % group == 0 and (of_keys % group == 0 or group % of_keys == 0)


def _cache(workload: Workload, config: FSTConfig, card: CardSheet, group: int) -> int:
    """Bytes for keys and values on each card of an engine; 0 where there is too little."""
    left = int(LARGEST_SHARE * card.memory) - served(workload, config, group)
    return left if left * group >= 2 * workload.size.cached * FEWEST_CACHED_TOKENS else 0


def _on_one_card(workload: Workload, config: FSTConfig, card: CardSheet) -> list[Layout]:
    """Trainer and engine beside each other, where `dspy_fst.memory` expects them to fit."""
    room = imagined_machine(card.memory)
    share = fitting_share(workload, config, room)
    plan = plan_for(_with_share(workload, share), config, room)
    if plan.faults() or not plan.expected_to_fit:
        return []
    (needs,) = (requirement for requirement in plan.requirements if requirement.place == GPU)
    trainer = next(part for part in needs.allocations if part.expected)
    taken = served(workload, config, 1)
    cache = max(1, int(share * card.memory) - taken)
    held = TrainerShare(trainer.certain, trainer.expected, plan.micro_batch_tokens, plan.gradient_checkpointing)
    return [Layout(1, 1, 1, held, taken, cache, shared=True)]


def _with_share(workload: Workload, share: float) -> Workload:
    return replace(workload, kind="vllm", options={**workload.options, "gpu_memory_utilization": share})


def _fault(workload: Workload, config: FSTConfig, card: CardSheet, cards: int) -> str:
    recipe = config.model_copy(update={"gradient_checkpointing": True})
    part = trainer_allocations(workload, recipe, SMALLEST, on_gpu=True)[0]
    trainer, engine = part.certain + part.expected, served_bytes(workload, config) + VLLM_WORKINGS
    smaller = "" if config.adapter is not None else ", adapter: lora in the recipe"
    return (
        f"{workload.model} and its recipe fit on no layout of {cards} x {card.name}: the trainer takes "
        f"{format_bytes(trainer)} ({format_bytes(part.certain)} of it can be divided among cards), an engine at least "
        f"{format_bytes(engine)}, and a card has {format_bytes(card.memory)}; give more --cards, a larger --card"
        f"{smaller}, or a smaller model"
    )
