"""Reads prompts and then token after token with a transformers model, in the cheapest way that is right for its kind.

Most models read prompts of different lengths side by side, padded on the left, and keep keys and values. In recurrent
layers (Mamba, gated delta nets, short convolutions) padding would pass through the state, so those read one length at a
time. A model whose memory is of a kind of its own reads the whole text again for every token: slow, and right.
"""

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dspy_fst.model_files.architectures import last_position

TOLERANCE, STATE_TOLERANCE = 1e-3, 5e-5
"""Largest relative gap between a way of reading and the plain forward, in float32, where kernels differ by 1e-6.

What goes wrong with keys and values is wrong by the size of the logits. Recurrent layers may be off by little and
always: Zamba 2 and Nemotron-H bound the time step when they read a text, not when they read a token (1e-4; 1e-2 nats).
"""
Ids = tuple[int, ...]


class Reading(Protocol):
    """Rows of text that grow together."""

    logits: Tensor
    """Of each row's next token, shape (rows, vocabulary), float32."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; one may be taken several times."""

    @abstractmethod
    def append(self, tokens: Tensor) -> None:
        """Read one more token in each row, shape (rows,)."""


class BatchReader:
    """A model with the way in which it is read.

    Args:
        model: On its device, in eval mode.
    """

    def __init__(self, model: Any):
        self.model = model
        self._takes = set(inspect.signature(model.forward).parameters)
        self._memory = "past_key_values" if "past_key_values" in self._takes else "cache_params"
        self._last_position = last_position(model.config)
        self.keeps_memory = self._memory in self._takes and self._has_plain_memory()
        self.one_length = False
        """Whether the rows of a batch must be of one length."""
        if self.keeps_memory:
            self._choose()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def begin(self, prompts: Sequence[Ids]) -> Reading:
        """Read prompts, of one length if `one_length`."""
        return _Remembering(self, prompts) if self.keeps_memory else _Rereading(self, prompts)

    def forward(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, memory: DynamicCache | None
    ) -> Tensor:
        """Logits (rows, kept positions, vocabulary): of the last position with a memory, else of all."""
        given: dict[str, Any] = {"attention_mask": mask}
        if positions is not None and "position_ids" in self._takes:
            given["position_ids"] = positions.clamp(min=0, max=self._last_position)
        if memory is not None:
            given[self._memory] = memory
            given |= {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}
        logits: Tensor = self.model(input_ids=ids, use_cache=memory is not None, **given).logits
        return logits

    def _has_plain_memory(self) -> bool:
        try:
            layers = DynamicCache(config=self.model.config).layers
        except Exception:  # a config that describes no layers that transformers knows
            return False
        return all(hasattr(layer, "reorder_cache") for layer in layers)

    @torch.no_grad()
    def _choose(self) -> None:
        """Take the first way that gives what plain forwards give.

        In bfloat16 rounding alone is as large as some faults, so there the kinds of layers decide.
        """
        layers = DynamicCache(config=self.model.config).layers
        self.one_length = not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        if self.model.dtype != torch.float32 or (not self.one_length and self._agrees()):
            return
        self.one_length = True
        self.keeps_memory = self._agrees()
        self.one_length = self.keeps_memory

    def _agrees(self) -> bool:
        size = self.model.get_input_embeddings().num_embeddings
        texts = [(3, 1, 4, 1, 5, 9, 2, 6), (2, 7, 1, 8, 2, 8, 1, 8) if self.one_length else (2, 7, 1, 8, 2)]
        try:
            gap = self._gap([tuple(token % size for token in text) for text in texts])
        except Exception:  # a model's own code may refuse such a batch in any way
            return False
        return gap <= (STATE_TOLERANCE if self.one_length else TOLERANCE)

    def _gap(self, texts: list[Ids]) -> float:
        """Largest gap of the last three tokens' logits, relative to their size; rows change places, and one doubles."""
        reading = self.begin([text[:-2] for text in texts])
        rows = torch.tensor([1, 0, 1], device=self.device)
        reading.select(rows)
        read = [texts[row] for row in rows.tolist()]
        found = [reading.logits]
        for place in (-2, -1):
            reading.append(torch.tensor([text[place] for text in read], device=self.device))
            found.append(reading.logits)
        gaps = []
        for row, text in enumerate(read):
            own = self.forward(torch.tensor([text], device=self.device), None, None, None)[0, -3:].float()
            ours = torch.stack([logits[row] for logits in found])
            gaps.append(float((ours - own).abs().max() / own.abs().max().clamp(min=1e-6)))
        return max(gaps)


class _Remembering:
    """Padded on the left, keys and values (or states) kept."""

    logits: Tensor

    def __init__(self, reader: BatchReader, prompts: Sequence[Ids]):
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # on the left: the next token is last in every row
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self._reader, self._mask = reader, mask.to(reader.device)
        self._memory = DynamicCache(config=reader.model.config)
        self._read(ids.to(reader.device), self._mask.cumsum(-1) - 1)

    def select(self, rows: Tensor) -> None:
        # Not batch_select_indices, which recurrent layers lack, or which leaves their states as they are.
        self._memory.reorder_cache(rows)
        self.logits, self._mask = self.logits[rows], self._mask[rows]

    def append(self, tokens: Tensor) -> None:
        positions = self._mask.sum(-1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self._read(tokens[:, None], positions)

    def _read(self, ids: Tensor, positions: Tensor) -> None:
        mask = None if self._reader.one_length else self._mask
        self.logits = self._reader.forward(ids, mask, positions, self._memory)[:, -1].float()


class _Rereading:
    """Nothing kept: padded on the right, where no real token looks."""

    logits: Tensor

    def __init__(self, reader: BatchReader, prompts: Sequence[Ids]):
        self._reader = reader
        self._rows = [list(prompt) for prompt in prompts]
        self._read()

    def select(self, rows: Tensor) -> None:
        self._rows = [list(self._rows[row]) for row in rows.tolist()]
        self.logits = self.logits[rows]

    def append(self, tokens: Tensor) -> None:
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.append(token)
        self._read()

    def _read(self) -> None:
        width, device = max(map(len, self._rows)), self._reader.device
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in self._rows], device=device)
        last = torch.tensor([len(row) - 1 for row in self._rows], device=device)
        logits = self._reader.forward(ids, None, None, None)
        self.logits = logits[torch.arange(len(self._rows), device=device), last].float()
