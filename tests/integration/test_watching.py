"""Watching a pool of real actors: recorded load, emulated devices, live views, metrics."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import moesaic
from moesaic import Client
from moesaic.cli.main import main
from moesaic.cluster.placement import LayerKey
from moesaic.handle import Cluster
from moesaic.traces import read_trace
from tests.helpers.live import hosts_of, text_of, wait_until
from tests.integration.conftest import save_model

MODEL = "m"
EMULATE = {"call_us": 3000, "row_us": 100}

pytestmark = [
    pytest.mark.timeout(300),
    # Ray leaves sockets and log files to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("watching")
    save_model(folder, "mixtral")
    spec = {
        "name": f"watching-{os.getpid()}",
        "models": [{"name": MODEL, "path": str(folder)}],
        "hosts": [{"count": 2, "slots": 16, "emulate": EMULATE}],
        "trunk": {"cache_tokens": 1024, "threads": 1},
        "endpoint": {"port": 0},
        "balance": {"auto": False, "lease_s": 4},
    }
    with moesaic.up(spec) as cluster:
        yield cluster


@pytest.fixture
def client(pool: Cluster) -> Iterator[Client]:
    with Client(pool.url or "") as client:
        yield client


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
    # Every token passes all layers, and each layer picks as many experts of it.
    first, second = (int(trace.counts[key].sum()) for key in layers)
    assert first > 0
    assert abs(first - second) <= 8
    assert trace.hosts == ("host-0", "host-1")
    assert trace.choices_WH.sum(axis=0).min() > 0
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
    assert trace.choices_WH.sum() > 0


def test_an_emulated_device_takes_its_time_and_says_when_it_could_not(
    pool: Cluster, client: Client
) -> None:
    text_of(client, MODEL, 10)
    for host in hosts_of(pool).values():
        assert host["batches"] > 0
        assert host["busy_s"] >= 0.003 * host["batches"] + 1e-4 * host["calls"]
        assert 0 <= host["overruns"] <= host["batches"]
        assert (host["worst_overrun_s"] > 0) == (host["overruns"] > 0)
        assert host["late_s"] >= 0
