"""Runs inside vLLM's workers: compares the weights that the forward pass uses with those of a published folder.

vLLM's own digests (`compute_weight_checksums`, 0.32) hash `named_parameters`. On a CPU that proves nothing: oneDNN
packs a private copy of a linear layer's weight, the layer multiplies with that copy, and the parameter is emptied. So
the folder is loaded layer by layer into blank tensors, by the model's own loaders, and each tensor is compared with the
one that the layer uses. A packed matrix is read by multiplying the layer with the identity, which is exact.

This folder is on the server's PYTHONPATH, and ``--worker-extension-cls`` names the class. Read from vLLM 0.32,
`model_executor/model_loader/reload`: the steps of a reload are repeated here, without the last one, which copies.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import xxhash
from torch import Tensor, nn

EYE_ROWS = 256
"""Rows of the identity that a packed layer is multiplied with at once, to bound the memory."""


def digest(tensor: Tensor) -> str:
    """XXH3 (128 bits) of a tensor's type, shape and bytes. It detects faults, but not forgeries."""
    flat = tensor.detach().cpu().contiguous()
    hashed = xxhash.xxh3_128(f"{flat.dtype} {tuple(flat.shape)} ".encode())
    hashed.update(flat.view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def difference(used: Tensor, wanted: Tensor) -> str | None:
    """How two tensors differ, in words; None if all their numbers are equal.

    Args:
        used: The tensor in use; ``wanted`` is cast to its type.
        wanted: The tensor that should be in use. NaN marks numbers that are not compared, such as padding.
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


def require_heard(parallel: object, wrong: Mapping[str, str]) -> None:
    """Raise where a difference would not be told: vLLM returns the answer of the first data-parallel engine alone.

    A call fails if it fails in any engine (0.32, `v1/engine/core_client.py`, `DPLBAsyncMPClient.call_utility_async`).

    Args:
        parallel: vLLM's parallel config of this worker.
        wrong: Tensor -> how it differs.

    Raises:
        RuntimeError: this is another engine, and some tensor differs.
    """
    engine = getattr(parallel, "data_parallel_index", 0)
    if engine and wrong:
        name, how = next(iter(wrong.items()))
        raise RuntimeError(f"data-parallel engine {engine} uses other weights, e.g. {name} ({how})")


def answer(vllm_config: Any, digests: Mapping[str, str], wrong: Mapping[str, str]) -> dict[str, object]:
    """What a worker says of a comparison; see `WeightCheck.dspy_fst_compare`."""
    require_heard(vllm_config.parallel_config, wrong)
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return {"dtype": dtype, "digests": digests, "wrong": wrong}


class WeightCheck:
    """Mixed into vLLM's worker class."""

    def dspy_fst_compare(self, folder: str) -> dict[str, object]:
        """Compare the weights in use with a folder's; no step of the engine runs meanwhile.

        Returns:
            ``"dtype"`` of the body, ``"digests"`` of the folder's tensors as this worker read them, and ``"wrong"``:
            tensor name -> how what is in use differs, empty when all is right.
        """
        runner = self.model_runner  # type: ignore[attr-defined]
        config = copy.copy(runner.vllm_config.model_config)
        config.model, config.model_weights, config.revision = folder, "", None
        with _without_lora(runner.get_model()) as model:
            comparison = Comparison(model, config)
            with torch.no_grad(), comparison.taking() as take:
                take(_read(runner.vllm_config.load_config, config, model))
        return answer(runner.vllm_config, comparison.digests, comparison.wrong)

    def dspy_fst_transfer_backend(self) -> str | None:
        """The backend of the weight transfer that vLLM was launched with; None: without."""
        config = self.model_runner.vllm_config.weight_transfer_config  # type: ignore[attr-defined]
        return getattr(config, "backend", None)

    def dspy_fst_compare_sent(self, update_info: dict[str, object]) -> dict[str, object]:
        """`dspy_fst_compare` with the tensors that the trainer sends meanwhile; see `compare_sent`."""
        from dspy_fst_transfer_check import compare_sent  # type: ignore[import-not-found]

        found = compare_sent(self.weight_transfer_engine, update_info)  # type: ignore[attr-defined]
        return answer(self.model_runner.vllm_config, found.digests, found.wrong)  # type: ignore[attr-defined]

    def dspy_fst_sees(self, file: str, content: str) -> bool:
        """Whether this worker finds that content in a file: whether both sides see the same folder under one path."""
        try:
            return Path(file).read_text(encoding="utf-8") == content
        except (OSError, ValueError):
            return False

    def dspy_fst_note_loras(self) -> bool:
        """Note from now on under which name each LoRA adapter is loaded; False if vLLM was launched without LoRA."""
        from dspy_fst_lora_check import notes_of  # type: ignore[import-not-found]

        manager = getattr(self.model_runner, "lora_manager", None)  # type: ignore[attr-defined]
        if manager is not None:
            notes_of(manager)
        return manager is not None

    def dspy_fst_compare_lora(self, name: str, folder: str) -> dict[str, object]:
        """Compare the LoRA adapter that requests for ``name`` use with a peft folder's; see `dspy_fst_compare`."""
        from dspy_fst_lora_check import compare_adapter

        runner = self.model_runner  # type: ignore[attr-defined]
        digests, wrong = compare_adapter(runner.lora_manager, name, folder)
        return answer(runner.vllm_config, digests, wrong)

    def dspy_fst_forget_lora(self, name: str) -> bool:
        """Free the memory of a LoRA adapter that no request uses any more; False if it is not loaded."""
        from dspy_fst_lora_check import forget

        return forget(self.model_runner.lora_manager, name)  # type: ignore[attr-defined]


@contextmanager
def _without_lora(model: nn.Module) -> Iterator[nn.Module]:
    """Put the layers that LoRA wraps in the places of their wrappers in this block: so their names are the folder's."""
    if not hasattr(model, "lora_manager"):
        yield model
        return
    from vllm.lora.layers import BaseLayerWithLoRA

    wrapped = [
        (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], layer)
        for path, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, BaseLayerWithLoRA)
    ]
    try:
        for parent, name, layer in wrapped:
            setattr(parent, name, layer.base_layer)
        yield model
    finally:
        for parent, name, layer in wrapped:
            setattr(parent, name, layer)


