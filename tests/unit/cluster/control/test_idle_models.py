"""Models that nobody asks for fall asleep, and the first call wakes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.control.control import Control
from moesaic.cluster.expert_keys import ExpertVersion, LayerKey
from moesaic.cluster.load.meter import LoadReport
from moesaic.cluster.placement import LayerPlacement, Placement, PlacementId
from moesaic.cluster.routing.dispatch import Dispatcher
from moesaic.cluster.routing.policy import RouterPolicy
from tests.helpers.cluster.control_world import POLICY, ControlWorld, shape
from tests.helpers.effort import tries

IDLE_S = 20.0
KEY = LayerKey("sleepy", 0)


class SleepyWorld(ControlWorld):
    """One model that may sleep, on disk, and one that stays."""

    def __init__(self, hosts: int = 2, *, on_disk: bool = True) -> None:
        sleepy = replace(shape("sleepy"), idle_s=IDLE_S)
        # What the shell keeps for a controller that starts anew.
        self.asleep_kept: frozenset[str] = frozenset()
        super().__init__(hosts, [(sleepy, on_disk), (shape("other"), True)])
        if not on_disk:
            self.finish(5)
            self.put_models_in_memory()
        self.finish(20)

    def tick(self, late: frozenset[str] = frozenset(), seconds: float = 0.5) -> bool:
        acted = super().tick(late, seconds)
        self.asleep_kept = frozenset(self.control.idle_models.asleep)
        return acted

    def new_control(self) -> Control:
        control = super().new_control()
        control.idle_models.keep_asleep(self.asleep_kept)
        return control

    def finish(self, rounds: int, seconds: float = 0.5) -> None:
        for _ in range(rounds):
            self.tick(seconds=seconds)
            for name in self.routers:
                self.report(name)
            for name, host in self.hosts.items():
                while host.loading:
                    self.load_one(name)

    def ask(self, *, waits: bool) -> None:
        """A router's call: counted where the layer is placed, waiting where it is not."""
        number = self.published[-1].id
        if waits:
            heard = LoadReport(router="r0", placement_id=number, unplaced=(KEY,))
        else:
            heard = LoadReport(
                router="r0", placement_id=number, counts={KEY: np.array([1, 0, 0, 0])}
            )
        self.control.hear(heard, self.now)

    @property
    def asleep(self) -> bool:
        return bool(self.control.idle_models.asleep)

    def held(self, model: str) -> int:
        return sum(key.model == model for host in self.hosts.values() for key, _ in host.held)

    def placed(self) -> set[str]:
        return {key.model for key in self.published[-1].layers}


def test_a_model_that_nobody_asks_for_leaves_the_hosts_and_comes_back() -> None:
    world = SleepyWorld()
    assert (world.held("sleepy"), world.held("other")) == (8, 8)
    world.finish(20, seconds=2.0)
    assert world.asleep
    assert world.placed() == {"other"}
    assert (world.held("sleepy"), world.held("other")) == (0, 8)
    assert world.control.missing() == {}
    world.ask(waits=True)
    assert not world.asleep
    assert len(world.control.missing()) == 8
    world.finish(5)
    assert world.placed() == {"sleepy", "other"}
    assert world.held("sleepy") == 8


def test_a_model_that_is_asked_for_stays_awake() -> None:
    world = SleepyWorld()
    for _ in range(10):
        world.finish(3, seconds=2.0)
        world.ask(waits=False)
        assert not world.asleep


def test_the_only_model_may_sleep_too() -> None:
    world = ControlWorld(1, [(replace(shape("sleepy"), idle_s=IDLE_S), True)])
    for _ in range(60):
        world.tick()
        for name in world.routers:
            world.report(name)
        for host in world.hosts:
            world.load_one(host)
    assert not world.published[-1].layers
    assert not world.hosts["h0"].held


def test_a_model_in_memory_never_sleeps() -> None:
    world = SleepyWorld(on_disk=False)
    assert world.placed() == {"sleepy", "other"}
    world.finish(30, seconds=5.0)
    assert not world.asleep
    assert world.held("sleepy") == 8


def test_a_model_with_new_weights_in_memory_never_sleeps() -> None:
    world = SleepyWorld()
    key = KEY.expert(0)
    world.update([key], in_file=False)
    world.finish(5)
    world.serve("sleepy")
    world.finish(30, seconds=5.0)
    assert not world.asleep
    assert world.control.weights.lost([ExpertVersion(key, 2)]) == []


