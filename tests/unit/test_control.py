"""The controller's state machine under random deaths, restarts, late reports and slow loads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.control import Control, Load, Observation, Publish
from moesaic.cluster.placement import (
    ExpertKey,
    HostEntry,
    LayerKey,
    LayerPlacement,
    ModelShape,
    Placement,
    spread,
)


@dataclass
class SimHost:
    """One host: what it holds, and the load that it has begun and not finished."""

    name: str
    incarnation: int = 1
    alive: bool = True
    held: set[ExpertKey] = field(default_factory=set)
    loading: list[tuple[ExpertKey, str | None]] = field(default_factory=list)  # (key, peer)

    @property
    def address(self) -> str:
        return f"{self.name}#{self.incarnation}"

    def observe(self) -> Observation:
        holdings: dict[LayerKey, set[int]] = {}
        for key in self.held:
            holdings.setdefault(LayerKey(key.model, key.layer), set()).add(key.expert)
        entry = HostEntry(
            host=self.name,
            incarnation=self.incarnation,
            node="n",
            shm_address="",
            grpc_address=self.address,
        )
        return Observation(entry=entry, holdings=holdings, loading=bool(self.loading))


class ControlWorld:
    """Carries out what a `Control` says, and checks it against what it was told."""

    def __init__(self, hosts: int, models: list[tuple[ModelShape, bool]]) -> None:
        """``models`` are (shape, whether it is on disk); the others were put by a trunk."""
        self.hosts = {f"h{n}": SimHost(f"h{n}") for n in range(hosts)}
        self.models = models
        self.on_disk = {shape.model for shape, on_disk in models if on_disk}
        self.wanted = spread([shape for shape, _ in models], list(self.hosts))
        self.reported: dict[str, Observation] = {}
        self.published: list[Placement] = []
        self.term = 0
        self.take_over()
        for name, host in self.hosts.items():
            host.held = {key for key in self.control.wanted(name) if key.model not in self.on_disk}

    def take_over(self) -> None:
        """The controller dies; another one starts anew, under a higher term."""
        self.term += 1
        self.reported.clear()
        self.seen_models: set[str] = set()
        self.control = Control(list(self.hosts), term=self.term)
        for shape, on_disk in self.models:
            self.control.add_model(shape, on_disk=on_disk)

    # ---- what may happen ------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        host = self.hosts[name]
        host.alive, host.held, host.loading = False, set(), []

    def restart(self, name: str) -> None:
        host = self.hosts[name]
        if not host.alive:
            host.alive, host.incarnation = True, host.incarnation + 1

    def load_one(self, name: str) -> None:
        """One expert of a host's load arrives, or the load fails because its peer is gone."""
        host = self.hosts[name]
        if not host.loading:
            return
        key, peer = host.loading.pop(0)
        holders = [h for h in self.hosts.values() if h.alive and key in h.held]
        if peer is None or peer in [holder.address for holder in holders]:
            host.held.add(key)
        else:
            host.loading.clear()

    def fail_load(self, name: str) -> None:
        self.hosts[name].loading.clear()

    def tick(self, late: frozenset[str] = frozenset()) -> bool:
        """One round; the ``late`` hosts do not answer in time. True if anything was decided."""
        reports = {
            name: host.observe() if host.alive else None
            for name, host in self.hosts.items()
            if name not in late
        }
        for name, observation in reports.items():
            if observation is None:
                self.reported.pop(name, None)
            else:
                self.reported[name] = observation
        commands = self.control.tick(reports)
        for command in commands:
            match command:
                case Load():
                    assert command.host not in late, "a load for a host that did not answer"
                    self._begin_load(command)
                case Publish(placement=placement):
                    self._check(placement)
                    self.published.append(placement)
        return bool(commands)

    # ---- checks ---------------------------------------------------------------------------------

    def _begin_load(self, command: Load) -> None:
        seen = self.reported[command.host]
        assert not seen.loading, "a second load at the same time"
        assert len(set(command.keys)) == len(command.keys) > 0
        for key in command.keys:
            assert not seen.holds(key), "a load of what is there"
            assert key in self.control.wanted(command.host)
            peer = command.peers.get(key)
            if key.model in self.on_disk:
                assert peer is None
            else:
                addresses = [o.entry.grpc_address for o in self.reported.values() if o.holds(key)]
                assert peer in addresses, "in-memory experts come from a peer that has them"
        host = self.hosts[command.host]
        host.loading = [(key, command.peers.get(key)) for key in command.keys]

    def _check(self, placement: Placement) -> None:
        if self.published:
            assert placement.number > self.published[-1].number
        assert placement.number.term == self.term
        entries = {name: seen.entry for name, seen in self.reported.items()}
        assert dict(placement.hosts) == entries, "hosts that live, as they last reported"
        for key, layer in placement.layers.items():
            assert len(layer.replicas) == len(self.wanted[key].replicas)
            for expert, replicas in enumerate(layer.replicas):
                wanted = self.wanted[key].replicas[expert]
                ready = tuple(
                    replica
                    for replica in wanted
                    if replica.host in self.reported
                    and self.reported[replica.host].holds(key.expert(expert))
                )
                assert replicas == ready, "exactly the wanted replicas that are ready"
        for model in {key.model for key in placement.layers} - self.seen_models:
            self.seen_models.add(model)
            for key, layer in self.wanted.items():
                if key.model == model:
                    assert placement.layers[key] == layer, "a model appears when it is whole"
        shown = {key.model for key in placement.layers}
        assert self.seen_models <= shown, "a model went away"

    def settle(self) -> None:
        """No more faults: everybody lives, answers in time, and finishes its loads."""
        for name in self.hosts:
            self.restart(name)
        for _ in range(20):
            loading = any(host.loading for host in self.hosts.values())
            if not self.tick() and not loading:
                return
            for name, host in self.hosts.items():
                while host.loading:
                    self.load_one(name)
        raise AssertionError("the controller still acts although nothing happens")

    def lost(self) -> set[ExpertKey]:
        """Experts of models in memory that nobody has any more."""
        held = {key for host in self.hosts.values() for key in host.held}
        every = {
            key.expert(expert)
            for key, layer in self.wanted.items()
            for expert in range(len(layer.replicas))
        }
        return {key for key in every - held if key.model not in self.on_disk}


