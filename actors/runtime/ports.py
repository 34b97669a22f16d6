"""Ports and addresses of this machine: checks that they can be used, and a free port."""

from __future__ import annotations

import contextlib
import ipaddress
import random
import socket
from pathlib import Path

from ...proto.errors import ClusterError

_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
# Free ports are sought from here on, by chance.
_FIRST_PORT, _TRIES = 10_240, 50


def check_port(part: str, host: str, port: int) -> None:
    """Check that the ``port`` of this part of the spec is free; 0 always is. Raises ClusterError.

    `check_address` checks that this machine has the address.
    """
    if port == 0:
        return
    family, address = resolved(f"{part}.host", host)
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ClusterError(
                f"{part}.port: {host}:{port} is not free ({error.strerror or error}); "
                "choose another port, or 0 for any free one"
            ) from error


def check_address(key: str, host: str) -> None:
    """Check that this machine has the address of the spec's ``key``. Raises ClusterError."""
    family, address = resolved(key, host)
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ClusterError(
                f"{key}: {host!r} is not an address of this machine ({error.strerror or error}); "
                "give one that `ip address` shows, or 127.0.0.1"
            ) from error


def resolved(key: str, host: str) -> tuple[int, str]:
    """Return family and address of a host, without brackets. Raises ClusterError if unknown."""
    plain = host.strip("[]")
    try:
        number = ipaddress.ip_address(plain)
    except ValueError:
        pass  # a name
    else:
        return (socket.AF_INET if number.version == 4 else socket.AF_INET6), plain
    try:
        return socket.getaddrinfo(plain, 0, type=socket.SOCK_STREAM)[0][0], plain
    except OSError as error:
        raise ClusterError(
            f"{key}: {host!r} cannot be resolved ({error.strerror or error}); give an address of "
            "this machine"
        ) from error


def free_port(host: str) -> int:
    """Return a free port below those that the kernel assigns to sockets bound to port 0.

    Whoever asks binds to it seconds later, when other listeners have started. Raises ClusterError.
    """
    family, address = resolved("host", host)
    first_ephemeral = _first_ephemeral_port()
    tries = _TRIES if first_ephemeral > _FIRST_PORT else 0
    chosen = (random.randrange(_FIRST_PORT, first_ephemeral) for _ in range(tries))
    for port in (*chosen, 0):
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            return probe.getsockname()[1]
    raise ClusterError(f"host: no port of {host} is free, or this machine lacks the address")


def _first_ephemeral_port() -> int:
    """Return the lowest port that the kernel gives out by itself; 0 if it does not say."""
    try:
        return int(_EPHEMERAL_PORTS.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0
