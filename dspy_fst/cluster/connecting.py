"""Whether a Ray cluster answers, and the block in which this process is connected to it (Ray 2.60)."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from ipaddress import ip_address

from dspy_fst.errors import ClusterError, briefly
from dspy_fst.formatting.numbers import counted
from dspy_fst.run.interrupts import terminated_again

LOCAL = "local"
"""The address with which Ray starts a cluster on this machine, for this run alone."""
FOUND = "auto"
"""The address with which Ray takes the cluster that RAY_ADDRESS names, or that `ray start` began on this machine."""
ANSWER_S = 5.0
"""Seconds in which the cluster's address has to answer (ours). Ray itself tries for minutes."""

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""An empty frame of HTTP/2's settings: length, type, flags, stream (RFC 9113, 6.5)."""
HTTP_2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS
"""With which a client of HTTP/2 begins (RFC 9113, 3.4); the server's own settings come first of all that it answers."""


def address_faults(address: str | None) -> Iterator[str]:
    """Why a run cannot be connected to this cluster, as far as can be known without connecting."""
    if address is None:
        return
    if find_spec("ray") is None:
        yield f"ray={address!r} needs Ray, which is not installed: pip install 'dspy-fst[ray]'"
        return
    given = address
    if address == FOUND:
        address = os.environ.get("RAY_ADDRESS") or FOUND
        given = given if address == FOUND else f"{given} with RAY_ADDRESS={address}"
    if address in (LOCAL, FOUND):
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        yield (
            f"ray={given!r}: use 'local', 'auto', or HOST:PORT of the cluster's head as `ray start` prints it. A run "
            "plays from a node of the cluster, so ray:// addresses of Ray's client are not taken"
        )
        return
    try:
        answered = _answers_as_head(host.strip("[]"), int(port))
    except (OSError, OverflowError) as error:
        yield (
            f"ray={given!r} does not answer ({briefly(error)}): start the cluster's head with `ray start --head`, "
            "and name the address that it prints"
        )
        return
    if not answered:
        yield (
            f"ray={given!r}: what listens there is no head of a Ray cluster (its dashboard has a port of its own); "
            "name the address that `ray start --head` prints"
        )


def _answers_as_head(host: str, port: int) -> bool:
    """Whether a head of a cluster may listen there: it speaks gRPC, and so HTTP/2. Ray asks any server for minutes.

    Raises:
        OSError, OverflowError: nobody answers.
    """
    with socket.create_connection((host, port), timeout=ANSWER_S) as asked, asked.makefile("rb") as answer:
        if os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true"):
            return True
        asked.sendall(HTTP_2)
        return answer.read(len(SETTINGS))[3:4] == SETTINGS[3:4]


@contextmanager
def connected(address: str, *, stay: bool = False) -> Iterator[ExitStack]:
    """The block in which this process is connected to a cluster; what is pushed on the stack ends before.

    A connection that the process had before is used, and kept.

    Args:
        address: As `ray.init` takes it.
        stay: Whether the process stays connected after a block without an error, as the cluster holds what is used
            later.

    Raises:
        ClusterError: the cluster does not take this process, or it is connected to another one.
    """
    import ray

    def leave(kind: type[BaseException] | None, error: object, trace: object) -> None:
        if not stay or kind is not None:
            ray.shutdown()

    with terminated_again(), ExitStack() as stack:
        if not ray.is_initialized():
            _connect(address)
            stack.push(leave)
        elif address not in (LOCAL, FOUND):
            _require_same(address, ray.get_runtime_context().gcs_address)
        yield stack


def cluster_in_words() -> str:
    """The one that this process is connected to, e.g. ``"the Ray cluster at 10.0.0.1:6379 (2 nodes, 16 CPUs)"``."""
    import ray

    nodes, cpus = sum(node["Alive"] for node in ray.nodes()), int(ray.cluster_resources().get("CPU", 0))
    at = ray.get_runtime_context().gcs_address
    return f"the Ray cluster at {at} ({counted(nodes, 'node')}, {counted(cpus, 'CPU')})"


def _require_same(address: str, connected_to: str) -> None:
    """
    Raises:
        ClusterError: the two are heads of different clusters.
    """
    wanted, own = ({*_places_of(one)} for one in (address, connected_to))
    if not wanted & own:
        raise ClusterError(
            f"ray={address!r}: this process is connected to the cluster at {connected_to}; call ray.shutdown() before, "
            "or name that one"
        )


def _places_of(address: str) -> Iterator[tuple[str, str]]:
    """The (IP address, port) of a head: a name may stand for several, and Ray takes loopback for this node's own."""
    import ray

    host, _, port = address.rpartition(":")
    for *_, place in socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM):
        yield str(place[0]), port
        if ip_address(str(place[0]).partition("%")[0]).is_loopback:
            yield ray.util.get_node_ip_address(), port


def _connect(address: str) -> None:
    import ray

    dashboard = False if address == LOCAL else None
    try:
        with sigterm_as_before():
            ray.init(address=address, include_dashboard=dashboard, logging_level=logging.WARNING)
    except Exception as error:  # of its services and of their processes, as many kinds as there are causes
        why = briefly(error).rstrip(".")
        raise ClusterError(f"ray={address!r}: Ray does not connect: {why}. {_remedy(address)}") from error


def _remedy(address: str) -> str:
    if address == LOCAL:
        return "Ray starts a cluster on this machine here: its logs are below /tmp/ray/session_latest/logs"
    return (
        "This machine must be a node of the cluster: run `ray start --address=HOST:PORT` here first; Python and Ray "
        "must be the same releases on all nodes. If `ray start` said that token authentication is enabled, set "
        "RAY_AUTH_MODE=token, and have the head's ~/.ray/auth_token on all nodes"
    )


@contextmanager
def sigterm_as_before() -> Iterator[None]:
    """A block in which Ray sets a handler of SIGTERM: it would replace the one that ends a run with its state saved."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if in_main_thread and before is not None:
            signal.signal(signal.SIGTERM, before)
