"""Trainer ranks as actors of a Ray cluster of two nodes: a run whose rank dies, and what it ends with."""

import os
import shutil
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
import torch
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load_file
from typer.testing import CliRunner

from dspy_fst import FSTConfig
from dspy_fst.cli import app
from dspy_fst.cluster import trainer_ranks
from dspy_fst.cluster.connecting import connected
from dspy_fst.cluster.trainer_ranks import RankActor, ranks_on_ray
from dspy_fst.engine.vllm.on_ray.room import Claim, seen_here, too_little
from dspy_fst.errors import ClusterError, RankError
from dspy_fst.preflight.cluster_checks import rank_faults
from dspy_fst.run.directory import read_events
from dspy_fst.run.interrupts import Terminated, signals_raise, terminate_run
from dspy_fst.slow.ranks import launcher
from dspy_fst.slow.ranks.launcher import MEET_S, Launcher
from dspy_fst.slow.ranks.several import SeveralRanks
from programs.lab import BASE
from tests.ranks import run as script
from tests.ranks.launching import ROOT

PROJECT = {
    **{name: f"tests.ranks.run:{name}" for name in ("program", "trainset", "propose")},
    "metric": "tests.cluster.play:graded",
    **{"folder": str(ROOT), "model": str(BASE), "policy": {"engine": "in_process", "max_tokens": script.REPLY_LIMIT}},
    "recipe": {**script.RECIPE, "method": "rl", "steps_per_cycle": 2, "micro_batch_tokens": 64},
}
SOON_S = 20.0
"""The death of a rank ends all within these seconds, on a machine that may be busy."""
NODE_SOON_S = 40.0
"""The same of a node once Ray takes it for lost: a wait that is longer costs nothing, as the loss ends it."""
RAY_S = 15.0
"""After so long without a word from a node Ray takes it for lost."""
LIMIT_S = 240.0


@dataclass
class Killed:
    """A run on two ranks of which the second was killed after the first step."""

    run_dir: Path
    pid: int
    status: int
    printed: str
    took_s: float
    """From the kill to the end."""


def rank_of(cluster) -> int | None:
    """The process of the rank that trains on the cluster."""
    raylets = [info.process.pid for node in cluster.list_all_nodes() for info in node.all_processes["raylet"]]
    for worker in (child for pid in raylets for child in psutil.Process(pid).children(recursive=True)):
        with suppress(psutil.Error):  # it has ended since
            if "RankActor" in " ".join(worker.cmdline()):
                return worker.pid
    return None


def dspy_fst(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


@contextmanager
def cpu_held(**options):
    """The block in which another job holds a CPU of the cluster."""

    class Holder:
        def here(self):
            return True

    holder = ray.remote(num_cpus=1, **options)(Holder).remote()
    try:
        assert ray.get(holder.here.remote(), timeout=LIMIT_S)
        yield
    finally:
        ray.kill(holder)


@pytest.fixture(scope="module")
def connection(cluster):
    with connected(cluster.address):
        yield


@pytest.fixture(scope="module")
def killed(cluster, connection, tmp_path_factory) -> Killed:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("killed")
    file, run_dir, kills = folder / "project.yaml", folder / "run", []
    file.write_text(yaml.safe_dump({**PROJECT, "run_dir": str(run_dir)}))
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.05):
            if run_dir.exists() and "step" in {event["event"] for event in read_events(run_dir)}:
                kills.append((rank_of(cluster), time.monotonic()))
                os.kill(kills[0][0], signal.SIGKILL)
                return

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    done = dspy_fst("run", file, "--ray", cluster.address, "--ranks", 2)
    ended = time.monotonic()
    over.set()
    killer.join(LIMIT_S)
    assert kills, done.output
    ((pid, at),) = kills
    return Killed(run_dir, pid, done.exit_code, done.output, ended - at)


def weights(run_dir):
    """Of the last update, as they were published."""
    newest = [event["weights"] for event in read_events(run_dir) if event["event"] == "done"][-1]
    return load_file(run_dir / "weights" / newest / "model.safetensors")


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_and_is_named(cluster, killed):
    assert killed.status == 1, killed.printed
    assert f"programs and metrics run on the Ray cluster at {cluster.address} (2 nodes, 2 CPUs)" in killed.printed
    assert "2 processes train together, and each holds all weights" in killed.printed
    assert f"rank 1 died (process {killed.pid} on " in killed.printed
    assert f"dspy-fst resume {killed.run_dir}" in killed.printed
    assert killed.took_s < SOON_S
    assert read_events(killed.run_dir)[-1]["event"] == "halted"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.slow
