"""A run made by Python has all that a run of the command line has."""

import json

import pytest

import dspy_fst
from dspy_fst.compiled import policy_of
from dspy_fst.rollout.texts import read_texts
from dspy_fst.run.directory import read_events
from tests.relay import Relay
from tests.test_compile import compile_relay

QUICK = {"cycles": 1, "steps_per_cycle": 1, "search_rollouts": 4, "anchors": 2, "reflection_minibatch": 2}


@pytest.fixture(scope="module")
def python_run(tmp_path_factory):
    """The directory of a run that compile() made; nobody writes into it."""
    run_dir = tmp_path_factory.mktemp("python") / "run"
    policy_of(compile_relay(run_dir, **QUICK)).release()
    return run_dir


# ---- the compiled program lies in the run's directory ----------------------------------------------


def test_compile_saves_its_program_in_the_run_s_directory(tmp_path):
    compiled = compile_relay(tmp_path / "run", **QUICK)
    policy_of(compiled).release()
    loaded = dspy_fst.load(tmp_path / "run" / "compiled", Relay())
    assert read_texts(loaded) == read_texts(compiled)
    assert loaded.population == compiled.population
    own = tmp_path / "run" / "weights" / "step-000001" / "model.safetensors"
    kept = tmp_path / "run" / "compiled" / "weights" / "model.safetensors"
    assert kept.samefile(own), "the weights take no room twice"
    before = kept.parent.parent.stat().st_ino
    policy_of(compile_relay(tmp_path / "run", **QUICK)).release()
    assert kept.parent.parent.stat().st_ino == before, "the same program is not written again"


def test_a_program_of_an_earlier_end_gives_way_to_that_of_the_last(tmp_path):
    run_dir = tmp_path / "run"
    policy_of(compile_relay(run_dir, **QUICK)).release()
    population = run_dir / "compiled" / "population.json"
    stale = json.loads(population.read_text())
    stale["scores"] = [0.0 for _ in stale["scores"]]
    population.write_text(json.dumps(stale))
    (run_dir / ".compiled.killed").mkdir()
    compiled = compile_relay(run_dir, **QUICK)
    policy_of(compiled).release()
    assert dspy_fst.load(run_dir / "compiled", Relay()).population == compiled.population
    assert [path.name for path in run_dir.iterdir() if path.name.startswith(".compiled")] == []


def test_a_program_that_cannot_be_kept_is_given_back_all_the_same_and_the_reason_is_told(tmp_path):
    run_dir = tmp_path / "run"
    policy_of(compile_relay(run_dir, **QUICK)).release()
    (run_dir / "compiled").rename(tmp_path / "elsewhere")
    (run_dir / "compiled").mkdir()
    compiled = compile_relay(run_dir, **QUICK)
    policy_of(compiled).release()
    assert compiled._compiled
    last = read_events(run_dir)[-1]
    assert last["event"] == "warning"
    assert f"is not kept in {run_dir / 'compiled'}: {run_dir / 'compiled'} is no saved program" in last["text"]
    assert list((run_dir / "compiled").iterdir()) == []
