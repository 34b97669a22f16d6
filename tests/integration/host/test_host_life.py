"""A host that can compute no more does not go on reporting that all is well."""

from __future__ import annotations

import os

import pytest

from moesaic.actors.host.host import local_hosts
from tests.helpers.processes.live import wait_until


def test_a_host_whose_loop_failed_leaves_at_the_next_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)

    def broken() -> None:
        raise RuntimeError("nobody thought of this")

    with local_hosts(1) as (host,):
        host.report()
        assert left == []
        host._loop.post(broken)
        wait_until(lambda: host._loop.failure is not None)
        host.report()
        assert left == [1]
