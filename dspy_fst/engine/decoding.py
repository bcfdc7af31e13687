"""How a model decodes: what a way of decoding can do, and which one is right for a model, found by a probe.

`dspy_fst.engine.generation` decodes in the way that was chosen here when the model was given.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, Self, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dspy_fst.engine.tree import Ids, attend_in_trees, padded

TOLERANCE, STATE_TOLERANCE = 1e-3, 5e-5
"""Largest relative gap between a way of decoding and the plain forward, in float32, where kernels differ by 1e-6.

A fault in cached keys and values shows at the size of the logits. Recurrent layers may always be off by a little:
Zamba 2 and Nemotron-H bound the time step when they read a text, but not when they read a token (1e-4; 1e-2 nats).
"""
TREE_TOLERANCE = 0.05
"""The same for prompts that are read as a tree in bfloat16. Attention that does not see the tree mixes up the texts."""
Start = tuple[Ids, str | None]
"""What a row begins with: its prompt, and the LoRA adapter that reads it; None: the base or the only one."""


class Decoding(Protocol):
    """Rows of text that grow by one token at a time."""

    logits: Tensor
    """Logits of each row's next token, shape (rows, vocabulary), float32."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may be taken several times."""

    @abstractmethod
    def append(self, tokens: Tensor) -> None:
        """Read one more token in each row; ``tokens`` has shape (rows,)."""

    @abstractmethod
    def join(self, other: Self) -> None:
        """Put the other's rows behind these; only where `DecodingChoice.joins`."""


class DecodingChoice(ABC):
    """What a model allows, from the cheapest way of decoding to the one that is always right.

    Args:
        model: On its device, in eval mode.
        takes_cache: Whether its forward takes a cache.
    """

    def __init__(self, model: PreTrainedModel, *, takes_cache: bool):
        self.model = model
        self.keeps_cache = takes_cache and self._has_plain_cache()
        """Whether keys and values (or states) are kept between tokens."""
        self.equal_lengths_only = False
        """Whether the prompts of a batch must have one length."""
        self.reads_trees = False
        """Whether what prompts have in common at their beginning is read once."""
        self.joins = not self.keeps_cache
        """Whether rows may join others that have begun."""
        if self.keeps_cache:
            self._choose()

    @abstractmethod
    def prefill(self, starts: Sequence[Start]) -> Decoding:
        """Rows that begin so. Equal beginnings are read once. All have one length if `equal_lengths_only`."""

    @abstractmethod
    def plain_logits(self, ids: Tensor) -> Tensor:
        """Logits of every token of some texts, by the model's own forward: shape (rows, tokens, vocabulary)."""

    def _has_plain_cache(self) -> bool:
        try:
            layers = DynamicCache(config=self.model.config).layers
        except Exception:  # the config describes layers that transformers has no cache for
            return False
        return all(hasattr(layer, "reorder_cache") for layer in layers)

    @torch.no_grad()
    def _choose(self) -> None:
        """Choose the first way of decoding whose logits are those of plain forwards.

        In bfloat16 rounding alone is as large as some faults, so there the kinds of layers decide.
        """
        kinds = {type(layer) for layer in DynamicCache(config=self.model.config).layers}
        self.equal_lengths_only = not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        plain = self.model.dtype == torch.float32
        if not plain or (not self.equal_lengths_only and self._agrees(TOLERANCE)):
            self.joins = kinds == {DynamicLayer}
            self.reads_trees = self.joins and self._takes_trees(TOLERANCE if plain else TREE_TOLERANCE)
            return
        self.equal_lengths_only = True
        self.keeps_cache = self._agrees(STATE_TOLERANCE)
        self.equal_lengths_only = self.keeps_cache
        self.joins = not self.keeps_cache

    def _takes_trees(self, tolerance: float) -> bool:
        """Whether decoding after prompts that were read as a tree gives the logits of plain forwards."""
        self.reads_trees = attend_in_trees(self.model)
        return self.reads_trees and self._agrees(tolerance)

    def _agrees(self, tolerance: float) -> bool:
        """Whether decoding a few short texts gives the logits of plain forwards."""
        size = cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings
        texts: list[Ids] = [
            (3, 1, 4, 1, 5, 9, 2, 6),
            (2, 7, 1, 8, 2, 8, 1, 8) if self.equal_lengths_only else (2, 7, 1, 8, 2),
        ]
        if self.reads_trees:
            texts += [(3, 1, 4, 1, 5, 8, 9, 7), (3, 1, 4, 1, 8, 2)]
        try:
            gap = self._gap([tuple(token % size for token in text) for text in texts])
        except Exception:  # a model's own code may refuse such a batch in any way
            return False
        return gap <= tolerance

    def _gap(self, texts: list[Ids]) -> float:
        """Largest gap of the last three tokens' logits, relative to their size.

        The rows change places and one of them is doubled, as it happens in a batch.
        """
        decoding = self.prefill([(text[:-2], None) for text in texts])
        rows = torch.tensor([1, 0, *range(2, len(texts)), 1], device=self.model.device)
        decoding.select(rows)
        selected = [texts[row] for row in rows.tolist()]
        steps = [decoding.logits]
        for place in (-2, -1):
            decoding.append(torch.tensor([text[place] for text in selected], device=self.model.device))
            steps.append(decoding.logits)
        gaps = []
        for row, text in enumerate(selected):
            plain = self.plain_logits(torch.tensor([text], device=self.model.device))[0, -3:].float()
            decoded = torch.stack([logits[row] for logits in steps])
            gaps.append(float((decoded - plain).abs().max() / plain.abs().max().clamp(min=1e-6)))
        return max(gaps)


class UncachedDecoding:
    """Nothing is kept: texts are padded on the right, where no real token looks, and read whole for every token."""

    logits: Tensor

    def __init__(self, decoder: DecodingChoice, prompts: Sequence[Ids]):
        self._decoder = decoder
        self._rows = [list(prompt) for prompt in prompts]
        self._read()

    def select(self, rows: Tensor) -> None:
        self._rows = [list(self._rows[row]) for row in rows.tolist()]
        self.logits = self.logits[rows]

    def append(self, tokens: Tensor) -> None:
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.append(token)
        self._read()

    def join(self, other: Self) -> None:
        self._rows += other._rows
        self.logits = torch.cat([self.logits, other.logits])

    def _read(self) -> None:
        device = self._decoder.model.device
        last = torch.tensor([len(row) - 1 for row in self._rows], device=device)
        logits = self._decoder.plain_logits(padded(self._rows).to(device))
        self.logits = logits[torch.arange(len(self._rows), device=device), last].float()
