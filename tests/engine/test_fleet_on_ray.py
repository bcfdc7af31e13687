"""vLLM servers as actors on a Ray cluster of two nodes: what it lacks for them, and a run that loses a node."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
from ray.actor import ActorHandle
from ray.cluster_utils import Cluster

from dspy_fst.cluster.connecting import connected, sigterm_as_before
from dspy_fst.engine import making
from dspy_fst.engine.vllm.fleet.fleet import Fleet
from dspy_fst.engine.vllm.on_ray.nodes import node_name
from dspy_fst.engine.vllm.on_ray.places import ActorProcess
from dspy_fst.engine.vllm.on_ray.room import room_faults
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.policy_lm import policy_of
from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.run.directory import read_events
from tests.engine.test_server_process import wait_until_gone
from tests.relay import relay
from tests.test_compile import assert_trained_together, compile_relay
from tests.test_survival import calls_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
OPTIONS = {"on_ray": True, "servers": 2, "cpu_kv_cache_gib": 1, "max_model_len": 256, "stall_timeout_s": 60}
LIMIT_S = 300


@dataclass
class Nodes:
    """A cluster: its head has room for both servers and the rollouts, and the other node for one server."""

    cluster: Cluster
    other: "ray._private.node.Node"

    @property
    def lost(self) -> str:
        return node_name(self.other.node_ip_address, self.other.node_id)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    soon = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    with sigterm_as_before():
        cluster = Cluster(True, head_node_args={"num_cpus": 3, "include_dashboard": False, "_system_config": soon})
        other = cluster.add_node(num_cpus=1)
    try:
        with connected(cluster.address):
            yield Nodes(cluster, other)
    finally:
        cluster.shutdown()


def test_what_the_cluster_lacks_is_told_before_the_run(nodes, tmp_path):
    sound = VLLMSettings(**OPTIONS)
    assert room_faults(sound, tmp_path / "runs" / "new", None) == []
    assert not [*tmp_path.iterdir()]  # nothing is left behind
    (crowded,) = room_faults(VLLMSettings(on_ray=True, servers=5), tmp_path, None)
    assert "room for 3 of 5 with 1 CPU each beside a CPU for rollouts" in crowded
    assert crowded.endswith("lower it to 3")
    assert room_faults(VLLMSettings(on_ray=True, servers=3), tmp_path, None) == []
    (tmp_path / "config.json").symlink_to("/proc/self/stat")  # of each process another
    unseen = room_faults(sound, tmp_path, tmp_path)
    assert room_faults(VLLMSettings(**OPTIONS, shared_folder=False), tmp_path, tmp_path) == []
    assert len(unseen) == 2
    assert all("does not see" in fault and str(tmp_path) in fault for fault in unseen)
    assert all(fault.endswith("or set engine_options: {shared_folder: false}") for fault in unseen)


class NodeLost:
    """Removes the node of one server while calls wait for that server, in the second step."""

    def __init__(self, nodes: Nodes):
        self.nodes, self.fleets, self.lost, self.told = nodes, [], threading.Event(), []

    def making(self, make):
        """Makes fleets as ``make`` does, and keeps them: the last one is the run's."""

        def kept(settings):
            self.fleets.append(make(settings))
            return self.fleets[-1]

        return kept

    def __call__(self, event):
        self.told.append(event.get("text", ""))
        if event.get("phase", "").startswith("step 1:"):
            self.lose()
        if event.get("phase", "").startswith("step 3:"):  # the last step is sampled by both
            changed, members = self.fleets[-1]._changed, self.fleets[-1].members
            with changed:
                all_up = changed.wait_for(lambda: {"up"} == {member.state for member in members}, LIMIT_S)
                assert all_up, [(member.state, member.why) for member in members]

    def lose(self):
        """Stop the server before the step's first call, so that it answers none of them; then remove the node."""
        (there,) = (one for one in self.fleets[-1].members if one.server._process._node == self.nodes.lost)
        group = group_of(there.server._process._actor)
        os.killpg(group, signal.SIGSTOP)
        threading.Thread(target=self.remove, args=(there, group), daemon=True).start()

    def remove(self, there, group):
        """At once, with all of its processes, when calls wait for the server."""
        until = time.monotonic() + LIMIT_S
        while not there.in_flight:
            assert time.monotonic() < until, "no call waits for that server"
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
        self.nodes.cluster.remove_node(self.nodes.other, allow_graceful=False)
        self.lost.set()