def test_who_needs_an_expert_wakes_its_model() -> None:
    world = SleepyWorld()
    world.finish(20, seconds=2.0)
    assert world.asleep
    world.control.idle_models.wake("sleepy", world.now)
    world.finish(5)
    assert world.held("sleepy") == 8
    world.finish(5, seconds=2.0)
    assert not world.asleep


def test_a_new_controller_lets_models_sleep() -> None:
    world = SleepyWorld()
    world.finish(20, seconds=2.0)
    assert world.held("sleepy") == 0
    world.take_over()
    world.finish(20)
    assert world.asleep
    assert (world.held("sleepy"), world.held("other")) == (0, 8)
    assert world.placed() == {"other"}
    world.ask(waits=True)
    world.finish(5)
    assert world.held("sleepy") == 8


def test_a_new_controller_that_is_told_wrongly_learns_from_the_first_call() -> None:
    world = SleepyWorld()
    world.asleep_kept = frozenset({"sleepy", "gone"})
    world.take_over()
    world.ask(waits=False)
    world.finish(20)
    assert (world.held("sleepy"), world.held("other")) == (8, 8)
    assert world.placed() == {"sleepy", "other"}


def test_a_call_that_began_as_it_fell_asleep_wakes_it() -> None:
    world = SleepyWorld()
    while not world.asleep:
        world.tick(seconds=1.0)
    world.ask(waits=False)
    world.finish(10)
    assert world.held("sleepy") == 8
    assert world.placed() == {"sleepy", "other"}


def test_nothing_leaves_before_every_router_follows() -> None:
    world = SleepyWorld()
    while not world.asleep:
        world.tick(seconds=1.0)
        for name in world.routers:
            world.report(name)
    for _ in range(6):
        world.tick()
        world.report("r0")  # and never r1
        assert world.held("sleepy") == 8
        assert world.now - world.routers["r1"].heard_at <= POLICY.lease_s


@settings(max_examples=tries(100), deadline=None, derandomize=True)
@given(data=st.data())
def test_any_history_ends_with_the_model_served_when_it_is_asked_for(data: st.DataObject) -> None:
    world = SleepyWorld(data.draw(st.integers(1, 3)))
    kinds = ("tick", "tick", "long tick", "load", "report", "ask", "kill", "restart", "take over")
    for _ in range(data.draw(st.integers(0, 60), label="steps")):
        kind = data.draw(st.sampled_from(kinds))
        name = data.draw(st.sampled_from(sorted(world.hosts)))
        if kind == "tick":
            world.tick()
        elif kind == "long tick":
            world.tick(seconds=IDLE_S)
        elif kind == "load":
            world.load_one(name)
        elif kind == "report":
            world.report(data.draw(st.sampled_from(sorted(world.routers))))
        elif kind == "ask":
            world.ask(waits=data.draw(st.booleans()))
        elif kind == "kill":
            world.kill(name)
        elif kind == "restart":
            world.restart(name)
        else:
            world.take_over()
    for name in world.hosts:
        world.restart(name)
    for _ in range(40):
        world.ask(waits=True)
        world.finish(1)
    assert world.placed() == {"sleepy", "other"}
    for key in world.every():
        holders = world.published[-1].layers[LayerKey(key.model, key.layer)].hosts(key.expert)
        assert holders
        assert all(ExpertVersion(key, 1) in world.hosts[name].held for name in holders)


# ---- the router's side --------------------------------------------------------------------------


def placement(epoch: int, *keys: LayerKey) -> Placement:
    layers = {key: LayerPlacement(((), ())) for key in keys}
    return Placement(id=PlacementId(1, epoch), hosts={}, layers=layers)


def test_a_router_knows_the_layer_that_is_asked_for_and_nowhere() -> None:
    dispatcher = Dispatcher(RouterPolicy())
    other = LayerKey("other", 0)
    dispatcher.place(placement(1, other), 0.0)
    ids_TK = np.zeros((1, 1), dtype=np.int32)
    call, _ = dispatcher.begin(KEY, ids_TK, max_rows=8, now=0.0)
    assert dispatcher.unplaced == KEY
    dispatcher.abandon(call, 1.0)
    dispatcher.begin(other, ids_TK, max_rows=8, now=1.0)
    assert dispatcher.unplaced is None
    # It falls asleep under a call that waits.
    dispatcher.place(placement(2), 2.0)
    assert dispatcher.unplaced == other
