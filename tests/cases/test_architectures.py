"""Architectures that people have: trained and sampled as plain transformers would, or refused with a sentence."""

import dataclasses
import json
from functools import cache

import pytest
import torch
from transformers import AutoConfig, Qwen3ForCausalLM

from benchmarks.architectures import EQUAL, PAGE, RESULTS, InProcess, Outcome, measured, page
from benchmarks.families import FAMILIES, Family
from dspy_fst import PolicyLM
from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.vllm import supervisor as supervisor_module
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.engine.vllm.supervisor import Supervisor
from dspy_fst.errors import TrainingError
from dspy_fst.model_files.architectures import context_length, restart_reason, unlike_vllm
from dspy_fst.preflight import model_checks, restarts, vllm_start
from dspy_fst.preflight.model_checks import model_faults
from dspy_fst.preflight.restarts import restart_warnings
from dspy_fst.preflight.vllm_start import vllm_faults
from dspy_fst.slow.batching import Scored, micro_batches
from dspy_fst.slow.head import Head
from dspy_fst.slow.model import Policy
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from programs.lab import BASE
from tests.engine.test_contract import request_of
from tests.engine.test_supervisor import World

BY_NAME = {family.name: family for family in FAMILIES}
NONE = ("Phi-3.5-MoE", "Bamba", "GPT-Neo", "MPT", "MiniMax", "RWKV", "RecurrentGemma")
"""For which vLLM has no code."""
NO_CODE = "vLLM has no code for a ... model as transformers writes it; use engine='in_process'"


@cache
def outcome(name: str) -> Outcome:
    return measured(BY_NAME[name])


@pytest.mark.parametrize("name", BY_NAME)
def test_a_family_is_trained_and_sampled_as_plain_transformers_would(name):
    found = outcome(name)
    assert found.refused is None
    gaps = {key: value for key, value in dataclasses.asdict(found).items() if isinstance(value, float)}
    moved = gaps.pop("moved")
    assert all(gap <= EQUAL for gap in gaps.values()), gaps
    assert moved > 100 * EQUAL, "an engine that stayed behind would not be seen"


def test_the_page_is_what_a_new_measurement_writes():
    served = json.loads(RESULTS.read_text())["vllm"]
    assert PAGE.read_text() == page([outcome(family.name) for family in FAMILIES], served)


# ---- what a family does to its logits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("Granite", Head(scale=1 / 8)),
        ("Cohere 2", Head(scale=3.0)),
        ("Gemma 2", Head(cap=1.5)),
        ("MiniCPM3", Head(before=256 / 64)),
        ("Falcon-H1", Head(scale=0.5)),
        ("Llama", Head()),
    ],
)
def test_scales_and_caps_are_measured(name, head):
    found = Head.of(BY_NAME[name].make())
    assert (found.before, found.scale) == pytest.approx((head.before, head.scale), rel=1e-6)
    assert found.cap == (None if head.cap is None else pytest.approx(head.cap))
    if head == Head():
        assert found == head, "a plain head must not cost a rounding"


