"""What a run trains, and the pool that it sees."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...proto.errors import ClusterError
from ..expert_keys import ExpertKey
from ..placement import HostEntry
from .host_memory import HostMemory, TrainedBytes, shortage

_CPU = "cpu"  # as the device of a host


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolNow:
    """The hosts of a pool as a run sees them at one moment."""

    entries: Mapping[str, HostEntry]
    domains: Mapping[str, str]  # of the hosts in `entries`
    # The hosts that serve each expert of the model. A host that has just begun may be missing.
    holders: Mapping[ExpertKey, tuple[str, ...]]
    leaving: frozenset[str] = frozenset()  # they are drained, and own nothing new
    # Versions before the served one that some host still holds.
    old_versions: frozenset[int] = frozenset()

    def incarnations(self) -> dict[str, int]:
        return {host: entry.incarnation for host, entry in self.entries.items()}

    def domains_of_owners(self, hosts: Iterable[str], kind: str | None) -> dict[str, str]:
        """Return the domains of those of ``hosts`` that stay and are on this kind of device."""
        return {
            host: self.domains.get(host) or host
            for host in hosts
            if host not in self.leaving and kind in (None, device_kind(self.entries[host]))
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What is trained under one key."""

    groups: Mapping[str, int]  # name -> the group of its hyperparameters
    memory: TrainedBytes

    @property
    def nbytes(self) -> int:
        """The size of its master, and of its owners' gradient."""
        return self.memory.master


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run trains, and how."""

    run: int
    model: str
    optimizer: str
    settings: Mapping[str, object]
    tensors: Mapping[ExpertKey, Trained]
    redundancy: int = 0  # owners of a key besides the first
    exact: bool = False

    @property
    def digest(self) -> str:
        """What all workers of a run have in common, whatever its number is by now."""
        groups = {str(key): dict(one.groups) for key, one in sorted(self.tensors.items())}
        how = self.optimizer, sorted(self.settings.items()), self.redundancy, self.exact
        return hashlib.sha256(repr((self.model, how, groups)).encode()).hexdigest()


def device_kind(entry: HostEntry) -> str:
    """Return where a host computes: "cpu" or "gpu"."""
    return "cpu" if entry.device == _CPU else "gpu"


def kind_of_owners(plan: RunPlan, pool: PoolNow) -> str | None:
    """Return the kind of device that owners have to be on; None: any.

    Updates on CPUs and on GPUs differ in their last bits, and those of one key's owners must not.
    Raises ClusterError if the pool has both.
    """
    if not plan.redundancy:
        return None
    kinds = {device_kind(entry): host for host, entry in pool.entries.items()}
    if len(kinds) > 1:
        raise ClusterError(
            f"redundancy: {plan.redundancy}: {kinds['cpu']} computes on a CPU and {kinds['gpu']} "
            "on a GPU, whose updates differ in the last bits; let all hosts be on one kind of "
            "device, or use redundancy 0"
        )
    return next(iter(kinds), None)


def check_room(
    plan: RunPlan,
    planned: Mapping[str, HostMemory],
    pool: PoolNow,
    free_bytes: Mapping[str, int | None],
) -> None:
    """Raise ClusterError if some machine lacks memory for what its hosts are to keep.

    ``planned`` is what each host takes, and ``free_bytes`` what it has found free.
    """
    nodes = {host: entry.node for host, entry in pool.entries.items()}
    if why := shortage({h: one for h, one in planned.items() if h in nodes}, nodes, free_bytes):
        raise ClusterError(
            f"{plan.model} cannot be trained with {plan.optimizer} here: {why}; end other "
            "programs, use more machines, fewer replicas, less redundancy or an optimizer with "
            "less state, or train fewer parameters"
        )