def shape(model: str, *, replicas: int = 1, experts: int = 4, layers: int = 2) -> ModelShape:
    return ModelShape(model=model, experts=dict.fromkeys(range(layers), experts), replicas=replicas)


# ---- random histories ---------------------------------------------------------------------------

KINDS = ("tick", "tick", "tick", "load", "load", "load", "fail", "kill", "restart", "take over")


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_history_publishes_only_what_is_ready_and_ends_whole(data: st.DataObject) -> None:
    hosts = data.draw(st.integers(1, 4), label="hosts")
    counts = st.integers(1, hosts)
    models = [(shape("disk", replicas=data.draw(counts), experts=3), True)]
    if data.draw(st.booleans(), label="with a model in memory"):
        models.append((shape("memory", replicas=data.draw(counts), experts=2, layers=1), False))
    world = ControlWorld(hosts, models)
    for _ in range(data.draw(st.integers(0, 50), label="steps")):
        kind = data.draw(st.sampled_from(KINDS))
        name = data.draw(st.sampled_from(sorted(world.hosts)))
        if kind == "tick":
            world.tick(data.draw(st.frozensets(st.sampled_from(sorted(world.hosts)), max_size=2)))
        elif kind == "load":
            world.load_one(name)
        elif kind == "fail":
            world.fail_load(name)
        elif kind == "kill":
            world.kill(name)
        elif kind == "restart":
            world.restart(name)
        elif data.draw(st.booleans()):
            world.take_over()
    world.settle()
    lost = world.lost()
    placement = world.control.placement
    assert placement is not None
    assert {h: e.incarnation for h, e in placement.hosts.items()} == {
        name: host.incarnation for name, host in world.hosts.items()
    }
    for key, layer in world.wanted.items():
        gone = {expert for expert in range(len(layer.replicas)) if key.expert(expert) in lost}
        whole = not {one for one in lost if one.model == key.model}
        if whole or key.model in world.seen_models:
            kept = tuple(() if e in gone else r for e, r in enumerate(layer.replicas))
            assert placement.layers[key] == LayerPlacement(kept)
        else:
            assert key not in placement.layers, "a model that was never whole"
    assert set(world.control.missing()) == lost
    assert all("lost" in why for why in world.control.missing().values())
    single = {s.model for s, _ in models if s.replicas == 1}
    assert {key.model for key in world.control.unprotected()} <= single
    assert not world.tick(), "a quiet pool needs no decision"


