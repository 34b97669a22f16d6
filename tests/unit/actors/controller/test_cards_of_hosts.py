"""The memory of hosts' cards: from the spec to each host, and from their reports to `status`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from moesaic.actors.controller.host_provisioner import HostStarter
from moesaic.actors.controller.overview import _cards
from moesaic.actors.host.report import CardReport, HostReport, LoopStats
from moesaic.cluster.card_memory import CardShare
from moesaic.cluster.placement import HostEntry
from moesaic.cluster.spec.deployment import Deployment
from moesaic.cluster.spec.spec import parse_spec

LOOP = LoopStats(
    calls=0, rows=0, assignments=0, batches=0, refused=0, queued_rows=0, busy_s=0.0, routers=0
)


def report(host: str, node: str, device: str, card: CardReport | None) -> HostReport:
    entry = HostEntry(
        host=host, incarnation=1, node=node, shm_address="", grpc_address="", device=device
    )
    return HostReport(
        entry=entry,
        revision=(1, 0, 0),
        pid=1,
        device="cuda:0",
        holdings={},
        models=[],
        loading=0,
        weight_bytes=3,
        rss_bytes=5,
        loop=LOOP,
        card=card,
    )


def card(used: int, limit: int | None, free: int = 50) -> CardReport:
    return CardReport(
        total_bytes=100, free_bytes=free, used_bytes=used, limit_bytes=limit, room_bytes=limit
    )


def test_hosts_of_one_card_are_added_up() -> None:
    hosts = [
        report("h0", "n", "a", card(7, 30)),
        report("h1", "n", "a", card(8, 30, free=49)),
        report("h2", "n", "b", card(9, None)),
        report("h3", "n", "b", card(9, 30)),
        report("h4", "other", "a", card(1, 2)),
        report("h5", "n", "cpu", None),
    ]
    found = _cards({one.entry.host: one for one in hosts})
    assert [(one.node, one.card, one.hosts) for one in found] == [
        ("n", "a", ["h0", "h1"]),
        ("n", "b", ["h2", "h3"]),
        ("other", "a", ["h4"]),
    ]
    first, second, _ = found
    assert (first.weight_bytes, first.used_bytes, first.limit_bytes) == (6, 15, 60)
    assert (first.memory_bytes, first.free_bytes) == (100, 49)
    assert second.limit_bytes is None, "one of its hosts has no limit"


def test_a_hosts_process_has_its_part_of_the_card() -> None:
    process = report("h0", "n", "a", card(7, 30)).process()
    assert (process.card_used_bytes, process.card_limit_bytes) == (7, 30)
    process = report("h0", "n", "cpu", None).process()
    assert (process.card_used_bytes, process.card_limit_bytes) == (None, None)


def test_a_host_is_told_what_its_group_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    actor = SimpleNamespace(remote=lambda name, **asked: told.append(asked))
    monkeypatch.setattr(ray, "remote", lambda _: SimpleNamespace(options=lambda **_: actor))
    monkeypatch.setattr(ray, "nodes", list)
    groups = [{"num_gpus": 0.3}, {"gpu_memory": "2GB"}]
    spec = parse_spec({"hosts": groups})
    numbered = dict(enumerate(spec.hosts))
    wanted = Deployment(id="", spec=spec, models=[], groups=numbered, order=list(numbered))
    starter = HostStarter(lambda: wanted, "n", {}, dict)
    for number in range(2):
        starter.start(f"host-{number}", number, {})
    assert [one["share"] for one in told] == [
        CardShare(key="hosts.0", num_gpus=0.3),
        CardShare(key="hosts.1", gpu_memory=2 * 10**9),
    ]
