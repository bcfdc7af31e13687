"""A real pretrained model on the embedded engine."""

import shutil
from statistics import fmean

import pytest
from transformers import AutoTokenizer

from benchmarks.durability.outcome import outcome
from benchmarks.durability.trials import Comparison
from benchmarks.real_model import scores, shares
from benchmarks.real_model.runs import MOODS_RUN, gaps, step_reports
from programs import smollm2
from tests.real.asked import DEATH, RESUMED_FROM, SMALL, SYSTEM_OF_THE_TEMPLATE, request_of


@pytest.mark.parametrize(
    ("precision", "mean", "largest"),
    [
        # Measured on 430 tokens under three adapters: mean 3e-6, largest 2.3e-5.
        ("float32", 5e-5, 1e-3),
        # Measured on the same: means of .014 to .037, largest .21. Other weights may show as little: the tensors tell.
        ("bfloat16", 0.08, 1.0),
    ],
)
def test_recorded_tokens_are_what_the_trainer_scores(in_process, precision, mean, largest):
    policy = in_process(precision)
    rollouts = [*shares.play(policy, "ChatAdapter", 0, 2), *shares.play(policy, "JSONAdapter", 2, 4)]
    policy.release()
    found = scores.gaps(scores.trainer_of(precision), rollouts)
    assert len(found) > 60
    assert fmean(found) < mean
    assert max(found) < largest


def test_a_request_without_a_system_text_gets_the_template_s_own_and_one_with_it_does_not(in_process):
    engine = in_process().handle.ready()
    tokenizer = AutoTokenizer.from_pretrained(smollm2.folder())
    bare, told = (
        tokenizer.decode(engine.complete(request_of(system), seed=1).prompt_ids) for system in (None, "Be brief.")
    )
    assert bare == (
        f"<|im_start|>system\n{SYSTEM_OF_THE_TEMPLATE}<|im_end|>\n<|im_start|>user\nGood morning!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert told == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGood morning!<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.fixture(scope="module")
def comparison(on_disk):
    folder = on_disk / "compared"
    folder.mkdir()
    yield Comparison(folder, settings={**SMALL, "precision": "float32"}, subject=MOODS_RUN)
    shutil.rmtree(folder)  # gigabytes


def test_a_run_in_float32_that_is_killed_and_continued_equals_an_undisturbed_one(comparison):
    killed = comparison.killed("killed", DEATH)
    assert killed.deaths == [str(DEATH)]
    assert len(killed.resumed_from) == 1
    assert {*killed.resumed_from} <= RESUMED_FROM
    assert gaps(killed.run_dir) == []
    assert comparison.differing(outcome(killed.run_dir)) == []
    assert step_reports(killed.run_dir)[0]["reward"] > 0


def test_the_real_model_learns_from_some_of_its_replies(comparison):
    reports = step_reports(comparison.folder / "whole")
    assert any(report["update"]["rows"] for report in reports)
    assert all(report["update"]["effective_sample_share"] > 0.99 for report in reports if report["update"]["rows"])
