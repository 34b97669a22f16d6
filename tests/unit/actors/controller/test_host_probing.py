"""The controller's probes as tasks: none waits for another, and none is open twice."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from moesaic.actors.controller import host_probing
from moesaic.actors.controller.host_probing import HostProbing
from moesaic.cluster.host.probes import PROBE_S
from moesaic.cluster.host_answers import HostAnswers
from moesaic.cluster.placement import HostEntry
from moesaic.cluster.reports.report import HostState
from moesaic.proto.errors import HostLost
from moesaic.proto.keys import ClusterSecret
from tests.helpers.cluster.fake_clock import FakeClock
from tests.helpers.cluster.worlds import entry

WELL = HostAnswers(startup=True, liveness=True, readiness=True)


class Hosts:
    """Hosts that are up by Ray's word; their listeners answer when the test says so."""

    def __init__(self, *names: str) -> None:
        self.clock = FakeClock()
        self.reports: Any = {name: SimpleNamespace(entry=entry(name)) for name in names}
        self.asked: list[str] = []
        self.open: dict[str, asyncio.Future[HostAnswers]] = {}
        hosts: Any = self
        self.probing = HostProbing(hosts, self.ask, self.clock)

    def state(self, host: str) -> HostState:
        return HostState.UP

    async def ask(self, host: HostEntry) -> HostAnswers:
        self.asked.append(host.host)
        self.open[host.host] = asyncio.get_running_loop().create_future()
        return await self.open[host.host]

    async def look(self) -> None:
        self.probing.look()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


async def test_an_open_probe_holds_up_no_other_host_and_is_not_made_twice() -> None:
    hosts = Hosts("a", "b")
    await hosts.look()
    assert sorted(hosts.asked) == ["a", "b"]
    hosts.open["a"].set_result(WELL)
    await hosts.settle()
    assert hosts.probing.obstacle("a") is None
    assert hosts.probing.obstacle("b") is not None
    hosts.asked.clear()
    hosts.clock.now += PROBE_S
    await hosts.look()
    assert hosts.asked == ["a"]
    for asked in hosts.open.values():
        asked.set_result(WELL)
    await hosts.settle()
    assert hosts.probing.obstacle("b") is None
    assert hosts.probing._open == {}


async def test_what_was_never_reached_is_probed_at_once_and_waited_for() -> None:
    hosts = Hosts("a")
    first = asyncio.ensure_future(hosts.probing.reached(entry("a")))
    await hosts.settle()
    second = asyncio.ensure_future(hosts.probing.reached(entry("a")))
    await hosts.settle()
    assert hosts.asked == ["a"]
    hosts.open["a"].set_result(WELL)
    assert await first
    assert await second
    assert await hosts.probing.reached(entry("a"))
    assert hosts.asked == ["a"]
    assert hosts.probing.obstacle("a") is None


async def test_any_error_is_a_reason_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    hosts = Hosts("a")
    for error in (HostLost("no route"), HostLost("no route"), RuntimeError("a defect")):
        reached = asyncio.ensure_future(hosts.probing.reached(entry("a")))
        await hosts.settle()
        hosts.open["a"].set_exception(error)
        assert not await reached
    assert "has not answered yet (a defect)" in (hosts.probing.obstacle("a") or "")
    assert len(caplog.records) == 1
    assert "no route" in caplog.text


async def test_a_probe_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_probing, "PROBE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(host_probing, "_CARRY_S", 0.0)
    hosts = Hosts("a")
    assert not await hosts.probing.reached(entry("a"))
    assert hosts.probing._open == {}
    assert "TimeoutError" in (hosts.probing.obstacle("a") or "")


async def test_a_host_without_a_report_is_not_ready() -> None:
    hosts = Hosts()
    assert hosts.probing.obstacle("a") is not None


@pytest.mark.parametrize(
    ("node", "address", "itself"),
    [
        ("here", "127.0.0.1:5", False),
        ("there", "10.0.0.2:5", False),
        ("there", "[fd00::2]:5", False),
        ("there", "127.0.0.1:5", True),
        ("there", "[::1]:5", True),
    ],
)
async def test_a_listener_that_only_its_machine_reaches_is_called_by_the_host(
    monkeypatch: pytest.MonkeyPatch, node: str, address: str, itself: bool
) -> None:
    called: list[object] = []

    async def asked_over_ray() -> HostAnswers:
        called.append("itself")
        return WELL

    def probe(address: str, proof: bytes, timeout_s: float) -> Future[HostAnswers]:
        called.append((address, proof))
        found: Future[HostAnswers] = Future()
        found.set_result(WELL)
        return found

    secret = ClusterSecret.new()
    here = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(host_probing, "ray", SimpleNamespace(get_runtime_context=lambda: here))
    monkeypatch.setattr(host_probing, "secret_of", lambda namespace: secret)
    monkeypatch.setattr(host_probing, "probe", probe)
    handle = SimpleNamespace(probe=SimpleNamespace(remote=asked_over_ray))
    hosts: Any = SimpleNamespace(handle=lambda host: handle)
    host = replace(entry("a"), node=node, grpc_address=address)
    assert await host_probing.prober(hosts, "ns")(host) == WELL
    direct = (address, secret.proof("health", host.target))
    assert called == ["itself" if itself else direct]