def test_the_run_is_resumed_on_two_ranks_and_on_one_and_ends_with_the_same_weights(cluster, killed, tmp_path):
    shutil.copytree(killed.run_dir, tmp_path / "alone")
    resumed = dspy_fst("resume", killed.run_dir)
    assert resumed.exit_code == 0, resumed.output
    until = time.monotonic() + SOON_S
    while rank_of(cluster) is not None:
        assert time.monotonic() < until
        time.sleep(0.1)
    (tmp_path / "project.yaml").write_text(yaml.safe_dump({**PROJECT, "run_dir": str(tmp_path / "alone")}))
    alone = dspy_fst("run", tmp_path / "project.yaml")
    assert alone.exit_code == 0, alone.output
    found, wanted = weights(killed.run_dir), weights(tmp_path / "alone")
    assert found.keys() == wanted.keys()
    gap = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
    assert 0 < gap < 1e-6  # two ranks add in another order


def test_ranks_need_a_cluster_and_no_launcher(monkeypatch):
    assert [*rank_faults(FSTConfig(ranks=1))] == [*rank_faults(FSTConfig(ranks=2, ray="local"))] == []
    (fault,) = rank_faults(FSTConfig(ranks=2))
    assert "name it with ray (--ray ADDRESS), or use torchrun" in fault
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    (fault,) = rank_faults(FSTConfig(ranks=2, ray="local"))
    assert "a launcher has started 4 processes already" in fault


@pytest.mark.slow
def test_ranks_that_have_no_room_are_refused_before_any_work(cluster, connection, tmp_path):
    (tmp_path / "project.yaml").write_text(yaml.safe_dump({**PROJECT, "run_dir": str(tmp_path / "run")}))
    refused = dspy_fst("run", tmp_path / "project.yaml", "--ray", cluster.address, "--ranks", 4)
    assert refused.exit_code == 2
    assert "ranks is 4, and the Ray cluster has room for 1 of 3 with 1 CPU each" in refused.output
    assert "lower it to 2" in refused.output
    ranks, server = Claim("ranks", 2, 1, {"CPU": 1}), Claim("servers", 1, 1, {"CPU": 1})
    assert too_little([ranks]) == []
    (fault,) = too_little([server, ranks])
    assert "ranks is 2, and the Ray cluster has room for 0 of 1 with 1 CPU each beside a CPU for rollouts and " in fault
    assert "and what servers takes (" in fault
    assert fault.endswith("): add nodes")
    (fault,) = too_little([Claim("ranks", 2, 1, {"CPU": 1, "GPU": 1})])
    assert "room for 0 of 1 with 1 CPU and 1 card each" in fault


@pytest.mark.slow
def test_ranks_whose_places_others_hold_are_an_error_after_a_while(connection, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_ranks, "READY_S", 1.0)
    want = pytest.raises(ClusterError, match="did not start 1 with 1 CPU each within 1 s, and has 0 CPUs free")
    with cpu_held(), cpu_held(), want, ranks_on_ray(2, tmp_path, BASE):
        pass


