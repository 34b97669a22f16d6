"""What tests of a running cluster do again and again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from pytest import MonkeyPatch

import moesaic
from moesaic import Client
from moesaic.actors.runtime import embedded_ray
from moesaic.actors.runtime.embedded_ray import connected_own_ray, end_embedded, start_embedded
from moesaic.actors.runtime.joining import join
from moesaic.clients.http_client import Options
from moesaic.cluster.reports.status import HostProcess, HostStatus
from moesaic.handle import Cluster
from moesaic.proto.errors import ClusterError
from tests.helpers.effort import LENDING
from tests.helpers.processes.leftovers import leaving_nothing

TEXT = "the quick fox"

# For modules whose tests start Ray.
ON_RAY = [
    pytest.mark.alone,
    pytest.mark.timeout(300),
    # Ray leaves sockets and log files to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@contextmanager
def program_ray(num_cpus: int, **options: Any) -> Iterator[None]:
    """A Ray of the program's own, to which it is connected: no cluster on it may end it."""
    with (
        TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as elsewhere,
        MonkeyPatch.context() as patch,
    ):
        patch.setattr(embedded_ray, "_ray_folder", lambda: Path(elsewhere))
        ray = start_embedded(num_cpus=num_cpus)
        patch.undo()
        try:
            join(ray.address, insecure=False, log_to_driver=False, **options)
            assert connected_own_ray() is None
            yield
        finally:
            end_embedded(ray.folder)


@contextmanager
def running(what: str, model: Path, **spec: Any) -> Iterator[Cluster]:
    """A cluster that serves the model in a folder as ``m`` and balances only when asked to.

    It must leave nothing behind.
    """
    settings = {
        "name": f"{what}-{os.getpid()}",
        "models": [{"name": "m", "path": str(model)}],
        "trunk": {"cache_tokens": 1024, "threads": 1},
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
        "network": {"lending": LENDING},
        **spec,
    }
    settings["balance"] = {"auto": False, **spec.get("balance", {})}
    with leaving_nothing(), moesaic.up(settings) as cluster:
        yield cluster


def greedy(model: str, tokens: int) -> Options:
    return {"model": model, "max_tokens": tokens, "temperature": 0.0}


def text_of(client: Client, model: str, tokens: int) -> str:
    return client.complete(TEXT, **greedy(model, tokens)).text


@contextmanager
def streams(
    client: Client, model: str, tokens: int, count: int
) -> Iterator[Callable[[], set[str]]]:
    """Answers that are under way: all have begun, and the call waits for their texts."""
    begun = threading.Semaphore(0)

    def stream() -> str:
        pieces = []
        for piece in client.stream_complete(TEXT, **greedy(model, tokens)):
            if not pieces:
                begun.release()
            pieces.append(piece.text)
        return "".join(pieces)

    with ThreadPoolExecutor(count) as threads:
        texts = [threads.submit(stream) for _ in range(count)]
        for _ in range(count):
            assert begun.acquire(timeout=60), "an answer does not begin"
        assert not any(one.done() for one in texts), "they end before anything happens to them"
        yield lambda: {one.result(120) for one in texts}


def hosts_of(cluster: Cluster) -> dict[str, HostStatus]:
    return {host.name: host for host in cluster.status().hosts}


def processes_of(cluster: Cluster) -> dict[str, HostProcess]:
    """What the processes of hosts last reported; hosts that are down are left out."""
    return cluster.status().processes


def replicas_of(cluster: Cluster) -> dict[str, int]:
    """How many replicas each host holds; none while it is down."""
    held = {name: process.replicas for name, process in processes_of(cluster).items()}
    return dict.fromkeys(hosts_of(cluster), 0) | held


def term_of(cluster: Cluster) -> int:
    """Of the controller; 0 while there is none."""
    try:
        return cluster.status().controller.term
    except ClusterError:
        return 0


def wait_until(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll what only another process knows."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


def wait_replaced(cluster: Cluster, host: str, pid: int) -> None:
    """Until the killed process has a successor: before, the last report still looks whole."""

    def replaced() -> bool:
        process = hosts_of(cluster)[host].process
        return process is not None and process.pid != pid

    wait_until(replaced)
    wait_whole(cluster)


def wait_whole(cluster: Cluster) -> None:
    def whole() -> bool:
        status = cluster.status()
        up = all(host.state == "up" for host in status.hosts)
        missing = any(model.missing_experts for model in status.models)
        # Replicas that only protect come back behind those that somebody waits for.
        return up and not missing and not status.balancing.pending_moves

    wait_until(whole)


@contextmanager
def text_in_background(
    client: Client, model: str, tokens: int, **more: Any
) -> Iterator[Callable[[], str]]:
    """A streamed completion that runs while the test does harm; gives its text at the end."""
    pieces: list[str] = []
    first = threading.Event()
    failure: list[BaseException] = []

    def stream() -> None:
        try:
            for chunk in client.stream_complete(TEXT, **greedy(model, tokens), **more):
                pieces.append(chunk.text)
                first.set()
        except BaseException as error:
            failure.append(error)
            first.set()

    thread = threading.Thread(target=stream)
    thread.start()
    assert first.wait(60), "no token came"

    def result() -> str:
        thread.join(120)
        assert not thread.is_alive(), "the stream did not end"
        if failure:
            raise failure[0]
        return "".join(pieces)

    try:
        yield result
    finally:
        thread.join(120)


@contextmanager
def asking(
    client: Client, model: str, tokens: int, wanted: str, *, clients: int = 2
) -> Iterator[list[str]]:
    """Each client asks one request after the other, until the end; texts that are not as wanted,
    and errors, are in the list."""
    wrong: list[str] = []
    done = 0
    stop = threading.Event()

    def ask() -> None:
        nonlocal done
        while not stop.is_set():
            try:
                text = text_of(client, model, tokens)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            done += 1
            if text != wanted:
                wrong.append(text)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert done > clients
    assert not any(thread.is_alive() for thread in threads)
