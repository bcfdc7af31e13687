"""LoRA adapters on a transformers model in this process: put on, switched, read, written, merged.

peft replaces linear layers in place by layers of its own. The model stays its own class, its modules keep their names,
and the weight of such a layer becomes ``NAME.base_layer.weight``. Read from peft 0.21.2 (`tuners/lora/layer.py`).
"""

import json
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dspy_fst.engine.lora_layers import BASE_LAYER, NO_ADAPTER, target_modules
from dspy_fst.errors import TrainingError, briefly
from dspy_fst.model_files.lora_folder import CONFIG, TENSORS
from dspy_fst.recipe.lora_settings import LoRA

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

PREFIX = "base_model.model."
"""What peft puts before the names of modules in its files."""
NO_MODULE = "^$"
"""A pattern of peft's that matches no layer."""


# ---- on the model -------------------------------------------------------------------------------


def _is_adapted(module: nn.Module) -> "TypeGuard[LoraLayer]":
    """Whether a module is a layer of peft's. There is none before peft was imported, which takes seconds: runs without
    an adapter do without it."""
    kind = getattr(sys.modules.get("peft.tuners.lora"), "LoraLayer", None)
    return kind is not None and isinstance(module, kind)


def layers_of(model: nn.Module, name: str) -> "dict[str, LoraLayer]":
    """Module -> its layer, for every layer that has the adapter of this name."""
    layers = {path: module for path, module in model.named_modules() if _is_adapted(module)}
    return {path: layer for path, layer in layers.items() if name in layer.lora_A}


def put_on(model: PreTrainedModel, name: str, lora: LoRA, *, seed: int = 0) -> None:
    """Put a new adapter on the model, and freeze the model's own weights. Until it is trained, it changes nothing.

    B is zero. A is drawn as in `torch.nn.Linear` from a generator of its own, so that a rerun has the same; torch's own
    generator is left as it was.

    Raises:
        TrainingError: see `target_modules`; or peft cannot adapt one of the layers.
    """
    _inject(model, name, lora)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in parameters_of(model, name).items():
        if key.endswith("lora_A.weight"):
            drawn = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                parameter.copy_(drawn)


def peft_fault(empty: PreTrainedModel, lora: LoRA) -> str | None:
    """Why peft itself refuses the adapter, in a sentence; for settings without `target_faults`.

    Args:
        empty: The model on the meta device; it holds the adapter afterwards.
    """
    try:
        _inject(empty, "shared", lora, empty=True)
    except TrainingError as error:
        return f"adapter: {error}"
    return None


def _inject(model: PreTrainedModel, name: str, lora: LoRA, *, empty: bool = False) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    layers = target_modules(model, lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it; whole numbers are a habit
        target_modules=NO_MODULE,
        use_rslora=lora.rslora,
    )
    # peft takes names in a configuration for ends of names, and a shared expert's `gate_proj` for the fused experts'.
    # The keys of a state name the layers themselves.
    keys = {f"{layer}.lora_A.weight": torch.empty(0) for layer in layers}
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a model has an adapter already, or keeps its weights transposed
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=empty, state_dict=keys)
            config.target_modules = layers
    except (ValueError, TypeError, RuntimeError) as error:
        raise TrainingError(
            f"peft cannot put a LoRA adapter on a {model.config.model_type!r} model: {error}"
        ) from error


def take_off(model: PreTrainedModel, name: str) -> None:
    """Remove an adapter; its layers stay, and compute what the base does once they have none."""
    for layer in layers_of(model, name).values():
        layer.delete_adapter(name)
    getattr(model, "peft_config", {}).pop(name, None)