@pytest.mark.slow
def test_a_rank_tells_what_it_does_not_see_and_whom_it_does_not_reach(connection, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_ranks, "ANSWER_S", 1.0)
    (tmp_path / "config.json").touch()
    with socket.create_server(("127.0.0.1", 0)) as first, seen_here(tmp_path / "run", tmp_path) as wanted:
        variables = {"RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(first.getsockname()[1])}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        name, faults = RankActor().ready(wanted)
        assert name.startswith(f"rank 3 (process {os.getpid()} on Ray node ")
        assert faults == []
        (tmp_path / "config.json").unlink()
        (fault,) = RankActor().ready(wanted)[1]
        assert f"does not see {tmp_path} as this machine does" in fault
    (fault,) = RankActor().ready(wanted)[1]
    assert "does not reach rank 0 at 127.0.0.1:" in fault


def test_a_lost_rank_ends_a_run_and_no_other_program():
    terminate_run()
    with pytest.raises(Terminated), signals_raise():
        terminate_run()


def test_a_signal_that_no_lost_rank_has_sent_is_told_as_what_it_is():
    ranks = object.__new__(SeveralRanks)  # has no store to ask
    ranks.world, ranks.told = 2, list
    with pytest.raises(Terminated), ranks.naming_lost():
        raise Terminated(signal.SIGTERM)


@pytest.mark.slow
def test_a_rank_that_fails_ends_with_its_error_printed_and_is_named(cluster, connection, tmp_path, capsys):
    unheard = threading.Timer(SOON_S, lambda: os.kill(rank_of(cluster), signal.SIGKILL))  # else a failing test waits
    named = pytest.raises(RankError, match="rank 1 failed: AttributeError: ")
    with named, signals_raise(), ranks_on_ray(2, tmp_path, BASE) as ranks:
        began = time.monotonic()
        unheard.start()
        with ranks.together("no_method", (), {}):
            ranks.gathered(None)
    unheard.cancel()
    assert time.monotonic() - began < SOON_S
    printed, until = "", time.monotonic() + SOON_S
    while "AttributeError: 'NoneType' object has no attribute 'no_method'" not in printed:
        assert time.monotonic() < until, printed
        time.sleep(0.1)
        printed += "".join(capsys.readouterr())
    assert "Traceback" in printed


@pytest.mark.slow
def test_a_rank_that_dies_while_rank_0_waits_for_rollouts_on_ray_is_named(cluster, connection, tmp_path):
    rollouts = ray.remote(num_cpus=0)(lambda: time.sleep(LIMIT_S)).remote()
    named = pytest.raises(RankError, match="rank 1 died ")
    try:
        with named, signals_raise(), ranks_on_ray(2, tmp_path, BASE):
            os.kill(rank_of(cluster), signal.SIGKILL)
            ray.wait([rollouts], timeout=LIMIT_S)
    finally:
        ray.cancel(rollouts, force=True)


@pytest.mark.slow
def test_a_rank_that_dies_as_the_ranks_meet_ends_the_run_and_is_named(connection, tmp_path, monkeypatch):
    real = Launcher.variables
    hindered = {"GLOO_SOCKET_IFNAME": "none"}
    monkeypatch.setattr(Launcher, "variables", lambda own, rank: {**real(own, rank), **(hindered if rank else {})})
    named = pytest.raises(RankError, match=r"did not find each other: rank 1 \(process \d+ on .*\) is lost: .*GLOO_")
    began = time.monotonic()
    with named, signals_raise(), ranks_on_ray(2, tmp_path, BASE):
        pass
    assert time.monotonic() - began < MEET_S


@pytest.mark.parametrize("lost", [False, True])
def test_ranks_that_do_not_come_are_waited_for_no_longer_than_they_live(monkeypatch, lost):
    monkeypatch.setattr(launcher, "MEET_S", LIMIT_S if lost else 1.0)
    gone: list[str] = []

    def lose() -> None:
        gone.append("rank 1 is lost")
        terminate_run()

    losing, began = threading.Timer(0.5 if lost else LIMIT_S, lose), time.monotonic()
    why = "rank 1 is lost" if lost else "after 1 s at most: TimeoutError"
    losing.start()
    want = pytest.raises(RankError, match=f"the ranks did not find each other: {why}")
    with want, signals_raise(), Launcher("127.0.0.1", 2).leading(gone):
        pass
    losing.cancel()
    assert time.monotonic() - began < SOON_S
    assert "ranks-meet" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
def test_a_node_that_is_lost_while_rank_0_searches_ends_the_run_and_its_rank_is_named(cluster, connection, tmp_path):
    """The last test of this file, as the cluster has one node less after it."""
    head, other = cluster.list_all_nodes()
    there = NodeAffinitySchedulingStrategy(head.node_id, soft=False)
    named = pytest.raises(RankError, match=r"rank 1 died \(process \d+ on ")
    with cpu_held(scheduling_strategy=there), named, signals_raise(), ranks_on_ray(2, tmp_path, BASE):
        began = time.monotonic()
        cluster.remove_node(other, allow_graceful=False)
        time.sleep(RAY_S + NODE_SOON_S)  # as a search, which asks no rank
    assert time.monotonic() - began < RAY_S + NODE_SOON_S
    # One that is left inside Ray's core would be there when the connection is ended.
    assert "ray-places" not in {thread.name for thread in threading.enumerate()}
