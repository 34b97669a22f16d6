"""Emulated devices: the time of a batch, and answers that are held back until it has passed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.actors.host import device
from moesaic.actors.host.device import Device
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.host.emulation import Emulation
from moesaic.cluster.host.residency import QueuedCall
from moesaic.cluster.spec.spec import parse_spec
from moesaic.proto.errors import SpecError


def ids(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int32)


def call(seq: int, ids_TK: np.ndarray) -> QueuedCall:
    return QueuedCall(
        router="r",
        seq=seq,
        key=LayerKey("m", 0),
        rows=len(ids_TK),
        hidden=4,
        dtype="float32",
        exact=False,
        expires_at=1e9,
        incarnation=1,
        version=0,
        ids=ids_TK,
    )


class Clock:
    """Sleeping and yielding take time, and nothing else does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 10.0
        self.oversleep_s = 0.0
        monkeypatch.setattr(device, "time", self)
        monkeypatch.setattr(device, "os", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + self.oversleep_s

    def sched_yield(self) -> None:
        self.now += 1e-6


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_batch_takes_its_start_its_choices_and_its_experts() -> None:
    emulation = Emulation(call_us=100, row_us=10, expert_us=1000)
    assert emulation.batch_s([ids([0, 1], [1, -1])]) == pytest.approx(100e-6 + 30e-6 + 2e-3)
    merged = [ids([0, 1]), ids([1, 2], [0, 2])]
    assert emulation.batch_s(merged) == pytest.approx(100e-6 + 60e-6 + 3e-3)
    assert emulation.batch_s([ids([-1, -1])]) == pytest.approx(100e-6)


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=30), st.integers(1, 29))
def test_only_the_start_of_a_batch_is_saved_by_merging_calls(values: list[int], at: int) -> None:
    whole, parts = np.array(values), np.split(np.array(values), [min(at, len(values))])
    emulation = Emulation(call_us=7, row_us=3)
    apart = sum(emulation.batch_s([part]) for part in parts)
    assert emulation.batch_s(parts) == pytest.approx(emulation.batch_s([whole]))
    assert apart == pytest.approx(emulation.batch_s(parts) + 7e-6)


def test_answers_are_held_back_until_the_device_would_have_them(clock: Clock) -> None:
    made = Device(Emulation(row_us=5000), clock.monotonic)
    clock.now += 0.002
    assert made.finish([call(1, ids([0, 1])), call(2, ids([0, -1]))], 10.0) == pytest.approx(0.015)
    assert clock.now == pytest.approx(10.015, abs=1e-5)
    stats = made.stats(refused=3, queued_rows=4, routers=1)
    assert (stats.calls, stats.rows, stats.batches) == (2, 2, 1)
    assert (stats.refused, stats.queued_rows, stats.routers) == (3, 4, 1)
    assert stats.busy_s == pytest.approx(0.015)
    assert (stats.overruns, stats.worst_overrun_s) == (0, 0.0)


def test_arithmetic_that_takes_longer_than_the_device_is_counted(clock: Clock) -> None:
    made = Device(Emulation(row_us=1000), clock.monotonic)
    for took_s in (0.0005, 0.004, 0.003):
        began = clock.now
        clock.now += took_s
        assert made.finish([call(1, ids([0]))], began) == pytest.approx(max(took_s, 0.001))
    stats = made.stats(refused=0, queued_rows=0, routers=1)
    assert stats.overruns == 2
    assert stats.worst_overrun_s == pytest.approx(0.003)
    assert stats.busy_s == pytest.approx(0.008)


def test_waking_late_is_counted_as_lateness_and_not_as_work(clock: Clock) -> None:
    made = Device(Emulation(row_us=1000), clock.monotonic)
    clock.oversleep_s = 0.002
    assert made.finish([call(1, ids([0]))], clock.now) == pytest.approx(0.001)
    stats = made.stats(refused=0, queued_rows=0, routers=1)
    assert stats.late_s == pytest.approx(0.002 - 200e-6)
    assert stats.overruns == 0


def test_a_real_device_takes_the_time_it_takes(clock: Clock) -> None:
    made = Device(None, clock.monotonic)
    clock.now += 0.25
    assert made.finish([call(1, ids([0]))], 10.0) == pytest.approx(0.25)
    assert clock.now == 10.25


def test_a_spec_may_emulate_a_device_with_one_thread_each() -> None:
    spec = parse_spec({"hosts": [{"emulate": {"row_us": 20}}, {}]})
    emulated, plain = spec.hosts
    assert emulated.limits.emulate == Emulation(row_us=20)
    assert emulated.threads == 1
    assert (plain.limits.emulate, plain.threads) == (None, "auto")
    given = parse_spec({"hosts": [{"emulate": {"call_us": 1}, "threads": 2}]})
    assert given.hosts[0].threads == 2
    assert parse_spec(spec.model_dump()) == spec


@pytest.mark.parametrize(
    ("emulate", "words"),
    [
        ({}, "hosts.0.emulate: one of call_us, row_us and expert_us must be above 0"),
        ({"row_us": -1}, "hosts.0.emulate.row_us"),
        ({"row_us": float("inf")}, "hosts.0.emulate.row_us"),
        ({"rows_us": 1}, "hosts.0.emulate.rows_us: unknown key"),
        ("fast", "hosts.0.emulate"),
    ],
)
def test_impossible_devices_are_refused(emulate: object, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse_spec({"hosts": [{"emulate": emulate}]})