class Bent(Qwen3ForCausalLM):
    """A model with a head of its own kind."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.sign() * output.logits.abs().sqrt()
        return output


def test_another_function_of_the_logits_is_refused_by_its_type():
    with pytest.raises(TrainingError, match="'qwen3' cannot be trained: it changes its logits after the head"):
        Head.of(Bent(BY_NAME["Qwen3"].config()).eval())


# ---- positions that depend on the length ---------------------------------------------------------------------------


def longrope() -> Family:
    return BY_NAME["Phi-3, longrope"]


def dynamic() -> Family:
    told = {**BY_NAME["Llama, dynamic rope"].told, "max_position_embeddings": 32}
    return dataclasses.replace(BY_NAME["Llama, dynamic rope"], told=told)


def learned() -> Family:
    return dataclasses.replace(BY_NAME["GPT-2"], told={"n_inner": None, "max_position_embeddings": 32})


def test_the_context_of_a_longrope_model_is_its_original_length(tmp_path):
    assert context_length(longrope().config()) == 128
    path = longrope().save(tmp_path / "model")
    assert model_faults(PolicyLM(path, engine="in_process", max_tokens=120)) == []
    assert any("context of 128" in fault for fault in model_faults(PolicyLM(path, engine="in_process", max_tokens=200)))


def test_vllm_is_told_no_longer_context_for_longrope(tmp_path):
    path = longrope().save(tmp_path / "model")
    long, short = (
        model_faults(PolicyLM(path, engine="vllm", max_tokens=64, engine_options={"max_model_len": length}))
        for length in (256, 128)
    )
    assert any("set max_model_len to 128 or less" in fault for fault in long)
    assert short == []


def test_dynamic_rope_is_refused_for_vllm_only(tmp_path):
    path = dynamic().save(tmp_path / "model")
    assert any("'dynamic'" in fault for fault in model_faults(PolicyLM(path, engine="vllm", max_tokens=8)))
    assert model_faults(PolicyLM(path, engine="in_process", max_tokens=8)) == []


@pytest.mark.parametrize("family", ["Gemma 2", "Bloom", "Gemma 3n (text)"])
def test_a_model_without_a_head_of_its_own_in_vllm_is_refused_for_vllm_only(family, tmp_path):
    folder = BY_NAME[family].save(tmp_path / "model")
    (fault,) = model_faults(PolicyLM(folder, engine="vllm", max_tokens=8))
    assert "vLLM has no place for an LM head of its own" in fault
    assert not model_faults(PolicyLM(folder, engine="in_process", max_tokens=8))


@pytest.mark.parametrize(
    ("name", "lacking"),
    [("LFM2", ("block_dim", "conv_dim")), ("MiniMax M2", ("rotary_dim", "scoring_func", "use_routing_bias"))],
    ids=["LFM2", "MiniMax M2"],
)
def test_what_vllm_alone_reads_in_a_config_is_asked_for_when_vllm_serves(name, lacking, tmp_path):
    """Without it the server ends with "'Lfm2Config' object has no attribute 'conv_dim'", after it was started."""
    published = BY_NAME[name]
    told = {key: value for key, value in published.told.items() if key not in lacking}
    bare = dataclasses.replace(published, told=told).save(tmp_path / "bare")
    fault, *_ = model_faults(PolicyLM(bare, engine="vllm", max_tokens=8))
    assert f"vLLM reads {' and '.join(lacking)} in the config.json of a {published.model_type!r} model" in fault
    assert model_faults(PolicyLM(bare, engine="in_process", max_tokens=8)) == []
    assert unlike_vllm(published.config(), None) == []


@pytest.mark.parametrize(
    ("name", "dtype", "says"),
    [
        ("Qwen3.5 (text)", "bfloat16", "imports torchvision, which is not installed"),
        ("Gemma 3 (multimodal)", "float32", "imports torchvision, which is not installed"),
        ("Qwen3-Next", "float32", "in bfloat16 alone, and its server would not start in float32"),
        ("LFM2", "float32", "other log-probabilities than transformers"),
        ("GLM 4.7-Flash", "float32", "other log-probabilities than transformers"),
        ("DeepSeek-V2", "bfloat16", "other log-probabilities than transformers"),
        ("Mamba", "bfloat16", "no kernel for the recurrent layers of a 'mamba' model"),
        ("Kimi-Linear", "bfloat16", "no kernel for the recurrent layers of a 'kimi_linear' model"),
        ("Nemotron-H", "bfloat16", "no kernel for the experts of a 'nemotron_h' model"),
        ("MiMo-V2-Flash", "bfloat16", "no kernel for the attention of a 'mimo_v2_flash' model"),
        ("MiniMax M2", "float32", "no kernel for the experts of a 'minimax_m2' model"),
        ("Zamba 2", "float32", "fails to load new weights into a running server of a 'zamba2' model"),
    ],
)
def test_what_vllm_cannot_do_on_this_machine_is_told_before_it_starts(name, dtype, says, monkeypatch):
    monkeypatch.setattr(vllm_start, "find_spec", lambda name: None)
    config, options = BY_NAME[name].config(), {"dtype": dtype}
    assert [says in fault for fault in vllm_faults(config, options, on_gpu=False)] == [True]
    assert list(vllm_faults(config, {**options, "attach_url": "http://127.0.0.1:1"}, on_gpu=False)) == []
    monkeypatch.setattr(vllm_start, "find_spec", lambda name: "found")
    assert list(vllm_faults(config, options, on_gpu=True)) == []
    assert list(vllm_faults(BY_NAME["Qwen3"].config(), options, on_gpu=False)) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *((name, NO_CODE) for name in NONE),
        (
            "Youtu",
            "vLLM takes the rotated part of a ... model's heads for a whole head, so its server would end at the first "
            "text; use engine='in_process'",
        ),
        (
            "LongCat-Flash",
            "transformers writes weights of the experts that do nothing in a ... model, for which vLLM has no place, "
            "so its server would not start; use engine='in_process'",
        ),
    ],
    ids=[*NONE, "Youtu", "LongCat-Flash"],
)
def test_a_model_for_which_vllm_has_no_code_is_refused_on_every_machine(name, says):
    config = BY_NAME[name].config()
    faults = [list(vllm_faults(config, {}, on_gpu=on_gpu)) for on_gpu in (False, True)]
    assert faults == [[says.replace("...", repr(BY_NAME[name].model_type))]] * 2


def test_such_a_model_is_refused_with_the_other_faults_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(model_checks, "has_gpu", lambda: False)
    folder = BY_NAME["Qwen3-Next"].save(tmp_path / "model")
    options = {"dtype": "float32"}
    (fault,) = model_faults(PolicyLM(folder, engine="vllm", max_tokens=8, engine_options=options))
    assert "on a CPU vLLM computes the linear attention of a 'qwen3_next' model in bfloat16 alone" in fault
    assert model_faults(PolicyLM(folder, engine="in_process", max_tokens=8)) == []


@pytest.mark.parametrize("family", [longrope, dynamic, learned], ids=lambda make: make.__name__)
@pytest.mark.parametrize("share", [False, True], ids=["alone", "shared"])
def test_a_short_text_beside_one_of_full_length_keeps_its_numbers(family, share, tmp_path):
    """Padding behind the short text's suffix stands at positions that the model does not have."""
    policy = Policy.load(family().save(tmp_path / "model"), dtype=torch.float32)
    assert policy.shares_prompts
    limit = context_length(policy.model.config)
    long = tuple(3 + i % 500 for i in range(limit))
    texts = [Scored(long, limit - 4), Scored((*long[: limit - 4], 9), limit - 4), Scored((7, 8, *long[: limit - 8]), 2)]
    for micro in micro_batches(texts, 10_000, share=share):
        with torch.no_grad():
            logits = policy.logits(micro)
        found = dict(zip(micro.members, logits.split(micro.tokens), strict=True))
        for member, ours in found.items():
            text = texts[member]
            own = policy.model(torch.tensor([text.ids]), use_cache=False).logits[0, text.start - 1 : -1]
            assert torch.allclose(ours, own, atol=1e-4)


