"""A run made by Python has all that a run of the command line has."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import dspy_fst
from dspy_fst import ConfigurationError
from dspy_fst.engine.base import Checkpoint
from dspy_fst.policy_lm import policy_of
from dspy_fst.rollout.components import read_texts
from dspy_fst.run.directory import read_events
from tests.cli.conftest import invoke
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


def test_a_continuation_of_a_program_in_memory_goes_on_from_the_loaded_one(python_run, tmp_path):
    first = shutil.copytree(python_run, tmp_path / "first")
    held = dspy_fst.load(first / "compiled", Relay())
    policy_of(held).handle.checkpoint = Checkpoint("step-000001", first / "weights" / "step-000001")
    with pytest.raises(KilledError):
        compile_relay(tmp_path / "second", program=held, listeners=[kill], **QUICK)
    loaded = dspy_fst.load(first / "compiled", Relay())  # the process that held the other is gone
    compiled = compile_relay(tmp_path / "second", program=loaded, **QUICK)
    policy_of(compiled).release()
    assert len(rates(tmp_path / "second")) == 1


class KilledError(Exception):
    pass


def kill(event):
    if event["event"] == "step":
        raise KilledError  # after the event was written and before the state was committed


# ---- the commands on a run of Python's -------------------------------------------------------------

MINE = """
import dspy

from programs.lab import build
from programs.lab.tokenizer import signature
from tests.relay import Relay, any_answer

LAB = build(train=32, val=4, test=4)
train, val, held_out = LAB.trainset, LAB.valset, LAB.testset


def propose(candidate, reflective_dataset, components_to_update):
    return {name: candidate[name] + " Be brief." for name in components_to_update}


class Other(Relay):
    def __init__(self):
        super().__init__()
        self.last = dspy.Predict(signature("Drop the first number."))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The user's working directory, with his module in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine_too.py").write_text(MINE)
    yield tmp_path
    sys.modules.pop("mine_too", None)


CODE = ("--program", "mine_too:Relay", "--metric", "mine_too:any_answer")
FAST = ("--k", "2", "--limit", "2", "--json")


@pytest.fixture
def of_python(python_run, here):
    """A copy of the run of one's own."""
    return shutil.copytree(python_run, here / "run")


def test_a_command_tells_all_that_it_needs_of_a_python_run_at_once(of_python):
    program = "--program MODULE:ATTRIBUTE, the program's class or a function that makes it (the run says"
    metric = "--metric MODULE:ATTRIBUTE (the run says tests.relay:any_answer)"
    told = invoke("eval", of_python, code=2).stderr
    assert f"{of_python} does not say whose code to run (it keeps no project.yaml, Python made it)" in told
    assert (
        f"Give --project FILE, or {program} tests.relay:Relay); {metric}; --valset MODULE:ATTRIBUTE|FILE.jsonl" in told
    )
    assert "--trainset" in invoke("eval", of_python, "--split", "train", code=2).stderr
    assert f"{program} tests.relay:Relay)" in invoke("serve", of_python, code=2).stderr
    lacking = invoke("eval", of_python, "--program", "mine_too:Relay", "--valset", "val.jsonl", code=2).stderr
    assert metric in lacking
    assert "--input FIELD" in lacking
    assert "--program MODULE" not in lacking
    both = invoke("eval", of_python, "--project", "p.yaml", *CODE, code=2).stderr
    assert "--project and --program, --metric exclude each other" in both


def test_what_a_run_says_of_its_code_is_shown_and_never_imported(of_python, monkeypatch):
    log = of_python / "events.jsonl"
    log.write_text(log.read_text().replace("tests.relay:Relay", "mine_too:Relay\\u001b[31m; rm"))
    told = invoke("serve", of_python, code=2).stderr
    assert "--program MODULE:ATTRIBUTE" in told
    assert "\x1b" not in told
    assert "mine_too" not in sys.modules
    monkeypatch.chdir(of_python)
    (of_python / "evil.py").write_text("raise SystemExit('ran')")
    assert "evil:make would be looked for in" in invoke("serve", ".", "--program", "evil:make", code=2).stderr
    refused = invoke("eval", ".", "--program", "evil:make", "--metric", "evil:m", "--valset", "evil:v", code=2).stderr
    assert "would be looked for in" in refused


