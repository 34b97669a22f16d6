"""Ports of this machine: whether one is free, and any that is."""

from __future__ import annotations

import socket

from ..proto.errors import ClusterError


def check_port(part: str, host: str, port: int) -> None:
    """Raises ClusterError when the ``port`` of this part of the spec is taken; 0 never is."""
    if port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ClusterError(
                f"{part}.port: {host}:{port} is not free ({error.strerror or error}); "
                "choose another one, or 0 for any"
            ) from error


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
