"""A LoRA adapter for each group of predictors: each learns from its own calls alone, on one base."""

import dataclasses
import random

import pytest
import torch

from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import TrainingError
from dspy_fst.recipe.lora_settings import LoRA, adapter_of
from dspy_fst.slow.checkpoint import write_merged
from dspy_fst.slow.credit import credit
from dspy_fst.slow.update_metrics import in_one_report
from dspy_fst.types import Batch, Group, SeedKLCall
from tests.slow.makers import make_call, make_rollout
from tests.slow.test_lora import flat
from tests.slow.test_trainer import assert_close, draw_call, make_trainer, recorded_gradients

SMALL = LoRA(rank=4, alpha=8.0)
BOTH = {"query": "for-query", "answer": "for-answer"}


def batch_of(seed: int, predictors=("query", "answer")) -> Batch:
    draw = random.Random(seed)
    rewards = ((1.0, 0.0, 0.25), (0.0, 1.0))

    def calls():
        drawn = [draw_call(draw, name) for name in ("query", "answer", "query")]
        return [call for call in drawn if call.predictor in predictors]

    return credit(
        [Group(p, tuple(make_rollout(r, *calls(), problem=p) for r in group)) for p, group in enumerate(rewards)]
    )


def trained(start, updates=2, **changes):
    trainer = make_trainer(start, **{"adapter": SMALL, "warmup_steps": 0, **changes}, adapters=BOTH)
    for update in range(updates):
        trainer.step(batch_of(update))
    return trainer


def of(name, tensors):
    return {key.replace(f".{name}.", ".shared."): tensor for key, tensor in tensors.items() if f".{name}." in key}


def test_names_of_the_adapters():
    assert adapter_of("shared", ["a", "b"]) == {}
    assert adapter_of("per_predictor", ["a.b", "c"]) == {"a.b": "for-a-b", "c": "for-c"}
    assert adapter_of({"one": ("a", "b"), "two": ("c",)}, ["a", "b", "c"]) == {"a": "one", "b": "one", "c": "two"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["query", "answer"])
def test_the_gradient_of_an_adapter_is_that_of_its_own_calls(start, name):
    """Against a trainer with one adapter, of the same numbers, on the rows of that predictor alone."""
    batch = batch_of(7)
    both, alone = trained(start), make_trainer(start, adapter=SMALL, warmup_steps=0)
    ours, its = of(f"for-{name}", dict(both.parameters)), dict(alone.parameters)
    assert ours.keys() == its.keys()
    with torch.no_grad():
        for key, parameter in its.items():
            parameter.copy_(ours[key])
    with recorded_gradients(both) as found:
        both.step(batch)
    rows = tuple(row for row in batch.rows if row.predictor == name)
    with recorded_gradients(alone) as wanted:
        alone.step(dataclasses.replace(batch, rows=rows))
    assert_close(of(f"for-{name}", found), wanted)


def test_an_update_tells_what_each_adapter_learnt_from(start):
    """Against the calls themselves, the gradients that were applied, and the KL of each call."""
    trainer, batch = trained(start, kl_coefficient=0.1), batch_of(7)
    kl = trainer.kl_by_call(batch.rows)
    with recorded_gradients(trainer) as gradients:
        update = trainer.step(batch)
    assert update.adapters.keys() == {"for-answer", "for-query"}
    for predictor, name in BOTH.items():
        report = update.adapters[name]
        rows = [(row, own) for row, own in zip(batch.rows, kl, strict=True) if row.predictor == predictor]
        weights = torch.cat([torch.full((len(own),), row.token_weight) for row, own in rows])
        wanted = float((weights * flat([own for _, own in rows])).sum() / weights.sum())
        norm = torch.cat([gradient.flatten() for gradient in of(name, gradients).values()]).norm()
        assert (report.rows, report.tokens) == (len(rows), sum(len(own) for _, own in rows))
        assert report.kl_to_start == pytest.approx(wanted, rel=1e-4)
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert report.entropy > 0
    assert sum(report.rows for report in update.adapters.values()) == update.rows
    assert update.grad_norm**2 == pytest.approx(sum(each.grad_norm**2 for each in update.adapters.values()), rel=1e-5)


def test_a_distillation_tells_of_each_adapter_what_it_tells_of_all(start):
    """Rows, KL and entropy against the update of each predictor's calls alone, which is a whole update."""
    calls = [make_call([4, 5, 6], [1, 2], predictor=name) for name in ("query", "answer", "query")]
    held = [SeedKLCall(call, (3, *call.prompt_ids)) for call in calls]
    settings = {"kl_coefficient": 0.0, "seed_kl_coefficient": 1.0}

    def distilled(chosen):
        return trained(start, **settings).step(Batch((), "step-000000", seed_kl_calls=tuple(chosen)))

    update = distilled(held)
    assert update.adapters.keys() == {"for-answer", "for-query"}
    for predictor, name in BOTH.items():
        alone = distilled(each for each in held if each.call.predictor == predictor)
        report = update.adapters[name]
        assert (report.rows, report.tokens, report.kl_to_start) == (alone.rows, alone.tokens, None)
        assert report.distance == report.kl_under_seed == pytest.approx(alone.kl_under_seed, rel=1e-5)
        assert report.entropy == pytest.approx(alone.entropy, rel=1e-5)
    assert update.grad_norm**2 == pytest.approx(sum(each.grad_norm**2 for each in update.adapters.values()), rel=1e-5)
    twice = in_one_report([update, update]).adapters["for-query"]
    assert (twice.rows, twice.kl_under_seed) == (4, pytest.approx(update.adapters["for-query"].kl_under_seed))


