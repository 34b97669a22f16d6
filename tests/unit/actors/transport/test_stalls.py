"""What stands still is ended; what moves, and what stood still with this process, is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from moesaic.actors.transport.grpc import stalls
from moesaic.actors.transport.grpc.stalls import StallWatcher

LIMIT_S = 0.1


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[StallWatcher]:
    monkeypatch.setattr(stalls, "_LOOK_S", 0.01)
    one = StallWatcher()
    yield one
    one.close()


def test_what_stands_still_is_ended_once(watch: StallWatcher) -> None:
    ended = []
    over = threading.Event()

    def end() -> None:
        ended.append(1)
        over.set()

    with watch.watching(end, LIMIT_S):
        assert over.wait(10.0)
        time.sleep(5 * LIMIT_S)
    assert ended == [1]


def test_what_moves_is_not(watch: StallWatcher) -> None:
    ended = []
    with watch.watching(lambda: ended.append(1), 10 * LIMIT_S) as progress:
        for _ in range(30):
            time.sleep(LIMIT_S / 2)
            progress.moved()
    assert not ended


def test_one_that_cannot_be_ended_does_not_keep_the_others(watch: StallWatcher) -> None:
    over = threading.Event()

    def fail() -> None:
        raise RuntimeError("a defect")

    with watch.watching(fail, LIMIT_S), watch.watching(over.set, LIMIT_S):
        assert over.wait(10.0)


def test_a_process_that_was_frozen_hears_first(
    watch: StallWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock jumps, as it does for one that was stopped in the middle of a transfer."""
    real, ahead = time.monotonic, 0.0
    monkeypatch.setattr(stalls.time, "monotonic", lambda: real() + ahead)
    monkeypatch.setattr(stalls, "STILL_S", 0.5)
    ended = threading.Event()
    with watch.watching(ended.set, 1.0) as progress:
        time.sleep(0.1)
        ahead = 60.0
        assert not ended.wait(0.2)
        progress.moved()
        assert not ended.wait(0.6)
        assert ended.wait(10.0), "it moves no more"
