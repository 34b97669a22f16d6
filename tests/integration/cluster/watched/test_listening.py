"""What listens where is what docs/security.md says, and no replica of Serve listens elsewhere."""

from __future__ import annotations

import contextlib
import socket

import psutil
import pytest

from moesaic import Client
from moesaic.actors.runtime.embedded_ray import started_processes
from moesaic.handle import Cluster
from tests.helpers.processes.listening import documented, listening
from tests.helpers.processes.live import ON_RAY, text_of, wait_until

pytestmark = [*ON_RAY, pytest.mark.slow]

# Where they export metrics; they listen nowhere if another process does.
FIXED_PORTS = {"monitor": 44217, "dashboard": 44227}


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_one_machine(pool: Cluster, client: Client, listening_before: set[tuple[str, str]]) -> None:
    assert text_of(client, "m", 3)

    def found() -> set[tuple[str, str]]:
        return listening([psutil.Process(), *started_processes()]) - listening_before

    def expected() -> set[tuple[str, str]]:
        """What is documented, without those whose port another Ray of this machine has."""
        ours = {kind for kind, _ in found()}
        taken = {kind for kind, port in FIXED_PORTS.items() if kind not in ours and listens(port)}
        return {one for one in documented("one machine") if one[0] not in taken}

    # Ray's dashboard may begin to listen after the cluster answers.
    with contextlib.suppress(AssertionError):
        wait_until(lambda: found() == expected(), 30.0)
    assert found() == expected()
    assert {where for _, where in found()} == {"loopback"}
