"""Hosts are started and ended as the controller wants them, and outlive it."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from moesaic.actors.controller import host_provisioner
from moesaic.actors.controller.host_provisioner import HostProvisioner

Desired = dict[str, int]


class Pool:
    """Ray's actors, and what a controller's loop answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, there: set[str]) -> None:
        self.there = set(there)
        self.told: list[str] = []
        self.fails: set[str] = set()
        self.answers: queue.Queue[tuple[int, Desired]] = queue.Queue()
        self.asked: queue.Queue[int | None] = queue.Queue()
        monkeypatch.setattr(host_provisioner, "PAUSE_S", 0.0)
        monkeypatch.setattr(host_provisioner, "host_names", lambda namespace: set(self.there))
        monkeypatch.setattr(host_provisioner, "end_hosts", self._end)
        HostProvisioner(self, "n", self._desired)  # pyright: ignore[reportArgumentType]

    def start(self, name: str, group: int, others: Desired) -> None:
        if name in self.fails:
            self.fails.discard(name)
            raise RuntimeError("Ray's GCS is down")
        self.told.append(f"{name} of group {group} beside {sorted(others)}")
        self.there.add(name)

    def _end(self, namespace: str, names: list[str]) -> None:
        self.told += [f"{name} ends" for name in names]
        self.there -= set(names)

    def _desired(self, known: int | None) -> tuple[int, Desired]:
        self.asked.put(known)
        return self.answers.get()

    def after(self, number: int, desired: Desired) -> list[str]:
        """What was done until it asks again, and the number that it knew then."""
        while not self.asked.empty():
            self.asked.get()
        self.answers.put((number, desired))
        known: Any = self.asked.get(timeout=10)
        told, self.told = self.told, []
        return [*told, f"knows {known}"]


def test_hosts_follow_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(monkeypatch, set())
    assert pool.asked.get(timeout=10) is None
    assert pool.after(7, {"host-0": 0, "host-10": 1, "host-2": 0}) == [
        "host-0 of group 0 beside ['host-10', 'host-2']",
        "host-2 of group 0 beside ['host-0', 'host-10']",
        "host-10 of group 1 beside ['host-0', 'host-2']",
        "knows 7",
    ]
    assert pool.after(7, {"host-0": 0, "host-10": 1, "host-2": 0}) == ["knows 7"]
    assert pool.after(8, {"host-0": 0, "host-2": 0}) == ["host-10 ends", "knows 8"]


def test_a_new_controller_finds_the_hosts_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(monkeypatch, {"host-0", "host-1"})
    assert pool.asked.get(timeout=10) is None
    assert pool.after(0, {"host-0": 0, "host-2": 0}) == [
        "host-1 ends",
        "host-2 of group 0 beside ['host-0']",
        "knows 0",
    ]


def test_what_fails_is_done_in_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(monkeypatch, set())
    assert pool.asked.get(timeout=10) is None
    pool.fails = {"host-1"}
    wanted = {"host-0": 0, "host-1": 0}
    assert pool.after(1, wanted) == ["host-0 of group 0 beside ['host-1']", "knows None"]
    assert pool.after(1, wanted) == ["host-1 of group 0 beside ['host-0']", "knows 1"]