def test_an_adapter_with_seed_kl_calls_alone_has_no_learnt_tokens_beside_one_that_has(start):
    batch = batch_of(7)
    call = make_call([4, 5, 6], [1, 2], predictor="query")
    rows = tuple(row for row in batch.rows if row.predictor == "answer")
    seed_calls = (SeedKLCall(call, (3, *call.prompt_ids)),)
    trainer = trained(start, kl_coefficient=0.1, seed_kl_coefficient=1.0)
    update = trainer.step(dataclasses.replace(batch, rows=rows, seed_kl_calls=seed_calls))
    query, answer = update.adapters["for-query"], update.adapters["for-answer"]
    assert (query.rows, query.tokens, query.seed_tokens) == (0, 0, 3)
    assert query.kl_to_start is None
    assert query.distance == pytest.approx(update.kl_under_seed)
    assert (answer.rows, answer.tokens, answer.seed_tokens) == (update.rows, update.tokens, 0)
    assert update.seed_tokens == 3


def test_an_update_tells_nothing_of_an_adapter_without_calls_or_of_a_single_one(start):
    update = trained(start).step(batch_of(5, predictors=("answer",)))
    assert update.adapters.keys() == {"for-answer"}
    assert make_trainer(start, adapter=SMALL).step(batch_of(5)).adapters == {}


def test_a_predictor_without_calls_in_a_batch_leaves_its_adapter_as_it_is(start):
    trainer = trained(start)
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    trainer.step(batch_of(5, predictors=("answer",)))
    moved = {name for name, parameter in trainer.parameters.items() if not torch.equal(before[name], parameter)}
    assert moved
    assert all(".for-answer." in name for name in moved)


def test_calls_are_scored_through_their_own_adapter_and_the_kl_is_to_the_base(start):
    trainer, base = trained(start), make_trainer(start)
    calls = [make_call([4, 5, 6], [1, 2], predictor=name) for name in ("query", "answer", "other")]
    query, answer, other = trainer.logprobs(calls)
    ids = [[1, 2, 4, 5, 6]]
    assert query == pytest.approx(trainer.score(ids, adapter="for-query")[0][1:], abs=1e-6)
    assert answer == pytest.approx(trainer.score(ids, adapter="for-answer")[0][1:], abs=1e-6)
    assert other == pytest.approx(base.logprobs(calls[2:])[0], abs=1e-6)
    assert query != pytest.approx(answer, abs=1e-3)
    kl = trainer.kl_by_call(calls)
    assert min(kl[0] + kl[1]) > 1e-4
    assert kl[2] == pytest.approx([0.0] * 3, abs=1e-6)


def test_several_adapters_are_published_restored_and_go_on(start, tmp_path):
    trainer = trained(start)
    published = trainer.publish(tmp_path / "step-000002", "step-000002")
    assert [adapter.name for adapter in published.adapters] == ["for-query", "for-answer"]
    read = Checkpoint.at("step-000002", published.folder)
    assert (read, read.predictors) == (published, BOTH)
    trainer.save_state(tmp_path / "state")
    again = make_trainer(start, adapter=SMALL, warmup_steps=0, adapters=BOTH)
    again.load_state(tmp_path / "state")
    further = make_trainer(published.folder, adapter=SMALL, warmup_steps=0, adapters=BOTH)
    calls = [make_call([4, 5, 6], [1, 2], predictor=name) for name in BOTH]
    assert float(flat(further.kl_by_call(calls)).abs().max()) < 1e-6
    for each in (trainer, again, further):
        each.step(batch_of(9))
    assert all(torch.equal(again.parameters[name], p) for name, p in trainer.parameters.items())
    assert float(flat(further.kl_by_call(calls)).min()) > 0


def test_several_adapters_are_no_whole_weights(start, tmp_path):
    folder = trained(start).publish(tmp_path / "step-000002", "step-000002").folder
    for settings in ({}, {"adapter": SMALL}, {"adapter": LoRA(rank=2)}):
        with pytest.raises(TrainingError, match="holds 2 LoRA adapters, for different predictors"):
            make_trainer(folder, **settings)
    out = tmp_path / "base-alone"  # whoever names no adapter of several speaks with the base
    out.mkdir()
    write_merged(folder, out)
    assert torch.equal(flat(make_trainer(out).score([[4, 5, 6, 7]])), flat(make_trainer(start).score([[4, 5, 6, 7]])))


def test_a_single_group_is_updated_and_reported_as_one_of_several(start):
    trainer = make_trainer(start, adapter=SMALL, warmup_steps=0, adapters={"answer": "for-answer"})
    update = trainer.step(batch_of(5, predictors=("answer",)))
    assert update.adapters["for-answer"].rows == update.rows
    assert update.adapters["for-answer"].grad_norm == pytest.approx(update.grad_norm, rel=1e-5)
