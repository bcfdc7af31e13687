"""The model of the in-process engine: read from a checkpoint, replaced by the next, compared with it, and scored with.

Who calls this sees to it that nothing is sampled meanwhile.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dspy_fst.engine.base import Checkpoint, Holding
from dspy_fst.engine.chat import PromptRenderer
from dspy_fst.engine.generation import BatchDecoder
from dspy_fst.engine.holding import compare, compare_adapters, head_in_float32
from dspy_fst.engine.lora import put_on_as_read, take_off, takes_rows
from dspy_fst.engine.machine import has_gpu
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.engine.replies import ReplyReader
from dspy_fst.errors import EngineError
from dspy_fst.model_files.architectures import context_length, load_model_with_info
from dspy_fst.model_files.folder import folder_faults, layer_fault
from dspy_fst.model_files.reading import read_tokenizer
from dspy_fst.types import WeightsVersion

SCORED_AT_ONCE = 64
"""Number of tokens whose logits are normalised at once (ours): 39 MiB with a vocabulary of 150k."""


class LoadedModel:
    """What an engine holds of its checkpoint: the weights, the tokenizer, and how both are used."""

    def __init__(self, settings: InProcessSettings):
        self.settings = settings
        self._version: WeightsVersion | None = None
        self._checkpoint: Checkpoint | None = None
        """What the model holds; unlike ``_version`` it may not have been verified."""
        self._base_compared: Path | None = None
        """The base whose tensors were compared since it was read."""
        self._model: Any = None
        self._decoder: Any = None
        self._mixes = False
        """Whether one batch may hold calls of several LoRA adapters and of the base."""
        self._context: int | None = None
        self._tokenizer: Any = None
        self._reader: ReplyReader | None = None
        self._renderer: PromptRenderer | None = None

    def _start(self, checkpoint: Checkpoint) -> None:
        device = self.settings.device or ("cuda" if has_gpu() else "cpu")
        dtype = self.settings.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        self._tokenizer = read_tokenizer(checkpoint.path)
        if faults := list(folder_faults(checkpoint.path)):
            raise EngineError(f"weights {checkpoint.version} at {checkpoint.path} are not served: {'; '.join(faults)}")
        self._reader = ReplyReader.of(self._tokenizer, checkpoint.path)
        self._renderer = PromptRenderer(self._tokenizer, self._reader.traits)
        self._read(checkpoint, device, dtype)

    def _take(self, checkpoint: Checkpoint) -> None:
        """Hold the weights of a checkpoint. A base that is held already is not read again for other adapters on it."""
        if self._model is None:
            self._start(checkpoint)
        elif not (checkpoint.adapters and self._checkpoint and self._checkpoint.path == checkpoint.path):
            self._replace_weights(checkpoint)
        self._version = None  # an error from here on may leave a part of the new weights in the model
        former = self._checkpoint.adapters if self._checkpoint else ()
        for name in {adapter.name for adapter in former} - {adapter.name for adapter in checkpoint.adapters}:
            take_off(self._model, name)
        for adapter in checkpoint.adapters:
            put_on_as_read(self._model, adapter.name, adapter.path)
        self._mixes = len(checkpoint.adapters) > 1 and takes_rows(self._model)
        self._checkpoint = checkpoint

    def _replace_weights(self, checkpoint: Checkpoint) -> None:
        """Replace the served whole weights, or the base, by others of the same model."""
        stored = load_file(checkpoint.path / "model.safetensors")
        self._version = self._base_compared = None
        if stored.keys() == self._model.state_dict().keys():
            self._model.load_state_dict(stored)
            return
        # The tensors have other names or shapes on disk (experts, for example), or adapters are on the model.
        del stored
        device, dtype = self._model.device, self._model.dtype
        self._model = self._decoder = self._checkpoint = None  # frees memory for the new model
        self._read(checkpoint, str(device), dtype)

    def _read(self, checkpoint: Checkpoint, device: str, dtype: str | torch.dtype) -> None:
        model, info = load_model_with_info(checkpoint.path, dtype=dtype)
        if fault := layer_fault(info):
            raise EngineError(f"weights {checkpoint.version} at {checkpoint.path} are not served: {fault}")
        served: nn.Module = model  # transformers decorates its own `to`, and its type is lost there
        self._model = served.to(device).eval()
        head_in_float32(self._model, checkpoint.path)
        self._decoder = BatchDecoder(self._model)
        self._context = context_length(self._model.config)

    def _compare(self, checkpoint: Checkpoint) -> Holding:
        """See `Scorer.held`."""
        if self._model is None:
            raise EngineError("the in-process engine has no weights yet: load a checkpoint first")
        try:
            adapters = compare_adapters(self._model, checkpoint.adapters)
            if checkpoint.adapters and self._base_compared == checkpoint.path:
                return adapters
            base = compare(self._model, checkpoint.path)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"weights {checkpoint.version} at {checkpoint.folder} cannot be read: {error}") from error
        self._base_compared = None if base.wrong else checkpoint.path
        return Holding({**base.digests, **adapters.digests}, {**base.wrong, **adapters.wrong}, base.dtype)

    def _token_logprobs(self, sequence: Sequence[int]) -> list[float]:
        """Scores one sequence, in parts: the logits of all its tokens may need too much memory at once."""
        if len(sequence) < 2:
            return []
        ids = torch.tensor([[*sequence]], device=self._model.device)
        logits = self._model(input_ids=ids).logits[0, :-1]
        parts = zip(logits.split(SCORED_AT_ONCE), ids[0, 1:].split(SCORED_AT_ONCE), strict=True)
        chosen = [part.float().log_softmax(-1).gather(-1, wanted[:, None])[:, 0] for part, wanted in parts]
        return torch.cat(chosen).tolist()

    def _let_go(self) -> None:
        """Free the memory."""
        self._model = self._decoder = self._tokenizer = self._reader = self._renderer = self._version = None
        self._checkpoint = self._base_compared = None
