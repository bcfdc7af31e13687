"""A causal LM as the slow step sees it: token ids in, FP32 logits out, only where a token is predicted."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dspy_fst.errors import TrainingError

PROBE_TOLERANCE = 1e-3
"""Largest relative gap between our logits and the model's own on the probe; FP32 kernels differ by ~1e-6."""


class Policy(nn.Module):
    """Wraps a model so that one forward is all a training or scoring step needs.

    The body runs in float32, or in bfloat16 autocast when ``body_dtype`` says so. Hidden states are picked at the
    predicting positions first, and only they meet the LM head, in float32 (ScaleRL, 2510.13786: an FP32 head
    lifts the asymptote from 0.52 to 0.61). Parameters are always float32: at the learning rates of RL most
    updates of a bfloat16 parameter round away. Dropout stays off: training scores what was sampled.

    An adapter (LoRA) goes in where ``model`` comes in: only parameters that require a gradient are trained.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model.eval()
        self.body_dtype = torch.float32

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype, trainable: bool = True) -> "Policy":
        """Read a Hugging Face folder (or hub name) in float32 and check that its logits can be computed here."""
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        policy = cls(model.requires_grad_(trainable))
        policy._check_logits()
        policy.body_dtype = dtype
        return policy

    def forward(self, input_ids: Tensor, predict_at: Tensor) -> Tensor:
        """Logits, shape (N, V), float32, at the N positions ``predict_at`` of the flattened ``input_ids``."""
        device = input_ids.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.body_dtype == torch.bfloat16):
            hidden = self.model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        with torch.autocast(device, enabled=False):
            picked = hidden.flatten(0, 1).index_select(0, predict_at).float()
            return F.linear(picked, head.weight.float(), None if head.bias is None else head.bias.float())

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Refuse a model that scales or soft-caps its logits after the head, or whose padding is looked at."""
        ids = torch.arange(1, 9).remainder(self.model.config.get_text_config().vocab_size).view(1, -1)
        own = self.model(ids, use_cache=False).logits[0].float()
        ours = self(F.pad(ids, (0, 4)), torch.arange(ids.shape[1]))
        gap = float((ours - own).abs().max() / own.abs().max().clamp(min=1e-6))
        if not gap <= PROBE_TOLERANCE:
            raise TrainingError(
                f"model type {self.model.config.model_type!r} cannot be trained: its logits differ from "
                f"lm_head(hidden states) by {gap:.2g} of their size, so it scales or caps them in its own way; "
                "choose a model with a plain LM head"
            )
