"""A real pretrained model on a vLLM server in bfloat16, the precision of every GPU: one server for all tests here."""

import shutil
from statistics import fmean

import pytest

from benchmarks.durability.trials import Killer
from benchmarks.real_model import scores, shares
from benchmarks.real_model.runs import MOODS_RUN, OPTIONS, gaps, step_reports
from dspy_fst import PolicyLM
from dspy_fst.engine.base import Checkpoint
from tests.real.asked import ADAPTERS, DEATH, RESUMED_FROM, SMALL, request_of

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def trainer():
    return scores.trainer_of("bfloat16")


@pytest.fixture(scope="module")
def published(trainer, on_disk):
    return trainer.publish(on_disk / "v0", "v0")


@pytest.fixture(scope="module")
def server(published):
    """A policy whose server is started once, as a user's is; a run attaches to it, and leaves other weights behind."""
    policy = PolicyLM(
        published.path, engine="vllm", max_tokens=24, engine_options={**OPTIONS["vllm"], "dtype": "bfloat16"}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "")
        policy.handle.ready()
    yield policy
    policy.release()


@pytest.fixture
def served(server, published):
    server.handle.engine.load(Checkpoint("v0", published.path))
    return server


def test_recorded_tokens_are_what_the_trainer_scores(served, trainer):
    rollouts = [*shares.play(served, "ChatAdapter", 0, 2), *shares.play(served, "JSONAdapter", 2, 4)]
    found = scores.gaps(trainer, rollouts)
    assert len(found) > 60
    assert fmean(found) < 0.08
    assert max(found) < 1.0


def test_both_engines_are_given_the_same_prompt_ids(served, in_process):
    """Of every adapter, with and without demos; and of a request to which the template adds its own system text."""
    other = in_process(max_tokens=1)
    engines = served.handle.engine, other.handle.ready()
    for system in (None, "Be brief."):
        there, here = (engine.complete(request_of(system), seed=1).prompt_ids for engine in engines)
        assert there == here
    for adapter, demos in ADAPTERS:
        (there,), (here,) = (shares.play(policy, adapter, demos, 1) for policy in (served, other))
        assert there.calls[0].prompt_ids == here.calls[0].prompt_ids, (adapter, demos)


def test_a_run_in_bfloat16_that_is_killed_goes_on_without_gap_or_double(served, on_disk):
    address = served.handle.engine.address
    settings = {
        **SMALL,
        "precision": "bfloat16",
        "options": {"attach_url": address.url, "api_key": address.api_key},
    }
    folder = on_disk / "killed"
    folder.mkdir()
    killed = Killer(folder, "vllm", settings, MOODS_RUN).killed("run", DEATH)
    try:
        assert killed.deaths == [str(DEATH)]
        assert len(killed.resumed_from) == 1
        assert {*killed.resumed_from} <= RESUMED_FROM
        assert gaps(killed.run_dir) == []
        reports = step_reports(killed.run_dir)
        assert max(report["reward"] for report in reports) > 0
        assert all(report["update"]["effective_sample_share"] > 0.95 for report in reports if report["update"]["rows"])
    finally:
        shutil.rmtree(folder)  # gigabytes
