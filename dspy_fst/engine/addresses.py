"""Addresses and ports of this machine that a server could listen on."""

import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host, e.g. ``"127.0.0.1"``, ``"[::1]"`` or ``"localhost"``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(host: str) -> int:
    """A port that nobody listens on now; it is not reserved, so take it soon."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def port_taken(host: str, port: int) -> bool:
    """Whether binding the port fails now, as it would for a server started on it."""
    with socket.socket() as probe:
        # What servers set as well: a port in TIME_WAIT is free to them, one that is listened on is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError):  # the latter: no port number at all
            return True
    return False
