"""The proof of a publish needs no room for a second model, and leaves no stamp on weights that were half copied."""

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.engine.vllm.served import dspy_fst_weight_check as check
from dspy_fst.errors import EngineError
from programs.lab import BASE
from tests.engine.tiny_qwen import make_model, save

LAYERS = 6


class Stack(nn.Module):
    """Layers and a loader of their weights, as vLLM's models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(LAYERS))

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            parameter: Any = parameters[name]
            parameter.weight_loader(parameter, tensor)
        return set(parameters)


@pytest.fixture
def stack() -> Stack:
    reload = pytest.importorskip("vllm.model_executor.model_loader.reload")
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    torch.manual_seed(0)
    model = Stack().requires_grad_(False)
    for parameter in model.parameters():
        parameter.weight_loader = default_weight_loader  # type: ignore[attr-defined]
    reload.record_metadata_for_reloading(model)
    return model


@pytest.fixture
def blanks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(bytes alive, bytes of the newest) of the check's blank tensors, at each time that one was made."""
    from vllm.model_executor.model_loader.reload import meta

    make, alive, seen = meta.materialize_meta_tensor, list[Any](), list[tuple[int, int]]()

    def counted(template: Tensor) -> Tensor:
        made = make(template)
        alive.append(weakref.ref(made))
        gc.collect()
        found = [tensor for ref in alive if (tensor := ref()) is not None]
        seen.append((sum(tensor.nbytes for tensor in found), made.nbytes))
        return made

    monkeypatch.setattr(meta, "materialize_meta_tensor", counted)
    gc.freeze()  # what the process held before is no blank: a collection that walks through it takes half a second
    return seen


def compared(model: nn.Module, weights: dict[str, Tensor]) -> check.Comparison:
    comparison = check.Comparison(model, SimpleNamespace(head_dtype=torch.float32))
    with comparison.taking() as take:
        take(iter(weights.items()))
    return comparison


@pytest.mark.parametrize("wrong", [0, 1, LAYERS])
def test_one_layer_s_blanks_at_a_time_are_on_the_device(stack: Stack, blanks: list[tuple[int, int]], wrong: int):
    """The blanks of all layers together are a second model on the device."""
    weights = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    named = [f"layers.{n}.weight" for n in range(wrong)]
    for name in named:
        weights[name][1, 2] += 0.5
    before = {name: id(tensor) for name, tensor in stack.named_parameters()}
    comparison = compared(stack, weights)
    assert list(comparison.wrong) == named
    assert set(comparison.digests) == set(weights)
    largest = max(size for _, size in blanks)
    assert len(blanks) >= 2 * LAYERS
    # One that found a fault is loaded a second time, beside the first, to say in which of the fused tensors it lies.
    assert max(total for total, _ in blanks) <= 2 * largest
    assert {name: id(tensor) for name, tensor in stack.named_parameters()} == before
    assert compared(stack, {n: t.clone() for n, t in stack.state_dict().items()}).wrong == {}


def test_scoring_holds_few_tokens_log_probabilities_at_once(monkeypatch: pytest.MonkeyPatch):
    engine = InProcessEngine(InProcessSettings(device="cpu"))
    engine.load(Checkpoint("base", BASE))
    texts = [[5 + n % 40 for n in range(length)] for length in (200, 1, 90, 2)]
    with torch.no_grad():
        whole = [
            engine._model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
            .gather(-1, torch.tensor(text)[1:, None])[:, 0].tolist()
            for text in texts
        ]  # fmt: skip
    rows, log_softmax = [], Tensor.log_softmax

    def noted(logits: Tensor, *arguments: Any) -> Tensor:
        rows.append(logits.numel() // logits.shape[-1])
        return log_softmax(logits, *arguments)

    monkeypatch.setattr(Tensor, "log_softmax", noted)
    for found, wanted in zip(engine.score(texts), whole, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    assert max(rows) <= 64
    assert engine.score([]) == []
    engine.close()


def test_weights_that_were_copied_in_part_have_no_version(tmp_path):
    """transformers copies what fits and then raises: some layers are new, the others old."""
    sound = save(make_model(0), tmp_path, "step-000000")
    tensors = load_file(sound.path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    faulty = save(make_model(1), tmp_path, "step-000001")
    save_file(tensors, faulty.path / "model.safetensors", {"format": "pt"})
    engine = InProcessEngine(InProcessSettings(device="cpu"))
    engine.load(sound)
    with pytest.raises(EngineError, match="do not load"):
        engine.load(faulty)
    assert engine.weights is None
    engine.load(sound)
    assert engine.weights == "step-000000"
    engine.close()