@pytest.mark.parametrize("family", [longrope, dynamic, learned], ids=lambda make: make.__name__)
def test_a_text_longer_than_its_positions_is_refused_by_the_trainer(family, tmp_path):
    path = family().save(tmp_path / "model")
    trainer = Trainer(path, TrainingSettings(learning_rate=1e-3))
    limit = context_length(AutoConfig.from_pretrained(path))
    with pytest.raises(TrainingError, match=f"call 0 has {limit + 1} tokens, and the model reads {limit} at most"):
        trainer.score([[5] * (limit + 1)])


@pytest.mark.parametrize("family", [longrope, dynamic, learned], ids=lambda make: make.__name__)
def test_a_reply_that_ended_early_does_not_grow_past_the_context(family, tmp_path):
    """It waits in the batch for the others, at positions that the model does not have."""
    from dspy_fst.engine.generation import BatchDecoder, Pending, generate

    model = family().make()
    limit = context_length(model.config)
    calls = [Pending(tuple(range(5, 5 + limit - 4)), 2, 1.0, 0), *(Pending((5, 6 + i), 20, 1.0, i) for i in range(3))]
    for call, reply in zip(calls, generate(BatchDecoder(model), frozenset(), calls), strict=True):
        ids = torch.tensor([[*call.prompt, *reply.ids]])
        with torch.no_grad():
            own = model(ids, use_cache=False).logits[0, len(call.prompt) - 1 : -1].log_softmax(-1)
        assert reply.logprobs == pytest.approx(
            own.gather(-1, ids[0, len(call.prompt) :, None])[:, 0].tolist(), abs=1e-4
        )


# ---- what is not swapped, not sampled, not trained -------------------------------------------------------------------


def test_experts_are_not_swapped_into_a_running_server_on_a_cpu():
    moe = ("Qwen3-MoE", "Mixtral", "OLMoE", "DeepSeek-V3, Kimi-K2", "Qwen3-Next", "GPT-OSS", "Granite-MoE")
    for name in (*moe, "Llama 4 (text)", "Jamba", "Phi-3.5-MoE", "ERNIE 4.5-MoE"):
        assert "experts" in restart_reason(BY_NAME[name].config(), on_gpu=False), name
        assert restart_reason(BY_NAME[name].config(), on_gpu=True) is None
    for name in ("Qwen3", "Gemma 3 (multimodal)", "Granite", "Mamba", "GPT-2"):
        assert restart_reason(BY_NAME[name].config(), on_gpu=False) is None


