"""What a router counts of its sends until its next report."""

from __future__ import annotations

from moesaic.cluster.load.router_counts import RouterCounts, TransportCounts, TransportMeter


def test_answers_are_counted_with_their_times() -> None:
    meter = TransportMeter()
    meter.sent("a", 1, "shm", 100, now=5.0)
    meter.sent("b", 2, "grpc", 10, now=5.0)
    meter.answered("a", 1, 50, now=5.003)
    found = meter.take()
    shm = found["shm"]
    assert (shm.sends, shm.failures, shm.sent_bytes, shm.received_bytes) == (1, 0, 100, 50)
    assert (round(shm.answer_s, 6), shm.buckets.index(1), sum(shm.buckets)) == (0.003, 3, 1)
    assert (found["grpc"].sends, sum(found["grpc"].buckets)) == (1, 0)
    # The answer belongs to the next report then.
    meter.answered("b", 2, 7, now=5.5)
    assert meter.take()["grpc"].received_bytes == 7
    assert meter.take() == {}


def test_what_fails_is_counted_once_and_what_nobody_waits_for_not_at_all() -> None:
    meter = TransportMeter()
    for seq in range(4):
        meter.sent("a", seq, "shm", 1, now=0.0)
    meter.refused("a", 0)
    meter.refused("a", 0)
    meter.cancelled("a", 1)
    meter.refused("a", 1)
    meter.answered("a", 2, 1, now=0.1)
    meter.lost("a")
    meter.lost("a")
    meter.answered("a", 3, 1, now=0.1)
    found = meter.take()["shm"]
    assert (found.sends, found.failures, sum(found.buckets)) == (4, 2, 1)


def test_a_slow_answer_is_in_the_last_bucket() -> None:
    meter = TransportMeter()
    meter.sent("a", 1, "shm", 1, now=0.0)
    meter.answered("a", 1, 1, now=60.0)
    assert meter.take()["shm"].buckets[-1] == 1


def test_counts_are_those_since_the_last_report() -> None:
    shm = {"shm": TransportCounts(sends=2)}
    first = RouterCounts(calls=3, rows=30, lost_rows=1)
    then = RouterCounts(calls=5, rows=60, lost_rows=1, transports=shm)
    assert then.since(first) == RouterCounts(calls=2, rows=30, transports=shm)


def test_reports_add_up_and_stay_as_they_are() -> None:
    report = RouterCounts(calls=1, transports={"shm": TransportCounts(sends=1)})
    total = RouterCounts()
    total.add(report)
    total.add(report)
    assert (total.calls, total.transports["shm"].sends) == (2, 2)
    assert report.transports["shm"].sends == 1
