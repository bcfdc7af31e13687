"""The formulas of the table in `dspy_fst.memory`: bytes of each part from a model's shape. Pure functions."""

from dataclasses import dataclass

from dspy_fst.memory.shape import ModelSize
from dspy_fst.slow.sizes import BLOCK_ROWS, CHUNK_LOGITS, CHUNK_TENSORS, CHUNK_TENSORS_WITHOUT_KL

REPLY = 256
"""Tokens of a typical reply (assumed)."""
HEAP = 1.3
"""Main memory of an update divided by the size of its tensors (measured): small ones lie in a heap with holes."""
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


@dataclass(frozen=True)
class Update:
    """How an update is computed, as far as its memory depends on it."""

    with_kl: bool
    """Whether the reference model (the starting weights) reads the micro-batch too."""
    low: bool
    """Whether the layers compute in bfloat16."""
    on_gpu: bool = False
    recompute: bool = False
    """Gradient checkpointing: each layer's inputs alone are kept, and one layer at a time is computed again."""
    frozen: bool = False
    """Whether the weights are the frozen base of a LoRA adapter, which is stored in the precision of the body."""


def update_bytes(size: ModelSize, batch: MicroBatchShape, update: Update) -> int:
    """Peak bytes of one micro-batch, on top of what the trainer always holds."""
    ends = 8 * batch.read * size.width + (12 if update.with_kl else 8) * batch.scored * size.width
    casts = 2 * size.body if update.low and not update.frozen else 0  # copies of the weights
    policy = (
        _layers(size, batch, update) + ends + max(_chunk(size, batch, update), _layer_gradient(size, batch, update))
    )
    return casts + max(policy, _reference(size, batch) if update.with_kl else 0)


def _layers(size: ModelSize, batch: MicroBatchShape, update: Update) -> int:
    """What the layers keep for the backward pass, and one layer's copies of the keys of shared beginnings."""
    layer = batch.read * _kept_of_token(size, low=update.low)
    copies = (batch.kept * 16 * (size.queries + size.keys) + batch.masked * 8) // (2 if update.low else 1)
    if not update.recompute:
        return size.layers * layer + copies
    return layer + size.layers * 4 * size.width * batch.read + copies


def _chunk(size: ModelSize, batch: MicroBatchShape, update: Update) -> int:
    """The logits of a chunk and what is made of them (`slow.head`), and a block of the head's gradient."""
    tokens = min(batch.scored, max(1, CHUNK_LOGITS["cuda" if update.on_gpu else "cpu"] // size.vocabulary))
    tensors = CHUNK_TENSORS if update.with_kl else CHUNK_TENSORS_WITHOUT_KL
    return 4 * tensors * tokens * size.vocabulary + 4 * min(size.vocabulary, BLOCK_ROWS) * size.width


def _layer_gradient(size: ModelSize, batch: MicroBatchShape, update: Update) -> int:
    """A layer's gradients on their way; the embedding's, where the head shares its weight."""
    embedding = 4 * size.embedding if size.tied and not update.frozen else 0
    return 4 * batch.read * (size.width + size.inner_width) + embedding


def _reference(size: ModelSize, batch: MicroBatchShape) -> int:
    """The reference's own pass, before the policy's."""
    return 4 * batch.scored * size.width + 4 * batch.read * (4 * size.width + 3 * size.inner_width)


def _kept_of_token(size: ModelSize, *, low: bool) -> int:
    """Bytes that autograd keeps for a token in one layer (Llama and Qwen3 in transformers 5.19)."""
    heads = size.queries + size.keys
    if low:
        return 26 * size.width + (10 if size.normed_heads else 4) * heads + 8 * size.inner_width
    return 24 * size.width + (16 if size.normed_heads else 8) * heads + 16 * size.inner_width
