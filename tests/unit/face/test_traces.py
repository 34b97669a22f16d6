"""Traces: from running totals to windows, to a file and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moesaic.cli.main import main
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.meter import HostTimes, LoadReport
from moesaic.cluster.load.trace import LoadTotals, Trace, TraceRecorder
from moesaic.cluster.load.tracker import LoadTracker
from moesaic.proto.errors import CheckpointError, ClusterError, RequestError
from moesaic.traces import read_trace, record, write_trace

KEY, OTHER = LayerKey("m", 0), LayerKey("folder/name", 3)


def totals(term: int, *counts: int, busy_s: float = 0.0) -> LoadTotals:
    times = HostTimes(calls=1, assignments=sum(counts), queued_s=2 * busy_s, busy_s=busy_s)
    return LoadTotals(term=term, counts={KEY: np.array(counts)}, hosts={"h": times})


# ---- windows ------------------------------------------------------------------------------------


def test_windows_hold_what_came_between_two_readings() -> None:
    recorder = TraceRecorder(2.0, totals(1, 5, 0, busy_s=1.0))
    recorder.add(totals(1, 7, 1, busy_s=1.5))
    recorder.add(totals(1, 7, 1, busy_s=1.5))
    trace = recorder.trace()
    assert trace.window_s == 2.0
    assert trace.counts[KEY].tolist() == [[2, 1], [0, 0]]
    assert trace.assignments_WH.tolist() == [[3], [0]]
    assert trace.busy_s_WH.tolist() == [[0.5], [0.0]]
    assert trace.queued_s_WH.tolist() == [[1.0], [0.0]]


def test_a_controller_that_starts_anew_counts_from_zero() -> None:
    recorder = TraceRecorder(1.0, totals(1, 100, 100, busy_s=9.0))
    recorder.add(totals(2, 3, 0, busy_s=0.25))
    assert recorder.trace().counts[KEY].tolist() == [[3, 0]]
    assert recorder.trace().busy_s_WH.tolist() == [[0.25]]


def test_what_appears_on_the_way_has_zeros_before_and_another_form_starts_anew() -> None:
    recorder = TraceRecorder(1.0, LoadTotals(term=1))
    recorder.add(totals(1, 1, 2))
    recorder.add(totals(1, 1, 2, 3))
    late = {OTHER: np.array([4]), KEY: np.array([1, 2, 3])}
    recorder.add(LoadTotals(term=1, counts=late, hosts={"late": HostTimes(assignments=8)}))
    trace = recorder.trace()
    assert trace.counts[KEY].tolist() == [[1, 2, 0], [1, 2, 3], [0, 0, 0]]
    assert trace.counts[OTHER].tolist() == [[0], [0], [4]]
    assert trace.hosts == ("h", "late")
    assert trace.assignments_WH[:, 1].tolist() == [0, 0, 8]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=4), st.integers(1, 9), st.floats(0, 100))
def test_windows_without_a_reading_share_evenly_and_lose_nothing(
    counts: list[int], windows: int, busy_s: float
) -> None:
    recorder = TraceRecorder(1.0, LoadTotals(term=1))
    recorder.add(totals(1, *counts, busy_s=busy_s), windows)
    trace = recorder.trace()
    assert trace.windows == windows
    assert trace.counts[KEY].sum(axis=0).tolist() == counts
    assert np.ptp(trace.counts[KEY], axis=0).max() <= 1
    assert trace.assignments_WH.sum() == sum(counts)
    assert trace.busy_s_WH.sum() == pytest.approx(busy_s)


def test_the_tracker_keeps_totals_that_readers_may_keep() -> None:
    tracker = LoadTracker()
    tracker.hear(LoadReport(router="r", placement_id=None, counts={KEY: np.array([1, 2])}))
    first = dict(tracker.totals)
    tracker.advance(0.0)
    tracker.advance(10.0)
    tracker.hear(LoadReport(router="s", placement_id=None, counts={KEY: np.array([1, 0])}))
    assert tracker.totals[KEY].tolist() == [2, 2]
    assert first[KEY].tolist() == [1, 2]


# ---- recording ----------------------------------------------------------------------------------


class World:
    """A clock, and a controller whose readings are given one by one."""

    def __init__(self, *readings: LoadTotals | ClusterError) -> None:
        self.now = 50.0
        self.readings: Iterator[LoadTotals | ClusterError] = iter(readings)
        self.stop = Event()
        self.steps: list[tuple[int, int]] = []
        self.on_wait: Callable[[], object] = lambda: None

    def read(self) -> LoadTotals:
        found = next(self.readings)
        if isinstance(found, ClusterError):
            raise found
        return found

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.on_wait()

    def record(self, seconds: float, window_s: float) -> Trace:
        return record(
            self.read,
            seconds,
            window_s,
            stop=self.stop,
            progress=lambda _, done, of: self.steps.append((done, of)),
            clock=lambda: self.now,
            wait=self.wait,
        )


def test_recording_takes_whole_windows_on_time() -> None:
    world = World(*(totals(1, n, 2 * n) for n in range(4)))
    trace = world.record(7.0, 2.0)
    assert trace.counts[KEY].tolist() == [[1, 2]] * 3
    assert world.now == 56.0
    assert world.steps == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_controller_that_is_away_for_a_while_costs_no_window() -> None:
    away = ClusterError("away")
    world = World(totals(1, 10, 0), totals(1, 12, 0), away, away, totals(2, 3, 0))
    assert world.record(4.0, 1.0).counts[KEY][:, 0].tolist() == [2, 1, 1, 1]


def test_a_controller_that_stays_away_ends_the_recording_and_keeps_what_there_is() -> None:
    away = [ClusterError("away")] * 1000
    world = World(totals(1, 0), totals(1, 1), *away)
    assert world.record(1000.0, 10.0).windows == 1
    assert world.now < 300
    with pytest.raises(ClusterError, match="away"):
        World(*away).record(10.0, 1.0)


def test_stopping_keeps_the_windows_that_are_whole() -> None:
    world = World(*(totals(1, n) for n in range(9)))
    world.on_wait = lambda: world.now >= 52.0 and world.stop.set()
    assert world.record(8.0, 1.0).windows == 1


@pytest.mark.parametrize(
    ("seconds", "window_s"), [(10, 0.5), (1, 2), (float("nan"), 1), (float("inf"), 1), (5, -1)]
)
def test_impossible_windows_are_refused(seconds: float, window_s: float) -> None:
    with pytest.raises(RequestError, match="window_s"):
        World().record(seconds, window_s)


# ---- files --------------------------------------------------------------------------------------


def some_trace() -> Trace:
    rng = np.random.default_rng(0)
    return Trace(
        window_s=0.1 + 0.2,
        counts={
            KEY: rng.integers(0, 99, (4, 8)),
            OTHER: rng.integers(0, 1 << 40, (4, 2)),
        },
        hosts=("host-0", "Häuschen"),
        assignments_WH=rng.integers(0, 99, (4, 2)),
        busy_s_WH=rng.random((4, 2)),
        queued_s_WH=rng.random((4, 2)),
    )


def equal(left: Trace, right: Trace) -> bool:
    arrays = "assignments_WH", "busy_s_WH", "queued_s_WH"
    return (
        (left.window_s, left.hosts) == (right.window_s, right.hosts)
        and left.counts.keys() == right.counts.keys()
        and all(np.array_equal(left.counts[key], right.counts[key]) for key in left.counts)
        and all(np.array_equal(getattr(left, name), getattr(right, name)) for name in arrays)
    )


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text("something older")
    write_trace(file, some_trace())
    assert equal(read_trace(file), some_trace())
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def test_a_trace_without_traffic_survives_its_file(tmp_path: Path) -> None:
    empty = np.zeros((3, 0))
    idle = Trace(
        window_s=1.0,
        counts={},
        hosts=(),
        assignments_WH=empty.astype(np.int64),
        busy_s_WH=empty,
        queued_s_WH=empty,
    )
    write_trace(tmp_path / "trace", idle)
    assert read_trace(tmp_path / "trace").windows == 3


def test_any_truncated_trace_gets_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    write_trace(file, some_trace())
    whole = file.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=str(file)):
            read_trace(file)


GOOD_META = {"moesaic_trace": "1", "window_s": "1.0", "hosts": '["h"]'}
GOOD = {
    "choices": np.zeros((2, 1), dtype=np.int64),
    "busy_s": np.zeros((2, 1)),
    "queued_s": np.zeros((2, 1)),
    "counts/m/0": np.zeros((2, 4), dtype=np.int64),
}


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({}, {"moesaic_trace": "2"}, "this is a trace of format '2', and"),
        ({}, {"moesaic_trace": None}, "not a trace: its metadata lack the key moesaic_trace"),
        ({}, {"window_s": None}, "window_s"),
        ({}, {"window_s": "0"}, "0.0 s"),
        ({}, {"window_s": "soon"}, "soon"),
        ({}, {"hosts": '["h", "i"]'}, "choices"),
        ({}, {"hosts": "[1]"}, "hosts"),
        ({}, {"hosts": "["}, "damaged"),
        ({"choices": None}, {}, "choices"),
        ({"busy_s": np.zeros((3, 1))}, {}, "busy_s"),
        ({"busy_s": np.full((2, 1), np.nan)}, {}, "busy_s"),
        ({"queued_s": np.zeros((2, 1), dtype=np.float32)}, {}, "queued_s: the tensor is float32"),
        ({"counts/m/0": np.zeros((3, 4), dtype=np.int64)}, {}, "counts/m/0"),
        ({"counts/m/0": np.full((2, 4), -1)}, {}, "below zero"),
        ({"counts/m": np.zeros((2, 4), dtype=np.int64)}, {}, "counts/m: this tensor"),
        ({"weights": np.zeros(2)}, {}, "weights: this tensor"),
    ],
)
def test_what_is_no_trace_gets_one_clear_error(
    tmp_path: Path,
    tensors: dict[str, np.ndarray | None],
    metadata: dict[str, str | None],
    words: str,
) -> None:
    file = tmp_path / "trace"
    given = {name: tensor for name, tensor in (GOOD | tensors).items() if tensor is not None}
    meta = {name: text for name, text in (GOOD_META | metadata).items() if text is not None}
    save_file(given, file, meta)
    with pytest.raises(CheckpointError, match=words) as error:
        read_trace(file)
    assert str(file) in str(error.value)


def test_files_that_are_not_there_or_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_trace(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_trace(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_trace(tmp_path / "none" / "trace", some_trace())
    (tmp_path / "text").write_text(json.dumps(GOOD_META))
    with pytest.raises(CheckpointError, match="not a trace"):
        read_trace(tmp_path / "text")


def test_recording_replaces_no_file_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace"
    file.write_text("precious")
    assert main(["record", str(file)]) == 1
    assert "--force" in capsys.readouterr().err
    assert file.read_text() == "precious"
    assert main(["record", str(tmp_path / "none" / "trace")]) == 1
    assert "there is no folder" in " ".join(capsys.readouterr().err.split())
