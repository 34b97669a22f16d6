"""Whole training steps over hosts in this process, by orders that are sent by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.actors.host.host import ExpertHost
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.cluster.expert_keys import (
    FIRST_VERSION,
    TRUNK,
    ExpertKey,
    ExpertVersion,
    trunk_block,
)
from moesaic.cluster.placement import HostEntry, PlacementId
from moesaic.cluster.training.contributions import Attempt
from moesaic.cluster.training.orders import (
    Answer,
    Begin,
    BulkKey,
    Commit,
    Gather,
    Gathered,
    GroupUpdate,
    NewlyOwned,
    Opened,
    OpenRun,
    Order,
    Own,
    Prepared,
    Reduce,
    Renew,
)
from moesaic.cluster.versions import WeightVersions
from moesaic.models.trunk.experts_layers import expert_tensors, experts_layers
from moesaic.proto.errors import HostLost
from tests.helpers.training.trunks import Trunk, loss_of, training

RUN, WORKER = 1, "worker"
DEADLINE_S = 30.0
BLOCKS = 2  # of the trunk
Sources = dict[ExpertKey, tuple[str, ...] | None]


class LocalLinks:
    """The bulk path without a transport. What it gives is spoiled after its block."""

    def __init__(self, hosts: Sequence[ExpertHost]) -> None:
        self._hosts = {host.name: host for host in hosts}
        self.lost: set[str] = set()
        self.fetched: list[tuple[str, BulkKey]] = []

    @contextmanager
    def get(
        self, entry: HostEntry, wanted: BulkKey, *, timeout_s: float
    ) -> Iterator[Mapping[str, Tensor]]:
        if entry.host in self.lost:
            raise HostLost(f"{entry.host}: its connection has ended")
        self.fetched.append((entry.host, wanted))
        with self._hosts[entry.host].training.reading(wanted) as found:
            copies = {name: tensor.clone() for name, tensor in found.items()}
        yield copies
        for tensor in copies.values():
            tensor.fill_(-1)

    def put(
        self, entry: HostEntry, given: BulkKey, tensors: Mapping[str, Tensor], *, timeout_s: float
    ) -> None:
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        self._hosts[entry.host].training.put(given, copies)


class Steps:
    """A run over a trunk's hosts; ``owners`` has the hosts of each key."""

    def __init__(
        self,
        trunk: Trunk,
        *,
        redundancy: int = 0,
        times: int = 1,
        near: bool | None = None,
        groups: Callable[[ExpertKey, str], int | None] = lambda key, name: 0,
    ) -> None:
        """Each order is sent ``times`` times. Tensors without a group are frozen.

        ``near``: hosts are reached as on this node, or as on others. None: without a transport.
        """
        self.trunk, self._times, self._groups = trunk, times, groups
        self.hosts = {host.name: host for host in trunk.pool.hosts}
        self.entries = {name: host.entry() for name, host in self.hosts.items()}
        self.links = LocalLinks(trunk.pool.hosts)
        self.client: BulkLinks | LocalLinks = self.links
        if near is None:
            for host in self.hosts.values():
                host._links.close()
                host.training._links = self.links
        else:
            self.client = BulkLinks("here")
            trunk.pool.stack.callback(self.client.close)
            node = "here" if near else "elsewhere"
            self.entries = {name: replace(one, node=node) for name, one in self.entries.items()}
        self.run, self.version = RUN, FIRST_VERSION
        self.attempt = Attempt(RUN, 0, 0)
        self.parameters: dict[str, Any] = dict(trunk.model.named_parameters())
        experts = [
            ExpertKey("m", layer.layer, expert)
            for layer in trunk.pool.layers
            for expert in range(layer.num_experts)
        ]
        names = sorted(self.parameters)
        self.blocks = {trunk_block("m", n): names[n::BLOCKS] for n in range(BLOCKS)}
        hosts = sorted(self.hosts)
        self.owners = {
            key: tuple(hosts[(at + n) % len(hosts)] for n in range(1 + redundancy))
            for at, key in enumerate([*experts, *self.blocks])
        }

    def order(self, host: str, order: Order) -> Answer:
        answers = [self.hosts[host].train(order) for _ in range(self._times)]
        if not isinstance(answers[0], Opened):  # the memory that is free changes by itself
            assert all(answer == answers[0] for answer in answers)
        return answers[0]

    def every(self, order: Order) -> dict[str, Answer]:
        return {host: self.order(host, order) for host in self.hosts}

    def owned_by(self, host: str) -> list[ExpertKey]:
        return [key for key, owners in self.owners.items() if host in owners]

    def names(self, key: ExpertKey) -> list[str]:
        if key.layer == TRUNK:
            return self.blocks[key]
        forms, _ = next(iter(self.hosts.values()))._store.expert_forms(key)
        return list(forms)

    def groups(self, key: ExpertKey) -> dict[str, int]:
        found = {name: self._groups(key, name) for name in self.names(key)}
        return {name: group for name, group in found.items() if group is not None}

    # ---- a run ----------------------------------------------------------------------------------

    def open(self, optimizer: str = "AdamW", **settings: object) -> None:
        self.every(OpenRun(run=self.run, model="m", optimizer=optimizer, settings=settings))

    def put_weights(self) -> None:
        """Put what owners do not serve themselves."""
        for key, owners in self.owners.items():
            served = {n: h for n, h in self.hosts.items() if h._residency.versions(key)}
            for host in set(owners) - served.keys():
                if key.layer == TRUNK:
                    tensors = {n: self.parameters[n].detach() for n in self.blocks[key]}
                else:
                    one = ExpertVersion(key, self.version)
                    tensors = next(iter(served.values()))._store.get(one)
                given = BulkKey("weights", key, version=self.version, run=self.run)
                self.client.put(self.entries[host], given, tensors, timeout_s=DEADLINE_S)

    def own(self) -> None:
        self.put_weights()
        for host in self.hosts:
            keys = {key: NewlyOwned(self.groups(key)) for key in self.owned_by(host)}
            self.order(host, Own(run=self.run, versions=versions(self.version), step=0, keys=keys))

    # ---- a step ---------------------------------------------------------------------------------

    def begin(self, *, exact: bool = False) -> None:
        self.every(Begin(attempt=self.attempt, exact=exact))
        self.trunk.learning.begin(self.attempt)

    def again(self) -> None:
        """Begin the next attempt at the step."""
        self.attempt = self.attempt._replace(number=self.attempt.number + 1)
        self.trunk.model.zero_grad()
        self.begin()

    def backward(self, *microbatches: Tensor) -> None:
        for ids in microbatches:
            loss_of(self.trunk.model, ids).backward()

    def gather(self) -> Sources:
        """Return the sources of all that is owned."""
        sources: Sources = dict.fromkeys(self.owners, ())
        for host, answer in self.every(Gather(attempt=self.attempt)).items():
            assert isinstance(answer, Gathered)
            for key in answer.keys:
                have = sources[key]
                assert have is not None
                sources[key] = (*have, host)
        return sources | dict.fromkeys(self.blocks, (WORKER,))

    def put_gradients(self) -> None:
        for key, names in self.blocks.items():
            found = {name: self.parameters[name].grad for name in names}
            given = BulkKey("gradient", key, attempt=self.attempt, source=WORKER)
            for host in self.owners[key]:
                tensors = {n: grad for n, grad in found.items() if grad is not None}
                self.client.put(self.entries[host], given, tensors, timeout_s=DEADLINE_S)

    def reduce(self, sources: Sources) -> dict[ExpertKey, Mapping[str, float]]:
        found: dict[ExpertKey, Mapping[str, float]] = {}
        for host in self.hosts:
            for key, squares in self.reduce_at(host, sources).items():
                assert found.setdefault(key, squares) == squares
        return found

    def reduce_at(self, host: str, sources: Sources) -> Mapping[ExpertKey, Mapping[str, float]]:
        mine = {key: sources[key] for key in self.owned_by(host)}
        answer = self.order(host, Reduce(attempt=self.attempt, sources=mine, peers=self.entries))
        assert isinstance(answer, Prepared)
        return answer.squares

    def commit(self, groups: Mapping[int, GroupUpdate]) -> None:
        order = Commit(attempt=self.attempt, version=self.version + 1, step=1, groups=groups)
        self.every(order)
        self.version += 1

    def renew(self) -> None:
        for host in self.hosts:
            due = {
                key: self.entries[owners[0]]
                for key, owners in self.owners.items()
                if key.layer != TRUNK
                and host not in owners
                and self.hosts[host]._residency.versions(key)
            }
            self.order(host, Renew(run=self.run, version=self.version, owners=due))

    def publish(self) -> None:
        """Let routers and the trunk use the new version, and evict the one before it."""
        placement = self.trunk.pool.placement
        placement = replace(
            placement,
            id=PlacementId(placement.id.term, placement.id.epoch + 1),
            versions=WeightVersions({"m": self.version}),
        )
        self.trunk.pool.placement = placement
        self.trunk.learning.router.place(placement)
        self.evict()
        for key, names in self.blocks.items():
            wanted = BulkKey("weights", key, version=self.version)
            entry = self.entries[self.owners[key][-1]]
            with self.client.get(entry, wanted, timeout_s=DEADLINE_S) as found, torch.no_grad():
                for name in names:
                    if name in found:
                        self.parameters[name].copy_(found[name])

    def evict(self) -> None:
        for host in self.hosts.values():
            keys = [key for key in self.owners if key.layer != TRUNK]
            gone = [ExpertVersion(k, v) for k in keys for v in host._residency.versions(k)]
            host.release([one for one in gone if one.version < self.version])

    def step(
        self, *microbatches: Tensor, groups: Mapping[int, GroupUpdate], exact: bool = False
    ) -> dict[ExpertKey, Mapping[str, float]]:
        """Make a whole step."""
        self.trunk.model.zero_grad()
        self.begin(exact=exact)
        self.backward(*microbatches)
        sources = self.gather()
        self.put_gradients()
        squares = self.reduce(sources)
        self.commit(groups)
        self.finish()
        return squares

    def finish(self) -> None:
        """Do what follows a commit."""
        self.renew()
        self.publish()
        self.attempt = Attempt(self.run, self.attempt.step + 1, 0)

    # ---- what is there --------------------------------------------------------------------------

    def state(self, key: ExpertKey, host: str) -> dict[str, Tensor]:
        with self.hosts[host].training.reading(BulkKey("state", key, run=self.run)) as found:
            return {name: tensor.clone() for name, tensor in found.items()}

    def states(self) -> dict[tuple[ExpertKey, str, str], Tensor]:
        return {
            (key, host, entry): tensor
            for key, hosts in self.owners.items()
            for host in hosts
            for entry, tensor in self.state(key, host).items()
        }

    def served(self) -> dict[tuple[ExpertKey, str, str], Tensor]:
        """The experts' weights of the newest version, on all hosts that serve them."""
        found = {}
        for key in self.owners:
            for name, host in self.hosts.items():
                one = ExpertVersion(key, self.version)
                if key.layer != TRUNK and host._residency.serves(one):
                    for tensor_name, tensor in host._store.get(one).items():
                        found[key, name, tensor_name] = tensor
        return found


def same(some: Mapping[Any, Tensor], others: Mapping[Any, Tensor]) -> bool:
    return some.keys() == others.keys() and all(
        one.dtype == others[at].dtype and torch.equal(one, others[at]) for at, one in some.items()
    )


def experts_in(model: Any) -> dict[ExpertKey, dict[str, Tensor]]:
    """The experts of a plain model as the pool has them."""
    return {
        ExpertKey("m", layer.layer, expert): expert_tensors(layer, expert)
        for layer in experts_layers(model)
        for expert in range(layer.num_experts)
    }


def versions(number: int, model: str = "m") -> WeightVersions:
    """All of a model's weights have this version."""
    return WeightVersions({model: number})


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Steps]:
    """A run with owners, whose first attempt has begun."""
    redundancy, times = options.pop("redundancy", 0), options.pop("times", 1)
    options = {"dtype": torch.float32, "hosts": 2} | options
    with training(folder, opened=False, **options) as trunk:
        steps = Steps(trunk, redundancy=redundancy, times=times)
        steps.open()
        steps.own()
        steps.begin()
        yield steps
