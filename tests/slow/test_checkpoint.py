"""What is left on disk: whole, immutable, untied, and enough to go on bit for bit."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dspy_fst.errors import TrainingError
from dspy_fst.slow.model import Policy
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from tests.slow.makers import VOCABULARY, make_batch, make_row, make_tokenizer

SETTINGS = {"learning_rate": 1e-2, "warmup_steps": 3, "min_effective_share": 0.0}


def make_trainer(start, **changes) -> Trainer:
    return Trainer(start, TrainingSettings(**(SETTINGS | changes)), device="cpu")


def draw_batch(seed: int):
    draw = random.Random(seed)
    rows = []
    for _ in range(4):
        prompt, completion = ([draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 6))] for _ in range(2))
        rows.append(make_row(prompt, completion, [-3.0] * len(completion), draw.uniform(-1, 1), 0.05))
    return make_batch(rows)


@pytest.mark.parametrize("tied", [False, True])
def test_a_published_folder_loads_untied_with_the_trainers_logits(start, tied_start, tmp_path, tied):
    trainer = make_trainer(tied_start if tied else start)
    trainer.step(draw_batch(0))
    checkpoint = trainer.publish(tmp_path / "step-000001", "step-000001")
    assert (checkpoint.version, checkpoint.path) == ("step-000001", tmp_path / "step-000001")
    config = json.loads((checkpoint.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(checkpoint.path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    wanted = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
    assert trainer.score(ids.tolist())[0] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_published_folder_has_what_an_engine_needs(start, tmp_path):
    trainer = make_trainer(start)
    path = trainer.publish(tmp_path / "new" / "step-000000", "step-000000").path
    assert AutoTokenizer.from_pretrained(path)("w3 w4").input_ids == [3, 4]
    assert json.loads((path / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == VOCABULARY - 2
    assert [p.name for p in path.parent.iterdir()] == ["step-000000"]


def test_published_weights_are_of_the_precision_trained_in(start, tmp_path):
    trainer = make_trainer(start, precision="bfloat16")
    path = trainer.publish(tmp_path / "low", "low").path
    assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_published_folder_is_never_overwritten(start, tmp_path):
    trainer = make_trainer(start)
    trainer.publish(tmp_path / "step-000000", "step-000000")
    before = (tmp_path / "step-000000" / "model.safetensors").read_bytes()
    trainer.step(draw_batch(0))
    with pytest.raises(TrainingError, match="exists already"):
        trainer.publish(tmp_path / "step-000000", "step-000000")
    assert (tmp_path / "step-000000" / "model.safetensors").read_bytes() == before


def test_a_publication_that_fails_leaves_nothing(start, tmp_path, monkeypatch):
    trainer = make_trainer(start)

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("dspy_fst.slow.checkpoint.save_file", full)
    with pytest.raises(OSError, match="no space"):
        trainer.publish(tmp_path / "step-000000", "step-000000")
    assert list(tmp_path.iterdir()) == []


def test_fused_experts_are_published_under_the_names_they_were_loaded_from(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    path = make_trainer(tmp_path / "start").publish(tmp_path / "published", "v").path
    start, published = (load_file(p / "model.safetensors") for p in (tmp_path / "start", path))
    assert start.keys() == published.keys()
    assert all(torch.equal(tensor, published[name]) for name, tensor in start.items())


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_trainer_goes_on_bit_for_bit(start, tied_start, tmp_path, tied):
    begin = tied_start if tied else start
    steady, early = make_trainer(begin), make_trainer(begin)
    for seed in range(2):
        steady.step(draw_batch(seed))
        early.step(draw_batch(seed))
    early.save_state(tmp_path / "state")
    drawn = torch.rand(3)
    late = make_trainer(begin)
    late.load_state(tmp_path / "state")
    assert torch.equal(torch.rand(3), drawn)
    for seed in range(2, 5):
        assert late.step(draw_batch(seed)) == steady.step(draw_batch(seed))
    assert late.updates == 5
    assert all(torch.equal(p, late.parameters[name]) for name, p in steady.parameters.items())


def test_a_state_before_the_first_update_can_be_gone_on_from(start, tmp_path):
    first, second = make_trainer(start), make_trainer(start)
    first.save_state(tmp_path / "state")
    second.step(draw_batch(0))
    second.load_state(tmp_path / "state")
    assert second.step(draw_batch(1)) == first.step(draw_batch(1))
    assert all(torch.equal(p, second.parameters[name]) for name, p in first.parameters.items())


def test_state_is_safetensors_and_json_only(start, tmp_path):
    make_trainer(start).save_state(tmp_path / "state")
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["state.json", "state.safetensors"]


def test_a_state_that_cannot_be_read_is_refused_by_its_path(start, tmp_path):
    with pytest.raises(TrainingError, match="nowhere"):
        make_trainer(start).load_state(tmp_path / "nowhere")


def test_the_state_of_another_model_is_refused(start, tied_start, tmp_path):
    make_trainer(start).save_state(tmp_path / "state")
    with pytest.raises(TrainingError, match="another model"):
        make_trainer(tied_start).load_state(tmp_path / "state")


def test_the_state_of_another_release_is_refused(start, tmp_path):
    make_trainer(start).save_state(tmp_path / "state")
    (tmp_path / "state" / "state.json").write_text('{"format": 99, "updates": 0}')
    with pytest.raises(TrainingError, match="format 99"):
        make_trainer(start).load_state(tmp_path / "state")


def test_a_model_whose_files_lack_a_layer_is_refused(start, tmp_path):
    folder = shutil.copytree(start, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"lack model\.layers\.0\.mlp\.up_proj\.weight"):
        Policy.load(folder, dtype=torch.float32)


def test_an_optimizer_is_taken_over_with_published_weights_and_the_next_update_is_the_same(start, tmp_path):
    trainer = make_trainer(start, kl_coefficient=0.0)
    for seed in range(2):
        trainer.step(draw_batch(seed))
    trainer.save_state(tmp_path / "state")
    published = trainer.publish(tmp_path / "weights", "step-000002").path
    taking, anew = (make_trainer(published, kl_coefficient=0.0) for _ in range(2))
    assert taking.load_optimizer(tmp_path / "state") == []
    for one in (trainer, taking, anew):
        one.step(draw_batch(2))
    assert [one.updates for one in (trainer, taking, anew)] == [3, 3, 1]
    wanted = trainer.parameters
    assert all(tensor.equal(wanted[name]) for name, tensor in taking.parameters.items())
    assert not all(tensor.equal(wanted[name]) for name, tensor in anew.parameters.items())


def test_a_head_that_was_tied_has_no_moments_to_take_over(tied_start, start, tmp_path):
    trainer = make_trainer(tied_start)
    trainer.step(draw_batch(0))
    trainer.save_state(tmp_path / "state")
    taking = make_trainer(trainer.publish(tmp_path / "weights", "step-000001").path)
    assert taking.load_optimizer(tmp_path / "state") == ["lm_head.weight"]
    taking.step(draw_batch(1))
    taking.save_state(tmp_path / "after")
    counts = load_file(tmp_path / "after" / "state.safetensors")
    assert (counts["step/lm_head.weight"], counts["step/model.embed_tokens.weight"]) == (1, 2)
    with pytest.raises(TrainingError, match="the state of another model"):
        make_trainer(tied_start).load_optimizer(tmp_path / "after")