def parameters_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters, by their names in adapter_model.safetensors."""
    return {
        f"{PREFIX}{path}.{part}.weight": getattr(layer, part)[name].weight
        for path, layer in layers_of(model, name).items()
        for part in ("lora_A", "lora_B")
    }


@contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """A block in which the model computes with this adapter, or with None as its base does. Models without adapters
    are left as they are.

    peft's own switch also changes which parameters get gradients, so its two fields are set here.
    """
    layers = [module for module in model.modules() if _is_adapted(module)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [] if name is None else [name], name is None
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def using_by_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """A block in which row i of each batch is computed with the adapter ``names[i]``, or with None as by the base.

    Args:
        model: One that `takes_rows`.
        names: Of each row; it is read at every forward, and may be changed in place between two of them.
    """
    layers = cast("list[nn.Module]", [module for module in model.modules() if _is_adapted(module)])

    def give_names(
        _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[Tensor, ...], dict[str, object]]:
        return args, {**kwargs, "adapter_names": [name or NO_ADAPTER for name in names]}

    hooks = [layer.register_forward_pre_hook(give_names, with_kwargs=True) for layer in layers]
    with using(model, next((name for name in names if name), "")):
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def takes_rows(model: PreTrainedModel) -> bool:
    """Whether every adapted layer reads its inputs row by row, as `using_by_row` needs it; found by a small forward.

    Some models hand a layer the tokens of all rows at once, e.g. those that go to one expert.
    """
    from peft.tuners.lora import Linear as LoraLinear

    rows, tokens, shapes = 2, 3, list[torch.Size]()
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
        for layer in model.modules()
        if type(layer) is LoraLinear
    ]
    try:
        model(input_ids=torch.ones(rows, tokens, dtype=torch.long, device=model.device))
    except Exception:  # a model's own code may refuse such a batch in any way
        return False
    finally:
        for hook in hooks:
            hook.remove()
    plain = all(type(module) is LoraLinear for module in model.modules() if _is_adapted(module))
    return plain and all(len(shape) == 3 and shape[:2] == (rows, tokens) for shape in shapes)


def in_use(model: nn.Module) -> str | None:
    """The adapter that the model computes with now (see `using`); None: its base alone."""
    layer = next((module for module in model.modules() if _is_adapted(module)), None)
    return None if layer is None or layer._disable_adapters else next(iter(layer._active_adapter), None)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state without adapters, under the names that it had before they were put on."""
    return {name.replace(BASE_LAYER, ""): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}


# ---- in files -----------------------------------------------------------------------------------


def write(model: PreTrainedModel, name: str, parameters: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Write an adapter as a new peft folder that peft, transformers and vLLM read.

    Args:
        parameters: Of the adapter, as `parameters_of` names them.

    Returns:
        What was written: the parameters on the CPU, in float32.
    """
    tensors = {key: tensor.detach().float().cpu().contiguous() for key, tensor in parameters.items()}
    from peft import LoraConfig

    config = model.peft_config[name]
    assert isinstance(config, LoraConfig)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "fan_in_fan_out": config.fan_in_fan_out,
        "target_modules": sorted(config.target_modules or ()),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    return tensors


def read(folder: Path) -> tuple[LoRA, dict[str, Tensor]]:
    """An adapter's settings, with the full names of its layers, and its tensors.

    Raises:
        TrainingError: the folder cannot be read, or holds another kind of adapter.
    """
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        lora = LoRA(
            rank=settings["r"],
            alpha=settings["lora_alpha"],
            target=_layers_in(tensors),
            rslora=settings["use_rslora"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingError(f"no LoRA adapter can be read from {folder}: {briefly(error)}") from error
    return lora, tensors


def goes_on(model: PreTrainedModel, folder: Path, wanted: LoRA) -> bool:
    """Whether a folder's adapter has these settings, and so can go on; the model may be on the meta device.

    Raises:
        TrainingError: the folder cannot be read, or the settings do not fit the model.
    """
    found, _ = read(folder)
    layers = {*target_modules(model, wanted)}
    return found == wanted.model_copy(update={"target": found.target}) and {*found.target} == layers


def _layers_in(tensors: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors))


def put_on_as_read(model: PreTrainedModel, name: str, folder: Path) -> None:
    """Have the model hold an adapter of this name with the folder's numbers, in the precision of its own weights.

    Raises:
        TrainingError: the folder cannot be read, or is of another model.
    """
    lora, tensors = read(folder)
    held = parameters_of(model, name)
    same_scaling = {layer.scaling[name] for layer in layers_of(model, name).values()} == {lora.scaling}
    if not same_scaling or {key: t.shape for key, t in held.items()} != {key: t.shape for key, t in tensors.items()}:
        take_off(model, name)
        put_on(model, name, lora)
        held = parameters_of(model, name)
    fill(held, tensors, folder)


@torch.no_grad()
def fill(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Give an adapter's parameters the numbers that were read from a folder.

    Raises:
        TrainingError: names or shapes differ.
    """
    if {key: p.shape for key, p in parameters.items()} != {key: t.shape for key, t in tensors.items()}:
        raise TrainingError(f"{folder} holds a LoRA adapter of another model or of another rank")
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])


@torch.no_grad()
def merge(model: PreTrainedModel, folder: Path) -> None:
    """Add a folder's adapter to the weights of a model in float32. In bfloat16 most of the change would round away.

    Raises:
        TrainingError: the folder cannot be read, or is of another model.
    """
    lora, tensors = read(folder)
    modules = dict(model.named_modules())
    for name in _layers_in(tensors):
        a, b = (tensors[f"{PREFIX}{name}.{part}.weight"].float() for part in ("lora_A", "lora_B"))
        layer, change = modules.get(name), lora.scaling * (b @ a)
        change = change.T if isinstance(layer, Conv1D) else change
        if not isinstance(layer, nn.Linear | Conv1D) or layer.weight.shape != change.shape:
            raise TrainingError(f"{folder} holds a LoRA adapter of another model: {name} does not fit")
        layer.weight += change.to(layer.weight.device)
