"""The memory that training takes on hosts: one formula for all who plan with it.

A check before a start has sizes alone (`pool_memory`); a run knows who serves and who owns what
(`memory_of_hosts`), and refuses to begin where it does not fit (`shortage`). Sizes are of tensors;
a process takes `BESIDES_TENSORS_BYTES` on top of what it took before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..card_memory import gb
from ..expert_keys import ExpertKey
from .owners import Owners

# What a run adds to a host's process besides tensors. PyTorch imports its compiler with the first
# optimizer of a process (147 MB with torch 2.13), and buffers of the bulk path have 10 to 50 MB.
# When a host says how much is free (`shortage`), the compiler is there already.
BESIDES_TENSORS_BYTES = 200_000_000


class TrainedBytes(NamedTuple):
    """Sizes of the tensors of one key, or of several keys together."""

    version: int = 0  # of what a host serves of an expert, in the model's type
    gradient: int = 0  # of one gradient of that, in the wide type
    added: int = 0  # of the sum that calls are added to: as a gradient; with `exact` it is float64
    master: int = 0  # of what is trained, in the wide type; its owners' gradient is as large
    state: int = 0  # of the optimizer's state, from the first commit on


@dataclass(slots=True, kw_only=True)
class HostMemory:
    """What one host takes, or several together, by what it is for."""

    weights: int = 0  # of one version of the experts that are served
    masters: int = 0
    state: int = 0
    added: int = 0  # gradients of the experts that are served, while calls are added to them
    # Gradients of what is owned, where they are other tensors than the added ones: sums over
    # several hosts, sums that are rounded to another type, and what a trunk has put.
    sums: int = 0
    kept: int = 0  # activations of forward calls, until their backward calls

    @property
    def at_rest(self) -> int:
        """Between two steps; the first one has made state and the second version of the weights.

        Both versions keep their memory, and steps fill one after the other. What gradients were
        added up in stays for the next ones.
        """
        return 2 * self.weights + self.masters + self.state + self.added

    @property
    def learning(self) -> int:
        """After the backward calls of a step."""
        return self.at_rest + self.kept

    @property
    def reduced(self) -> int:
        """Once gradients are summed up."""
        return self.at_rest + self.sums

    @property
    def peak(self) -> int:
        return max(self.learning, self.reduced)

    @property
    def passing(self) -> int:
        """What gradients and activations take, at most."""
        return self.peak - self.at_rest + self.added

    def without_state(self) -> HostMemory:
        """Return the same with an optimizer that keeps nothing."""
        return replace(self, state=0)

    def __str__(self) -> str:
        return (
            f"{gb(self.peak)} (twice {gb(self.weights)} of weights, {gb(self.masters)} of masters, "
            f"{gb(self.state)} of optimizer state, {gb(self.passing)} in a step)"
        )

    def __add__(self, other: HostMemory) -> HostMemory:
        return HostMemory(**{name: getattr(self, name) + getattr(other, name) for name in _PARTS})


_PARTS = tuple(HostMemory.__dataclass_fields__)


def memory_of_hosts(
    trained: Mapping[ExpertKey, TrainedBytes],
    owners: Owners,
    holders: Mapping[ExpertKey, Collection[str]],
    *,
    lent: bool = False,
    kept: int = 0,
) -> dict[str, HostMemory]:
    """Return what each host takes if every replica of an expert gets tokens.

    ``holders`` are the hosts that serve an expert. ``lent``: the trunk's process computes all
    backward calls, and puts the sums into the owners. No host takes more then than otherwise; on
    the trunk's machine all that it puts is its own memory, which hosts only look at. ``kept`` is
    how many bytes of activations a host may keep.
    """
    found: dict[str, HostMemory] = defaultdict(lambda: HostMemory(kept=kept))
    for key, one in trained.items():
        serving = holders.get(key, ())
        for host in serving:
            memory = found[host]
            memory.weights += one.version
            memory.added += 0 if lent else one.added
        for host in owners.get(key, ()):
            memory = found[host]
            memory.masters += one.master
            memory.state += one.state
            if lent or set(serving) != {host} or one.added > one.gradient:
                memory.sums += one.master
    return dict(found)


def pool_memory(
    experts: TrainedBytes, trunk: TrainedBytes, *, replicas: int, redundancy: int, hosts: int
) -> HostMemory:
    """Return what all hosts take together, where all experts and the whole trunk are trained."""
    owners, replicas = min(1 + redundancy, hosts), min(replicas, hosts)
    # A host that owns an expert and alone serves it sums nothing up, unless it has to round.
    sums_are_own = replicas > 1 or experts.added > experts.gradient
    apart = owners if sums_are_own else owners - 1
    return HostMemory(
        weights=replicas * experts.version,
        masters=owners * (experts.master + trunk.master),
        state=owners * (experts.state + trunk.state),
        added=replicas * experts.added,
        sums=apart * experts.master + owners * trunk.master,
    )


def shortage(
    planned: Mapping[str, HostMemory],
    nodes: Mapping[str, str],
    free_bytes: Mapping[str, int | None],
) -> str:
    """Say where hosts lack memory for what is planned beyond the weights that they hold already.

    ``nodes`` are the machines by host, and ``free_bytes`` what a host has found free on its own;
    None: unknown. Empty if all fits, as far as is known.
    """
    machines: dict[str, list[str]] = defaultdict(list)
    for host in sorted(planned):
        if free_bytes.get(host) is not None:
            machines[nodes[host]].append(host)
    for node, hosts in sorted(machines.items()):
        memory = sum((planned[host] for host in hosts), HostMemory())
        free = min(found for host in hosts if (found := free_bytes[host]) is not None)
        need = memory.peak - memory.weights
        if need > free:
            return (
                f"{', '.join(hosts)} on {node} need {gb(need)} of memory besides the weights that "
                f"they serve, and {gb(free)} are free: {gb(memory.masters)} for masters, "
                f"{gb(memory.state)} for the optimizer's state, {gb(memory.weights)} for a second "
                f"version of the weights, {gb(memory.passing)} for gradients"
            )
    return ""
