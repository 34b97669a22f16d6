"""What a host's own process answers to the three questions about it."""

from __future__ import annotations

from typing import NamedTuple


class HostAnswers(NamedTuple):
    """One answer to each question; the names are those of the services in gRPC's health checks."""

    startup: bool  # it has started: its listeners are bound, and its loop runs
    liveness: bool  # its loop turns, or it still starts
    readiness: bool  # it takes calls: it has started and lives, and the pool knows it
