"""A run made by Python has all that a run of the command line has."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import dspy_fst
from dspy_fst import ConfigurationError
from dspy_fst.compiled import policy_of
from dspy_fst.engine.base import Checkpoint
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


# ---- more cycles -----------------------------------------------------------------------------------


def rates(run_dir):
    """The learning rate of each update."""
    steps = [event["report"] for event in read_events(run_dir) if event["event"] == "step"]
    return [step["update"]["learning_rate"] for step in steps]


def notes(run_dir):
    return [event["text"] for event in read_events(run_dir) if event["event"] == "note"]


def test_a_compiled_program_goes_on_with_its_optimizer_when_asked(python_run, tmp_path):
    loaded = dspy_fst.load(python_run / "compiled", Relay())
    settings = {**QUICK, "method": "rl", "learning_rate": 1e-3, "warmup_steps": 4}
    for name, wanted in (("anew", False), ("on", True)):
        compiled = compile_relay(tmp_path / name, program=loaded, continue_optimizer=wanted, **settings)
        policy_of(compiled).release()
    assert rates(tmp_path / "anew") == [pytest.approx(0.25e-3)]
    assert rates(tmp_path / "on") == [pytest.approx(0.5e-3)], "the first run's update counts in the warm-up"
    moments = {name: adam(tmp_path / name) for name in ("anew", "on")}
    before = adam(python_run)
    assert {moments[name]["step"].item() for name in moments} == {1.0, 2.0}
    # 0.9 of what was plus 0.1 of the new gradient, against 0.1 of it alone; both runs begin with the same batch.
    assert torch.allclose(moments["on"]["exp_avg"], 0.9 * before["exp_avg"] + moments["anew"]["exp_avg"], atol=1e-7)
    (told,) = (text for text in notes(tmp_path / "on") if text.startswith("going on"))
    assert told.startswith(f"going on from the weights step-000001 of {python_run / 'compiled' / 'weights'}")
    assert "with AdamW's moments and its count of updates, 1; the KL's reference starts anew" in told
    assert any("AdamW, its warm-up and the KL's reference start anew" in text for text in notes(tmp_path / "anew"))


def adam(run_dir):
    """AdamW's state of one parameter, in the newest state of the run."""
    newest = max((run_dir / "states").glob("[0-9]*"))
    tensors = load_file(newest / "trainer" / "state.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    return {moment: tensors[f"{moment}/{name}"] for moment in ("step", "exp_avg")}


def test_an_optimizer_that_is_not_there_is_no_optimizer_to_go_on_with(python_run, tmp_path):
    with pytest.raises(ConfigurationError, match="the student was not compiled, so no optimizer is there"):
        compile_relay(tmp_path / "run", continue_optimizer=True, **QUICK)
    alone = shutil.copytree(python_run / "compiled", tmp_path / "alone")
    with pytest.raises(ConfigurationError, match=r"an optimizer's state is only kept in a run's directory"):
        compile_relay(tmp_path / "run", program=dspy_fst.load(alone, Relay()), continue_optimizer=True, **QUICK)
    run_dir = shutil.copytree(python_run, tmp_path / "first")
    loaded = dspy_fst.load(run_dir / "compiled", Relay())
    policy_of(loaded).handle.checkpoint = Checkpoint("step-000000", run_dir / "weights" / "step-000000")
    with pytest.raises(ConfigurationError, match=r"the weights step-000000, and the state in .* step-000001"):
        compile_relay(tmp_path / "run", program=loaded, continue_optimizer=True, **QUICK)
    assert not (tmp_path / "run").exists()


def test_more_cycles_in_the_same_directory_are_refused_with_the_way(python_run):
    way = re.escape(f"dspy-fst run FILE --continue-from {python_run} --run-dir NEW")
    with pytest.raises(ConfigurationError, match=rf"cycles \(there 1, now 2\).*compile\(compiled, .*{way}"):
        compile_relay(python_run, **{**QUICK, "cycles": 2})
    with pytest.raises(ConfigurationError, match=way):
        compile_relay(python_run, program=dspy_fst.load(python_run / "compiled", Relay()), **QUICK)
    with pytest.raises(ConfigurationError) as other:
        compile_relay(python_run, **{**QUICK, "steps_per_cycle": 2})
    assert "--continue-from" not in str(other.value)
