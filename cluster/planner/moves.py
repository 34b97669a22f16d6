"""The terms of a search for replicas: free capacity of hosts, limits, and steps.

Shapes: E experts of one layer, H hosts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .balance import Split


class FreeCapacity:
    """Free slots and bytes of all hosts, shared by the searches of all layers."""

    def __init__(self, slots_H: np.ndarray, bytes_H: np.ndarray) -> None:
        self.slots_H = slots_H
        self.bytes_H = bytes_H

    def fits(self, expert_bytes: int) -> np.ndarray:
        """Return which hosts have room for one replica, (H,) bool."""
        return (self.slots_H >= 1) & (self.bytes_H >= expert_bytes)

    def take(self, host: int, expert_bytes: int) -> None:
        self.slots_H[host] -= 1
        self.bytes_H[host] -= expert_bytes

    def give(self, host: int, expert_bytes: int) -> None:
        self.slots_H[host] += 1
        self.bytes_H[host] += expert_bytes


@dataclass(frozen=True, slots=True)
class Step:
    """Replicas to add and replicas to drop, each as (expert, host)."""

    adds: tuple[tuple[int, int], ...]
    drops: tuple[tuple[int, int], ...] = ()
    gain: float = 0.0  # the excess that it removes: first an estimate, then exact
    upkeep: float = 0.0  # what its replicas cost more than those that it drops, as load

    @property
    def net(self) -> float:
        """What it gains beyond the upkeep of its replicas."""
        return self.gain - self.upkeep

    @property
    def net_per_add(self) -> float:
        return self.net / len(self.adds)


@dataclass(frozen=True, slots=True)
class EvaluatedStep:
    """A step with its exact gain, and the split that it leads to."""

    step: Step
    split: Split


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConstraints:
    """The conditions that no step may violate."""

    domain_H: np.ndarray  # index of each host's failure domain
    domains: int  # an expert in this many failure domains, or in fewer, must not leave one
    min_replicas_E: np.ndarray  # the lower bound of each expert's replicas
    pinned_EH: np.ndarray  # replicas that operators pinned, bool

    def may_change_place(self, held_H: np.ndarray, source: int, target: int) -> bool:
        """Return whether an expert stays protected if its replica on ``source`` goes to ``target``.

        It may end in fewer failure domains than before, but not in fewer than `domains`.
        """
        domains = set(self.domain_H[held_H].tolist())
        others = held_H.copy()
        others[source] = False
        after = {*self.domain_H[others].tolist(), int(self.domain_H[target])}
        return len(after) >= min(self.domains, len(domains))

    def droppable(self, held_EH: np.ndarray, *, bare: bool = False) -> np.ndarray:
        """Return which replicas may be dropped, one at a time, (E, H) bool.

        ``bare``: an expert without any replica needs the slot, so every replica that is neither
        pinned nor the last of its expert may go, protected or not.
        """
        if bare:
            return held_EH & (held_EH.sum(axis=1) > 1)[:, None] & ~self.pinned_EH
        count = int(self.domain_H.max()) + 1
        by_domain = np.zeros((len(held_EH), count), dtype=np.int64)
        for host, domain in enumerate(self.domain_H):
            by_domain[:, domain] += held_EH[:, host]
        # Replicas that are the only one of their expert in their domain; experts that are in no
        # more domains than they need; experts with more replicas than they must keep.
        alone_EH = by_domain[:, self.domain_H] == 1
        few_E = (by_domain > 0).sum(axis=1) <= self.domains
        more_E = held_EH.sum(axis=1) > self.min_replicas_E
        return held_EH & more_E[:, None] & ~self.pinned_EH & ~(alone_EH & few_E[:, None])


def together(ranked: list[Step], most_adds: int) -> Step | None:
    """Join steps that share neither experts nor hosts into one; None if fewer than two fit.

    ``ranked`` are taken in order while the joint step adds at most ``most_adds`` replicas.
    """
    adds: list[tuple[int, int]] = []
    drops: list[tuple[int, int]] = []
    experts: set[int] = set()
    hosts: set[int] = set()
    gain, upkeep, count = 0.0, 0.0, 0
    for step in ranked:
        touched = step.adds + step.drops
        if (
            len(adds) + len(step.adds) > most_adds
            or experts.intersection(e for e, _ in touched)
            or hosts.intersection(h for _, h in touched)
        ):
            continue
        experts.update(e for e, _ in touched)
        hosts.update(h for _, h in touched)
        adds += step.adds
        drops += step.drops
        gain += step.gain
        upkeep += step.upkeep
        count += 1
    return Step(tuple(adds), tuple(drops), gain, upkeep) if count > 1 else None
