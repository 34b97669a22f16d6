"""What a live view and the watchdog say of a controller, and the frame that is drawn of it."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from moesaic.cli.live.top import frame
from moesaic.cluster.control.control import Control
from moesaic.cluster.control.pool_view import Observation
from moesaic.cluster.control.status_views import HostCounters, HostRates, hottest
from moesaic.cluster.control.watchdog import PlanCounts, Vitals, Watchdog
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.meter import LoadReport
from moesaic.cluster.placement import HostEntry, LayerPlacement, ModelShape, Replica
from moesaic.cluster.planner.plan import PoolHost
from moesaic.cluster.reports.activity import (
    Activity,
    HostActivity,
    HostThroughput,
    HotExpert,
    ModelActivity,
)
from moesaic.cluster.reports.report import (
    Balancedness,
    HostState,
    LayerRouting,
    PlacementNumber,
)

KEY = LayerKey("m", 0)


def vitals(**given: object) -> Vitals:
    quiet: dict[str, object] = {
        "tick_age_s": 0.1,
        "plan_age_s": 3.0,
        "planning_s": 0.0,
        "plan_failures": 0,
        "move_age_s": None,
        "moves_pending": 0,
        "missing_experts": 0,
        "unprotected_experts": 0,
        "balancedness_mean": None,
        "balancedness_worst": None,
        "term": 1,
        "epoch": 1,
        "failing": False,
        "hosts": {"up": 2},
    }
    return Vitals(**(quiet | given))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tick_age_s": 6.0}, "the controller has not run for 6 s"),
        ({"planning_s": 31.0}, "the planner has been running for 31 s"),
        ({"plan_failures": 2}, "the planner has failed 2 times in a row"),
        ({"collapses": ("the routing of m has collapsed",)}, "the routing of m has collapsed"),
        (
            {"moves_pending": 3, "move_age_s": 40.0},
            "3 planned replicas are missing, and none has arrived",
        ),
    ],
)
def test_whatever_stands_still_is_named(given: dict[str, object], words: str) -> None:
    (warning,) = vitals(**given).warnings()
    assert words in warning


def test_a_controller_that_works_has_no_warnings() -> None:
    assert vitals().warnings() == []
    # A pool that rests plans and moves nothing, for as long as it likes.
    assert vitals(plan_age_s=1e6, move_age_s=1e6).warnings() == []
    assert vitals(plan_failures=1, moves_pending=5, move_age_s=1.0).warnings() == []


class World:
    """A controller and two hosts that hold what the test says."""

    def __init__(self) -> None:
        self.control = Control([PoolHost(name="a"), PoolHost(name="b")], term=7)
        self.control.add_model(ModelShape(model="m", experts={0: 4}), on_disk=True)
        self.now = 100.0
        self.held: dict[str, set[int]] = {"a": set(), "b": set()}
        self.watchdog = Watchdog(self.control, self.now)

    def tick(self, seconds: float = 1.0) -> None:
        self.now += seconds
        reports = {
            host: Observation(
                entry=HostEntry(
                    host=host, incarnation=1, node="n", shm_address="", grpc_address=host
                ),
                holdings={KEY: dict.fromkeys(held, (1,))},
                loading=True,  # what is asked for is not the test's matter
            )
            for host, held in self.held.items()
        }
        for command in self.control.tick(reports, self.now):
            run = getattr(command, "run", None)
            if run is not None:
                self.control.planned(command, run(), self.now)  # pyright: ignore[reportArgumentType]
        self.watchdog.ticked(self.now, failed=False)

    def hold(self, count: int) -> None:
        """The first ``count`` planned replicas arrive."""
        wanted = [(host, key.expert) for host in self.held for key in self.control.wanted(host)]
        for host, expert in wanted[:count]:
            self.held[host].add(expert)

    def vitals(self) -> Vitals:
        return self.watchdog.vitals(["up", "up"], self.now)


def test_figures_follow_the_controller() -> None:
    world = World()
    world.tick()
    world.tick()
    seen = world.vitals()
    assert (seen.moves_pending, seen.missing_experts, seen.unprotected_experts) == (4, 4, 0)
    assert (seen.term, seen.epoch, seen.hosts) == (7, 0, {"up": 2})
    assert seen.plan_age_s is not None
    began = world.now
    world.now += 10.0
    assert world.vitals().move_age_s == pytest.approx(world.now - began)
    world.hold(1)
    world.tick()
    seen = world.vitals()
    assert (seen.moves_pending, seen.missing_experts, seen.move_age_s) == (3, 3, 0.0)
    world.hold(4)
    world.tick()
    seen = world.vitals()
    assert (seen.moves_pending, seen.missing_experts, seen.unprotected_experts) == (0, 0, 4)
    assert seen.epoch == 1
    world.now += 6.0
    assert world.vitals().tick_age_s == 6.0


def test_balancedness_is_that_of_the_load_under_the_published_shares() -> None:
    world = World()
    world.tick()
    world.hold(4)
    world.tick()
    assert world.vitals().balancedness_mean is None, "no load yet"
    layer = world.control.placement
    assert layer is not None
    counts = np.array([100 * (host == "a") for (host,) in map(layer.layers[KEY].hosts, range(4))])
    world.control.hear(LoadReport(router="r", placement_id=None, counts={KEY: counts}), world.now)
    world.tick()
    world.tick()
    seen = world.vitals()
    assert (seen.balancedness_mean, seen.balancedness_worst) == (0.5, 0.5)
    assert world.watchdog.balancedness == {"m": Balancedness(mean=0.5, worst=0.5)}
    assert world.watchdog.overall_balancedness == Balancedness(mean=0.5, worst=0.5)


def reports_until_collapse(world: World, counts: list[int]) -> int:
    """Let a router report the same again and again; return when a warning says so."""
    for reports in range(1, 100):
        report = LoadReport(router="r", placement_id=None, counts={KEY: np.array(counts)})
        world.control.hear(report, world.now)
        if any("the routing of m has collapsed" in text for text in world.vitals().warnings()):
            return reports
    raise AssertionError("it was not told")


def test_a_collapse_is_told_at_once_of_a_model_that_is_trained_and_later_of_others() -> None:
    world = World()
    one_expert = [80, 0, 0, 0]  # 20 for each expert
    assert reports_until_collapse(world, one_expert) == 30
    (collapsed,) = world.watchdog.routing.layers("m")
    assert (collapsed.dead_experts, collapsed.max_over_mean) == (3, 4.0)
    assert "all requests are alike" in world.vitals().warnings()[0]

    world = World()
    placed = {KEY: LayerPlacement(((Replica("a", 1.0),),) * 4)}
    world.control.training.begin("m", placed, who="me", unix_s=0.0, now=world.now)
    assert reports_until_collapse(world, one_expert) == 3
    assert "lower the learning rate" in world.vitals().warnings()[0]

    world = World()
    world.control.training.begin("m", placed, who="me", unix_s=0.0, now=world.now)
    # Many steps in one report.
    assert reports_until_collapse(world, [800, 0, 0, 0]) == 2


def test_what_routers_reported_is_judged_once() -> None:
    world = World()
    report = LoadReport(router="r", placement_id=None, counts={KEY: np.array([80, 0, 0, 0])})
    for _ in range(2):
        world.control.hear(report, world.now)
        world.vitals()
    for _ in range(100):
        assert world.vitals().collapses == ()
    (routing,) = world.watchdog.routing.layers("m")
    assert (routing.dead_experts, routing.collapsed) == (3, False)


def test_a_model_that_has_left_has_no_routing() -> None:
    world = World()
    assert reports_until_collapse(world, [8000, 0, 0, 0]) == 2
    world.control.loads.forget("m")
    assert world.vitals().warnings() == []
    assert world.watchdog.routing.layers("m") == []


def test_a_planner_that_hangs_or_fails_is_seen() -> None:
    world = World()
    world.watchdog.plan_began(world.now)
    world.now += 40.0
    assert world.vitals().planning_s == 40.0
    world.watchdog.plan_ended(world.now, failed=True)
    assert (world.vitals().planning_s, world.vitals().failing) == (0.0, True)
    world.watchdog.plan_ended(world.now, failed=True)
    assert any("failed 2 times" in warning for warning in world.vitals().warnings())
    world.watchdog.plan_ended(world.now, failed=False)
    assert not world.vitals().failing
    assert world.watchdog.plans == PlanCounts(ended=3, failed=2, took_s=40.0)
    world.watchdog.ticked(world.now, failed=True)
    assert world.vitals().failing


# ---- the live view ------------------------------------------------------------------------------


def counters(calls: int, busy_s: float, incarnation: int = 1) -> HostCounters:
    return HostCounters(incarnation=incarnation, calls=calls, rows=10 * calls, busy_s=busy_s)


def test_rates_are_those_of_the_last_seconds_and_of_one_incarnation() -> None:
    rates = HostRates()
    rates.note({"a": counters(0, 0.0)}, 0.0)
    assert rates.of("a") is None
    for second in range(1, 21):
        rates.note({"a": counters(100 * second, 0.5 * second)}, float(second))
    assert rates.of("a") == HostThroughput(calls_per_s=100.0, rows_per_s=1000.0, busy_fraction=0.5)
    for second in range(21, 30):
        rates.note({"a": counters(2000, 10.0)}, float(second))
    assert rates.of("a") == HostThroughput(calls_per_s=0.0, rows_per_s=0.0, busy_fraction=0.0)
    rates.note({"a": counters(1, 0.1, incarnation=2)}, 30.0)
    assert rates.of("a") is None, "counters that began anew"
    rates.note({"b": counters(1, 0.1)}, 31.0)
    assert rates.of("a") is None


def test_the_hottest_experts_of_all_layers() -> None:
    rates = {KEY: np.array([5.0, 0.0, 9.0]), LayerKey("m", 1): np.array([7.0, 6.0])}
    placed = {
        KEY: LayerPlacement(((Replica("a", 1.0),), (), (Replica("a", 0.5), Replica("b", 0.5))))
    }
    found = hottest(rates, placed, 3)
    assert [(one.layer, one.expert, one.assignments_per_s) for one in found] == [
        (0, 2, 9.0),
        (1, 0, 7.0),
        (1, 1, 6.0),
    ]
    assert [one.hosts for one in found] == [["a", "b"], [], []]
    assert len(hottest(rates, placed, 9)) == 4, "experts without load are not hot"


SEEN = Activity(
    placement=PlacementNumber(term=3, epoch=14),
    router_count=2,
    pending_moves=5,
    missing_experts=0,
    unprotected_experts=0,
    warnings=[],
    error=None,
    models=[
        ModelActivity(
            name="m", assignments_per_s=1234.5, balancedness=Balancedness(mean=0.97, worst=0.9)
        )
    ],
    hosts=[
        HostActivity(
            name="host-0",
            state=HostState.UP,
            replicas=8,
            queued_rows=1200,
            throughput=HostThroughput(calls_per_s=10.0, rows_per_s=80.0, busy_fraction=0.5),
        ),
        HostActivity(
            name="host-1",
            state=HostState.NOT_ANSWERING,
            replicas=8,
            queued_rows=0,
            throughput=None,
        ),
    ],
    hottest_experts=[
        HotExpert(model="m", layer=1, expert=3, assignments_per_s=9.0, hosts=["host-0"])
    ],
)


def shown(**changed: object) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(frame("c", SEEN.model_copy(update=changed)))
    return captured.get()


def test_a_frame_shows_hosts_experts_and_balance() -> None:
    text = shown()
    for words in ("placement 3, 14", "2 routers", "5 moves", "0.970", "0.900", "1,200", "50%"):
        assert words in text
    assert "assignments/s" in text
    assert "not answering" in text
    assert "missing" not in text


def test_a_frame_shows_the_layer_with_the_worst_routing() -> None:
    routing = LayerRouting(
        layer=3,
        experts=8,
        entropy=0.3312,
        max_over_mean=3.96,
        dead_experts=5,
        busiest_expert=2,
        collapsed=True,
    )
    text = shown(models=[SEEN.models[0].model_copy(update={"worst_routing": routing})])
    words = "layer 3: entropy 0.33, max over mean 3.96 (expert 2), 5 of 8 experts dead"
    assert f"m: worst routing in {words}" in text
    assert "worst routing" not in shown()


def test_a_frame_of_a_pool_in_trouble_or_at_rest() -> None:
    idle = ModelActivity(name="m", assignments_per_s=0.0, balancedness=None)
    text = shown(
        placement=None,
        models=[idle],
        hottest_experts=[],
        missing_experts=4,
        warnings=["it stands still"],
    )
    for words in ("nothing placed", "m: no load", "4 experts missing", "it stands still"):
        assert words in text
    assert shown(hosts=[], models=[]).startswith("cluster c")