def test_a_python_run_is_evaluated_two_by_two(of_python):
    told = invoke("eval", of_python, *CODE, "--valset", "mine_too:val", "--two-by-two", *FAST)
    (result,) = json.loads(told.stdout)["results"]
    assert set(result["cells"]) == {"seed/base", "seed/trained", "evolved/base", "evolved/trained"}
    assert result["weights"] == "step-000001"
    (line,) = (of_python / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line) == result, "it is kept with the run: the program, the temperature and the limit are its own"
    lines = [{"numbers": "1 2 3 4", "answer": "4 3 2"}, {"numbers": "5 6 7 8", "answer": "8 7 6"}]
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    of_file = invoke("eval", of_python, *CODE, "--split", "mine.jsonl", "--input", "numbers", *FAST)
    assert json.loads(of_file.stdout)["results"][0]["split"] == "mine.jsonl"
    alone = shutil.copytree(of_python / "compiled", Path("alone"))
    saved = invoke("eval", alone, *CODE, "--split", "mine_too:held_out", *FAST)
    assert json.loads(saved.stdout)["results"][0]["weights"] == "step-000001"


def test_figures_of_another_program_are_told_as_such_and_not_kept_with_the_run(of_python):
    told = invoke("eval", of_python, "--program", "mine_too:Other", *CODE[2:], "--valset", "mine_too:val", *FAST)
    (warning,) = json.loads(told.stdout)["warnings"]
    assert warning == (
        f"this is not the program that {of_python} trained: its instructions, fields or demos differ from those that "
        "the run began with"
    )
    assert f"warning: {warning}" in told.stderr
    assert json.loads(told.stdout)["kept_in"] is None
    assert not (of_python / "evaluations.jsonl").exists()


def test_a_python_run_is_shown_reported_exported_and_served(of_python, here, monkeypatch):
    assert "finished; 1 of 1 steps are done" in invoke("show", of_python).stdout
    invoke("report", of_python, "--out", "report.html")
    assert "step-000001" in Path("report.html").read_text()
    invoke("export", of_python, "exported")
    assert dspy_fst.load("exported", Relay()).population.members
    served = []
    monkeypatch.setattr("dspy_fst.serve.listening.serve", lambda app, settings: served.append(app))
    invoke("serve", of_python, "--program", "mine_too:Relay", "--signature", "numbers: str -> answer: str")
    assert len(served) == 1
    assert "is finished" in invoke("resume", of_python).stderr


def test_a_stopped_python_run_is_resumed_from_the_command_line(here):
    run_dir = here / "run"
    with pytest.raises(KilledError):
        compile_relay(run_dir, listeners=[kill], **QUICK)
    assert read_events(run_dir)[-1]["why"].startswith("KilledError")
    assert "dspy-fst resume" in invoke("serve", run_dir, *CODE[:2], code=2).stderr
    asked = invoke("resume", run_dir, code=2).stderr
    for flag in ("--program", "--metric", "--trainset", "--valset", "--reflection-lm NAME or --propose"):
        assert flag in asked
    data = ("--trainset", "mine_too:train", "--valset", "mine_too:val", "--propose", "mine_too:propose")
    other = invoke("resume", run_dir, "--program", "mine_too:Other", *CODE[2:], *data, code=2).stderr
    assert "holds a run of another configuration: program (there" in other
    told = invoke("resume", run_dir, *CODE, *data)
    assert "1 weight update in 1 step;" in told.stdout
    assert (run_dir / "compiled" / "policy.json").is_file()
    kept = yaml.safe_load((run_dir / "project.yaml").read_text())
    assert (kept["program"], kept["folder"], kept["policy"]["temperature"]) == ("mine_too:Relay", str(here), 1.5)
    assert invoke("eval", run_dir, *FAST).exit_code == 0, "what was named once is known from now on"
