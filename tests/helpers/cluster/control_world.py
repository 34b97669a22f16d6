"""Hosts, routers and a planner around the controller's state machine; the clock is the test's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np

from moesaic.cluster.control.commands import EndRun, Evict, MakePlan, Publish
from moesaic.cluster.control.control import Control, ControlPolicy
from moesaic.cluster.control.host_speed import Work
from moesaic.cluster.control.loading import LoadExperts
from moesaic.cluster.control.pool_view import Observation
from moesaic.cluster.expert_keys import (
    FIRST_VERSION,
    ExpertKey,
    ExpertVersion,
    LayerKey,
    first_versions,
)
from moesaic.cluster.load.meter import HostTimes, LoadReport
from moesaic.cluster.placement import HostEntry, ModelShape, Placement
from moesaic.cluster.planner.plan import OperatorConstraints, PlannerPolicy, PoolHost
from moesaic.cluster.versions import VERSIONS_AT_ONCE
from moesaic.cluster.weight_updates import WeightUpdate

POLICY = ControlPolicy(
    balance=PlannerPolicy(rebalance_below=0.9, target=0.95, horizon_s=1e9),
    every_s=2.0,
    budget=1.0,
    host_timeout_s=5.0,
    lease_s=4.0,
    retry_s=1.0,
    bytes_per_s=1e12,
)


@dataclass
class SimHost:
    """One host: what it holds, and the load that it has begun and not finished."""

    name: str
    incarnation: int = 1
    alive: bool = True
    held: set[ExpertVersion] = field(default_factory=set)
    loading: list[tuple[ExpertVersion, HostEntry | None]] = field(default_factory=list)  # peer
    run: int = 0  # the training run that it knows, and how many keys it owns for it
    owned: int = 0
    backward_s: float = 0.0  # since its start
    owner_s: float = 0.0
    node: str = "n"
    free_bytes: int | None = None

    @property
    def address(self) -> str:
        return f"{self.name}#{self.incarnation}"

    def observe(self) -> Observation:
        holdings: dict[LayerKey, dict[int, tuple[int, ...]]] = {}
        for key, version in sorted(self.held):
            layer = holdings.setdefault(LayerKey(key.model, key.layer), {})
            layer[key.expert] = (*layer.get(key.expert, ()), version)
        entry = HostEntry(
            host=self.name,
            incarnation=self.incarnation,
            node=self.node,
            shm_address="",
            grpc_address=self.address,
        )
        return Observation(
            entry=entry,
            holdings=holdings,
            loading=bool(self.loading),
            run=self.run,
            owned=self.owned,
            work=Work(0, 0, 0.0, self.backward_s, self.owner_s),
            free_bytes=self.free_bytes,
        )


@dataclass
class SimRouter:
    """A router that follows what it was given, and may be slow to hear of more."""

    name: str
    follows: Placement | None = None
    heard_at: float = 0.0


class ControlWorld:
    """Carries out what a `Control` says, and checks it against what it was told."""

    def __init__(
        self,
        hosts: int,
        models: list[tuple[ModelShape, bool]],
        *,
        policy: ControlPolicy = POLICY,
        slots: int | None = None,
    ) -> None:
        """``models`` are (shape, whether it is on disk); the others are put by a trunk."""
        self.pool = [PoolHost(name=f"h{n}", slots=slots) for n in range(hosts)]
        self.hosts = {host.name: SimHost(host.name) for host in self.pool}
        self.routers = {f"r{n}": SimRouter(f"r{n}") for n in range(2)}
        self.models = models
        self.policy = policy
        self.on_disk = {shape.model for shape, on_disk in models if on_disk}
        self.reported: dict[str, Observation] = {}
        self.published: list[Placement] = []
        self.evicted = 0
        self.saved: set[ExpertVersion] = set()  # later versions that are in files
        self.updates: dict[str, WeightUpdate] = {}  # under way, by model
        self.numbers: set[tuple[str, int]] = set()  # of all updates that there ever were
        self.kept_updates: str | None = None  # what is stored for later controllers
        self.term = 0
        self.now = 100.0
        self.constraints = OperatorConstraints()
        self.asked: MakePlan | None = None
        self.planner_is_slow = False
        self.take_over()

    def take_over(self) -> None:
        """The controller dies; another one starts anew, under a higher term."""
        self.term += 1
        self.asked = None
        self.reported.clear()
        self.control = self.new_control()
        self.control.set_constraints(self.constraints)
        self.updates = {}
        if self.kept_updates is not None:
            self.control.restore(json.loads(self.kept_updates))
        for shape, on_disk in self.models:
            if on_disk:
                self.control.add_model(shape, on_disk=True)
        if any(host.held for host in self.hosts.values()):
            for shape, on_disk in self.models:
                if not on_disk:
                    self.control.add_model(shape, on_disk=False)

    def new_control(self) -> Control:
        return Control(self.pool, term=self.term, policy=self.policy)

    def put_models_in_memory(self) -> None:
        """What a trunk does that attaches a model."""
        for shape, on_disk in self.models:
            if not on_disk:
                self.control.add_model(shape, on_disk=False)
                for name, host in self.hosts.items():
                    wanted = self.control.wanted(name)
                    mine = (key for key in wanted if key.model == shape.model)
                    host.held |= set(first_versions(mine))

    # ---- what may happen ------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        host = self.hosts[name]
        host.alive, host.held, host.loading = False, set(), []
        host.run = host.owned = 0

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
        if peer is None or peer.target in [holder.observe().entry.target for holder in holders]:
            host.held.add(key)
        else:
            self.fail_load(name, [key])

    def update(self, experts: list[ExpertKey], *, in_file: bool) -> None:
        """Somebody puts new weights of some experts of a model, each into one host."""
        (model,) = {key.model for key in experts}
        if model in self.updates:
            return
        until = self.now + 20.0
        update = self.control.updates.begin(model, experts, who="test", until=until)
        self.keep_updates()
        assert (model, update.number) not in self.numbers, "a number names one content"
        self.numbers.add((model, update.number))
        self.updates[model] = update
        for one in update.weights:
            for host in self.hosts.values():
                there = [version for key, version in host.held if key == one.key]
                if host.alive and len(there) == 1:
                    host.held.add(one)
                    if in_file:
                        self.saved.add(one)
                    break

    def revert(self, model: str) -> None:
        if model not in self.updates and self.control.updates.last(model) is not None:
            until = self.now + 20.0
            self.updates[model] = self.control.updates.begin_revert(model, who="t", until=until)
            self.keep_updates()

    def serve(self, model: str) -> None:
        """The update of a model is served, if every host that needs it has it."""
        update = self.updates.get(model)
        if update is None:
            return
        under_way = self.control.updates.arriving().items() >= update.versions.items()
        if not under_way:
            del self.updates[model]
        elif self.control.updates.is_ready(update):
            in_file = self.saved.issuperset(update.weights)
            self.control.updates.serve(update, in_file=in_file)
            self.keep_updates()
            del self.updates[model]

    def keep_updates(self) -> None:
        self.kept_updates = json.dumps(self.control.snapshot())

    def fail_load(self, name: str, also: list[ExpertVersion] | None = None) -> None:
        host = self.hosts[name]
        keys = [key for key, _ in host.loading] + (also or [])
        host.loading.clear()
        if keys:
            self.control.load_failed(name, keys, "broken", self.now)

    def report(self, name: str, counts: dict[LayerKey, np.ndarray] | None = None) -> None:
        """A router hears of the last placement, and says so."""
        router = self.routers[name]
        if self.published:
            router.follows = self.published[-1]
        router.heard_at = self.now
        number = None if router.follows is None else router.follows.id
        times = {"h0": HostTimes(calls=1, assignments=1000, busy_s=1.0)} if counts else {}
        self.control.hear(
            LoadReport(router=name, placement_id=number, counts=counts or {}, hosts=times), self.now
        )

    def tick(self, late: frozenset[str] = frozenset(), seconds: float = 0.5) -> bool:
        """One round; the ``late`` hosts do not answer in time. True if anything was decided."""
        self.now += seconds
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
        commands = self.control.tick(reports, self.now)
        for command in commands:
            match command:
                case MakePlan():
                    self.asked = command
                case LoadExperts():
                    assert command.host not in late, "a load for a host that did not answer"
                    self._begin_load(command)
                case Publish(placement=placement):
                    self._check(placement)
                    self.published.append(placement)
                case Evict():
                    self._evict(command)
                case EndRun(host=name, run=run):
                    assert self.hosts[name].run == run
                    self.hosts[name].run = self.hosts[name].owned = 0
        if not self.planner_is_slow:
            self.answer()
        return any(not isinstance(one, MakePlan) or not one.balance for one in commands)

    def answer(self) -> None:
        """The planner comes to its end."""
        if self.asked is not None:
            asked, self.asked = self.asked, None
            self.control.planned(asked, asked.run(), self.now)

    # ---- checks ---------------------------------------------------------------------------------

    def _begin_load(self, command: LoadExperts) -> None:
        seen = self.reported[command.host]
        assert not seen.loading, "a second load at the same time"
        assert len(set(command.weights)) == len(command.weights) > 0
        for one in command.weights:
            assert not seen.holds(one), "a load of what is there"
            arriving = self.control.updates.arriving() | self.control.training.arriving(
                shape for shape, _ in self.models
            )
            served = self.control.view.versions.of(one.key)
            assert one.version in (served, arriving.get(one.key))
            held = {version for key, version in self.hosts[command.host].held if key == one.key}
            assert len(held) < VERSIONS_AT_ONCE, "no room for a third version"
            assert one.key in self.control.wanted(command.host)
            peer = command.peers.get(one)
            holders = [o.entry for o in self.reported.values() if o.holds(one)]
            assert peer in holders if peer is not None else self.is_on_disk(one)
        host = self.hosts[command.host]
        host.loading = [(one, command.peers.get(one)) for one in command.weights]

    def is_on_disk(self, weights: ExpertVersion) -> bool:
        if weights.version != FIRST_VERSION:
            return weights in self.saved
        return weights.key.model in self.on_disk

    def _evict(self, command: Evict) -> None:
        host = self.hosts[command.host]
        for one in command.weights:
            key, version = one
            served = version == self.control.view.versions.of(key)
            assert not self.control.training.is_arriving(one)
            assert self.reported[command.host].holds(one)
            assert not served or key not in self.control.wanted(command.host)
            gone = not self.control.view.observations[command.host].holds(one)
            assert gone, "it may not be published again"
            for router in self.routers.values():
                # One whose lease has ended is told NotHere, and goes elsewhere inside its call.
                if router.follows is not None and self.now - router.heard_at <= POLICY.lease_s:
                    layer = router.follows.layers.get(LayerKey(key.model, key.layer))
                    asks = layer is not None and command.host in layer.hosts(key.expert)
                    assert not asks or router.follows.versions.of(key) != version, (
                        "evicted under a router that still asks for it"
                    )
            host.held.discard(one)
            self.evicted += 1
            served_ = self.control.view.versions.served(key)
            others = [
                o
                for n, o in self.reported.items()
                if o.holds(served_) and (n != command.host or not served)
            ]
            assert others or key.model in self.control.idle_models.asleep, "the last replica"

    def _check(self, placement: Placement) -> None:
        if self.published:
            assert placement.id > self.published[-1].id
        assert placement.id.term == self.term
        view = self.control.view
        entries = {
            name: seen.entry
            for name, seen in self.reported.items()
            if name not in view.retiring
            # One that is to leave is told of while it holds something, and is heard.
            or (name in view.observations and not (seen.bare and not seen.owned))
        }
        assert dict(placement.hosts) == entries, "hosts that live, as they last reported"
        for key, layer in placement.layers.items():
            for expert, replicas in enumerate(layer.replicas):
                one = placement.versions.served(key.expert(expert))
                for replica in replicas:
                    assert self.reported[replica.host].holds(one), "named before it is ready"
                holders = [name for name, o in self.reported.items() if o.holds(one)]
                assert bool(replicas) == bool(holders), "somebody has it, and nobody is told"
                if replicas:
                    assert sum(r.share for r in replicas) >= 0

    def rounds(self, seconds: float) -> None:
        """Hosts load what they are told, and routers follow and report."""
        end = self.now + seconds
        while self.now < end:
            self.tick()
            for name in self.routers:
                self.report(name)
            for name, host in self.hosts.items():
                while host.loading:
                    self.load_one(name)

    def settle(self) -> None:
        """No more faults: everybody lives, answers in time, and finishes its loads."""
        self.control.policy = ControlPolicy(auto=False, host_timeout_s=POLICY.host_timeout_s)
        self.planner_is_slow = False
        self.answer()
        for name in self.hosts:
            self.restart(name)
        quiet = 0
        for _ in range(200):
            acted = self.tick()
            for name in self.routers:
                self.report(name)
            for name, host in self.hosts.items():
                while host.loading:
                    self.load_one(name)
            for model in list(self.updates):
                self.serve(model)
            quiet = 0 if acted or self.updates else quiet + 1
            if quiet * 0.5 > POLICY.lease_s:
                return
        raise AssertionError("the controller still acts although nothing happens")

    def every(self) -> set[ExpertKey]:
        return {
            ExpertKey(shape.model, layer, expert)
            for shape, _ in self.models
            for layer, experts in shape.experts.items()
            for expert in range(experts)
        }

    def lost(self) -> set[ExpertKey]:
        """Experts whose served version is in no file and on no host any more."""
        served = self.control.view.versions.served
        held = {one for host in self.hosts.values() for one in host.held}
        lost = {key for key in self.every() if served(key) not in held}
        return {key for key in lost if not self.is_on_disk(served(key))}


def shape(model: str, *, replicas: int = 1, experts: int = 4, layers: int = 2) -> ModelShape:
    return ModelShape(
        model=model,
        experts=dict.fromkeys(range(layers), experts),
        replicas=replicas,
        expert_bytes=1,
    )


def counts(world: ControlWorld, seed: int) -> dict[LayerKey, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        LayerKey(s.model, layer): (1000 * np.exp(1.5 * rng.normal(size=experts))).astype(np.int64)
        for s, _ in world.models
        for layer, experts in s.experts.items()
    }


def started(hosts: int = 2, *, replicas: int = 2, **more: object) -> ControlWorld:
    world = ControlWorld(hosts, [(shape("m", replicas=replicas), True)], **more)  # pyright: ignore[reportArgumentType]
    policy = world.control.policy
    world.settle()
    world.control.policy = policy
    assert world.published
    return world


def finish(world: ControlWorld, rounds: int = 30, *, late: frozenset[str] = frozenset()) -> None:
    """Ticks, loads and routers' reports, with the balancer as the world's policy has it."""
    for _ in range(rounds):
        world.tick(late)
        for name in world.routers:
            world.report(name)
        for name, host in world.hosts.items():
            while host.loading:
                world.load_one(name)
