"""A causal LM as the slow step sees it: micro-batches in, FP32 logits out, only where a token is predicted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dspy_fst.errors import TrainingError
from dspy_fst.model_files.architectures import last_position, load_model
from dspy_fst.model_files.folder import folder_faults, layer_fault, wrapped_names
from dspy_fst.slow.batching import MicroBatch, Scored, micro_batches
from dspy_fst.slow.head import Head, decoder_of

PROBE_TOLERANCE = 1e-3
"""Largest relative gap between our logits and the model's own on the probe; FP32 kernels differ by ~1e-6."""


class Policy(nn.Module):
    """Wraps a model so that one forward is all a training or scoring step needs.

    The body runs in float32, or in bfloat16 autocast when ``body_dtype`` says so. Hidden states are picked at the
    predicting positions first, and only they meet the LM head, in float32 (ScaleRL, 2510.13786: an FP32 head
    lifts the asymptote from 0.52 to 0.61). Parameters are always float32: at the learning rates of RL most
    updates of a bfloat16 parameter round away. Dropout stays off: training scores what was sampled. Of a multimodal
    model the part that reads and writes text is trained.

    Raises:
        TrainingError: the model holds an adapter (LoRA) or a parametrization. The head's weight is read past what wraps
            it, so a LoRA on it would have no gradient; and no loader knows the names that would be published.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        _refuse_wrapped(model)
        self.model = model.eval()
        self.body_dtype = torch.float32
        self.shares_prompts = False
        """Whether a micro-batch may hold a common prompt once; set by :meth:`load` when the model can do it."""
        self.head = Head()
        """What the model does after its last hidden states; set by :meth:`load`."""
        self.last_position = last_position(model.config)
        """Where a text must end, see `architectures.last_position`; None: anywhere."""

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype, trainable: bool = True) -> "Policy":
        """Read a Hugging Face folder (or hub name) in float32 and check that its logits can be computed here.

        Raises:
            TrainingError: some of its layers are not in the files, or its logits cannot be computed here.
        """
        if faults := list(folder_faults(Path(path))):
            raise TrainingError(f"{path}: {'; '.join(faults)}")
        model, told = load_model(path, dtype=torch.float32, output_loading_info=True)
        _refuse_random_layers(path, told)
        policy = cls(model)
        policy._set_trainable(trainable)
        policy._probe()
        policy.body_dtype = dtype
        return policy

    def forward(self, batch: MicroBatch) -> Tensor:
        """Logits, shape (N, V), float32, one row for every scored token of the micro-batch."""
        device = batch.prefix_ids.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.body_dtype == torch.bfloat16):
            hidden = self._hidden(batch)
        with torch.autocast(device, enabled=False):
            return self.head(self.model.get_output_embeddings(), hidden.index_select(0, batch.predict_at))

    def _hidden(self, batch: MicroBatch) -> Tensor:
        """Last hidden states, shape (positions, d): of all prefixes, padding included, then of all suffixes."""
        decoder = decoder_of(self.model)
        alone = batch.suffix_ids.shape[1] == 0
        prefixes = decoder(input_ids=batch.prefix_ids, use_cache=not alone)
        if alone:
            return prefixes.last_hidden_state.flatten(0, 1)
        cache = prefixes.past_key_values
        _copy_prefixes(cache, batch.prefix_of)
        lengths = batch.prefix_lengths[batch.prefix_of, None]
        positions = torch.arange(batch.prefix_ids.shape[1], device=lengths.device)
        steps = torch.arange(batch.suffix_ids.shape[1], device=lengths.device)
        suffixes = decoder(
            input_ids=batch.suffix_ids,
            attention_mask=torch.cat([(positions < lengths).long(), torch.ones_like(batch.suffix_ids)], dim=1),
            # Padding is never read; but a position that does not exist would fail, or turn the factors of them all.
            position_ids=(lengths + steps).clamp(min=0, max=self.last_position),
            past_key_values=cache,
            use_cache=True,
        )
        return torch.cat([prefixes.last_hidden_state.flatten(0, 1), suffixes.last_hidden_state.flatten(0, 1)])

    def _set_trainable(self, trainable: bool) -> None:
        """Gradients for the text part; a vision or audio tower that no text passes through has none."""
        self.model.requires_grad_(False)
        for part in (decoder_of(self.model), self.model.get_output_embeddings()):
            if part is not None:
                part.requires_grad_(trainable)

    @torch.no_grad()
    def _probe(self) -> None:
        """Compare with the model's own logits: refuse what differs, share prompts where it makes no difference."""
        kind = f"model type {self.model.config.model_type!r} cannot be trained"
        vocabulary = self.model.get_input_embeddings().num_embeddings
        texts = [((1, 2, 3, 4, 5, 2, 3), 3), ((1, 2, 3, 6, 7, 8), 3), ((9, 1, 5, 3), 2), ((1, 2, 3, 4), 3)]
        texts = [(tuple(token % vocabulary for token in text), start) for text, start in texts]
        try:
            self.head = Head.of(self.model)
            own = torch.cat(
                [self.model(torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1] for ids, start in texts]
            )
            gap = self._gap(texts, own, share=False)
            early = self.model(torch.tensor([texts[0][0][:4]]), use_cache=False).logits[0, 2:]
            # Windowed, recurrent and hybrid models keep other memories than every token's key and value.
            cache = self.model(torch.tensor([texts[0][0]]), use_cache=True).get("past_key_values")
        except TrainingError:
            raise
        except Exception as error:  # a model's own code may fail in any way
            raise TrainingError(
                f"{kind}: scoring a few tokens with it failed ({type(error).__name__}: {error}); choose a causal "
                "language model that transformers can run by itself"
            ) from error
        if not float((early - own[:2]).abs().max() / own.abs().max().clamp(min=1e-6)) <= PROBE_TOLERANCE:
            raise TrainingError(
                f"{kind}: what it says of a token depends on the tokens behind it, so it cannot sample what it scores; "
                "choose a causal language model"
            )
        if not gap <= PROBE_TOLERANCE:
            raise TrainingError(
                f"{kind}: its logits differ from those of its head over its hidden states by {gap:.2g} of their size; "
                "choose a model with a plain LM head"
            )
        plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
        self.shares_prompts = plain and self._gap(texts, own, share=True) <= PROBE_TOLERANCE

    def _gap(self, texts: list[tuple[tuple[int, ...], int]], own: Tensor, *, share: bool) -> float:
        """Largest gap to the model's own logits at the scored tokens of the texts, relative to their size."""
        (batch,) = micro_batches([Scored(ids, start) for ids, start in texts], 1000, share=share)
        rows = dict(zip(batch.members, self(batch).split(batch.tokens), strict=True))
        ours = torch.cat([rows[index] for index in range(len(texts))])
        return float((ours - own).abs().max() / own.abs().max().clamp(min=1e-6))


def _copy_prefixes(cache: DynamicCache, prefix_of: Tensor) -> None:
    """Give each suffix the keys and values of its prefix, to whose gradient all copies add.

    Not the cache's own batch_select_indices: it indexes with a tensor, and on several CPU threads torch adds up the
    gradient of that in another order each time. A continued run would not be the same bit for bit.
    """
    for layer in cache.layers:
        layer.keys, layer.values = (kept.index_select(0, prefix_of) for kept in (layer.keys, layer.values))


def _refuse_random_layers(path: str | Path, told: Mapping[str, Any]) -> None:
    if fault := layer_fault(told):
        raise TrainingError(f"{path}: {fault}")


def _refuse_wrapped(model: nn.Module) -> None:
    if found := wrapped_names(name for name, _ in model.named_modules()):
        raise TrainingError(
            f"the model holds an adapter or a parametrization ({found[0]}), and the trainer trains whole weights; "
            "merge it (merge_and_unload) and give the merged model"
        )
