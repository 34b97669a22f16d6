"""How often the controller asks its hosts, and what it takes their silence for."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from moesaic.actors.controller.host_polling import LATE_S, QUIET_WAIT_S, HostPolling, PollResult
from moesaic.cluster.control.host_speed import Work
from moesaic.cluster.control.pool_view import Observation
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import HostEntry

ENTRY = HostEntry(
    host="a", incarnation=1, node="n", shm_address="s", grpc_address="g", device="cpu"
)
EMPTY = Observation(entry=ENTRY, holdings={}, loading=False, work=Work(0, 0, 0.0))
HELD = replace(EMPTY, holdings={LayerKey("m", 0): {1: (1,)}})


class Hosts:
    """Hosts that answer when the test says so, or at once where they are asked not to wait."""

    def __init__(self) -> None:
        self.now = 0.0
        self.says: dict[str, PollResult] = {}
        self.asked: list[tuple[str, float]] = []
        self.waiting: dict[str, asyncio.Future[PollResult]] = {}
        self.frozen: set[str] = set()
        self.heard = 0
        self.looks = HostPolling(self.ask, self.hear, lambda: self.now)

    def hear(self) -> None:
        self.heard += 1

    async def ask(self, host: str, wait_s: float) -> PollResult:
        self.asked.append((host, wait_s))
        if wait_s or host in self.frozen:
            self.waiting[host] = asyncio.get_running_loop().create_future()
            return await self.waiting[host]
        return self.says[host]

    async def rounds(self, count: int) -> dict[str, Observation | None]:
        found: dict[str, Observation | None] = {}
        for _ in range(count):
            found = await self.looks.round(list(self.says))
            await asyncio.sleep(0)
        return found


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Hosts:
    # A round waits by the loop's clock, everything else by the test's.
    monkeypatch.setattr("moesaic.actors.controller.host_polling.LATE_S", 0.01)
    hosts = Hosts()
    hosts.says = {"a": EMPTY, "b": EMPTY}
    return hosts


async def test_hosts_that_say_the_same_twice_are_asked_to_wait(hosts: Hosts) -> None:
    assert await hosts.rounds(1) == {"a": EMPTY, "b": EMPTY}
    assert not hosts.looks.quiet
    await hosts.rounds(1)
    assert hosts.looks.quiet
    hosts.asked.clear()
    assert await hosts.rounds(5) == {"a": EMPTY, "b": EMPTY}
    assert hosts.asked == []  # what was said stands
    assert sorted(hosts.waiting) == ["a", "b"]


async def test_a_change_is_heard_at_once_and_asked_about_often(hosts: Hosts) -> None:
    await hosts.rounds(2)
    hosts.says["a"] = HELD
    before = hosts.heard
    hosts.waiting["a"].set_result(HELD)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert hosts.heard > before
    hosts.asked.clear()
    assert await hosts.rounds(1) == {"a": HELD, "b": EMPTY}
    assert not hosts.looks.quiet
    await hosts.rounds(2)
    assert hosts.asked == [("a", 0.0), ("a", QUIET_WAIT_S)]


async def test_a_host_that_computes_is_not_quiet(hosts: Hosts) -> None:
    for batches in range(5):
        hosts.says["a"] = replace(EMPTY, work=Work(batches, batches, 0.1 * batches))
        await hosts.rounds(1)
        assert not hosts.looks.quiet


async def test_a_host_that_loads_is_not_quiet(hosts: Hosts) -> None:
    hosts.says["a"] = replace(EMPTY, loading=True)
    await hosts.rounds(3)
    assert not hosts.looks.quiet


async def test_a_quiet_host_that_dies_is_known_at_once(hosts: Hosts) -> None:
    await hosts.rounds(2)
    hosts.waiting["a"].set_result(None)
    await asyncio.sleep(0)
    assert await hosts.rounds(1) == {"a": None, "b": EMPTY}
    assert not hosts.looks.quiet


async def test_a_quiet_host_that_freezes_is_late_behind_its_wait(hosts: Hosts) -> None:
    await hosts.rounds(2)
    hosts.now = QUIET_WAIT_S
    assert await hosts.rounds(1) == {"a": EMPTY, "b": EMPTY}
    hosts.now = QUIET_WAIT_S + LATE_S + 0.1
    hosts.waiting["b"].set_result(EMPTY)
    await asyncio.sleep(0)
    assert await hosts.rounds(1) == {"b": EMPTY}
    assert hosts.looks.late == {"a"}
    hosts.waiting["a"].set_result(EMPTY)
    await asyncio.sleep(0)
    assert await hosts.rounds(1) == {"a": EMPTY, "b": EMPTY}
    assert hosts.looks.late == set()


async def test_a_host_that_was_late_is_not_waited_for(hosts: Hosts) -> None:
    hosts.frozen = {"a"}
    assert await hosts.rounds(1) == {"b": EMPTY}
    assert hosts.looks.late == {"a"}
    assert await hosts.rounds(1) == {"b": EMPTY}
    assert [host for host, _ in hosts.asked].count("a") == 1  # one question at a time


async def test_behind_an_order_nothing_that_was_said_before_counts(hosts: Hosts) -> None:
    """An answer that crossed an eviction may name what is gone by now."""
    hosts.says["a"] = HELD
    await hosts.rounds(2)
    crossed = hosts.waiting["a"]
    hosts.looks.invalidate("a")
    hosts.says["a"] = EMPTY
    assert await hosts.rounds(1) == {"a": EMPTY, "b": EMPTY}
    assert crossed.cancelled()


async def test_a_host_that_was_removed_is_forgotten(hosts: Hosts) -> None:
    await hosts.rounds(2)
    del hosts.says["a"]
    hosts.looks.forget("a")
    assert await hosts.rounds(1) == {"b": EMPTY}
    assert hosts.looks.quiet
