"""A frozen base in 4 or 8 bits below LoRA adapters (QLoRA, Dettmers et al., arXiv 2305.14314).

In: a model whose linear layers are in the precision of the published weights. Out: the same model with these layers
rounded. They are held as codes with scales, and decoded to that precision whenever they are used: in a forward pass, in
its backward pass, and when the base is published. So an engine that reads the published base computes with the numbers
that the trainer computes with.

- ``"nf4"``: bitsandbytes' 4-bit codes with a scale for each 64 numbers, 0.5625 bytes a number. The scales are not
  rounded themselves: a base that was published and is rounded again then keeps every number.
- ``"int8"``: whole numbers from -127 to 127 and a scale for each row, about 1 byte a number. Activations stay as they
  are.

The embedding, the LM head, norms, routers and fused experts are left alone.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dspy_fst.engine.lora_layers import linear_layers
from dspy_fst.errors import TrainingError

Kind = Literal["nf4", "int8"]
BLOCK = 64
"""Numbers that share a scale in nf4 (QLoRA)."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is kept as codes and scales.

    Args:
        linear: The layer that it stands for; it is not changed.
        kind: How its weight is rounded.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, kind: Kind):
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features, self.kind, self.dtype = *reversed(weight.shape), kind, weight.dtype
        codes, scales = _nf4(weight) if kind == "nf4" else _int8(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The rounded weight, in the precision of the layer that it stands for; made anew at each call."""
        if self.kind == "int8":
            return (self.codes.float().div_(127).mul_(self.scales)).to(self.dtype)
        # As one row: with rows that are no multiple of a block, bitsandbytes 0.50.2 takes other scales on some CPUs.
        shape = (1, 2 * self.codes.numel())
        flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit(self.codes, self.scales, BLOCK, "nf4", shape, self.dtype)
        return flat[0, : self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs @ weight.T + bias`` in the weight's precision, as autocast has it."""
        with torch.autocast(inputs.device.type, enabled=False):
            output: Tensor = _Product.apply(inputs.to(self.dtype), self)
        return output if self.bias is None else output + self.bias

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """The layer's state is that of the layer that it stands for. On the CPU: all weights at once may be many."""
        destination[f"{prefix}weight"] = self.weight.cpu()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


class _Product(torch.autograd.Function):
    """``inputs @ weight.T`` that keeps the codes for its backward pass, and not the weight."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, inputs: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer  # type: ignore[attr-defined]
        return F.linear(inputs, layer.weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.weight, None  # type: ignore[attr-defined]


def quantize(model: PreTrainedModel, kind: Kind) -> None:
    """Round the linear layers of a model's text part, in place; those below LoRA adapters too.

    Raises:
        TrainingError: it has none, or bitsandbytes is missing.
    """
    rounded = 0
    for name in linear_layers(model):
        module = model.get_submodule(name)
        parent, last = (module, "base_layer") if hasattr(module, "base_layer") else _place(model, name)
        if isinstance(linear := getattr(parent, last), nn.Linear):
            setattr(parent, last, QuantizedLinear(linear, kind))
            rounded += 1
    if not rounded:
        raise TrainingError(
            f"quantized_base={kind!r}: a {model.config.model_type!r} model has no linear layers that could be rounded; "
            "use quantized_base=None"
        )


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, last = name.rpartition(".")
    return model.get_submodule(parent), last


def _nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError as error:
        raise TrainingError(f"quantized_base='nf4': bitsandbytes cannot be imported ({error})") from error
    flat = weight.float().flatten()
    flat = F.pad(flat, (0, -len(flat) % BLOCK))
    codes, state = quantize_4bit(flat[None], blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    return codes, state.absmax


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.float().abs().amax(dim=1, keepdim=True)
    codes = (weight.float() / scales.clamp(min=torch.finfo(torch.float32).tiny) * 127).round()
    return codes.to(torch.int8), scales
