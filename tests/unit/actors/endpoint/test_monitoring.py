"""The server of the monitoring address: its port is free behind it, and is waited for before it."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from typing import Any

import httpx
import pytest

from moesaic.actors.endpoint.http import monitoring_server
from moesaic.actors.endpoint.http.metrics import HttpMetrics
from moesaic.actors.endpoint.http.monitoring_app import monitoring_app
from moesaic.actors.runtime.ports import free_port
from moesaic.actors.serve.replica import controller_link
from moesaic.cluster.metrics.snapshot import MetricsSnapshot
from moesaic.cluster.reports.status import ClusterStatus, EndpointStatus, EngineStatus
from moesaic.cluster.service.web_guard import WebGuard
from moesaic.proto.errors import ClusterError, MoesaicError, NoAnswer
from tests.helpers.cluster.metrics import Samples, samples, snapshot, value
from tests.helpers.cluster.reports import cluster_report, engine_report

HERE = "127.0.0.1"


STATUS = EndpointStatus(healthy=True, engines={}, cluster=None)


async def status() -> EndpointStatus:
    return STATUS


async def engines() -> dict[str, EngineStatus]:
    return {"m": engine_report(running_requests=2)}


class Pool:
    """A controller that answers, or does not."""

    cluster = "c"

    def __init__(self, *, answers: bool) -> None:
        self.answers = answers

    async def __call__(self) -> MetricsSnapshot:
        if not self.answers:
            raise NoAnswer("the controller is being restarted")
        return snapshot()


APP = monitoring_app(status=status, engines=engines, metrics=HttpMetrics(), guard=WebGuard.of(HERE))


async def answers(port: int, path: str = "/status", host: str = HERE) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
        async with asyncio.timeout(10):
            while True:
                try:
                    return await http.get(path)
                except httpx.ConnectError:
                    await asyncio.sleep(0.02)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HERE, port))
        except OSError:
            return False
    return True


async def test_it_lives_as_long_as_its_owner() -> None:
    port = free_port(HERE)
    for _ in range(3):
        async with monitoring_server.monitoring(APP, HERE, port):
            assert (await answers(port)).json() == STATUS.model_dump(mode="json")
            metrics = await answers(port, "/metrics")
            assert 'moesaic_engine_running_requests{model="m"} 2.0' in metrics.text
            assert not is_free(port)
        assert is_free(port)


async def test_its_port_is_free_when_its_owner_fails_or_is_cancelled() -> None:
    port = free_port(HERE)
    with pytest.raises(KeyError):
        async with monitoring_server.monitoring(APP, HERE, port):
            await answers(port)
            raise KeyError
    assert is_free(port)

    async def owner() -> None:
        async with monitoring_server.monitoring(APP, HERE, port):
            await asyncio.Event().wait()

    task = asyncio.create_task(owner())
    await answers(port)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert is_free(port)


async def test_a_client_that_stays_does_not_keep_it() -> None:
    port = free_port(HERE)
    async with monitoring_server.monitoring(APP, HERE, port):
        await answers(port)
        held = [await asyncio.open_connection(HERE, port) for _ in range(5)]
        for _, writer in held:
            writer.write(b"GET /status HTTP/1.1\r\nHost: localhost\r\n")
    assert is_free(port)
    for _, writer in held:
        writer.close()


async def test_a_port_that_is_taken_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitoring_server, "TRY_AGAIN_S", 0.02)
    caplog.set_level(logging.WARNING, logger=monitoring_server.__name__)
    with socket.create_server((HERE, 0)) as other:
        port = other.getsockname()[1]
        async with monitoring_server.monitoring(APP, HERE, port):
            await asyncio.sleep(0.2)
            (told,) = [one for one in caplog.records if one.name == monitoring_server.__name__]
            assert "monitoring.port: cannot listen" in told.getMessage()
            other.close()
            assert (await answers(port)).status_code == 200
    assert is_free(port)


async def test_a_name_without_an_address_is_logged_and_stops_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(key: str, host: str) -> tuple[int, str]:
        raise ClusterError(f"{key}: {host!r} cannot be resolved")

    monkeypatch.setattr(monitoring_server, "resolved", unknown)
    async with monitoring_server.monitoring(APP, "no-such-host", 1):
        await asyncio.sleep(0)
    assert "'no-such-host' cannot be resolved" in caplog.text


async def test_names_and_addresses_of_both_families() -> None:
    for host, asked in (("localhost", "localhost"), ("::1", "[::1]")):
        port = free_port(host)
        async with monitoring_server.monitoring(APP, host, port):
            assert (await answers(port, host=asked)).status_code == 200


# ---- what a scrape brings ------------------------------------------------------------------------


async def scrape(**asked: Any) -> Samples:
    app = monitoring_app(
        status=status, engines=engines, metrics=HttpMetrics(), guard=WebGuard.of(HERE), **asked
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{HERE}") as http:
        return samples((await http.get("/metrics")).text)


async def test_a_scrape_has_the_pool_too_and_each_series_the_clusters_name() -> None:
    found = await scrape(pool=Pool(answers=True))
    assert value(found, "moesaic_controller_up") == 1
    assert value(found, "moesaic_host_calls_total", host="a") == 5
    assert value(found, "moesaic_engine_running_requests", model="m") == 2
    assert all(("cluster", "c") in labels for _, labels in found)


async def test_a_scrape_without_a_controller_has_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    found = await scrape(pool=Pool(answers=False))
    assert value(found, "moesaic_controller_up") == 0
    assert value(found, "moesaic_engine_running_requests", model="m") == 2
    assert not any("host" in dict(labels) for _, labels in found)
    assert "lacks the values of the controller: NoAnswer" in caplog.text


async def test_an_endpoint_without_a_cluster_has_its_own_metrics_alone() -> None:
    found = await scrape()
    assert found["moesaic_engine_healthy", frozenset({("model", "m")})] == 1
    assert "moesaic_controller_up" not in {name for name, _ in found}


# ---- what the controller is asked ----------------------------------------------------------------


async def test_a_ray_that_does_not_answer_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, calls = threading.Event(), []

    def get_actor(name: str, namespace: str) -> Any:
        calls.append((name, namespace))
        go_on.wait(10)
        raise ValueError(name)

    monkeypatch.setattr(controller_link.ray, "get_actor", get_actor)
    monkeypatch.setattr(controller_link, "QUESTION_TIMEOUT_S", 0.05)
    asks = controller_link.ControllerStatus("moesaic-x")
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.005)
            beats += 1

    beating = asyncio.create_task(beat())
    for _ in range(3):
        with pytest.raises(NoAnswer, match=r"did not find the controller within 0\.05 s"):
            await asks()
    beating.cancel()
    assert beats >= 10, "the event loop goes on"
    assert calls == [("controller", "moesaic-x")], "one thread waits, however often it is asked"
    go_on.set()
    monkeypatch.setattr(controller_link, "QUESTION_TIMEOUT_S", 5.0)
    with pytest.raises(MoesaicError, match="the controller is not there"):
        await asks()


async def test_the_controller_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    class Controller:
        class status:  # noqa: N801
            @staticmethod
            async def remote() -> ClusterStatus:
                return cluster_report()

        class metrics:  # noqa: N801
            @staticmethod
            async def remote(hot_experts: int) -> MetricsSnapshot:
                assert hot_experts == 7
                return snapshot()

    def get_actor(name: str, namespace: str) -> Any:
        looked.append(name)
        return Controller

    monkeypatch.setattr(controller_link.ray, "get_actor", get_actor)
    asks = controller_link.ControllerStatus("moesaic-x")
    for _ in range(3):
        assert await asks() == cluster_report()
    metrics = controller_link.ControllerMetrics(asks, "x", hot_experts=7)
    assert await metrics() == snapshot()
    assert len(looked) == 1
