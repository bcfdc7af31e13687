"""A whole run over several ranks: compile() and dspy-fst run; and ranks that fail or die."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from dspy_fst.cli import OF_ALL_RANKS, app
from dspy_fst.config import FSTConfig
from dspy_fst.engine.machine import Launch, launch_faults
from dspy_fst.errors import ConfigurationError, EngineError
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.warm_start_checks import warm_start_rank_faults
from dspy_fst.run.directory import read_events
from dspy_fst.run.interrupts import signals_ignored, signals_raise
from dspy_fst.training.request import Arguments, Proposers, check
from programs.lab import BASE
from tests.ranks import run as script
from tests.ranks.launching import ROOT, by_hand, by_torchrun
from tests.slow.makers import save_model

HERE = Path(__file__).parent
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run whose ranks share the weights, and the second is killed in the second update: its directory, and what was
    printed."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    done = by_torchrun(HERE / "run.py", run_dir, DIES="1", SHARDING="fsdp")
    assert done.returncode, done.stdout
    return run_dir, done.stdout, len(read_events(run_dir))


@pytest.fixture(scope="module")
def resumed(killed):
    """The same run, which `dspy-fst run` finished on two ranks with all weights each: what was printed, and events."""
    run_dir = killed[0]
    project = {
        **{name: f"tests.ranks.run:{name}" for name in ("program", "metric", "trainset", "propose")},
        **{"folder": str(ROOT), "model": str(BASE), "run_dir": str(run_dir)},
        **{"policy": {"max_tokens": script.REPLY_LIMIT}, "recipe": script.RECIPE},
    }
    file = run_dir.parent / "project.yaml"
    file.write_text(yaml.safe_dump(project))
    done = by_torchrun("-m", "dspy_fst.cli", "run", file)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout, read_events(run_dir)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all_and_is_named(killed):
    run_dir, printed, _ = killed
    told = read_events(run_dir)[-1]
    assert told["event"] == "halted"
    assert "rank 1 died (process " in told["why"]
    assert "RankError: rank 1 died" in printed
    assert "goes on" not in printed.replace("the same command goes on", "")


@pytest.mark.slow
def test_the_run_goes_on_by_the_command_line_and_ends_as_that_of_one_process(killed, resumed, tmp_path):
    printed, events = resumed
    assert printed.count("best candidate") == 1  # only rank 0 speaks
    torch.set_num_threads(1)
    script.compiled(tmp_path / "alone")
    alone = read_events(tmp_path / "alone")

    def told(events, kind):
        return [event["report"] for event in events if event["event"] == kind]

    found, wanted = ([(r["reward"], r["counts"]) for r in told(of, "step")] for of in (events, alone))
    assert found == wanted
    assert len(found) == script.RECIPE["steps_per_cycle"]
    populations = [[e["population"]["members"] for e in of if e["event"] == "done"] for of in (events, alone)]
    assert populations[0] == populations[1] != []
    losses = [[r["update"]["loss"] for r in told(of, "step")] for of in (events, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_a_rank_with_other_weights_or_an_error_is_named_and_no_second_run_waits_for_it(tmp_path):
    save_model(tmp_path / "untied")
    save_model(tmp_path / "tied", tied=True)
    (first, printed), (second, traceback) = by_hand(HERE / "fail.py", tmp_path)
    assert "tied: rank 1 reads other weights there than rank 0" in printed
    assert "reference: start: rank 1 reads other weights there than rank 0 (checksum " in printed
    assert "state: rank 1 reads other weights there than rank 0" in printed.replace(str(tmp_path) + "/", "")
    assert "told: rank 1 failed: ZeroDivisionError: a fault of this rank. All ranks end with it" in printed
    assert "ended with the first compile()" in printed
    assert (first, second) == (0, 1)
    assert "ZeroDivisionError: a fault of this rank" in traceback


@pytest.mark.slow
def test_a_model_that_one_rank_alone_cannot_read_is_told_with_that_rank(tmp_path):
    save_model(tmp_path / "tied", tied=True)
    (first, printed), (second, _) = by_hand(HERE / "fail.py", tmp_path, GONE="1")
    assert "told: the ranks differ in the outcome of a call (rank 1: TrainingError: no such folder)" in printed
    assert (first, second) == (0, 1)


def test_a_launcher_that_does_not_say_how_the_ranks_find_each_other_is_refused():
    (fault,) = launch_faults({"PMI_SIZE": "4", "RANK": "0"})
    assert "PMI_SIZE=4" in fault
    assert "MASTER_ADDR" in fault
    assert "torchrun" in fault


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_another_trainer_that_accelerate_was_told_to_use_is_refused_with_several_ranks_alone(name):
    assert launch_faults({name: "true"}) == []
    assert name in launch_faults({**TORCHRUN, name: "true"})[0]


def test_more_processes_than_cards_are_refused(monkeypatch):
    monkeypatch.setattr("dspy_fst.engine.machine.gpu_count", lambda: 2)
    assert "4 processes were launched on this machine" in launch_faults({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"})[0]
    assert launch_faults({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}) == []
    monkeypatch.setattr("dspy_fst.engine.machine.gpu_count", lambda: 0)  # on a CPU they share the machine
    assert launch_faults({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}) == []


def test_no_engine_starts_on_another_rank(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert Launch.of().rank == 1
    with pytest.raises(EngineError, match="this process is rank 1 of several, and the engine runs on rank 0"):
        _ = PolicyLM(BASE, engine="in_process").handle.engine


def test_commands_that_need_one_process_are_left_to_rank_0_and_do_not_fail_the_launch(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    commands = [str(command.name or command.callback.__name__) for command in app.registered_commands]
    ended = {name: CliRunner().invoke(app, [name, "no-such-file", "--no-such-option"]) for name in commands}
    assert {name for name, result in ended.items() if result.exit_code} == set(OF_ALL_RANKS)
    assert all(not ended[name].output for name in commands if name not in OF_ALL_RANKS)
    monkeypatch.setenv("RANK", "0")
    assert CliRunner().invoke(app, ["runs", "no-such-file", "--no-such-option"]).exit_code == 2


def test_a_process_alone_is_none_of_several():
    assert Launch.of({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}).world == 1


def test_a_warm_start_is_refused_with_several_ranks(monkeypatch, tmp_path):
    for name, value in {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    student = script.program.deepcopy()
    student.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=16))
    proposers = Proposers(propose=script.propose)
    settings = {**script.RECIPE, "warm_start": "labels"}
    given = Arguments(
        student, script.trainset, script.metric, proposers=proposers, run_dir=tmp_path / "run", settings=settings
    )
    with pytest.raises(ConfigurationError, match=r"warm_start: .* 2 processes"):
        check(given)
    monkeypatch.undo()
    on_ray = FSTConfig(warm_start="labels", ray="local", ranks=3)
    assert "3 processes" in warm_start_rank_faults(on_ray, None, tmp_path / "run")[0]


def test_a_signal_of_the_launcher_waits_once_a_lost_rank_is_told_of():
    with signals_raise():
        signals_ignored()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
