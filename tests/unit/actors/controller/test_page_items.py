"""The controller's items of the page: they say what `experts`, `history` and `status` say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from moesaic.actors.controller.host_actors import HostActors
from moesaic.actors.controller.host_probing import HostProbing
from moesaic.actors.controller.overview import LoopState, Overview
from moesaic.actors.controller.page_items import PageItems
from moesaic.actors.controller.sizing import Sizing
from moesaic.actors.host.report import HostReport, LoopStats
from moesaic.cluster.control.watchdog import Watchdog
from moesaic.cluster.load.meter import HostPath, LoadReport
from moesaic.cluster.page_feed.encoding import event_of
from moesaic.cluster.page_feed.items import applied, same_value
from moesaic.cluster.page_feed.layers import NO_LOAD
from moesaic.cluster.placement import ModelRef
from moesaic.cluster.planner.plan import FleetGroup
from moesaic.cluster.reports.report import HostState
from tests.helpers.cluster.control_world import counts, finish
from tests.helpers.cluster.fleet_world import FleetWorld, started

UNIX_S = 1_790_000_000.0


def overview_of(world: FleetWorld) -> Overview:
    def clock() -> float:
        return world.now

    hosts = HostActors("ns")
    control = world.control
    for name, host in world.hosts.items():
        hosts.reported(name, report(host.observe()))
    return Overview(
        control=control,
        hosts=hosts,
        orders=cast(Any, None),  # for metrics alone
        probing=HostProbing(hosts, cast(Any, None), clock),
        sizing=Sizing(control, world.fleet, "ns", lambda: None, clock),
        training=cast(Any, SimpleNamespace(status=lambda _: None)),
        watchdog=Watchdog(control, world.now),
        service=None,
        models={
            shape.model: (ModelRef(name=shape.model, dtype="bfloat16", path="/m"), shape)
            for shape in control.models.values()
        },
        loop=LoopState(),
        term=world.term,
        clock=clock,
    )


def report(seen: Any) -> HostReport:
    return HostReport(
        entry=seen.entry,
        revision=(1, 0, 0),
        pid=1,
        device="cpu",
        holdings=seen.holdings,
        models=[],
        loading=0,
        weight_bytes=sum(1 for _ in seen.experts()),
        rss_bytes=5 << 20,
        loop=LoopStats(
            calls=1,
            rows=2,
            assignments=3,
            batches=1,
            refused=0,
            queued_rows=4,
            busy_s=0.1,
            routers=2,
        ),
        machine_bytes=(1 << 30, 1),
    )


@pytest.fixture
def world() -> FleetWorld:
    made = started(FleetGroup(count=2, min_count=1, max_count=6))
    for seed in range(4):
        for name in made.routers:
            made.report(name, counts(made, seed))
        finish(made, 4)
    finish(made)
    return made


def of_experts(items: dict[str, Any]) -> dict[tuple[int, int], tuple[float, dict[str, float]]]:
    """What the page makes of the items of a model's layers."""
    model = items["model:m"]
    found = {}
    for layer, experts in zip(model["layers"], model["experts"], strict=True):
        place, rest = items[f"place:{layer}:m"], 0
        for expert in range(experts):
            count = int(place["counts"][expert])
            held = slice(rest, rest + count)
            rest += count
            hosts = {
                items["names"][host]: share / 10_000
                for host, share in zip(place["hosts"][held], place["shares"][held], strict=True)
            }
            found[layer, expert] = (items[f"load:{layer}:m"][expert] / 10, hosts)
    return found


def test_loads_and_places_are_those_of_experts(world: FleetWorld) -> None:
    overview = overview_of(world)
    items = dict(PageItems(overview, "c").since(None).values)
    reports = {
        (one.layer, one.expert): (
            one.assignments_per_s.over_10_s,
            {replica.host: replica.share for replica in one.replicas},
        )
        for one in overview.experts("m", None, None)
    }
    assert any(load for load, _ in reports.values())
    assert of_experts(items) == reports


def test_everything_can_be_sent_and_nothing_changes_by_itself(world: FleetWorld) -> None:
    page = PageItems(overview_of(world), "c")
    first = page.since(None)
    assert event_of(first).startswith(b"event: snapshot\n")
    world.now += 1.7
    assert page.since(first.revision).empty, "ages would change all the time"


def test_a_copy_follows(world: FleetWorld) -> None:
    overview = overview_of(world)
    page = PageItems(overview, "c")
    changes = page.since(None)
    copy = applied({}, changes)
    assert copy["health"]["cluster"] == "c"
    assert copy["host:host-0"]["state"] == "up"
    assert copy["host:host-0"]["process"]["queued_rows"] == 4
    overview.hosts.died("host-0", restarting=True)
    for name in world.routers:
        world.report(name, counts(world, 9))
    finish(world, 6)
    changes = page.since(changes.revision)
    copy = applied(copy, changes)
    assert same_value(copy, page.since(None).values)
    assert copy["host:host-0"]["state"] == HostState.RESTARTING.value
    assert copy["host:host-0"]["process"] is None
    assert "host:host-1" not in changes.values


def test_history_and_balancedness(world: FleetWorld) -> None:
    overview = overview_of(world)
    items = PageItems(overview, "c", unix_clock=lambda: UNIX_S).since(None).values
    (last,) = [one for one in items["changes"] if one["id"] == len(world.control.changes.all)]
    change = world.control.changes.all[-1]
    assert (last["initiator"], last["reason"]) == (change.who, change.why)
    assert last["began"] == pytest.approx(UNIX_S - (world.now - change.began), abs=0.06)
    assert last["ended"] >= last["began"]
    status = overview.status()
    assert status.balancedness is not None
    assert items["health"]["mean"] == pytest.approx(status.balancedness.mean, abs=1e-3)
    assert items["even:m"].tolist() == [
        round(10_000 * overview.watchdog.layer_balancedness[key])
        for key in sorted(overview.watchdog.layer_balancedness)
    ]
    assert NO_LOAD not in items["even:m"]


def test_the_lent_share_of_a_host(world: FleetWorld) -> None:
    number = world.control.placement_id
    for router, lent in (("r0", True), ("r1", False)):
        world.control.hear(
            LoadReport(
                router=router,
                placement_id=number,
                paths=(HostPath(host="host-0", transport="shm", lent=lent),),
            ),
            world.now,
        )
    items = PageItems(overview_of(world), "c").since(None).values
    assert items["host:host-0"]["lent"] == [1, 2]
    assert items["host:host-1"]["lent"] == [0, 0]


def test_moves_under_way_and_a_drain(world: FleetWorld) -> None:
    page = PageItems(overview_of(world), "c")
    before = page.since(None)
    assert (before.values["moves"], before.values["health"]["pending"]) == ([], 0)
    world.scale(1)
    for _ in range(4):
        world.tick()
    world.now += 2.0
    items = applied(before.values, page.since(before.revision))
    assert [host for host in ("host-0", "host-1") if items[f"host:{host}"]["draining"]]
    assert len(items["moves"]) == items["health"]["pending"]
    for model, layer, expert, host in items["moves"]:
        assert model == "m"
        assert (layer, expert) in of_experts(items)
        assert f"host:{host}" in items
    assert items["scalings"][-1]["target"] == 1