# ---- one thing at a time ------------------------------------------------------------------------


def started(hosts: int = 2, *, replicas: int = 2, on_disk: bool = True) -> ControlWorld:
    world = ControlWorld(hosts, [(shape("m", replicas=replicas), on_disk)])
    world.settle()
    assert world.published
    return world


def test_a_model_appears_when_it_is_whole_and_not_before() -> None:
    world = ControlWorld(2, [(shape("m", replicas=2), True)])
    world.tick()
    for name in world.hosts:
        for _ in range(7):
            world.load_one(name)
    world.tick()
    assert world.published == []
    for name in world.hosts:
        world.load_one(name)
    world.tick()
    assert [tuple(p.number) for p in world.published] == [(1, 1)]


def test_a_dead_host_leaves_the_placement_and_comes_back_with_its_new_incarnation() -> None:
    world = started()
    world.kill("h0")
    world.tick()
    assert set(world.published[-1].hosts) == {"h1"}
    assert len(world.control.unprotected()) == 8
    world.restart("h0")
    world.tick()
    assert world.published[-1].hosts["h0"].incarnation == 2
    assert world.published[-1].layers[LayerKey("m", 0)].hosts(0) == ("h1",), "not loaded yet"
    world.settle()
    assert world.published[-1].layers == world.wanted
    assert world.control.unprotected() == []


def test_a_host_that_is_late_stays_in_the_placement() -> None:
    """Routers see for themselves whether it answers; the controller's view may be old."""
    world = started()
    before = len(world.published)
    for _ in range(5):
        assert not world.tick(frozenset({"h0"}))
    assert len(world.published) == before


def test_experts_in_memory_come_back_from_a_peer() -> None:
    world = started(on_disk=False)
    world.kill("h1")
    world.tick()
    world.restart("h1")
    world.tick()
    assert {peer for _, peer in world.hosts["h1"].loading} == {"h0#1"}
    world.settle()
    assert world.published[-1].layers == world.wanted


def test_experts_in_memory_that_nobody_has_are_named_as_lost() -> None:
    world = started(replicas=1, on_disk=False)
    gone = set(world.control.wanted("h1"))
    world.kill("h1")
    world.settle()
    missing = world.control.missing()
    assert set(missing) == gone
    assert set(missing.values()) == {"lost: its model was in memory"}
    layer = world.published[-1].layers[LayerKey("m", 0)]
    assert [bool(replicas) for replicas in layer.replicas] == [True, False, True, False]


def test_experts_that_are_still_loading_are_named_as_such() -> None:
    world = ControlWorld(1, [(shape("m"), True)])
    world.tick()
    assert set(world.control.missing().values()) == {"loading"}


def test_a_model_that_does_not_fit_changes_nothing() -> None:
    world = started()
    with pytest.raises(ValueError, match=r"models\.big\.replicas"):
        world.control.add_model(shape("big", replicas=3), on_disk=True)
    assert {key.model for host in world.hosts for key in world.control.wanted(host)} == {"m"}
    assert not world.tick()


def test_a_second_model_does_not_disturb_the_first() -> None:
    world = started()
    world.models.append((shape("late"), True))
    world.on_disk.add("late")
    world.wanted = spread([model for model, _ in world.models], list(world.hosts))
    world.control.add_model(shape("late"), on_disk=True)
    world.tick()
    assert world.published[-1].layers.keys() == {LayerKey("m", 0), LayerKey("m", 1)}
    world.settle()
    assert world.published[-1].layers == world.wanted


def test_exact_models_are_marked() -> None:
    world = ControlWorld(1, [(replace(shape("m"), exact=True), True), (shape("n"), True)])
    world.settle()
    assert world.published[-1].exact == {"m"}
