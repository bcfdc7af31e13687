"""The in-process engine serves LoRA adapters on a base that it reads once, and proves what it serves."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from dspy_fst.engine import loaded_model, lora
from dspy_fst.engine.base import AdapterFiles, Checkpoint
from dspy_fst.engine.generation import SideBySide
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.engine.verification import verify_identity
from dspy_fst.engine.vllm.served.dspy_fst_weight_check import digest
from dspy_fst.errors import DiskError, EngineError, SyncError
from dspy_fst.recipe.lora_settings import LoRA
from tests.engine.test_contract import BASE, request_of

SMALL = LoRA(rank=4)
SEQUENCE = [2, 9, 4, 17, 30, 8, 5]


def model_of(folder=BASE):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapter(folder: Path, name: str, seed: int, settings: LoRA = SMALL) -> AdapterFiles:
    """A peft folder of an adapter that changes the model visibly."""
    model = model_of()
    lora.put_on(model, name, settings, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in lora.parameters_of(model, name).items():
            if "lora_B" in key:
                parameter.normal_(std=0.05, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = lora.write(model, name, lora.parameters_of(model, name), folder / name)
    return AdapterFiles(name, folder / name, {key: digest(tensor) for key, tensor in tensors.items()})


def scored(folder: Path | None) -> list[float]:
    """Log-probabilities of the sequence under peft's own loading of the adapter."""
    model = model_of() if folder is None else PeftModel.from_pretrained(model_of(), folder)
    with torch.no_grad():
        logits = model(torch.tensor([SEQUENCE])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(SEQUENCE[1:])[:, None])[:, 0].tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("versions")
    return {
        "one": adapter(root / "step-000001", "shared", 1),
        "two": adapter(root / "step-000002", "shared", 2),
        "hops": adapter(root / "step-000003", "hops", 3, LoRA(rank=2, target="q_proj", rslora=True)),
        "answer": adapter(root / "step-000003", "answer", 4),
    }


@pytest.fixture
def engine():
    engine = InProcessEngine(InProcessSettings(device="cpu", dtype="float32", linger_s=0.05))
    yield engine
    engine.close()


def at(version: str, *adapters: AdapterFiles) -> Checkpoint:
    return Checkpoint(version, BASE, adapters=adapters)


@pytest.mark.slow
def test_a_version_is_served_with_its_adapter_and_the_base_is_read_once(engine, folders, monkeypatch):
    reads = []
    whole = loaded_model.load_model_with_info
    monkeypatch.setattr(loaded_model, "load_model_with_info", lambda *a, **k: reads.append(a) or whole(*a, **k))
    for version in ("one", "two", "one"):
        checkpoint = at(version, folders[version])
        engine.load(checkpoint)
        assert engine.score([SEQUENCE])[0] == pytest.approx(scored(folders[version].path), abs=1e-5)
        held = engine.held(checkpoint)
        verify_identity(held, checkpoint)
        assert held.wrong == {}
        completion = engine.complete(request_of("1 2 3"), seed=5)
        assert completion.weights == version
        assert list(completion.logprobs) == pytest.approx(
            engine.score([[*completion.prompt_ids, *completion.completion_ids]])[0][-len(completion.logprobs) :],
            abs=1e-4,
        )
    assert len(reads) == 1
    engine.load(at("base"))
    assert engine.score([SEQUENCE])[0] == pytest.approx(scored(None), abs=1e-6)


def test_each_call_goes_through_the_adapter_that_it_names(engine, folders):
    checkpoint = at("both", folders["hops"], folders["answer"])
    engine.load(checkpoint)
    for name in ("hops", "answer"):
        assert engine.score([SEQUENCE], adapter=name)[0] == pytest.approx(scored(folders[name].path), abs=1e-5)
    assert engine.score([SEQUENCE])[0] == pytest.approx(scored(None), abs=1e-6)
    replies = {name: engine.complete(request_of("1 2 3"), seed=5, adapter=name) for name in ("hops", "answer")}
    for name, reply in replies.items():
        again = engine.score([[*reply.prompt_ids, *reply.completion_ids]], adapter=name)[0]
        assert list(reply.logprobs) == pytest.approx(again[-len(reply.logprobs) :], abs=1e-4)
    with pytest.raises(EngineError, match=r"no LoRA adapter 'judge'"):
        engine.complete(request_of("1 2 3"), seed=5, adapter="judge")


THROUGH = ["hops", "answer", None] * 4


