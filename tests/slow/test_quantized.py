"""A frozen base in 4 or 8 bits below LoRA adapters: what is trained on is what is published, number by number."""

import importlib.util
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.families import FAMILIES
from dspy_fst.config import FSTConfig
from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import ConfigurationError, TrainingError
from dspy_fst.memory import Workload, model_size
from dspy_fst.memory.bytes_by_part import trainer_parts
from dspy_fst.preflight.library_checks import library_faults
from dspy_fst.slow.model import Policy
from dspy_fst.slow.quantized import QuantizedLinear
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from tests.slow.makers import save_model
from tests.slow.test_lora import SMALL, batch_of, calls_of, flat, trained
from tests.slow.test_trainer import make_trainer

KINDS = [pytest.param("nf4", id="nf4"), pytest.param("int8", id="int8")]
SEQUENCES = [[5, 6, 7, 8, 9], [11, 3, 2, 40, 17, 8]]
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
"""QLoRA's appendix E."""


@pytest.fixture(autouse=True)
def library(request):
    if "nf4" in request.node.name:
        pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model with rows that are no multiple of a block: 96 numbers."""
    return save_model(tmp_path_factory.mktemp("wide") / "model", width=48)


@pytest.fixture(scope="module")
def wide_tied(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("wide") / "tied", width=48, tied=True)


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What the two kinds are, written down again."""
    if kind == "int8":
        scale = weight.abs().amax(dim=1, keepdim=True)
        return (weight / scale * 127).round() / 127 * scale
    blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / scale)[..., None].sub(NF4).abs().argmin(dim=-1)
    return (NF4[nearest] * scale).flatten()[: weight.numel()].view_as(weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 64), (96, 48), (33, 31), (7, 640)], ids=str)
