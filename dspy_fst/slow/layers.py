"""How the layers of a decoder read a micro-batch: prefixes once, then suffixes; kept for the backward pass, or not.

transformers' own gradient checkpointing works in training mode alone, where dropout is on, and takes the cache away,
without which no prefix can be shared. Here a cache has no state that a second pass through a layer would change, so
that each layer may be computed again when its gradient is, with the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from dspy_fst.errors import TrainingError


class _PrefixLayer(DynamicLayer):
    """Keeps the keys and values of the first pass through a layer; another pass gets its own ones back."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        return key_states, value_states


class _SuffixLayer(DynamicLayer):
    """Puts the keys and values of its prefix before those of each suffix, and keeps nothing.

    They are copied by `index_select`, and not by the cache's own batch_select_indices. That one indexes with a tensor,
    whose gradient torch sums in a different order each time on several CPU threads, so a continued run would not be
    bit-equal.
    """

    def __init__(self, keys: Tensor, values: Tensor, prefix_of: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self._prefix_of = keys, values, prefix_of

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        keys = torch.cat([self.keys.index_select(0, self._prefix_of), key_states], dim=-2)
        return keys, torch.cat([self.values.index_select(0, self._prefix_of), value_states], dim=-2)


def prefix_cache() -> DynamicCache:
    """An empty cache for one pass over prefixes."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = _PrefixLayer
    return cache


def suffix_cache(prefixes: DynamicCache, prefix_of: Tensor) -> DynamicCache:
    """A cache for one pass over suffixes.

    Args:
        prefixes: What the pass over the prefixes left.
        prefix_of: The prefix of each suffix, shape (suffixes,).
    """
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    for layer in prefixes.layers:
        assert isinstance(layer, _PrefixLayer)
        assert layer.keys is not None
        assert layer.values is not None
        cache.layers.append(_SuffixLayer(layer.keys, layer.values, prefix_of))
    return cache


def recompute_layers(decoder: nn.Module, again: Callable[[], AbstractContextManager[None]]) -> None:
    """From now on keep a layer's inputs alone; compute the rest again in the backward pass (gradient checkpointing).

    Args:
        again: Called when a layer is computed. Gives the block in which it will be computed again, e.g. with the LoRA
            adapter that is in use now.

    Raises:
        TrainingError: the decoder's layers are not marked as layers that can be computed again.
    """
    layers = list(_outermost(decoder))
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


def _outermost(module: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    """The layers, and not the layers inside them."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _outermost(child)
