"""Defects inside a host: each ends what it touched, and the host's loop goes on."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from moesaic.actors.host import compute
from moesaic.actors.router.connect import connect
from moesaic.cluster.expert_keys import ExpertKey, first_versions
from moesaic.proto.errors import HostLost
from moesaic.proto.expert_pb2 import Frame
from tests.helpers.pool.host_calls import LAYER, PROMPT, ask
from tests.helpers.pool.served_pool import ServedPool
from tests.helpers.pool.transports import hear, hear_end


def test_work_that_fails_in_the_loop_is_raised_to_its_caller(served: ServedPool) -> None:
    def fail() -> None:
        raise KeyError("drill")

    with pytest.raises(KeyError, match="drill"):
        served.hosts[0]._loop.call(fail)
    # The host holds none of these experts, and -1 does not name its last one.
    served.hosts[0].release(first_versions(ExpertKey("m", LAYER, e) for e in (8, 99, -1)))
    reply, _ = ask(served, "shm", ids=(-1, -1))
    assert reply.seq == 1


def test_a_router_that_is_dropped_while_it_speaks(
    served: ServedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end and its frame arrive in the same round of the host's loop."""
    host = served.hosts[0]
    loop = host._loop
    channel = connect(host.entry(), "shm", router="gone", slots=1)
    with closing(channel):
        hear(channel)
        (session,) = [s for s in loop._sessions.values() if s.router == "gone"]
        computing, go_on = threading.Event(), threading.Event()
        real = compute.compute

        def slow(*args: Any, **kwargs: Any) -> Any:
            computing.set()
            assert go_on.wait(30)
            return real(*args, **kwargs)

        monkeypatch.setattr(loop, "_compute_batch", slow)
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(ask, served, "shm")
            assert computing.wait(10)
            loop.post(lambda: loop._drop(session, HostLost("drill")))
            ping = Frame()
            ping.ping.seq = 1
            channel.send(ping)
            go_on.set()
            answer.result(30)
        hear_end(channel)


def test_a_defect_in_a_computation_is_an_error_of_its_calls(
    served: ServedPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("drill")

    for host in served.hosts:
        monkeypatch.setattr(host._loop, "_compute_batch", fail)
    answer = served.complete(PROMPT)
    monkeypatch.undo()
    assert answer.status_code == 500
    told, identity = answer.json()["error"]["message"], answer.headers["x-request-id"]
    assert "drill" not in told
    assert identity in told
    assert re.search(f"{identity}.*AssertionError: drill", caplog.text), "the log has the cause"