def test_a_weight_is_rounded_to_the_nearest_code_and_once_rounded_stays(kind, dtype, shape):
    torch.manual_seed(1)
    linear = nn.Linear(shape[1], shape[0]).to(dtype).requires_grad_(False)
    layer = QuantizedLinear(linear, kind)
    wanted = rounded(linear.weight.detach().float(), kind)
    assert layer.weight.dtype == dtype
    assert torch.allclose(layer.weight.float(), wanted.to(dtype).float(), rtol=1e-6, atol=1e-7)
    assert float((wanted - linear.weight).norm() / linear.weight.norm()) < {"nf4": 0.12, "int8": 0.01}[kind]
    again = nn.Linear(shape[1], shape[0]).to(dtype)
    again.weight.data = layer.weight
    assert torch.equal(QuantizedLinear(again, kind).weight, layer.weight)
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert held / linear.weight.numel() < {"nf4": 0.57, "int8": 1.13}[kind] + 64 / linear.weight.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_published_base_is_what_is_trained_on(wide, wide_tied, tmp_path, kind, tied):
    trainer = trained(wide_tied if tied else wide, adapter=SMALL, quantized_base=kind)
    published = trainer.publish(tmp_path / "step-000001", "step-000001")
    plain = Trainer(published.folder, TrainingSettings(), device="cpu")  # whole weights, the adapter merged
    assert torch.allclose(flat(trainer.score(SEQUENCES)), flat(plain.score(SEQUENCES)), atol=1e-5)
    start = AutoModelForCausalLM.from_pretrained(wide_tied if tied else wide).state_dict()
    base = load_file(published.path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.allclose(base[name], rounded(start[name], kind), rtol=1e-6, atol=1e-7)
    assert not torch.equal(base[name], start[name])
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(base[name], start[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_updates_are_those_on_whole_weights_that_hold_the_rounded_numbers(wide, tmp_path, kind, precision):
    settings = {"adapter": SMALL, "warmup_steps": 0, "precision": precision}
    low = make_trainer(wide, quantized_base=kind, **settings)
    published = low.publish(tmp_path / "step-000000", "step-000000")
    high = make_trainer(published.path, **settings)
    for seed in range(3):
        assert low.step(batch_of(seed)) == high.step(batch_of(seed))
    assert all(torch.equal(p, high.parameters[name]) for name, p in low.parameters.items())
    assert low.kl_by_call(calls_of(1)) == high.kl_by_call(calls_of(1))
    assert all(float(p.detach().abs().max()) > 0 for name, p in low.parameters.items() if ".lora_B." in name)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_and_a_resumed_trainer_keep_their_bits(wide, tmp_path, kind):
    settings = {"adapter": SMALL, "quantized_base": kind, "learning_rate": 1e-2, "min_effective_share": 0.0}

    def start(**options) -> Trainer:
        return Trainer(wide, TrainingSettings(**settings, **options), device="cpu")

    steady, early, late = start(), start(), start(gradient_checkpointing=True)
    for seed in range(2):
        assert steady.step(batch_of(seed)) == early.step(batch_of(seed))
    early.save_state(tmp_path / "state")
    late.load_state(tmp_path / "state")
    for seed in range(2, 4):
        assert steady.step(batch_of(seed)) == late.step(batch_of(seed))
    assert all(torch.equal(p, late.parameters[name]) for name, p in steady.parameters.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_adapter_goes_on_above_the_same_numbers(wide, tmp_path, kind):
    settings = {"adapter": SMALL, "quantized_base": kind}
    first = trained(wide, **settings).publish(tmp_path / "one" / "step-000001", "step-000001")
    second = make_trainer(first.folder, **settings).publish(tmp_path / "two" / "step-000000", "step-000000")
    bases = [load_file(version.path / "model.safetensors") for version in (first, second)]
    assert all(torch.equal(tensor, bases[1][name]) for name, tensor in bases[0].items())
    assert first.adapters[0].digests == second.adapters[0].digests


@pytest.mark.parametrize("kind", KINDS)
def test_routers_and_fused_experts_are_left_alone(tmp_path, kind):
    folder = next(family for family in FAMILIES if family.name == "Qwen3-MoE").save(tmp_path / "model")
    policy = Policy.load(folder, dtype=torch.float32, adapter=SMALL, quantized=kind)
    names = {name for name, module in policy.model.named_modules() if isinstance(module, QuantizedLinear)}
    assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert Checkpoint.at("start", folder).path == folder


@pytest.mark.parametrize("family", ["Qwen3-MoE", "Granite-MoE", "Qwen2.5-VL"])
def test_the_plan_rounds_the_numbers_that_are_rounded(tmp_path, family):
    folder = next(each for each in FAMILIES if each.name == family).save(tmp_path / "model")
    policy = Policy.load(folder, dtype=torch.float32, adapter=SMALL, quantized="int8")
    layers = [module for module in policy.model.modules() if isinstance(module, QuantizedLinear)]
    size = model_size(folder)
    assert 0 < size.in_linear == sum(layer.in_features * layer.out_features for layer in layers) < size.body
    planned, unrounded = (
        trainer_parts(Workload("it", size, "in_process"), FSTConfig(adapter=SMALL, quantized_base=kind), on_gpu=False)[
            "frozen base"
        ]
        for kind in ("int8", None)
    )
    assert planned == 4 * size.parameters - 3 * size.in_linear
    assert unrounded == 4 * size.parameters


def test_layers_without_an_adapter_are_rounded_too(wide):
    policy = Policy.load(
        wide, dtype=torch.float32, adapter=SMALL.model_copy(update={"target": ("q_proj",)}), quantized="int8"
    )
    names = [name for name, module in policy.model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(names) == 2 * 7
    assert sum(name.endswith("base_layer") for name in names) == 2


def test_a_model_without_such_layers_is_refused(tmp_path):
    folder = next(family for family in FAMILIES if family.name == "GPT-2").save(tmp_path / "model")
    with pytest.raises(TrainingError, match="quantized_base='int8': a 'gpt2' model has no linear layers that could be"):
        Policy.load(folder, dtype=torch.float32, adapter=SMALL, quantized="int8")


def test_whole_weights_on_a_rounded_base_are_refused():
    with pytest.raises(ConfigurationError, match="quantized_base='int8' freezes the weights, and adapter=None trains"):
        TrainingSettings.checked({"quantized_base": "int8"})


def test_a_missing_library_is_told_and_int8_needs_none(wide, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "dspy_fst.preflight.library_checks.find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    (fault,) = library_faults(TrainingSettings(adapter="lora", quantized_base="nf4"))
    assert fault.startswith("quantized_base='nf4' needs bitsandbytes, which is not installed: pip install")
    assert list(library_faults(TrainingSettings(adapter="lora", quantized_base="int8"))) == []
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(TrainingError, match="quantized_base='nf4': bitsandbytes cannot be imported"):
        make_trainer(wide, adapter=SMALL, quantized_base="nf4")
