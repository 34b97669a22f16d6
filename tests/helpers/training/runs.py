"""A pool for training in the test's own process: hosts, a trunk that learns, and runs over both."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moesaic.actors.host.host import ExpertHost
from moesaic.actors.training.lead.coordinator import Coordinator
from moesaic.actors.training.learning import Learning
from moesaic.actors.training.opening import plan_run
from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.actors.training.run import LearningTrunk, PoolRun
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.cluster.expert_keys import FIRST_VERSION, ExpertKey, ExpertVersion
from moesaic.cluster.placement import LayerPlacement, Placement, PlacementId, Replica
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.cluster.training.orders import Answer, Order
from moesaic.cluster.training.progress import RunProgress
from moesaic.cluster.training.run_plan import PoolNow
from moesaic.cluster.training.steps import TrainingSteps
from moesaic.cluster.training.workers import Workers
from moesaic.kernels.training.update_rules import UpdateRule
from moesaic.models.training.groups import TrainedTensors
from moesaic.models.training.trainable_trunk import TrainableTrunk
from moesaic.models.trunk.routing_record import record_routing
from moesaic.models.trunk.trunk import connect_experts, load_trunk
from moesaic.proto.errors import HostGone, HostLost, MoesaicError, Superseded
from tests.helpers.pool.serving import PATIENT, Hosts, serving

DECAY = {"lr": 1e-2, "weight_decay": 0.1}
# (host, order) -> whether it gets there
Gate = Callable[[str, Order], bool]


class LocalPool:
    """A `TrainingPool` of hosts in this process, which plays the controller's part."""

    def __init__(self, hosts: Hosts, *, domains: Mapping[str, str] | None = None) -> None:
        self.hosts = hosts
        self.domains = dict(domains or {})
        self.leaving: set[str] = set()
        self.gone: set[str] = set()
        self.gate: Gate = lambda host, order: True
        self.routers: list[Any] = []
        self.orders: list[tuple[str, Order]] = []
        self.ended = False
        self.told: RunProgress | None = None

    @property
    def alive(self) -> dict[str, ExpertHost]:
        return {host.name: host for host in self.hosts.hosts if host.name not in self.gone}

    def now(self, skip: int | None = None, tells: RunProgress | None = None) -> PoolNow:
        placement = self.hosts.placement
        self.told = tells or self.told
        if skip is not None:
            self._release(lambda version: version == skip)
        return PoolNow(
            entries={name: host.entry() for name, host in self.alive.items()},
            domains={name: self.domains.get(name, name) for name in self.alive},
            holders={
                key.expert(expert): layer.hosts(expert)
                for key, layer in placement.layers.items()
                for expert in range(len(layer.replicas))
            },
            leaving=frozenset(self.leaving),
        )

    def order(
        self, orders: Mapping[str, Order], timeout_s: float
    ) -> dict[str, Answer | MoesaicError]:
        return {host: self._answer(host, order) for host, order in orders.items()}

    def _answer(self, host: str, order: Order) -> Answer | MoesaicError:
        self.orders.append((host, order))
        is_reached = self.gate(host, order)
        if host not in self.alive:
            return HostGone(f"{host} is gone")
        if not is_reached:
            return HostLost(f"{host} does not answer")
        try:
            return self.alive[host].train(order)
        except MoesaicError as error:
            return error

    def lose(self, host: str) -> None:
        """A host is gone for good; its replicas' tokens go to the others."""
        self.gone.add(host)
        placement = self.hosts.placement
        layers = {}
        for key, layer in placement.layers.items():
            replicas = [tuple(r for r in row if r.host != host) for row in layer.replicas]
            even = [tuple(Replica(r.host, 1 / len(row)) for r in row) for row in replicas]
            layers[key] = LayerPlacement(tuple(even))
        self._place(
            replace(
                placement,
                hosts={name: one for name, one in placement.hosts.items() if name != host},
                layers=layers,
            )
        )

    def _place(self, placement: Placement) -> None:
        number = PlacementId(placement.id.term, placement.id.epoch + 1)
        self.hosts.placement = replace(placement, id=number)
        for router in self.routers:
            router.place(self.hosts.placement)

    def publish(self, version: int, timeout_s: float) -> PlacementId:
        placement = self.hosts.placement
        if version <= placement.versions.models.get(self.hosts.ref.name, FIRST_VERSION):
            raise Superseded(f"version {version} is over")
        models = {**placement.versions.models, self.hosts.ref.name: version}
        self._place(replace(placement, versions=replace(placement.versions, models=models)))
        self._release(lambda held: held < version)
        return self.hosts.placement.id

    def _release(self, is_over: Callable[[int], bool]) -> None:
        for host in self.alive.values():
            old = [
                ExpertVersion(layer.expert(expert), held)
                for layer, experts in host.report().holdings.items()
                for expert, versions in experts.items()
                for held in versions
                if is_over(held)
            ]
            host.release(old)

    def end(self) -> None:
        self.ended = True


