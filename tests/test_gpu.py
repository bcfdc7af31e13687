"""The same promises on a GPU: bfloat16 bodies, float32 logits. Skipped where there is none."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from dspy import lm15

from dspy_fst.engine.in_process import InProcessEngine, InProcessSettings
from dspy_fst.engine.verification import MEAN_GAP_LIMITS, Expected, verify, verify_numbers
from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.slow.checkpoint import read_state
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Batch, Row
from programs.lab import BASE
from programs.lab.demo import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the GPU paths are untried"),
]
GRADIENT_GAPS = {"float32": 1e-4, "bfloat16": 2**-5}
"""Largest distance of two gradients of the same weights and batch, over their length. CUDA's kernels add up the
backward pass in varying order (index_select, embedding, attention). A bfloat16 number has 8 significant bits, so a sum
in another order is another number by a few times 2**-8; on an H100 the gradients' lengths differed by up to 4e-4."""
NORM_GAPS = {"float32": 1e-4, "bfloat16": 4e-3}
"""The same for their lengths, relative: ten times what was seen on an H100 in bfloat16."""
SEQUENCES = [[2, 30, 31, 32, 33], [5, 6, 7, 8, 9, 10, 11]]
KINDS = {"full": None, "lora": LoRA(rank=4)}


def a_batch(problems=6, rollouts=4):
    """Prompts that several rows share, in three lengths, with recorded log-probabilities near a uniform choice."""
    draw = random.Random(0)
    rows = []
    for problem in range(problems):
        prompt = tuple(draw.randrange(2, 500) for _ in range(20 + 5 * (problem % 3)))
        for _ in range(rollouts):
            reply = tuple(draw.randrange(2, 500) for _ in range(draw.randint(4, 12)))
            rows.append((prompt, reply, draw.choice((-1.0, 1.0))))
    weight = 1 / sum(len(reply) for _, reply, _ in rows)
    return Batch(tuple(Row(p, r, (-6.0,) * len(r), advantage=a, token_weight=weight) for p, r, a in rows), "start")


def a_trainer(precision="float32", device="auto", **changes):
    settings = TrainingSettings(learning_rate=1e-3, precision=precision, min_effective_share=0.0, **changes)
    return Trainer(BASE, settings, device=device)


def gradient(trainer, folder):
    """The gradient of the first update: AdamW's first moment is a tenth of it."""
    trainer.step(a_batch())
    trainer.save_state(folder)
    tensors, _ = read_state(folder, {})
    return {name: 10 * tensor for name, tensor in tensors.items() if name.startswith("exp_avg/")}


def test_the_trainer_computes_in_bfloat16_and_keeps_float32_parameters():
    trainer = Trainer(BASE, TrainingSettings(learning_rate=1e-4))
    assert trainer.dtype == "bfloat16"
    assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_on_the_gpu_is_that_of_the_cpu(kind, tmp_path):
    mine, theirs = (a_trainer(device=device, adapter=KINDS[kind]) for device in ("auto", "cpu"))
    on_gpu, on_cpu = gradient(mine, tmp_path / "gpu"), gradient(theirs, tmp_path / "cpu")
    assert on_gpu.keys() == on_cpu.keys()
    scale = max(float(tensor.abs().max()) for tensor in on_cpu.values())
    gaps = {name: float((on_gpu[name] - on_cpu[name]).abs().max()) / scale for name in on_cpu}
    assert scale > 0
    assert max(gaps.values()) <= 1e-4, max(gaps, key=gaps.__getitem__)


