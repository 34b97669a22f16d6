"""The thread of an expert host, on a clock that the test sets."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from moesaic.actors.host.host_loop import HostLoop
from moesaic.actors.host.weight_store import ExpertStore
from moesaic.actors.transport.base import Session
from moesaic.cluster.host.residency import HostPolicy, Residency
from moesaic.proto.errors import InternalError
from tests.helpers.cluster.fake_clock import FakeClock


class Quiet:
    """A listener to which nobody connects."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0)
        self.looks = 0

    @property
    def address(self) -> str:
        return ""

    def fileno(self) -> int:
        return self._fd

    def accept(self) -> list[Session]:
        self.looks += 1
        return []

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def looping(clock: FakeClock, *listeners: Quiet) -> Iterator[HostLoop]:
    store = ExpertStore(torch.device("cpu"))
    loop = HostLoop("h0", store, Residency(HostPolicy(), incarnation=1), [*listeners], clock)
    try:
        yield loop
    finally:
        loop.close()


def test_listeners_are_looked_at_now_and_then() -> None:
    clock, listener = FakeClock(), Quiet()
    with looping(clock, listener) as loop:
        for passed_s in (0.0, 0.2, 0.2, 0.2, 0.2):
            clock.now += passed_s
            loop.turn([])
    assert listener.looks == 2


def test_an_error_that_comes_too_late_for_its_caller_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    go_on, over = threading.Event(), threading.Event()

    def fail_late() -> None:
        go_on.wait(10)
        raise ValueError("too late")

    with looping(FakeClock()) as loop, caplog.at_level(logging.ERROR):
        loop.start()
        with pytest.raises(InternalError, match="did not answer"):
            loop.call(fail_late, timeout_s=0.01)
        go_on.set()
        loop.post(over.set)
        assert over.wait(10)
        assert "too late" in caplog.text
        assert loop.alive
