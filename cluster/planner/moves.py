"""What a search for replicas counts with: free room, limits, and the steps it may take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .balance import Split


class Rooms:
    """Free slots and bytes of all hosts, shared by the searches of all layers."""

    def __init__(self, slots_H: np.ndarray, bytes_H: np.ndarray) -> None:
        self.slots_H = slots_H
        self.bytes_H = bytes_H

    def fits(self, expert_bytes: int) -> np.ndarray:
        """(H,) bool"""
        return (self.slots_H >= 1) & (self.bytes_H >= expert_bytes)

    def take(self, host: int, expert_bytes: int) -> None:
        self.slots_H[host] -= 1
        self.bytes_H[host] -= expert_bytes

    def give(self, host: int, expert_bytes: int) -> None:
        self.slots_H[host] += 1
        self.bytes_H[host] += expert_bytes


@dataclass(frozen=True, slots=True)
class Step:
    """Replicas to add and to drop, in this order, as (expert, host)."""

    adds: tuple[tuple[int, int], ...]
    drops: tuple[tuple[int, int], ...] = ()
    gain: float = 0.0  # load that it takes off hosts that are over: estimated, then exact

    @property
    def gain_per_add(self) -> float:
        return self.gain / len(self.adds)


@dataclass(frozen=True, slots=True)
class Found:
    """A step that was solved exactly, and where it leads."""

    step: Step
    split: Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What no step may break."""

    domain_H: np.ndarray  # number of each host's failure domain
    domains: int  # in how many an expert with more may be left
    least_E: np.ndarray  # replicas that each expert keeps
    pinned_EH: np.ndarray  # replicas that stay

    def may_change_place(self, held_H: np.ndarray, source: int, target: int) -> bool:
        """Whether an expert is protected as before when a replica goes to another host."""
        domains = set(self.domain_H[held_H].tolist())
        others = held_H.copy()
        others[source] = False
        after = {*self.domain_H[others].tolist(), int(self.domain_H[target])}
        return len(after) >= min(self.domains, len(domains))

    def droppable(self, held_EH: np.ndarray, *, bare: bool = False) -> np.ndarray:
        """(E, H): replicas that may go, one at a time; with ``bare`` all that others stand for."""
        if bare:
            return held_EH & (held_EH.sum(axis=1) > 1)[:, None] & ~self.pinned_EH
        count = int(self.domain_H.max()) + 1
        by_domain = np.zeros((len(held_EH), count), dtype=np.int64)
        for host, domain in enumerate(self.domain_H):
            by_domain[:, domain] += held_EH[:, host]
        alone_EH = by_domain[:, self.domain_H] == 1
        few_E = (by_domain > 0).sum(axis=1) <= self.domains
        more_E = held_EH.sum(axis=1) > self.least_E
        return held_EH & more_E[:, None] & ~self.pinned_EH & ~(alone_EH & few_E[:, None])


def together(ranked: list[Step], most_adds: int) -> Step | None:
    """Steps that have neither experts nor hosts in common, as one; None unless there are two."""
    adds: list[tuple[int, int]] = []
    drops: list[tuple[int, int]] = []
    experts: set[int] = set()
    hosts: set[int] = set()
    gain, count = 0.0, 0
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
        count += 1
    return Step(tuple(adds), tuple(drops), gain) if count > 1 else None