@pytest.mark.parametrize(("name", "launched"), [("Qwen3-MoE", [["v0"], ["v1"]]), ("Qwen3", [["v0", "v1"]])])
def test_a_server_is_started_again_for_new_experts(name, launched, tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor_module, "has_gpu", lambda: False)
    folder = BY_NAME[name].save(tmp_path / "model")
    world = World()
    engine = Supervisor(VLLMSettings(), world.make)
    for version in ("v0", "v1"):
        engine.load(Checkpoint(version, folder))
    assert world.launched == launched
    counted = {"restarts for experts": 1} if len(launched) > 1 else {}
    assert engine.take_counts() == counted, "and no restart of a server that failed"


def test_the_kind_of_a_model_is_read_once_and_not_at_each_publish(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor_module, "has_gpu", lambda: False)
    folder, world, read = BY_NAME["Qwen3-MoE"].save(tmp_path / "model"), World(), []
    reason = supervisor_module.folder_restart_reason
    monkeypatch.setattr(
        supervisor_module, "folder_restart_reason", lambda *asked, **on: [read.append(asked), reason(*asked, **on)][1]
    )
    engine = Supervisor(VLLMSettings(), world.make)
    for version in ("v0", "v1", "v2", "v3"):
        engine.load(Checkpoint(version, folder))
    assert world.launched == [["v0"], ["v1"], ["v2"], ["v3"]]
    assert engine.take_counts() == {"restarts for experts": 3}
    assert len(read) == 1


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Qwen3"])
def test_a_server_that_each_publish_starts_anew_is_told_before_the_run(name, tmp_path, monkeypatch):
    folder = BY_NAME[name].save(tmp_path / "model")
    monkeypatch.setattr(restarts, "has_gpu", lambda: False)
    told = restart_warnings(folder, "vllm", {})
    assert [text.partition(":")[0] for text in told] == [
        "the vLLM server is restarted for each new version of the weights"
    ] * (name == "Qwen3-MoE")
    assert restart_warnings(folder, "vllm", {}, lora=True) == [], "the base stays, adapters are loaded beside it"
    assert restart_warnings(folder, "in_process", {}) == []
    assert restart_warnings(folder, "vllm", {"attach_url": "http://127.0.0.1:1"}) == []
    monkeypatch.setattr(restarts, "has_gpu", lambda: True)
    assert restart_warnings(folder, "vllm", {}) == []


def test_a_model_without_a_context_limit_answers(tmp_path):
    with InProcess(BY_NAME["Bloom"].save(tmp_path / "model")) as sampler:
        completion = sampler.engine.complete(request_of("1 2", max_tokens=None), seed=3)
    assert context_length(BY_NAME["Bloom"].config()) is None
    assert completion.finish_reason == "stop" or len(completion.completion_ids) == 1024


def test_the_towers_beside_the_text_part_are_left_as_they_are(tmp_path):
    trainer = Trainer(BY_NAME["Gemma 3 (multimodal)"].save(tmp_path / "model"), TrainingSettings(learning_rate=1e-3))
    trained = set(trainer.parameters)
    assert any("language_model" in name for name in trained)
    assert not any("vision" in name or "projector" in name for name in trained)


def test_of_a_model_that_reads_text_only_everything_is_trained():
    for name in ("Qwen3", "GPT-2", "Mamba", "Llama 4 (text)"):
        policy = Policy(BY_NAME[name].make())
        policy._set_trainable(True)
        assert all(parameter.requires_grad for parameter in policy.model.parameters()), name


def test_a_load_that_fails_leaves_an_engine_that_can_load_again(tmp_path):
    """Of a model whose files must be converted, the old weights are gone by then."""
    from dspy_fst.errors import EngineError

    good = BY_NAME["Qwen3-MoE"].save(tmp_path / "good")
    bad = BY_NAME["Qwen3-MoE"].save(tmp_path / "bad")
    (bad / "config.json").unlink()
    with InProcess(good) as sampler:
        before = sampler.engine.score([[2, 30, 31]])
        with pytest.raises(EngineError):
            sampler.load(Checkpoint("bad", bad))
        sampler.load(Checkpoint("good", good))
        assert sampler.engine.score([[2, 30, 31]]) == before
        assert sampler.sample(["1 2"])[0].weights == "good"


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    """BERT with a language model's head: its log-probabilities can be computed, and nothing samples from them."""
    path = Family("BERT", "bert", {"bos_token_id": None}).save(tmp_path / "model")
    with pytest.raises(TrainingError, match=r"'bert' cannot be trained: .*depend on later tokens"):
        Policy.load(path, dtype=torch.float32)


def test_the_laboratory_s_model_is_swapped_in_place(tmp_path):
    with InProcess(BASE) as sampler:
        model = sampler.engine._model
        trainer = Trainer(BASE, TrainingSettings(learning_rate=1e-3))
        sampler.load(trainer.publish(tmp_path / "v1", "v1"))
        assert sampler.engine._model is model