class LocalTrunk:
    """A trunk that learns over hosts in this process."""

    def __init__(
        self,
        pool: LocalPool,
        folder: Path,
        dtype: torch.dtype,
        *,
        borrows: bool = False,
        policy: RouterPolicy = PATIENT,
    ) -> None:
        where = torch.device(pool.hosts.device)
        self.model: Any = load_trunk(folder, dtype=dtype, device=where).train()
        self.model.requires_grad_(True)
        router = pool.hosts.router(borrows=borrows, policy=policy)
        pool.routers.append(router)
        self.learning = Learning(router, pool.hosts.ref.name, dtype)
        connect_experts(self.model, pool.hosts.layers, self.learning.layer)
        self.learning.watch(self.model)
        record_routing(self.model)


@contextmanager
def training_pool(
    folder: Path, *, dtype: torch.dtype = torch.float64, borrows: bool = False, **options: Any
) -> Iterator[LocalPool]:
    with serving(folder, dtype=dtype, learns=True, lends=borrows, **options) as hosts:
        yield LocalPool(hosts)


def held(pool: LocalPool, keys: Collection[ExpertKey]) -> dict[ExpertKey, dict[str, torch.Tensor]]:
    """What hosts serve of experts; all replicas must have the same bits."""
    found: dict[ExpertKey, dict[str, torch.Tensor]] = {}
    versions = pool.hosts.placement.versions
    for key in keys:
        for host in pool.alive.values():
            if host._residency.serves(versions.served(key)):
                tensors = host._store.get(versions.served(key))
                before = found.setdefault(key, {n: t.clone() for n, t in tensors.items()})
                assert all(torch.equal(before[name], tensor) for name, tensor in tensors.items())
    return found


class Team:
    """The workers of one run, each in a thread of this process; the first one brings its plan."""

    def __init__(self, least: int) -> None:
        self.least = least
        self.lead: Coordinator | None = None
        self._lock = threading.Lock()

    def join(self, begin: Callable[[Workers], Coordinator]) -> Coordinator:
        with self._lock:
            self.lead = self.lead or begin(Workers(self.least, lease_s=math.inf))
            return self.lead


@contextmanager
def optimizing(
    pool: LocalPool,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float64,
    borrows: bool = False,
    redundancy: int = 0,
    run: int = 1,
    since: int | None = None,
    exact: bool = False,
    team: Team | None = None,
    name: str = "worker",
    policy: RouterPolicy = PATIENT,
    prepare: Callable[[Any], None] = lambda _: None,
    params: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Iterator[tuple[Any, RunOptimizer]]:
    """A trunk that is trained with AdamW, unless ``options`` say otherwise.

    It is the only worker of its run, or one of a team's. ``prepare`` gets the model before the
    optimizer is made, and ``params`` makes groups of it.
    """
    trunk = LocalTrunk(pool, folder, dtype, borrows=borrows, policy=policy)
    opened = TrainableTrunk(trunk.model, pool.hosts.layers, dtype)
    learning = LearningTrunk(model=trunk.model, learning=trunk.learning, name=name)

    def open_run(trained: TrainedTensors, rule: UpdateRule) -> PoolRun:
        plan = plan_run(
            run,
            pool.hosts.ref.name,
            learning,
            pool.hosts.layers,
            trained,
            rule,
            redundancy=redundancy,
            exact=exact,
        )
        versions = pool.hosts.placement.versions
        number = versions.of(ExpertKey("m", 0, 0)) + 1
        steps = TrainingSteps(plan, pool.now(), versions=versions, next_version=number)

        def begin(workers: Workers | None = None) -> Coordinator:
            return Coordinator(pool, steps, workers=workers, since=since)

        lead = begin() if team is None else team.join(begin)
        return PoolRun(lead, BulkLinks("here"), learning)

    prepare(trunk.model)
    given: dict[str, Any] = DECAY | options
    if params is not None:
        given["params"] = params(trunk.model)
    optimizer = RunOptimizer(trunk.model, open_run, **given)
    try:
        yield trunk.model, optimizer
    finally:
        optimizer.close()
        opened.close()
