"""Whether a cluster answers is known before anything starts, and a connection leaves the process as it was."""

import re
import signal
import socket
import time
from contextlib import suppress

import pytest
import ray

from dspy_fst.cluster import connecting
from dspy_fst.cluster.connecting import address_faults, connected
from dspy_fst.errors import ClusterError
from tests.cluster.listening import listener


def fault(address: str) -> str:
    (found,) = address_faults(address)
    return found


@pytest.fixture
def deaf_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_an_address_that_nobody_listens_on_is_found_at_once(deaf_port):
    began = time.monotonic()
    assert "does not answer" in fault(f"127.0.0.1:{deaf_port}")
    assert time.monotonic() - began < connecting.ANSWER_S


def test_an_address_that_answers_as_a_head_does_is_no_fault():
    with listener(connecting.SETTINGS) as address:
        assert [*address_faults(address)] == []


def test_another_server_than_a_cluster_s_head_is_refused(monkeypatch):
    with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        assert "is no head of a Ray cluster" in fault(address)
        monkeypatch.setenv("RAY_USE_TLS", "1")
        assert [*address_faults(address)] == []


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(connecting, "ANSWER_S", 0.2)
    with listener(b"") as address:
        assert "does not answer (timed out)" in fault(address)


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", ":6379", "http://head:6379", "head:99999999"])
def test_an_address_of_another_form_is_refused(address):
    assert address in fault(address)


def test_auto_is_held_to_the_form_that_an_address_has(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert "RAY_ADDRESS=ray://head:10001" in fault("auto")


@pytest.mark.parametrize("address", [None, "local", "auto"])
def test_an_address_that_only_ray_can_resolve_is_left_to_it(address, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert [*address_faults(address)] == []


def test_without_ray_the_fault_names_the_extra(monkeypatch):
    monkeypatch.setattr(connecting, "find_spec", lambda name: None)
    assert "dspy-fst[ray]" in fault("local")


def test_an_address_without_a_cluster_behind_it_is_an_error_of_ours():
    with pytest.raises(ClusterError, match="no-such-cluster"), connected("no-such-cluster"):
        pass
    assert not ray.is_initialized()


def test_only_a_named_cluster_is_to_be_joined_from_a_node_of_it():
    assert "ray start --address" in connecting._remedy("10.0.0.1:6379")
    assert "RAY_AUTH_MODE=token" in connecting._remedy("auto")
    assert "ray start" not in connecting._remedy("local")


def test_ray_s_handler_of_sigterm_does_not_stay():
    mine = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ClusterError), connected("no-such-cluster"):
        pass
    assert signal.getsignal(signal.SIGTERM) is mine


@pytest.mark.parametrize(
    ("address", "connected_to"),
    [("127.0.0.1:6379", "127.0.0.1:6379"), ("localhost:6379", ray.util.get_node_ip_address() + ":6379")],
)
def test_names_of_the_cluster_that_this_process_is_connected_to(address, connected_to):
    connecting._require_same(address, connected_to)


@pytest.mark.parametrize("address", ["127.0.0.1:6380", "192.0.2.1:6379"])
def test_another_cluster_than_the_one_that_this_process_is_connected_to_is_refused(address):
    with pytest.raises(ClusterError, match=re.escape(address)):
        connecting._require_same(address, "127.0.0.1:6379")


@pytest.mark.parametrize(("stay", "fails", "left"), [(False, False, 1), (True, False, 0), (True, True, 1)])
def test_a_process_stays_connected_only_where_that_is_wanted_and_nothing_failed(monkeypatch, stay, fails, left):
    times = []
    monkeypatch.setattr(connecting, "_connect", lambda address: None)
    monkeypatch.setattr(ray, "shutdown", lambda: times.append("left"))
    with suppress(KeyError), connected("local", stay=stay):
        if fails:
            raise KeyError
    assert len(times) == left
