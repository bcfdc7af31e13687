"""The formulas of the table in `dspy_fst.memory`: bytes of each part from a model's shape. Pure functions."""

from collections.abc import Iterator
from dataclasses import dataclass

from dspy_fst.memory.shape import ModelSize

REPLY = 256
"""Tokens of a typical reply (assumed)."""
HEAP = 1.3
"""Main memory of an update divided by the size of its tensors (measured): the C library's heap keeps holes."""
SMALLEST, LARGEST_ON_CPU, LARGEST_ON_GPU = 256, 4096, 16384
"""Bounds of ``micro_batch_tokens="auto"``: a CPU is fastest at about 4,096 (measured), a GPU at more (assumed)."""
BLOCK_KEYS = 2**14
"""Most keys that a block of attention copies, unless one text alone has more; the trainer cuts its blocks by it."""


@dataclass(frozen=True)
class MicroBatchShape:
    """The counts that decide how much memory a micro-batch takes.

    >>> MicroBatchShape.shared(1000, replies=4, prompt=100, reply=25)
    MicroBatchShape(read=1000, scored=500, kept=2500, masked=62500)
    """

    read: int
    """Tokens that pass through the layers, padding included: R of the table."""
    scored: int
    """Tokens whose logits are needed: N."""
    kept: int = 0
    """Keys that texts attend to which share a beginning, in the largest block of their attention: S. A text of a block
    has a copy of its keys from the root on."""
    masked: int = 0
    """Pairs of a new token of such a text and such a key: M."""

    @classmethod
    def shared(cls, tokens: int, replies: int, prompt: int, reply: int) -> "MicroBatchShape":
        """A micro-batch of ``tokens`` tokens, full of prompts with ``replies`` replies each. Lengths in tokens."""
        groups = tokens / (prompt + replies * reply)
        rows = groups * replies
        kept = min(rows * (prompt + reply), max(BLOCK_KEYS, prompt + reply))
        return cls(tokens, round(rows * reply), *((round(kept), round(kept * reply)) if replies > 1 else (0, 0)))


def expected_micro_batch(tokens: int, replies: int) -> MicroBatchShape:
    """A typical micro-batch: half of it is scored. A prompt is as long as its replies of `REPLY` tokens together."""
    reply = min(REPLY, max(1, tokens // (2 * replies)))
    return MicroBatchShape.shared(tokens, replies, replies * reply, reply)


def extreme_micro_batches(tokens: int, replies: int) -> tuple[MicroBatchShape, MicroBatchShape]:
    """The two extremes: every token is scored; or almost none is, and each reply keeps the keys of a long prompt."""
    reply = max(1, min(16, tokens // (2 * replies)))
    return MicroBatchShape(tokens, tokens), MicroBatchShape.shared(tokens, replies, tokens - replies * reply, reply)


def update_bytes(size: ModelSize, batch: MicroBatchShape, *, with_kl: bool, low: bool, teacher: bool = False) -> int:
    """Peak bytes of one micro-batch, on top of what the trainer always holds.

    Args:
        with_kl: Whether the reference model (the starting weights) reads it too.
        low: Whether the layers compute in bfloat16.
        teacher: Whether the reference model reads other prompts than the policy.
    """
    layers = batch.read * size.layers * _kept_of_token(size, low=low)
    ends = 8 * batch.read * size.width + 4 * batch.scored * size.width
    copies = (batch.kept * 16 * (size.queries + size.keys) + batch.masked * 8) // (2 if low else 1)
    return layers + copies + ends + _casts(size, low=low) + max(_moments(size, batch, with_kl, teacher))


def _moments(size: ModelSize, batch: MicroBatchShape, with_kl: bool, teacher: bool) -> Iterator[int]:
    """Bytes besides what autograd keeps, at each moment that may be the peak."""
    logits = 4 * batch.scored * size.vocabulary
    yield logits * ((5 if with_kl else 3) + teacher)  # the loss and its gradient
    yield logits * 2 + 4 * size.embedding  # the head's gradient
    yield 4 * batch.read * (size.width + size.inner_width) + (
        4 * size.embedding if size.tied else 0
    )  # a layer's gradient
    if with_kl:
        yield logits + 4 * batch.read * (4 * size.width + 3 * size.inner_width)  # the reference's forward pass


def _kept_of_token(size: ModelSize, *, low: bool) -> int:
    """Bytes that autograd keeps for a token in one layer (Llama and Qwen3 in transformers 5.19)."""
    heads = size.queries + size.keys
    if low:
        return 26 * size.width + (10 if size.normed_heads else 4) * heads + 8 * size.inner_width
    return 24 * size.width + (16 if size.normed_heads else 8) * heads + 16 * size.inner_width


def _casts(size: ModelSize, *, low: bool) -> int:
    """Bytes of the bfloat16 copies of the weights; the embedding and the head are not cast."""
    body = size.parameters - size.embedding * (1 if size.tied else 2)
    return 2 * max(0, body) if low else 0
