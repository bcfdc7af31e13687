"""A machine's rates by arithmetic from a card's data sheet and a model's shape. Nothing here was timed as a whole.

P: parameters. L: layers. t: cards of an engine. s: cards of the trainer. W: published bytes. M: what a micro-batch
moves between the trainer's cards. Weights are gathered twice (forward and backward) and gradients summed, in float32:
12 P. With a KL the reference is gathered once more. LoRA: the frozen base twice, or three times with a KL.

| rate                   | formula                                                                              |
| ---------------------- | ------------------------------------------------------------------------------------ |
| a decoding step        | 2 (P without the embedding) / (t bandwidth READ_SHARE) + STEP_S; t > 1: 2 L GATHER_S more |
| each row of it         | its keys and values / (t bandwidth READ_SHARE) + 2 P / (t FLOP/s PROMPT_SHARE)        |
| a prompt's token       | 2 P / (t FLOP/s PROMPT_SHARE)                                                         |
| an update's token      | 6 P (LoRA: 4 P; layers computed again: 2 P more) / (s FLOP/s UPDATE_SHARE)            |
| s > 1, for each micro-batch | M (s - 1) / s over the links                                                     |
| AdamW                  | 28 bytes of each trained number / (s bandwidth READ_SHARE)                            |
| a publish              | W / write + W / read; several machines: W / SHARED_STORAGE, and W for each that reads   |
| verification           | W / VERIFIED                                                                          |
| a state                | its bytes / write, while the next step is sampled                                     |

A step's rows are counted as if reading and computing never overlapped, so a full engine is faster than is told here.
"""

from dspy_fst.config import FSTConfig
from dspy_fst.memory import ModelSize, Workload
from dspy_fst.memory.bytes_by_part import (
    BASE,
    GRADIENTS,
    REFERENCE,
    TRAINED,
    state_bytes,
    trained_numbers,
    trainer_parts,
    with_kl,
    writes_of,
)
from dspy_fst.sizing.layout import Layout
from dspy_fst.sizing.machine import (
    GATHER_S,
    LINK_SHARE,
    LOCAL_READ,
    LOCAL_WRITE,
    NETWORK,
    NODE,
    PROGRAM_S,
    PROMPT_SHARE,
    READ_SHARE,
    REFLECTION_S,
    SHARED_STORAGE,
    STEP_S,
    UPDATE_SHARE,
    VERIFIED,
    CardSheet,
)
from dspy_fst.sizing.rates import EngineRates, MachineRates
from dspy_fst.sizing.workload import Texts

MOST_ROWS = 256
"""Rows of an engine at once (vLLM's ``max_num_seqs`` where nothing else is said, on most cards)."""
ADAM_BYTES = 28
"""Bytes of a trained number that an optimizer step moves: weight, gradient and two moments read, all but the gradient
written, in float32."""


def rates_of_card(
    card: CardSheet, layout: Layout, workload: Workload, config: FSTConfig, texts: Texts, update_tokens: float
) -> MachineRates:
    """
    Args:
        update_tokens: Of one update; the links are busy once for each micro-batch of it.
    """
    published = published_bytes(workload, config)
    write = SHARED_STORAGE if layout.machines > 1 else LOCAL_WRITE
    read = published * layout.readers / (SHARED_STORAGE if layout.machines > 1 else LOCAL_READ)
    token_s = update_token_seconds(card, layout, workload, config)
    links_s = link_seconds(card, layout, workload, config, update_tokens)
    return MachineRates(
        engine_rates(card, layout, workload.size, texts),
        layout.engines,
        program_s=PROGRAM_S,
        reflection_s=REFLECTION_S,
        # The links work beside the cards: where they take longer, the difference is waited for.
        update_s=optimizer_seconds(card, layout, workload, config) + max(0.0, links_s - update_tokens * token_s),
        update_token_s=token_s,
        publish_s=published / write + read,
        verify_s=published / VERIFIED,
        state_s=state_bytes(workload, config) / write,
    )


def engine_rates(card: CardSheet, layout: Layout, size: ModelSize, texts: Texts) -> EngineRates:
    """One engine of ``layout.group`` cards; one without room for the keys and values of a single text has no rows."""
    bandwidth, flops = layout.group * card.bandwidth * READ_SHARE, layout.group * card.flops * PROMPT_SHARE
    gathered = 2 * size.layers * GATHER_S if layout.group > 1 else 0.0
    context = texts.prompt + texts.replies.mean / 2
    room = layout.cache * layout.group / (2 * size.cached * (texts.prompt + texts.replies.mean))
    return EngineRates(
        step_s=2 * (size.body + size.embedding) / bandwidth + STEP_S + gathered,
        row_s=2 * size.cached * context / bandwidth + 2 * size.parameters / flops,
        prompt_s=2 * size.parameters / flops,
        rows=min(MOST_ROWS, int(room)),
    )


def update_token_seconds(card: CardSheet, layout: Layout, workload: Workload, config: FSTConfig) -> float:
    """Of each token that an update reads, on all of the trainer's cards together."""
    passes = (6 if config.adapter is None else 4) + (2 if layout.trainer.recompute else 0)
    return passes * workload.size.parameters / (layout.trainers * card.flops * UPDATE_SHARE)


def link_seconds(card: CardSheet, layout: Layout, workload: Workload, config: FSTConfig, tokens: float) -> float:
    """Of an update's weights and gradients between the trainer's cards; 0 on one."""
    count = layout.trainers
    link = (card.link if count <= NODE else min(card.link, NETWORK)) * LINK_SHARE
    micro_batches = max(1, -(-int(tokens) // (count * layout.trainer.micro_batch_tokens)))
    return micro_batches * moved_bytes(workload, config) * (count - 1) / count / link


def moved_bytes(workload: Workload, config: FSTConfig) -> int:
    """Of one micro-batch between trainer cards that share the weights (`slow.ranks.sharding`, which names no other
    precision for what it moves than that in which it is kept)."""
    parts = trainer_parts(workload, config, on_gpu=True)
    base = parts.get(BASE, 0)
    reference = (base or parts[REFERENCE]) if with_kl(config) else 0
    return 2 * (base + parts[TRAINED]) + parts[GRADIENTS] + reference


def optimizer_seconds(card: CardSheet, layout: Layout, workload: Workload, config: FSTConfig) -> float:
    """Of AdamW's step."""
    return ADAM_BYTES * trained_numbers(workload, config) / (layout.trainers * card.bandwidth * READ_SHARE)


def published_bytes(workload: Workload, config: FSTConfig) -> int:
    """Of one publish, as the trainer writes it."""
    return writes_of(workload, config, on_gpu=True).weights
