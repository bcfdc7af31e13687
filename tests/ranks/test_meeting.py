"""Ranks that wait for each other, or whose launcher is gone, end at once and say why."""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from dspy_fst.engine.machine import without_launcher
from dspy_fst.errors import RankError
from dspy_fst.run import interrupts
from dspy_fst.run.interrupts import signals_raise
from dspy_fst.slow.ranks import meeting, several
from dspy_fst.slow.ranks.meeting import wait_for_all
from dspy_fst.slow.ranks.several import SeveralRanks, end_before_first_call
from tests.ranks.launching import ENVIRONMENT

SOON_S = 20.0
"""On a machine that may be busy; torchrun kills after 30 seconds what does not end by itself."""
LIMIT_S = 120.0


@pytest.fixture
def launcher():
    """Holds the store of the ranks, as torchrun does, until it is emptied."""
    return [dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))]


@pytest.fixture
def waiting(launcher, tmp_path):
    """`dspy-fst run` as the second of two ranks, which waits for the first."""
    (store,) = launcher
    told = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    known, until = store.num_keys(), time.monotonic() + LIMIT_S
    process = subprocess.Popen(
        [sys.executable, "-m", "dspy_fst.cli", "run", str(tmp_path / "project.yaml")],
        env={**without_launcher(os.environ), **ENVIRONMENT, **told},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while store.num_keys() == known:
            assert time.monotonic() < until
            time.sleep(0.05)
        del store
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_rank_that_waits_for_rank_0_hears_the_launchers_signal(waiting):
    waiting.send_signal(signal.SIGTERM)
    printed, _ = waiting.communicate(timeout=SOON_S)
    assert waiting.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_rank_whose_launcher_is_gone_says_so(waiting, launcher):
    launcher.clear()
    printed, _ = waiting.communicate(timeout=SOON_S)
    assert waiting.returncode == 1
    assert "the process that started the ranks, or the one that holds their store, has ended" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_rank_that_rank_0_gives_up_ends_in_silence(waiting, launcher):
    end_before_first_call(launcher[0])
    printed, _ = waiting.communicate(timeout=SOON_S)
    assert (waiting.returncode, printed) == (0, "")


def test_a_run_whose_launcher_is_gone_does_not_blame_a_rank(launcher):
    ranks = object.__new__(SeveralRanks)  # of two that have met
    ranks.told = ranks._named = None
    ranks._store = dist.TCPStore("127.0.0.1", launcher[0].port, 2, is_master=False, timeout=timedelta(seconds=5))
    launcher.clear()
    told = pytest.raises(RankError, match=r"process that started the ranks, .* has ended .*goes on from there")
    with told, ranks.naming_lost():
        raise RuntimeError("gloo lost the other rank, which has left")


@pytest.mark.parametrize("lost", [[], ["rank 1 is lost: the node was low on memory"]])
def test_a_rank_that_ray_ended_is_told_with_rays_reason_or_as_ended(monkeypatch, lost):
    monkeypatch.setattr(several, "LAST_WORDS_S", 0.2)
    store = dist.HashStore()
    first, second = (object.__new__(SeveralRanks) for _ in range(2))  # that have met
    for rank, own in enumerate((first, second)):
        own.rank, own.world, own._store, own._places, own.told = rank, 2, store, ["", ""], lambda: lost
    second.leave(SystemExit(1))
    why = lost[0] if lost else "rank 1 was ended"
    with pytest.raises(RankError, match=f"^{why}. All ranks end with it"), first.naming_lost():
        raise RuntimeError("gloo/transport: connection closed")


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_a_late_signal_of_torchrun_does_not_end_a_rank_before_it_has_told_of_the_lost_one(monkeypatch, by_torchrun):
    monkeypatch.setattr(interrupts, "_to_the_end", [])
    for name in several.ATTEMPT if by_torchrun else ():
        monkeypatch.setenv(name, "0")
    ranks = object.__new__(SeveralRanks)  # of two that have met; the second is no process any more
    ranks.rank, ranks.world, ranks._store, ranks.told = 0, 2, dist.HashStore(), None
    ranks._places = ["", f"process {2**31} on {socket.gethostname()}"]
    try:
        with pytest.raises(RankError, match=r"^rank 1 died "), signals_raise(), ranks.naming_lost():
            raise RuntimeError("gloo/transport: connection closed")
        assert signal.getsignal(signal.SIGTERM) is (signal.SIG_IGN if by_torchrun else signal.SIG_DFL)
    finally:
        for number in interrupts.ENDING:
            signal.signal(number, signal.SIG_DFL)


def test_ranks_that_do_not_come_are_named(launcher, monkeypatch):
    monkeypatch.setattr(meeting, "COME_S", 0.2)
    (store,) = launcher
    client = dist.TCPStore("127.0.0.1", store.port, 2, is_master=False, timeout=timedelta(seconds=5))
    client.set("process/0", "here")
    with pytest.raises(RankError, match=r"rank 1, 2 did not come within 0\.2 s"):
        wait_for_all(client, [f"process/{rank}" for rank in range(3)], "call/1")
