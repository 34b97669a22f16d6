"""Watching a pool of real actors: recorded load, emulated devices, live views, metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from moesaic import Client
from moesaic.cli.main import main
from moesaic.cluster.expert_keys import LayerKey
from moesaic.handle import Cluster
from moesaic.traces import read_trace
from tests.helpers.cluster.metrics import samples
from tests.helpers.processes.live import ON_RAY, TEXT, processes_of, text_of, wait_until

MODEL = "m"

pytestmark = [*ON_RAY, pytest.mark.slow]


@pytest.fixture
def traffic(client: Client) -> Iterator[None]:
    """One text after the other, in the background."""
    stop = threading.Event()

    def talk() -> None:
        while not stop.is_set():
            text_of(client, MODEL, 20)

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)


@pytest.mark.usefixtures("traffic")
def test_load_is_recorded_window_by_window(pool: Cluster) -> None:
    trace = pool.record(5.0, 1.0)
    assert (trace.windows, trace.window_s) == (5, 1.0)
    layers = [LayerKey(MODEL, layer) for layer in (0, 1)]
    assert sorted(trace.counts) == layers
    # Every token passes all layers, and each layer picks two experts of it. Of a pass that is under
    # way when the recording begins or ends, the first layer alone may be counted.
    first, second = (int(trace.counts[key].sum()) for key in layers)
    assert first > 0
    assert abs(first - second) <= 2 * len(TEXT)
    assert trace.hosts == ("host-0", "host-1")
    assert trace.assignments_WH.sum(axis=0).min() > 0
    assert 0 < trace.busy_s_WH.sum() < 20


@pytest.mark.usefixtures("traffic")
def test_the_command_line_records_until_ctrl_c(pool: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    before = signal.getsignal(signal.SIGINT)

    def press() -> None:
        wait_until(lambda: signal.getsignal(signal.SIGINT) is not before)
        # A few windows of the hour that is asked for.
        threading.Event().wait(4.0)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        assert main(["record", str(file), "--name", pool.name, "--seconds", "3600"]) == 0
    finally:
        thread.join(60)
    assert signal.getsignal(signal.SIGINT) is before
    trace = read_trace(file)
    assert 0 < trace.windows < 3600
    assert trace.assignments_WH.sum() > 0


def test_an_emulated_device_takes_its_time_and_says_when_it_could_not(
    pool: Cluster, client: Client
) -> None:
    text_of(client, MODEL, 10)
    for host in processes_of(pool).values():
        assert host.batches > 0
        assert host.busy_s >= 0.003 * host.batches + 1e-4 * host.calls
        assert 0 <= host.overrun_batches <= host.batches
        assert (host.worst_overrun_s > 0) == (host.overrun_batches > 0)
        assert host.total_late_s >= 0


@pytest.mark.usefixtures("traffic")
def test_top_shows_what_goes_on(pool: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    def busy() -> bool:
        seen = pool.top(3)
        rates = [host.throughput for host in seen.hosts]
        busy = [rate is not None and rate.calls_per_s > 0 for rate in rates]
        # The balance is computed once a second, the rates whenever somebody asks.
        balanced = all(model.balancedness is not None for model in seen.models)
        return bool(seen.hottest_experts) and all(busy) and balanced

    wait_until(busy)
    seen = pool.top(3)
    assert [host.name for host in seen.hosts] == ["host-0", "host-1"]
    for host in seen.hosts:
        assert (host.state, host.replicas) == ("up", 8)
        assert host.throughput is not None
        assert 0 < host.throughput.busy_fraction < 1.5
    rates = [expert.assignments_per_s for expert in seen.hottest_experts]
    assert rates == sorted(rates, reverse=True)
    assert len(rates) == 3
    for expert in seen.hottest_experts:
        assert len(expert.hosts) == 1
    (model,) = seen.models
    assert model.balancedness is not None
    assert 0 < model.balancedness.worst <= model.balancedness.mean <= 1
    # The trunk and the router service.
    assert (seen.router_count, seen.pending_moves, seen.error) == (2, 0, None)

    assert main(["top", "--json", "--name", pool.name, "--experts", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["hottest_experts"]) == 2
    assert main(["top", "--once", "--name", pool.name]) == 0
    drawn = capsys.readouterr().out
    assert pool.name in drawn
    assert "host-1" in drawn


def test_top_goes_on_without_a_terminal_until_it_is_stopped(pool: Cluster) -> None:
    command = [sys.executable, "-m", "moesaic.cli.main", "top", "--interval", "0.2"]
    with subprocess.Popen(
        [*command, "--name", pool.name], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        heads = (line for line in process.stdout if line.startswith("cluster "))
        assert [pool.name in line for line, _ in zip(heads, range(3), strict=False)] == [True] * 3
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130


@pytest.mark.usefixtures("traffic")
def test_history_shows_what_a_change_brought(
    pool: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    pool.replicate(MODEL, 0, 0, 2)
    wait_until(lambda: bool(pool.history()) and pool.history()[-1].measured is not None)
    change = pool.history()[-1]
    assert (change.phase, change.total_moves) == ("done", 1)
    measured = change.measured
    assert measured is not None
    assert measured.window_s >= 1.0
    assert 0 < measured.balancedness_unchanged.mean <= 1
    assert 0 < measured.balancedness_changed.mean <= 1
    assert measured.host_assignments_per_s_after.keys() == {"host-0", "host-1"}
    assert main(["history", "--name", pool.name]) == 0
    assert "measured" in capsys.readouterr().out, "beside what was predicted"
    pool.replicate(MODEL, 0, 0, 1)


def test_the_watchdog_stands_in_status_and_among_the_metrics(pool: Cluster, client: Client) -> None:
    text_of(client, MODEL, 5)
    status = pool.status()
    assert (status.controller.failing, status.warnings) == (False, [])
    assert status.controller.tick_age_s < 5
    assert ([host.state for host in status.hosts], status.missing_experts) == (["up"] * 2, 0)
    found = samples(httpx.get(f"{pool.monitoring}/metrics").text)

    def of(name: str, **labels: str) -> float:
        return found[name, frozenset(({"cluster": pool.name} | labels).items())]

    assert of("moesaic_controller_up") == 1
    assert of("moesaic_controller_term") == status.controller.term
    assert of("moesaic_missing_experts", model=MODEL) == 0
    assert of("moesaic_hosts", state="up") == 2
    assert of("moesaic_controller_tick_age_seconds") >= 0


def test_hosts_and_routers_count_the_same(pool: Cluster, client: Client) -> None:
    def totals() -> dict[str, float]:
        """Name -> value, those of all hosts or transports added up."""
        found: dict[str, float] = defaultdict(float)
        for (name, _), value in samples(httpx.get(f"{pool.monitoring}/metrics").text).items():
            found[name.removeprefix("moesaic_")] += value
        return found

    def grown(name: str) -> float:
        return now[name] - before[name]

    def all_reported() -> bool:
        """Routers report once a second."""
        nonlocal now
        now = totals()
        return grown("host_calls_total") == grown("transport_sends_total") > 0

    # Until routers have reported what they counted in the tests before.
    before = now = totals()
    for _ in range(3):
        threading.Event().wait(1.5)
        before, now = now, totals()
    assert grown("transport_sends_total") == 0
    before = now
    text_of(client, MODEL, 5)
    wait_until(all_reported)
    assert grown("host_received_bytes_total") == grown("transport_sent_bytes_total") > 0
    assert grown("host_sent_bytes_total") == grown("transport_received_bytes_total") > 0
    assert grown("host_assignments_total") == grown("model_assignments_total") > 0
    assert grown("transport_answer_seconds_count") == grown("transport_sends_total")
    assert grown("transport_failures_total") == 0
