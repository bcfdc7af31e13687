"""Runs inside vLLM's workers: compares the weights that the forward pass reads with those of a published folder.

vLLM's own digests (`compute_weight_checksums`, 0.32) hash `named_parameters`. On a CPU that proves nothing: a linear
layer's parameter is emptied once oneDNN has packed a private copy, and the copy is what the layer multiplies with. So
the folder goes through the model's own loading, layer by layer into blank tensors, and each is compared with what the
layer uses. A packed layer is asked for its matrix by multiplying it with the identity, which is exact.

This folder is on the server's PYTHONPATH, and the class is named by ``--worker-extension-cls``. Read from vLLM 0.32:
`model_executor/model_loader/reload` (what a reload does, step by step, is done here without the last copy).
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import xxhash
from torch import Tensor, nn

EYE_ROWS = 256
"""Rows of the identity that a packed layer is multiplied with at once; bounds the memory."""


def digest(tensor: Tensor) -> str:
    """XXH3 (128 bits) of a tensor's type, shape and bytes. It finds faults, not forgeries."""
    flat = tensor.detach().cpu().contiguous()
    seen = xxhash.xxh3_128(f"{flat.dtype} {tuple(flat.shape)} ".encode())
    seen.update(flat.view(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()


def difference(used: Tensor, wanted: Tensor) -> str | None:
    """How two tensors differ, in words; None when they are equal, number by number.

    Args:
        used: What the engine reads; ``wanted`` is cast to its type.
        wanted: What it should read. NaN stands for numbers that nobody asks for, such as padding.
    """
    if used.shape != wanted.shape:
        return f"shape {tuple(used.shape)} for {tuple(wanted.shape)}"
    wanted = wanted.to(used.device, used.dtype)
    if torch.equal(used, wanted):
        return None
    wrong = (used != wanted) & (wanted == wanted)
    count = int(wrong.sum())
    if not count:
        return None
    gap = (used[wrong].double() - wanted[wrong].double()).abs().max()
    return f"{count} of {int((wanted == wanted).sum())} numbers, by up to {float(gap):.3g}"


class WeightCheck:
    """Mixed into vLLM's worker class."""

    def dspy_fst_compare(self, folder: str) -> dict[str, Any]:
        """Compare the weights in use with a folder's; no step of the engine runs meanwhile.

        Returns:
            ``"dtype"`` of the body, ``"digests"`` of the folder's tensors as this worker read them, and ``"wrong"``:
            tensor name -> how what is in use differs, empty when all is right.
        """
        runner = self.model_runner  # type: ignore[attr-defined]
        config = copy.copy(runner.vllm_config.model_config)
        config.model, config.model_weights, config.revision = folder, "", None
        comparison = Comparison(runner.get_model(), config)
        comparison.run(_read(runner.vllm_config.load_config, config, comparison.model))
        return {
            "dtype": str(config.dtype).removeprefix("torch."),
            "digests": comparison.digests,
            "wrong": comparison.wrong,
        }


def _read(load_config: Any, model_config: Any, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    from vllm.model_executor.model_loader import get_model_loader

    if not any(Path(model_config.model).glob("*.safetensors")):
        raise FileNotFoundError(f"{model_config.model} holds no *.safetensors file")
    weights: Iterable[tuple[str, Tensor]] = get_model_loader(load_config).get_all_weights(model_config, model)
    return weights


class _Named(list[Any]):
    """The arguments of a layer's loader calls, as vLLM buffers them, and the tensor of the folder behind each."""

    def __init__(self, reading: "Comparison"):
        super().__init__()
        self.reading, self.names = reading, list[str]()

    def append(self, item: Any) -> None:
        self.names.append(self.reading.current)
        super().append(item)


class _Load(NamedTuple):
    """One call of a weight loader."""

    origin: str
    """The folder's tensor."""
    name: str
    """The layer's."""
    arguments: Any


class Comparison:
    """One pass over a folder's weights beside a live model, which is left as it was found."""

    def __init__(self, model: nn.Module, model_config: Any):
        self.model, self.model_config = model, model_config
        self.digests: dict[str, str] = {}
        self.wrong: dict[str, str] = {}
        self.live: dict[nn.Module, dict[str, Any]] = {}
        self.current = ""
        """Name of the tensor that the model's loading was given last."""

    @torch.no_grad()
    def run(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill ``digests`` and ``wrong``."""
        from vllm.model_executor.model_loader.reload import layerwise

        live = {name for name, _ in self.model.named_parameters()}
        with self._set_aside(), mock.patch.object(layerwise, "_layerwise_process", self._compare_layer):
            loaded = self.model.load_weights(self._noting(weights))  # type: ignore[operator]
            for layer in self.model.modules():
                info = layerwise.get_layerwise_info(layer)
                if info.can_load() and info.loaded_weights and not layerwise.is_deferred_attention_layer(layer):
                    self._compare_layer(layer, info)  # parts of it are padding, so it was never full
            self._compare_shielded()
        for name in sorted(live - loaded) if loaded is not None else ():
            self.wrong[name] = "no tensor of the folder is loaded into it"
        for name, layer in self.model.named_modules():
            self._compare_packed_head(name, layer)

    def _noting(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for self.current, tensor in weights:
            self.digests[self.current] = digest(tensor)
            yield self.current, tensor

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Blank tensors in the place of the live ones, which come back whatever happens."""
        from vllm.model_executor.model_loader.reload import layerwise

        kept = [_Kept(layer) for layer in self.model.modules()]
        self.live = {state.layer: state.tensors for state in kept}
        try:
            for layer, tensors in self.live.items():
                _shield(layer, tensors)
            layerwise.initialize_layerwise_reload(self.model)
            for layer in self.live:
                layerwise.get_layerwise_info(layer).loaded_weights = _Named(self)
            yield
        finally:
            for state in kept:
                layerwise.get_layerwise_info(state.layer).reset()
                state.restore()

    def _compare_layer(self, layer: nn.Module, info: Any) -> None:
        """Compare a layer, then let go of its blank tensors: all layers' together would be a second model."""
        empty = _Kept(layer)
        try:
            self._compare_loaded(layer, info)
        finally:
            empty.restore()
            info.reset()

    def _compare_loaded(self, layer: nn.Module, info: Any) -> None:
        """Load what was buffered for a layer into blank tensors and compare them with the live ones."""
        live, buffered = self.live[layer], info.loaded_weights
        loads = [_Load(origin, *load) for origin, load in zip(buffered.names, buffered, strict=True)]
        names = list(dict.fromkeys(load.name for load in loads))
        self._load(layer, info, loads)
        raw = {name: getattr(layer, name) for name in names}
        packed = getattr(layer, "cpu_linear", None)
        wanted = raw if packed is not None else self._processed(layer, names)
        for name in names:
            used = live[name]
            if name == "weight" and packed is not None and used.numel() == 0:
                used = multiplied_out(packed, raw[name].shape[1], used)
            if (how := difference(used, wanted[name])) is not None:
                self._put_down(layer, info, [load for load in loads if load.name == name], used, how)

    def _load(self, layer: nn.Module, info: Any, loads: "list[_Load]") -> None:
        """Run the model's own loaders into blank tensors, NaN where nothing is loaded."""
        from vllm.model_executor.model_loader.reload import layerwise, meta

        templates = {name: tensor for part in info.restore_metadata for name, tensor in part.items()}
        for name in {load.name for load in loads}:
            template = templates[name] if name in templates else meta.to_meta_tensor(self.live[layer][name])
            with info.restore_device:
                blank: Any = meta.materialize_meta_tensor(template)
            blank.fill_(float("nan") if blank.is_floating_point() else 0)
            blank.weight_loader = layerwise._get_original_loader(blank)
            layer._parameters.pop(name, None)
            layer._buffers.pop(name, None)
            setattr(layer, name, blank)
        for load in loads:
            blank = load.arguments.arguments["param"] = getattr(layer, load.name)
            blank.weight_loader(*load.arguments.args, **load.arguments.kwargs)

    def _processed(self, layer: nn.Module, names: list[str]) -> dict[str, Tensor]:
        """What a first load makes of the loaded tensors: repacked experts, quantized weights."""
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

        method = copy.copy(getattr(layer, "quant_method", None))
        if isinstance(method, QuantizeMethodBase):
            # On a reload the experts' kernel, made by the first load, makes vLLM 0.32 leave out the packing on a CPU.
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
            if hasattr(layer, "_already_called_process_weights_after_loading"):
                del layer._already_called_process_weights_after_loading
            method.process_weights_after_loading(layer)
        return {name: getattr(layer, name) for name in names}

    def _compare_shielded(self) -> None:
        """What vLLM loads at once and never buffers, such as a router's correction bias, is in the copies now."""
        from vllm.model_executor.model_loader.reload import meta

        for path, layer in self.model.named_modules():
            for name in meta.SKIP_LOAD_TENSORS & self.live[layer].keys():
                used, read = self.live[layer][name], getattr(layer, name, None)
                if used is not None and read is not None and (how := difference(used, read)) is not None:
                    self.wrong[f"{path}.{name}"] = how

    def _put_down(self, layer: nn.Module, info: Any, loads: "list[_Load]", used: Tensor, how: str) -> None:
        """Put a difference down to those of the folder's tensors, fused into this one, that it lies in."""
        fused = "" if len(loads) == 1 else f", in the {len(loads)} tensors fused with it"
        found: dict[str, str] = {}
        for load in loads:
            self._load(layer, info, [load])
            part = getattr(layer, load.name)
            if part.shape != used.shape or not part.is_floating_point():  # the live one has another layout
                found[load.origin] = how + fused
            elif (own := difference(used, part)) is not None:
                found[load.origin] = own
        # Equal to the file, and yet not what a first load makes of it: the kernel reads it in another order.
        self.wrong |= found or {load.origin: f"{how}{fused}: it is not packed for its kernel" for load in loads}

    def _compare_packed_head(self, name: str, layer: nn.Module) -> None:
        """A head keeps its parameter beside the packed copy; where the copy is multiplied with, it must be the same."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        packed = getattr(layer, "cpu_linear", None)
        if not isinstance(layer, ParallelLMHead) or packed is None or layer.weight.numel() == 0:
            return
        if self.model_config.head_dtype != layer.weight.dtype:
            return  # then vLLM multiplies with the parameter itself
        used = multiplied_out(packed, layer.weight.shape[1], layer.weight)
        if (how := difference(used, layer.weight)) is not None:
            self.wrong.setdefault(f"{name}.weight", f"{how} (a packed copy was left behind)")


def multiplied_out(linear: Any, width: int, weight: Tensor) -> Tensor:
    """The matrix, shape (outputs, ``width``), that a packed layer really multiplies with.

    A row of the identity picks one column: each output is one weight plus zeros, exact in every precision.
    """
    dtype = weight.dtype
    columns = []
    for start in range(0, width, EYE_ROWS):
        rows = torch.zeros(min(EYE_ROWS, width - start), width, dtype=dtype, device=weight.device)
        rows[torch.arange(len(rows)), start + torch.arange(len(rows))] = 1
        columns.append(linear(rows, weight, None))
    return torch.cat(columns).t()


class _Kept:
    """All that a layer holds, to be put back."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.tensors: dict[str, Any] = {**layer._parameters, **layer._buffers}
        self._attributes = dict(layer.__dict__)
        self._tables = {name: copy.copy(getattr(layer, name)) for name in _TABLES}
        self._loaders = {name: getattr(tensor, "weight_loader", None) for name, tensor in self.tensors.items()}

    def restore(self) -> None:
        self.layer.__dict__.clear()
        self.layer.__dict__.update(self._attributes)
        for name, content in self._tables.items():  # in place, for whoever holds the table itself
            table = getattr(self.layer, name)
            table.clear()
            table.update(content)
        for name, tensor in self.tensors.items():
            if self._loaders[name] is not None:
                tensor.weight_loader = self._loaders[name]
            elif hasattr(tensor, "weight_loader"):
                del tensor.weight_loader


_TABLES = ("_parameters", "_buffers", "_non_persistent_buffers_set")


def _shield(layer: nn.Module, tensors: dict[str, Any]) -> None:
    """Put copies in the place of what vLLM's reload leaves on the layer and writes into, such as biases."""
    from vllm.model_executor.model_loader.reload import meta

    tables: list[dict[str, Any]] = [layer._parameters, layer._buffers]
    for table in tables:
        for name in table.keys() & meta.SKIP_TENSORS:
            if (tensor := tensors[name]) is not None:
                twin = tensor.detach().clone()
                twin.__class__, twin.__dict__ = tensor.__class__, dict(tensor.__dict__)
                table[name] = twin