def replies_of(engine, checkpoint, monkeypatch):
    """Replies to the same few prompts through both adapters and the base, of many lengths; and the batches' sizes."""
    sizes, plain = [], SideBySide.admit
    monkeypatch.setattr(
        SideBySide,
        "admit",
        lambda batch, joining: sizes.append(len({c.adapter for c in joining})) or plain(batch, joining),
    )
    engine.load(checkpoint)
    engine.expect(len(THROUGH))
    with ThreadPoolExecutor(len(THROUGH)) as pool:
        asked = [
            pool.submit(engine.complete, request_of(f"{i // 6} 2 3", max_tokens=2 + 2 * i), i, adapter=name)
            for i, name in enumerate(THROUGH)
        ]
    monkeypatch.undo()
    return [reply.result() for reply in asked], sizes


def test_calls_of_two_adapters_and_of_the_base_are_one_batch_with_the_tokens_of_three(engine, folders, monkeypatch):
    checkpoint = at("both", folders["hops"], folders["answer"])  # they are on different layers
    together, sizes = replies_of(engine, checkpoint, monkeypatch)
    assert sizes == [3]
    with monkeypatch.context() as patch:
        patch.setattr(loaded_model, "takes_rows", lambda model: False)
        apart, sizes = replies_of(engine, checkpoint, patch)
    assert sizes == [1, 1, 1]
    assert len({len(reply.completion_ids) for reply in together}) >= 4, "rows left the batch before others"
    for name, one, other in zip(THROUGH, together, apart, strict=True):
        assert one.completion_ids == other.completion_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        text = [*one.prompt_ids, *one.completion_ids]
        assert list(one.logprobs) == pytest.approx(engine.score([text], name)[0][-len(one.logprobs) :], abs=1e-4)
    assert engine.score([SEQUENCE])[0] == pytest.approx(scored(None), abs=1e-6)  # nothing of it stays on the model


def test_a_layer_that_reads_the_tokens_of_all_rows_at_once_keeps_batches_of_one_adapter():
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 2}
    flat = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **experts, num_key_value_heads=2)).eval()
    for model, mixes in ((flat, False), (model_of(), True)):
        lora.put_on(model, "one", SMALL)
        lora.put_on(model, "two", LoRA(rank=2))
        assert lora.takes_rows(model) == mixes


def test_the_base_is_compared_once_and_the_adapters_each_time(engine, folders):
    first, second = at("one", folders["one"]), at("two", folders["two"])
    engine.load(first)
    whole = engine.held(first)
    assert whole.with_base
    assert "model.embed_tokens.weight" in whole.digests
    engine.load(second)
    part = engine.held(second)
    assert not part.with_base
    assert part.digests.keys() == whole.digests.keys() - load_file(BASE / "model.safetensors").keys()


def test_another_adapter_than_the_published_one_is_found(engine, folders):
    engine.load(at("one", folders["one"]))
    stale = at("two", folders["two"])
    with pytest.raises(SyncError, match=r"shared: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"):
        verify_identity(engine.held(stale), stale)


def test_a_folder_that_changed_after_it_was_written_is_found(engine, folders, tmp_path):
    written = adapter(tmp_path / "step-000009", "shared", 9)
    tensors = load_file(written.path / lora.TENSORS)
    tensors[next(iter(tensors))][0, 0] += 1
    save_file(tensors, written.path / lora.TENSORS)
    checkpoint = at("step-000009", written)
    engine.load(checkpoint)
    with pytest.raises(DiskError, match=r"does not hold what the trainer wrote: shared: .*its bytes differ"):
        verify_identity(engine.held(checkpoint), checkpoint)


@pytest.mark.parametrize("damage", ["no tensors", "another model", "no settings"])
def test_a_damaged_adapter_is_not_served(engine, folders, tmp_path, damage):
    written = adapter(tmp_path / "step-000009", "shared", 9)
    if damage == "another model":
        tensors = load_file(written.path / lora.TENSORS)
        save_file({name: tensor[..., :-1].clone() for name, tensor in tensors.items()}, written.path / lora.TENSORS)
    else:
        (written.path / (lora.TENSORS if damage == "no tensors" else lora.CONFIG)).unlink()
    engine.load(at("one", folders["one"]))
    with pytest.raises(EngineError, match=r"step-000009.*do not load: .*LoRA adapter"):
        engine.load(at("step-000009", written))
    assert engine.weights is None  # so that whoever asks next loads weights first
