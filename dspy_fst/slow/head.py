"""What a model does between its last hidden states and its logits: a linear head, scaled and capped by constants."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dspy_fst.errors import TrainingError

FORM_TOLERANCE = 1e-4
"""Largest relative gap between the measured function and its form; float32 differs by ~1e-6."""
_TINY, _HUGE = 1e-3, 1e6
"""A cap does not bend the one (caps are 15 or more) and swallows the other."""


def decoder_of(model: Any) -> nn.Module:
    """What makes hidden states of token ids: the model without its LM head, and without the towers of other senses.

    Raises:
        TrainingError: it cannot be found.
    """
    found: Any = model.get_decoder()
    if found is model:  # transformers' own search misses Llama 4's
        found = getattr(model, "model", model)
    if found is model:
        raise TrainingError(
            f"model type {model.config.model_type!r} cannot be trained: its layers cannot be told from its LM head; "
            "choose a causal language model of another type"
        )
    decoder: nn.Module = found
    return decoder


@dataclass(frozen=True)
class Head:
    """``logits = bounded(scale * head(before * hidden))``; ``bounded(x) = cap * tanh(x / cap)`` when there is a cap.

    Granite divides its logits by ``logits_scaling``, Cohere multiplies them by ``logit_scale``, Falcon-H1 by
    ``lm_head_multiplier``; Gemma 2, 3n and 4 cap them. All of that is measured, not looked up: numbers are put in the
    place of what the head computes, and the model's own forward shows what becomes of them.
    """

    before: float = 1.0
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> "Head":
        """Measure the model's own head.

        Raises:
            TrainingError: it has none, or does something else to its logits.
        """
        kind = f"model type {model.config.model_type!r} cannot be trained"
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise TrainingError(f"{kind}: it has no linear LM head; choose a causal language model that has one")
        numbers = [_TINY, _HUGE, *(sign * 2.0**power for power in range(-8, 11) for sign in (-1, 1))]
        values = torch.tensor(numbers, dtype=torch.float32)
        values = values[torch.arange(head.out_features) % len(values)]
        seen: dict[str, Tensor] = {}

        def replaced(_: nn.Module, given: tuple[Tensor, ...], computed: Tensor) -> Tensor:
            seen["given"] = given[0]
            return values.to(computed).expand_as(computed)

        def noted(_: nn.Module, __: Any, output: Any) -> None:
            seen["hidden"] = output[0]

        hooks = [head.register_forward_hook(replaced), decoder_of(model).register_forward_hook(noted)]
        try:
            logits = model(torch.tensor([[1, 2, 3]], device=head.weight.device), use_cache=False).logits[0, -1].float()
        finally:
            for hook in hooks:
                hook.remove()
        if set(seen) != {"given", "hidden"} or logits.shape != values.shape:
            raise TrainingError(f"{kind}: its logits are not those of its LM head; choose a model with a plain LM head")
        found = cls(_ratio(seen["given"][0, -1], seen["hidden"][0, -1]), *_form(values, logits))
        gap = (found.bounded(values) - logits).abs() / logits.abs().clamp(min=_TINY)
        if not float(gap.max()) <= FORM_TOLERANCE:
            raise TrainingError(
                f"{kind}: what it does to its logits after the head is neither a constant factor nor a cap of tanh; "
                "choose a model with a plain LM head"
            )
        return found

    def __call__(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """Logits in float32, shape (N, V), of the hidden states (N, d)."""
        picked = hidden.float() if self.before == 1.0 else hidden.float() * self.before
        return self.bounded(F.linear(picked, head.weight.float(), None if head.bias is None else head.bias.float()))

    def bounded(self, logits: Tensor) -> Tensor:
        """What the model does with what its head computes."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


def _form(values: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """Scale and cap, read off at the first two values."""
    tiny, huge = logits[:2].tolist()
    scale = _exact(tiny / _TINY)
    return scale, None if abs(huge) > abs(scale) * _HUGE / 2 else huge


def _ratio(given: Tensor, hidden: Tensor) -> float:
    given, hidden = given.flatten().double(), hidden.flatten().double()
    return _exact(float(given @ hidden / (hidden @ hidden)))


def _exact(value: float) -> float:
    """1 where it was meant: a head that does nothing must cost nothing, not even a rounding."""
    return 1.0 if abs(value - 1.0) < 1e-5 else value