def test_a_run_survives_a_node_with_one_of_its_servers(nodes, tmp_path, monkeypatch):
    trouble = NodeLost(nodes)
    monkeypatch.setattr(making, "_on_ray", trouble.making(making._on_ray))
    student = relay("vllm")
    policy_of(student).handle.options.update(OPTIONS, shared_folder=False)
    on_ray = {"ray": nodes.cluster.address, "num_threads": 8}
    compiled = compile_relay(tmp_path / "run", program=student, listeners=[trouble], **on_ray)
    assert_trained_together(student, compiled, tmp_path / "run")

    assert trouble.lost.is_set()
    steps = [event["report"] for event in read_events(tmp_path / "run") if event["event"] == "step"]
    assert [step["counts"].get("engine: servers lost", 0) for step in steps] == [0, 1, 0, 0]
    # Steps of this size remove the weights of an attempt that waits until Ray has found out that the node is lost, or
    # that starts meanwhile.
    assert 1 <= sum(step["counts"].get("engine: restarts", 0) for step in steps) <= 3
    assert steps[1]["counts"]["engine: asked elsewhere"] > 0
    for step in steps:
        assert not [reason for reason in step["counts"] if reason.startswith("masked")]
        assert step["counts"]["calls"] == calls_of(step["step"])  # none lost, and none kept twice
    for member in trouble.fleets[-1].members:
        assert len(copies_of(member.server._process)) == 2  # the weights in use, and those before
    (back,) = (text for text in trouble.told if "it is back" in text)
    assert re.search("it is back, and serves weights step-00000[123], verified$", back)
    end_with_their_actors(trouble.fleets[-1])
    policy_of(compiled).release()


def test_adapters_and_their_base_are_copied_to_a_node_and_removed_with_the_server(nodes, tmp_path, monkeypatch):
    trouble = NodeLost(nodes)  # which loses none here
    monkeypatch.setattr(making, "_on_ray", trouble.making(making._on_ray))
    student = relay("vllm")
    policy_of(student).handle.options.update(OPTIONS, servers=1, shared_folder=False)
    compiled = compile_relay(
        tmp_path / "run", program=student, ray=nodes.cluster.address, adapter=LoRA(rank=4), learning_rate=5e-3
    )
    steps = [event["report"] for event in read_events(tmp_path / "run") if event["event"] == "step"]
    assert [step["update"]["max_log_ratio"] < 1e-4 for step in steps] == [True] * 4
    process = trouble.fleets[-1].members[0].server._process
    base, *adapters = sorted(copies_of(process), key=lambda folder: not (folder / "config.json").is_file())
    assert len(adapters) == 2
    assert all((folder / "adapter_config.json").is_file() for folder in adapters)
    assert str(base) in " ".join(psutil.Process(group_of(process._actor)).cmdline())
    policy_of(compiled).release()
    assert not base.parent.exists()


def copies_of(process: ActorProcess) -> list[Path]:
    """The folders that a server's node has copies of."""
    scratch = ray.get(process._actor.__ray_call__.remote(lambda actor: actor._copies._scratch), timeout=LIMIT_S)
    return [path for path in scratch.iterdir() if path.is_dir()]


def end_with_their_actors(fleet: Fleet) -> None:
    """Each server ends when its actor does, by a signal or by Ray."""
    first, second = (member.server._process._actor for member in fleet.members)
    groups = [group_of(first), group_of(second)]
    psutil.Process(groups[0]).parent().kill()
    ray.kill(second)
    for group in groups:
        assert wait_until_gone(group, seconds=60) == []


def group_of(actor: ActorHandle) -> int:
    """The process group of an actor's server."""
    pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=LIMIT_S)
    (supervisor,) = psutil.Process(pid).children()
    return supervisor.pid