def _read(load_config: Any, model_config: Any, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    from vllm.model_executor.model_loader import get_model_loader

    if not any(Path(model_config.model).glob("*.safetensors")):
        raise FileNotFoundError(f"{model_config.model} holds no *.safetensors file")
    weights: Iterable[tuple[str, Tensor]] = get_model_loader(load_config).get_all_weights(model_config, model)
    return weights


class _Named(list[Any]):
    """The arguments of a layer's loader calls, as vLLM buffers them, each with the name of the folder's tensor."""

    def __init__(self, reading: "Comparison"):
        super().__init__()
        self.reading, self.names = reading, list[str]()

    def append(self, item: Any) -> None:
        self.names.append(self.reading.current)
        super().append(item)


class _Load(NamedTuple):
    """One call of a weight loader."""

    origin: str
    """Name of the folder's tensor."""
    name: str
    """Name of the layer's tensor."""
    arguments: Any


class Comparison:
    """One comparison of a folder's weights with a live model, which is unchanged afterwards."""

    def __init__(self, model: nn.Module, model_config: Any):
        self.model, self.model_config = model, model_config
        self.digests: dict[str, str] = {}
        self.wrong: dict[str, str] = {}
        self.live: dict[nn.Module, dict[str, Any]] = {}
        self.current = ""
        """Name of the folder's tensor that was passed to the model's loader last."""

    @contextmanager
    def taking(self) -> Iterator[Callable[[Iterable[tuple[str, Tensor]]], None]]:
        """A block that takes the folder's tensors, in parts of any size, and has filled ``digests`` and ``wrong``."""
        from vllm.model_executor.model_loader.reload import layerwise

        missed: set[str] | None = {name for name, _ in self.model.named_parameters()}

        def take(weights: Iterable[tuple[str, Tensor]]) -> None:
            nonlocal missed
            loaded = self.model.load_weights(self._noting(weights))  # type: ignore[operator]
            missed = None if loaded is None or missed is None else missed - loaded

        with self._set_aside(), mock.patch.object(layerwise, "_layerwise_process", self._compare_layer):
            yield take
            for layer in self.model.modules():
                info = layerwise.get_layerwise_info(layer)
                if info.can_load() and info.loaded_weights and not layerwise.is_deferred_attention_layer(layer):
                    self._compare_layer(layer, info)  # parts of it are padding, so it never counted as complete
            self._compare_shielded()
        for name in sorted(missed or ()):
            self.wrong[name] = "no tensor of the folder is loaded into it"
        for name, layer in self.model.named_modules():
            self._compare_packed_head(name, layer)

    def _noting(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for self.current, tensor in weights:
            self.digests[self.current] = digest(tensor)
            yield self.current, tensor

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Replace the live tensors by blank ones in this block; they are restored even after an error."""
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
        """Compare a layer, then release its blank tensors: those of all layers would be a second model in memory."""
        empty = _Kept(layer)
        try:
            self._compare_loaded(layer, info)
        finally:
            empty.restore()
            info.reset()

    def _compare_loaded(self, layer: nn.Module, info: Any) -> None:
        """Load a layer's buffered tensors into blank ones, and compare these with the live ones."""
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
                self._attribute(layer, info, [load for load in loads if load.name == name], used, how)

    def _load(self, layer: nn.Module, info: Any, loads: "list[_Load]") -> None:
        """Run the model's own loaders on blank tensors, which are NaN wherever nothing is loaded."""
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
        """The tensors after the processing of a first load, which packs experts and quantizes weights."""
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

        method = copy.copy(getattr(layer, "quant_method", None))
        if isinstance(method, QuantizeMethodBase):
            # On a CPU, vLLM 0.32 skips the packing of experts if their kernel exists already, as it does on a reload.
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
            if hasattr(layer, "_already_called_process_weights_after_loading"):
                del layer._already_called_process_weights_after_loading
            method.process_weights_after_loading(layer)
        return {name: getattr(layer, name) for name in names}

    def _compare_shielded(self) -> None:
        """Compare tensors that vLLM never buffers, such as a router's correction bias; they were loaded into copies."""
        from vllm.model_executor.model_loader.reload import meta

        for path, layer in self.model.named_modules():
            for name in meta.SKIP_LOAD_TENSORS & self.live[layer].keys():
                used, read = self.live[layer][name], getattr(layer, name, None)
                if used is not None and read is not None and (how := difference(used, read)) is not None:
                    self.wrong[f"{path}.{name}"] = how

    def _attribute(self, layer: nn.Module, info: Any, loads: "list[_Load]", used: Tensor, how: str) -> None:
        """Attribute a difference to those of the folder's tensors, among the fused ones, that contain it."""
        fused = "" if len(loads) == 1 else f", in the {len(loads)} tensors fused with it"
        faults: dict[str, str] = {}
        for load in loads:
            self._load(layer, info, [load])
            part = getattr(layer, load.name)
            if part.shape != used.shape or not part.is_floating_point():  # the live tensor has another layout
                faults[load.origin] = how + fused
            elif (gap := difference(used, part)) is not None:
                faults[load.origin] = gap
        # Equal to the file, but not to the result of a first load: the kernel would read it in another order.
        self.wrong |= faults or {load.origin: f"{how}{fused}: it is not packed for its kernel" for load in loads}

    def _compare_packed_head(self, name: str, layer: nn.Module) -> None:
        """Compare the packed copy that an LM head may multiply with, and the parameter that it also keeps."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        packed = getattr(layer, "cpu_linear", None)
        if not isinstance(layer, ParallelLMHead) or packed is None or layer.weight.numel() == 0:
            return
        if self.model_config.head_dtype != layer.weight.dtype:
            return  # vLLM multiplies with the parameter itself
        used = multiplied_out(packed, layer.weight.shape[1], layer.weight)
        if (how := difference(used, layer.weight)) is not None:
            self.wrong.setdefault(f"{name}.weight", f"{how} (a packed copy was left behind)")


def multiplied_out(linear: Any, width: int, weight: Tensor) -> Tensor:
    """The matrix, shape (outputs, ``width``), that a packed layer multiplies with.

    A row of the identity selects one column: each output is one weight plus zeros, which is exact in any precision.
    """
    dtype = weight.dtype
    columns = []
    for start in range(0, width, EYE_ROWS):
        rows = torch.zeros(min(EYE_ROWS, width - start), width, dtype=dtype, device=weight.device)
        rows[torch.arange(len(rows)), start + torch.arange(len(rows))] = 1
        columns.append(linear(rows, weight, None))
    return torch.cat(columns).t()


class _Kept:
    """The state of a layer, for restoring it."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.tensors: dict[str, Any] = {**layer._parameters, **layer._buffers}
        self._attributes = dict(layer.__dict__)
        self._tables = {name: copy.copy(getattr(layer, name)) for name in _TABLES}
        self._loaders = {name: getattr(tensor, "weight_loader", None) for name, tensor in self.tensors.items()}

    def restore(self) -> None:
        self.layer.__dict__.clear()
        self.layer.__dict__.update(self._attributes)
        for name, content in self._tables.items():  # in place, because others may refer to the table itself
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
    """Replace the tensors that vLLM's reload does not blank but writes into, such as biases, by copies."""
    from vllm.model_executor.model_loader.reload import meta

    tables: list[dict[str, Any]] = [layer._parameters, layer._buffers]
    for table in tables:
        for name in table.keys() & meta.SKIP_TENSORS:
            if (tensor := tensors[name]) is not None:
                twin = tensor.detach().clone()
                twin.__class__, twin.__dict__ = tensor.__class__, dict(tensor.__dict__)
                table[name] = twin
