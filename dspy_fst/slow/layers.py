"""Gradient checkpointing: each layer of a decoder is computed again when its gradient is, with the same bits.

transformers' own works in training mode alone, where dropout is on.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from dspy_fst.errors import TrainingError


def recompute_layers(decoder: nn.Module, again: Callable[[], AbstractContextManager[None]]) -> None:
    """From now on keep a layer's inputs alone; compute the rest again in the backward pass (gradient checkpointing).

    Args:
        again: Called when a layer is computed. Gives the block in which it will be computed again, e.g. with the LoRA
            adapter that is in use now.

    Raises:
        TrainingError: the decoder's layers are not marked as layers that can be computed again.
    """
    layers = list(outermost_layers(decoder))
    if not layers:
        raise TrainingError(
            f"gradient_checkpointing: {type(decoder).__name__} has no layers that can be computed again; set "
            "gradient_checkpointing=False"
        )
    for layer in layers:
        layer.forward = _Recomputed(layer.forward, again)


class _Recomputed:
    """A layer's forward that keeps its inputs alone."""

    def __init__(self, forward: Callable[..., object], again: Callable[[], AbstractContextManager[None]]):
        self._forward, self._again = forward, again

    def __call__(self, *args: object, **kwargs: object) -> object:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        again = self._again()
        return checkpoint(
            partial(self._forward, **kwargs),
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn: dropout is off
            context_fn=lambda: (nullcontext(), again),
        )


def outermost_layers(module: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    """A model's layers, and not the layers inside them."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from outermost_layers(child)
