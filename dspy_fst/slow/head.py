"""From a model's last hidden states to its logits, in float32: a linear LM head, with constant scales and a cap."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dspy_fst.errors import TrainingError
from dspy_fst.slow.sizes import BLOCK_ROWS

FORM_TOLERANCE = 1e-4
"""Largest relative gap between the measured logits and those of the fitted form; float32 differs by ~1e-6."""
_TINY, _HUGE = 1e-3, 1e6
"""Probe values. Caps are 15 or more: a cap leaves the first value unchanged and clamps the second one."""
_LOCK = threading.Lock()
_inside = 0
_before = "highest"


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part that turns token ids into hidden states: no LM head, no vision or audio tower.

    Raises:
        TrainingError: the model has no such part of its own.
    """
    kind = model.config.model_type
    decoder: nn.Module = model.get_decoder()
    if decoder is model:  # transformers' own search does not find Llama 4's
        decoder = getattr(model, "model", model)
    if decoder is model:
        raise TrainingError(
            f"model type {kind!r} cannot be trained: its layers cannot be told from its LM head; "
            "choose a causal language model of another type"
        )
    return decoder


@dataclass(frozen=True)
class Head:
    """``logits = bounded(scale * head(before * hidden))``; ``bounded(x) = cap * tanh(x / cap)`` when there is a cap.

    Granite divides its logits by ``logits_scaling``, Cohere multiplies them by ``logit_scale``, Falcon-H1 by
    ``lm_head_multiplier``; Gemma 2, 3n and 4 cap them. The constants are measured rather than looked up: a hook
    replaces the output of the head by known numbers, and the model's own forward shows what it does to them.
    """

    before: float = 1.0
    """Factor on the hidden states, before the head."""
    scale: float = 1.0
    """Factor on the head's output."""
    cap: float | None = None
    """Bound of the logits, e.g. 30.0 in Gemma 2; None: no bound."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> "Head":
        """Measure the constants of a model's head.

        Raises:
            TrainingError: the model has no linear LM head, or its logits do not have this form.
        """
        kind = f"model type {model.config.model_type!r} cannot be trained"
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise TrainingError(f"{kind}: it has no linear LM head; choose a causal language model that has one")
        numbers = [_TINY, _HUGE, *(sign * 2.0**power for power in range(-8, 11) for sign in (-1, 1))]
        values = torch.tensor(numbers, dtype=torch.float32)
        values = values[torch.arange(head.out_features) % len(values)]
        seen: dict[str, Tensor] = {}

        def replace_output(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen["input"] = inputs[0]
            return values.to(output).expand_as(output)

        def record_hidden(_: nn.Module, __: object, output: Sequence[Tensor]) -> None:
            seen["hidden"] = output[0]

        hooks = [head.register_forward_hook(replace_output), decoder_of(model).register_forward_hook(record_hidden)]
        try:
            logits = model(torch.tensor([[1, 2, 3]], device=head.weight.device), use_cache=False).logits[0, -1].float()
        finally:
            for hook in hooks:
                hook.remove()
        if set(seen) != {"input", "hidden"} or logits.shape != values.shape:
            raise TrainingError(f"{kind}: its logits are not those of its LM head; choose a model with a plain LM head")
        measured = cls(_ratio(seen["input"][0, -1], seen["hidden"][0, -1]), *_scale_and_cap(logits))
        gap = (measured.bounded(values) - logits).abs() / logits.abs().clamp(min=_TINY)
        if not float(gap.max()) <= FORM_TOLERANCE:
            raise TrainingError(
                f"{kind}: it changes its logits after the head by more than a constant factor and a tanh cap; "
                "choose a model with a plain LM head"
            )
        return measured

    def __call__(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """Float32 logits, shape (N, V), from hidden states of shape (N, d)."""
        return self.bounded(linear(self.scaled(hidden), head))

    def scaled(self, hidden: Tensor) -> Tensor:
        """What the linear head is given, float32."""
        return hidden.float() if self.before == 1.0 else hidden.float() * self.before

    def bounded(self, logits: Tensor) -> Tensor:
        """The model's logits, from the output of its linear head."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


def linear(hidden: Tensor, head: nn.Linear) -> Tensor:
    """The head's output in float32. A weight in another type is converted a block at a time, never whole."""
    bias = None if head.bias is None else head.bias.float()
    if head.weight.dtype == torch.float32:
        return F.linear(hidden, head.weight, bias)
    blocks = [F.linear(hidden, block.float()) for block in head.weight.split(BLOCK_ROWS)]
    output = torch.cat(blocks, dim=-1)
    return output if bias is None else output.add_(bias)


def times_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """``gradient @ weight`` in float32, shapes (N, V) and (V, d) -> (N, d), with the same care."""
    if weight.dtype == torch.float32:
        return gradient @ weight
    total = gradient.new_zeros(len(gradient), weight.shape[1])
    for columns, block in zip(gradient.split(BLOCK_ROWS, dim=-1), weight.split(BLOCK_ROWS), strict=True):
        total.addmm_(columns, block.float())
    return total


def add_outer(weight: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """Add ``gradient.T @ inputs`` to the weight's gradient, shapes (N, V) and (N, d).

    The sum is rounded as autograd rounds it, product first. Only a block of the product exists at a time.
    """
    if weight.grad is None:
        weight.grad = gradient.T @ inputs
        return
    for into, columns in zip(weight.grad.split(BLOCK_ROWS), gradient.split(BLOCK_ROWS, dim=-1), strict=True):
        into.add_(columns.T @ inputs)


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to the parameter's gradient, which may be None."""
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _scale_and_cap(logits: Tensor) -> tuple[float, float | None]:
    """Scale and cap, from the logits of the first two probe values, `_TINY` and `_HUGE`."""
    tiny, huge = logits[:2].tolist()
    scale = _exact(tiny / _TINY)
    return scale, None if abs(huge) > abs(scale) * _HUGE / 2 else huge


def _ratio(head_input: Tensor, hidden: Tensor) -> float:
    """The factor between the hidden states and what the head is given."""
    head_input, hidden = head_input.flatten().double(), hidden.flatten().double()
    return _exact(float(head_input @ hidden / (hidden @ hidden)))


def _exact(value: float) -> float:
    """Exactly 1.0 for a value near 1, so that a head without a factor is not rounded by one."""
    return 1.0 if abs(value - 1.0) < 1e-5 else value


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """A block in which float32 products keep all 24 bits. The process's own setting is restored at its end.

    A caller's autocast is off inside.

    ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1`` (set in NVIDIA's containers) and `torch.set_float32_matmul_precision` allow
    rounding to TF32 or bfloat16. The float32 LM head would then be float32 in name only. The setting belongs to the
    whole process, so it is restored when the last of several concurrent blocks ends.
    """
    global _inside, _before
    with _LOCK:
        if not _inside:
            _before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        _inside += 1
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                torch.set_float32_matmul_precision(_before)