def test_an_update_in_bfloat16_has_the_direction_of_one_in_float32(tmp_path):
    low, exact = (gradient(a_trainer(p), tmp_path / p) for p in ("bfloat16", "float32"))
    one, other = (torch.cat([tensors[name].flatten() for name in sorted(exact)]) for tensors in (low, exact))
    assert float(torch.cosine_similarity(one, other, dim=0)) > 0.99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_continued_trainer_has_every_bit_of_the_state_and_the_next_update_up_to_the_order_of_sums(
    kind, precision, tmp_path
):
    whole = a_trainer(precision, adapter=KINDS[kind])
    before = whole_state(whole, tmp_path / "new")
    whole.step(a_batch())
    saved = whole_state(whole, tmp_path / "state")
    continued = a_trainer(precision, adapter=KINDS[kind])
    continued.load_state(tmp_path / "state")
    restored = whole_state(continued, tmp_path / "restored")
    assert restored[1] == saved[1] != before[1]
    assert restored[0].keys() == saved[0].keys()
    assert [name for name in saved[0] if not torch.equal(saved[0][name], restored[0][name])] == []
    reports = [trainer.step(a_batch()) for trainer in (whole, continued)]
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=NORM_GAPS[precision])
    moments = [first_moment(trainer, tmp_path / name) for name, trainer in (("one", whole), ("other", continued))]
    earlier = first_moment_of(saved[0])
    one, other = (10 * moment - 9 * earlier for moment in moments)  # the gradients: AdamW adds a tenth of each
    assert float((one - other).norm() / one.norm()) <= GRADIENT_GAPS[precision]


def whole_state(trainer, folder):
    """What the trainer would be continued from: tensors and counters."""
    trainer.save_state(folder)
    return read_state(folder, {})


def first_moment(trainer, folder):
    return first_moment_of(whole_state(trainer, folder)[0])


def first_moment_of(tensors):
    """AdamW's first moment of all parameters, as one vector."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if name.startswith("exp_avg/")])


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_serves_what_the_trainer_publishes(kind, tmp_path):
    trainer = a_trainer("auto", adapter=KINDS[kind])
    trainer.step(a_batch())
    engine = InProcessEngine()
    checkpoint = trainer.publish(tmp_path / "v1", "v1")
    engine.load(checkpoint)
    assert verify(engine, Expected(checkpoint, SEQUENCES, trainer.score(SEQUENCES), trainer.dtype)).identical
    assert engine.complete(request_of("1 2 3 4"), seed=1).completion_ids
    engine.close()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_engine_scores_what_it_samples(precision, tmp_path):
    trainer = a_trainer(precision)
    engine = InProcessEngine(InProcessSettings(dtype=precision))
    engine.load(trainer.publish(tmp_path / "v0", "v0"))
    engine.expect(16)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda n: engine.complete(request_of(f"{n} 2 3 4"), seed=n), range(16)))
    sampled = [list(reply.logprobs) for reply in replies]
    scored = engine.score([(*reply.prompt_ids, *reply.completion_ids) for reply in replies])
    own = [scores[-len(reply.completion_ids) :] for scores, reply in zip(scored, replies, strict=True)]
    verify_numbers(sampled, own, tolerance=MEAN_GAP_LIMITS[precision], version="v0")
    engine.close()


def request_of(numbers, max_tokens=12):
    config = lm15.Config(max_tokens=max_tokens, temperature=1.0)
    return lm15.Request(model="policy", messages=(lm15.Message.user(numbers),), config=config)


@pytest.mark.parametrize("engine", ["in_process", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_the_demo_s_joint_cell_is_best(engine, tmp_path):
    cells = run("reverse_drop", engine, 0, tmp_path / "run")["cells"]
    scores = [cell["mean_at_k"] for cell in cells.values()]
    assert scores[-1] == max(scores)


def test_an_update_that_runs_out_of_memory_is_made_again_with_smaller_micro_batches(tmp_path):
    """The process may have less than the first try takes, and more than one with half the micro-batch tokens."""
    batch, budget, total = a_batch(problems=200), 16384, torch.cuda.mem_get_info()[1]
    (large, _), (small, expected) = (reserved_by_a_step(batch, tokens) for tokens in (budget, budget // 2))
    assert large > small
    torch.cuda.set_per_process_memory_fraction((large + small) / 2 / total)
    try:
        trainer = a_trainer(micro_batch_tokens=budget)
        report = trainer.step(batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert report.halved_to is not None
    assert report.halved_to < budget
    assert (report.rows, report.tokens) == (expected.rows, expected.tokens)
    assert report.grad_norm == pytest.approx(expected.grad_norm, rel=NORM_GAPS["float32"])


def reserved_by_a_step(batch, tokens):
    """The most bytes that the process held, and the step's report."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    report = a_trainer(micro_batch_tokens=tokens).step(batch)
    held = torch.cuda.max_memory_reserved()
    gc.collect()
    torch.cuda.empty_cache()
    return held, report
