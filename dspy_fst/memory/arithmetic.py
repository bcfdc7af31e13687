"""The arithmetic of the table in `dspy_fst.memory`: bytes of each part, from a model's shape. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from dspy_fst.memory.shape import ModelSize

REPLY = 256
"""Tokens of a reply in what is expected (assumed)."""
HEAP = 1.3
"""Main memory over what the tensors of an update take: the C library's heap keeps holes (measured)."""
SMALLEST, LARGEST_ON_CPU, LARGEST_ON_GPU = 256, 4096, 16384
"""Bounds of ``micro_batch_tokens="auto"``: a CPU is fastest at about 4,096 (measured), a GPU at more (assumed)."""


@dataclass(frozen=True)
class Reading:
    """What one micro-batch is made of. Counts of tokens."""

    read: int
    """That pass through the layers, padding included."""
    scored: int
    """That need their logits, N."""
    kept: int = 0
    """Keys that replies look at where they share prompts: for every reply its prompt's and its own."""
    masked: int = 0
    """Pairs of a reply's token and such a key."""

    @classmethod
    def shared(cls, tokens: int, replies: int, prompt: int, reply: int) -> "Reading":
        """As many prompts with ``replies`` replies to each as ``tokens`` tokens hold."""
        groups = tokens / (prompt + replies * reply)
        rows = groups * replies
        kept = rows * (prompt + reply)
        return cls(tokens, round(rows * reply), *((round(kept), round(kept * reply)) if replies > 1 else (0, 0)))


def expected_reading(tokens: int, replies: int) -> Reading:
    """Half of what is read is scored: replies of `REPLY` tokens after a prompt as long as all of them."""
    reply = min(REPLY, max(1, tokens // (2 * replies)))
    return Reading.shared(tokens, replies, replies * reply, reply)


def extreme_readings(tokens: int, replies: int) -> tuple[Reading, Reading]:
    """All that is read is scored; or hardly anything, and every prompt's keys are kept once for each of its replies."""
    reply = max(1, min(16, tokens // (2 * replies)))
    return Reading(tokens, tokens), Reading.shared(tokens, replies, tokens - replies * reply, reply)


def update_bytes(size: ModelSize, reading: Reading, *, with_kl: bool, low: bool, teacher: bool = False) -> int:
    """What one micro-batch takes at its worst moment, beside what the trainer holds anyway.

    Args:
        with_kl: Whether the frozen start reads it too.
        low: Whether the body computes in bfloat16.
        teacher: Whether the start reads other prompts than the policy.
    """
    layers = reading.read * size.layers * _kept_of_token(size, low=low)
    shared = size.layers * (reading.kept * 8 * size.queries + reading.masked * 4) // (2 if low else 1)
    ends = 8 * reading.read * size.width + 4 * reading.scored * size.width
    return layers + shared + ends + _casts(size, low=low) + max(_moments(size, reading, with_kl, teacher))


def _moments(size: ModelSize, reading: Reading, with_kl: bool, teacher: bool) -> Iterator[int]:
    """What is there besides what autograd keeps, at the moments that may be the worst."""
    logits = 4 * reading.scored * size.vocabulary
    yield logits * ((5 if with_kl else 3) + teacher)  # the loss and its gradient
    yield logits * 2 + 4 * size.embedding  # the head's gradient
    yield 4 * reading.read * (size.width + size.inner_width) + (4 * size.embedding if size.tied else 0)  # a layer's
    if with_kl:
        yield logits + 4 * reading.read * (4 * size.width + 3 * size.inner_width)  # the start's forward


def _kept_of_token(size: ModelSize, *, low: bool) -> int:
    """Bytes that autograd keeps of a token in one layer (Llama and Qwen3 in transformers 5.19)."""
    heads = size.queries + size.keys
    if low:
        return 26 * size.width + (10 if size.normed_heads else 4) * heads + 8 * size.inner_width
    return 24 * size.width + (16 if size.normed_heads else 8) * heads + 16 * size.inner_width


def _casts(size: ModelSize, *, low: bool) -> int:
    """Copies of the body's weights; neither the embedding nor the head is cast."""
    body = size.parameters - size.embedding * (1 if size.tied else 2)
    return 2 * max(0, body) if low else 0
