"""The number of series of `/metrics`, whatever comes and goes in the pool."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from moesaic.actors.controller.host_actors import HostActors
from moesaic.actors.controller.host_orders import HostOrders
from moesaic.actors.controller.host_probing import HostProbing
from moesaic.actors.controller.overview import LoopState, Overview
from moesaic.actors.controller.sizing import Sizing
from moesaic.actors.controller.training import Training
from moesaic.actors.host.report import HostReport, LoopStats
from moesaic.cluster.control.watchdog import Watchdog
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.meter import HostPath, LoadReport
from moesaic.cluster.load.router_counts import RouterCounts, TransportCounts
from moesaic.cluster.placement import ModelRef
from moesaic.cluster.planner.plan import FleetGroup
from moesaic.cluster.scaling.autoscaler import ScalePolicy
from moesaic.cluster.scaling.fleet import Fleet
from tests.helpers.cluster.control_world import ControlWorld, shape
from tests.helpers.cluster.metrics import Samples, pool_samples, value

HOT = 3
EXPERTS = 16
SHAPE = shape("m", experts=EXPERTS)
LOOP = LoopStats(
    calls=1,
    rows=2,
    assignments=3,
    batches=1,
    refused=0,
    queued_rows=0,
    busy_s=0.1,
    routers=1,
    received_bytes=5,
    sent_bytes=6,
)


class Pool:
    """A controller's overview over a pool without processes."""

    def __init__(self) -> None:
        self.world = world = ControlWorld(2, [(SHAPE, True)])
        self.hosts = HostActors("n")
        control = world.control
        models = {"m": (ModelRef(name="m", dtype="float32", path="/m"), SHAPE)}
        fleet = Fleet([FleetGroup(count=2, min_count=2, max_count=2)], ScalePolicy(), pending_s=1.0)
        self.overview = Overview(
            control=control,
            hosts=self.hosts,
            orders=HostOrders(
                control=control,
                hosts=self.hosts,
                models=models,
                term=1,
                changed=lambda host: None,
                clock=self.clock,
            ),
            probing=HostProbing(self.hosts, cast(Any, None), self.clock),
            sizing=Sizing(control, fleet, "n", lambda: None, self.clock),
            training=Training(
                control=control,
                models=models,
                store=lambda: None,
                evicting=lambda host: (),
                hurry=lambda: None,
                clock=self.clock,
            ),
            watchdog=Watchdog(control, world.now),
            service=None,
            models=models,
            loop=LoopState(),
            term=1,
            clock=self.clock,
        )
        world.settle()
        self.forget_routers()  # the world's own
        for name in world.hosts:
            self.report(name)

    def forget_routers(self) -> None:
        """Their leases end."""
        for _ in range(8):
            self.world.tick(seconds=2.0)

    def clock(self) -> float:
        return self.world.now

    def report(self, host: str) -> None:
        """A host's report arrives."""
        seen = self.world.hosts[host].observe()
        self.hosts.reported(
            host,
            HostReport(
                entry=seen.entry,
                revision=(seen.entry.incarnation, 0, 0),
                pid=1,
                device="cpu",
                holdings={},
                models=(),
                loading=0,
                weight_bytes=1,
                rss_bytes=1,
                loop=LOOP,
            ),
        )

    def hear(self, router: str, hottest: int = 0) -> None:
        """A router's report arrives; some experts of the first layer are hot."""
        counts_E = np.ones(EXPERTS, dtype=np.int64)
        counts_E[hottest : hottest + HOT] = 1000
        transports = {"shm": TransportCounts(sends=1)}
        paths = [HostPath(host=host, transport="shm", lent=False) for host in self.world.hosts]
        report = LoadReport(
            router=router,
            placement_id=self.world.control.placement_id,
            counts={LayerKey("m", 0): counts_E},
            paths=tuple(paths),
            router_counts=RouterCounts(calls=1, transports=transports),
        )
        self.world.control.hear(report, self.world.now)

    def scrape(self) -> Samples:
        return pool_samples(self.overview.metrics(HOT))


def experts_of(found: Samples) -> set[str]:
    return {dict(of)["expert"] for name, of in found if name == "moesaic_expert_replicas"}


def test_there_are_as_many_series_as_before() -> None:
    pool = Pool()
    for _ in range(2):  # samples of the routing
        pool.hear("r")
        pool.world.tick(seconds=2.0)
        pool.scrape()
    before = pool.scrape()
    assert experts_of(before) == {"0", "1", "2"}
    assert value(before, "moesaic_routers") == 1

    for n in range(500):
        pool.hear(f"trainer-{n}")
    assert value(pool.scrape(), "moesaic_routers") == 501
    assert value(pool.scrape(), "moesaic_router_calls_total") == 502
    assert value(pool.scrape(), "moesaic_transport_connections", transport="shm") == 1002
    assert pool.scrape().keys() == before.keys()

    for _ in range(100):
        pool.world.hosts["h0"].incarnation += 1
        pool.report("h0")
    assert pool.scrape().keys() == before.keys()

    for _ in range(30):
        pool.hear("r", hottest=8)
        pool.world.tick(seconds=2.0)
    after = pool.scrape()
    assert experts_of(after) == {"8", "9", "10"}, "those that were hot have left with their series"
    assert len(after) == len(before)
    assert {name for name, _ in after} == {name for name, _ in before}


def test_routing_has_as_many_series_as_models_have_layers() -> None:
    """Whatever gates do, and whatever layers routers tell of."""
    pool = Pool()
    pool.hear("r")
    control, layers = pool.world.control, sorted(SHAPE.experts)
    random = np.random.default_rng(0)
    for n in range(200):
        counts_E = random.integers(0, 100, EXPERTS) * random.integers(0, 2, EXPERTS)
        told = [LayerKey("m", layer) for layer in layers]
        told += [LayerKey("m", 100 + n), LayerKey(f"other-{n}", 0)]
        report = LoadReport(router="r", placement_id=None, counts=dict.fromkeys(told, counts_E))
        control.hear(report, pool.world.now)
        pool.overview.top(1)
    names = ("entropy_ratio", "max_over_mean_ratio")
    wanted = {f"moesaic_routing_{name}" for name in names} | {"moesaic_dead_experts"}
    found = [(name, dict(of)["layer"]) for name, of in pool.scrape() if name in wanted]
    assert sorted(found) == sorted((name, str(layer)) for name in wanted for layer in layers)


def test_a_host_that_left_has_no_series() -> None:
    pool = Pool()
    pool.hear("r")
    pool.hosts.forget("h1")
    pool.world.control.view.remove("h1")
    assert not [name for name, labels in pool.scrape() if ("host", "h1") in labels]


def test_paths_of_a_router_that_is_gone_are_not_counted() -> None:
    pool = Pool()
    pool.hear("gone")
    pool.forget_routers()
    found = pool.scrape()
    assert value(found, "moesaic_routers") == 0
    assert "moesaic_transport_connections" not in {name for name, _ in found}
