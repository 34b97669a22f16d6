"""Search for better replicas of one layer, one step at a time.

The aim is a balancedness, and with it a level: the load / speed that no host may exceed. Level
times speed is a host's capacity. The load that no split fits below the capacities is the layer's
*excess*; each step must reduce it.

The linear program of `balance.split_below` also gives a price for each host, by how much one more
unit of capacity there would reduce the excess: 1 or 0. A host with price 1 is *over*. By
complementary slackness no expert with load on such a host has a replica on a host with price 0, so
the hosts that are over can hand load only to each other. They are the bottleneck (in terms of
network flows, one side of a minimum cut), and only a new replica of one of their experts on a host
with price 0 and slack helps.

So a step adds a replica of an expert whose replicas are all on hosts that are over to a host with
slack. If that host has no free slot, the step drops a replica there whose load other replicas can
take, or moves a cold expert to another host. Estimates rank the steps, and one linear program each
decides between the best.

While a run trains the layer, each replica costs something in every step (`upkeep.py`). Steps then
count with what they gain beyond that, and `unneeded` finds replicas that cost more than they bring.

Shapes: E experts of one layer, H hosts, N replicas of several experts on one host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from .balance import Split, split_below
from .greedy_repack import repack
from .moves import EvaluatedStep, FreeCapacity, LayerConstraints, Step, together

# Rounds of the search: (how many experts are combined with as many hosts, how many of the resulting
# steps are solved exactly). The second, wider round runs only if the first finds nothing.
_WIDTHS = ((8, 5), (16, 40))
# How many replicas of a host are considered for dropping.
_VICTIMS = 3
# For each replica that it adds, a step must remove at least this fraction of the layer's excess, or
# of the mean capacity of a host if that is smaller; otherwise the search ends.
_LEAST_PART = 0.02
# In large pools one step joins several independent ones, up to one new replica for this many hosts.
_HOSTS_PER_STEP = 32
# An excess below this fraction of the layer's load counts as zero.
_NOTHING = 1e-6


class LayerSearch:
    """The replicas of one layer while the planner improves them."""

    def __init__(
        self,
        held_EH: np.ndarray,
        load_E: np.ndarray,
        speed_H: np.ndarray,
        *,
        free: FreeCapacity,
        expert_bytes: int,
        constraints: LayerConstraints,
        least: float = 0.0,
        upkeep_EH: np.ndarray | None = None,
    ) -> None:
        self.held_EH = held_EH
        self.load_E = load_E
        self.speed_H = speed_H
        self.constraints = constraints
        self.free = free
        self.expert_bytes = expert_bytes
        self.least = least  # load / speed of a host up to which evenness is worth nothing
        self.upkeep_EH = upkeep_EH  # what each replica costs, as load; None: nothing
        self.split: Split | None = None
        self._capacity_H = speed_H

    @property
    def excess_part(self) -> float:
        """Excess as a fraction of the layer's load."""
        assert self.split is not None
        total = float(self.load_E.sum())
        part = self.split.excess / total if total else 0.0
        return part if part > _NOTHING else 0.0

    @property
    def is_light(self) -> bool:
        """Whether the layer has too little load to be spread over all hosts."""
        return float(self.load_E.sum() / self.speed_H.sum()) < self.least

    def even_load(self) -> np.ndarray:
        """Return the load of each host (H,) if every expert's load is split evenly."""
        copies_E = np.maximum(self.held_EH.sum(axis=1, keepdims=True), 1)
        return (self.held_EH / copies_E).T @ self.load_E

    def retarget(self, balancedness: float) -> float:
        """Search for this balancedness from now on, and return `excess_part` under it."""
        # Balancedness is mean / busiest, so mean / balancedness bounds the busiest host.
        level = max(self.load_E.sum() / self.speed_H.sum() / balancedness, self.least)
        self._capacity_H = np.maximum(level * self.speed_H, 1e-300)
        self.split = split_below(self.held_EH, self.load_E, self._capacity_H)
        return self.excess_part

    def apply(self, step: Step) -> None:
        """Carry out a step without updating the split."""
        for expert, host in step.drops:
            self.held_EH[expert, host] = False
            self.free.give(host, self.expert_bytes)
        for expert, host in step.adds:
            self.held_EH[expert, host] = True
            self.free.take(host, self.expert_bytes)

    def improve(self, most_adds: int) -> EvaluatedStep | None:
        """Return the best step with at most ``most_adds`` new replicas, or None; see `accept`."""
        assert self.split is not None
        before = self.split.excess
        least = _LEAST_PART * min(before, float(self._capacity_H.mean()))
        for width, exact in _WIDTHS:
            best: EvaluatedStep | None = None
            for step in self._ranked(max(width, len(self.speed_H) // 16), exact, most_adds):
                split = split_below(self._after(step), self.load_E, self._capacity_H)
                found = EvaluatedStep(replace(step, gain=before - split.excess), split)
                if best is None or found.step.net_per_add > best.step.net_per_add:
                    best = found
                # Steps come in the order of their estimates. One that keeps most of its estimate
                # is good enough, and the linear programs of the others are saved.
                if found.step.gain > (0.5 if len(step.adds) > 2 else 0.7) * step.gain:
                    best = found
                    break
            if best is not None and best.step.net_per_add >= least:
                return best
        return self._anew(most_adds, least)

    def _anew(self, most_adds: int, least: float) -> EvaluatedStep | None:
        """Return a step that rebuilds the whole layer, if it gains enough per new replica."""
        assert self.split is not None
        step = repack(self.held_EH, self.load_E, self.speed_H, self.constraints)
        if step is None or len(step.adds) > most_adds:
            return None
        split = split_below(self._after(step), self.load_E, self._capacity_H)
        step = self._priced(replace(step, gain=self.split.excess - split.excess))
        found = EvaluatedStep(step, split)
        return found if step.net > 0 and step.net_per_add >= least else None

    def accept(self, found: EvaluatedStep) -> None:
        """Carry out a step, and take over the split that it leads to."""
        self.apply(found.step)
        self.split = found.split

    def wanted_hosts(self) -> list[int]:
        """Return hosts without a free slot that could take load, the most slack first."""
        assert self.split is not None
        slack_H = self._capacity_H - self.split.flow_EH.sum(axis=0)
        able_H = (self.split.price_H <= 0.5) & (slack_H > 0)
        able_H &= ~self.free.fits(self.expert_bytes)
        return [int(h) for h in np.argsort(-slack_H) if able_H[h]][:4]

    def lend(self, host: int) -> EvaluatedStep | None:
        """Drop the replica on ``host`` that carries least and may go, unless the excess grows.

        Returns what `take_back` needs to undo it, or None if nothing was dropped.
        """
        assert self.split is not None
        droppable_E = self.constraints.droppable(self.held_EH)[:, host]
        if not droppable_E.any():
            return None
        flow_E = np.where(droppable_E, self.split.flow_EH[:, host], np.inf)
        step = Step((), ((int(np.argmin(flow_E)), host),))
        split = split_below(self._after(step), self.load_E, self._capacity_H)
        if split.excess > self.split.excess + _NOTHING * self.load_E.sum():
            return None
        undo = EvaluatedStep(Step(step.drops), self.split)
        self.accept(EvaluatedStep(step, split))
        return undo

    def take_back(self, undo: EvaluatedStep) -> None:
        """Undo a `lend`."""
        self.accept(undo)

    def unneeded(self, worth: float) -> EvaluatedStep | None:
        """Return a step that drops replicas whose upkeep exceeds what they bring by ``worth``.

        None if there is none, or none of those that were looked at. ``worth`` is load, as upkeep.
        """
        if self.upkeep_EH is None:
            return None
        assert self.split is not None
        flow_EH, excess = self.split.flow_EH, self.split.excess
        costly_EH = self.constraints.droppable(self.held_EH) & (self.upkeep_EH > worth)
        # Without load a replica can go, and the split stays what it is; the others may be more
        # than the hosts need, too, and the linear program says what is lost without them.
        order = np.lexsort((-self.upkeep_EH[costly_EH], flow_EH[costly_EH]))
        for expert, host in np.argwhere(costly_EH)[order][:_VICTIMS].tolist():
            drop = self._priced(Step((), ((expert, host),)))
            split = self.split
            if flow_EH[expert, host] > 0:
                split = split_below(self._after(drop), self.load_E, self._capacity_H)
            found = EvaluatedStep(replace(drop, gain=excess - split.excess), split)
            if found.step.net > worth:
                return found
        return None

    def _priced(self, step: Step) -> Step:
        """Return a step with what its replicas cost more than those that it drops."""
        upkeep_EH = self.upkeep_EH
        if upkeep_EH is None:
            return step
        more = sum(float(upkeep_EH[where]) for where in step.adds)
        return replace(step, upkeep=more - sum(float(upkeep_EH[where]) for where in step.drops))

    def _after(self, step: Step) -> np.ndarray:
        held_EH = self.held_EH.copy()
        for where in step.drops:
            held_EH[where] = False
        for where in step.adds:
            held_EH[where] = True
        return held_EH

    # ---- candidates -----------------------------------------------------------------------------

    def _ranked(self, width: int, exact: int, most_adds: int) -> Iterator[Step]:
        """Yield the ``exact`` steps with the best estimates, for an exact solution.

        Of steps that add the same replica and differ only in what makes room for it, the best is
        taken. In a large pool the first step joins many independent ones.
        """
        steps = (self._priced(one) for one in self._steps(width) if len(one.adds) <= most_adds)
        ranked = sorted(
            (step for step in steps if step.net > 0), key=lambda step: -step.net_per_add
        )
        bundle = together(ranked, min(most_adds, len(self.speed_H) // _HOSTS_PER_STEP))
        if bundle is not None:
            yield bundle
        seen: set[tuple[int, int]] = set()
        for step in ranked:
            if step.adds[0] not in seen:
                seen.add(step.adds[0])
                yield step
                if len(seen) == exact:
                    return

    def _steps(self, width: int) -> Iterator[Step]:
        """Yield steps with estimated gains for the best ``width`` experts and hosts.

        The gain of a new replica is at most what the expert can give (`_gives`) and what the host
        can take (its slack), less the load that loses its room in what is dropped or moved.
        """
        split = self.split
        assert split is not None
        flow_EH = split.flow_EH
        over_H = split.price_H > 0.5
        slack_H = np.maximum(self._capacity_H - flow_EH.sum(axis=0), 0.0)
        slack_H[over_H] = 0.0
        open_H = ~over_H & (slack_H > 0)
        gives_E = self._gives(over_H)
        experts = [int(e) for e in np.argsort(-gives_E)[:width] if gives_E[e] > 0]
        hosts = [int(h) for h in np.argsort(-slack_H)[:width] if open_H[h]]
        fits_H = self.free.fits(self.expert_bytes)
        droppable_EH = self.constraints.droppable(self.held_EH)
        # A cold expert may also go to a host that has no slack but free slots.
        spare_H = np.where(fits_H & ~open_H, self.free.slots_H, 0)
        targets = hosts + [int(h) for h in np.argsort(-spare_H)[:_VICTIMS] if spare_H[h] > 0]
        for host in hosts:
            for victim, room, loss in self._openings(host, fits_H, droppable_EH, slack_H, targets):
                for expert in experts:
                    if self.held_EH[expert, host] or expert in (v for v, _ in victim.drops):
                        continue
                    gain = min(gives_E[expert], room) - loss
                    if gain > 0:
                        adds = ((expert, host), *victim.adds)
                        yield Step(adds, victim.drops, float(gain))
        yield from self._swaps(over_H, slack_H, hosts)

    def _gives(self, over_H: np.ndarray) -> np.ndarray:
        """Estimate how much excess a new replica of each expert could remove at most, (E,)."""
        split = self.split
        assert split is not None
        # Only experts whose replicas are all on hosts that are over: the others have a replica
        # with room already, and the linear program has used it.
        stuck_E = ~(self.held_EH & ~over_H).any(axis=1) & self.held_EH.any(axis=1)
        hot_H = split.excess_H > 0
        # The load that leaves hosts with excess directly: no more than the expert has there, and
        # no more than is in excess there.
        direct_E = np.minimum(
            (split.flow_EH * hot_H).sum(axis=1), (self.held_EH * split.excess_H).sum(axis=1)
        )
        # A host may have price 1 without excess. An expert that leaves it makes room there for
        # load from hosts with excess, along replicas that they share; half is a rule of thumb,
        # since only part of that load can follow.
        indirect_E = 0.5 * np.minimum(split.flow_EH.sum(axis=1), split.excess)
        return np.where(stuck_E, np.maximum(direct_E, indirect_E), 0.0)

    def _openings(
        self,
        host: int,
        fits_H: np.ndarray,
        droppable_EH: np.ndarray,
        slack_H: np.ndarray,
        targets: list[int],
    ) -> Iterator[tuple[Step, float, float]]:
        """Yield the ways to get a free slot on ``host``.

        Each is (the step that frees the slot, the slack of ``host`` after it, the load that
        finds no room elsewhere because of it). A step may move a cold expert to one of ``targets``.
        """
        slack = float(slack_H[host])
        if fits_H[host]:
            yield Step(()), slack, 0.0
            return
        assert self.split is not None
        flow_E = self.split.flow_EH[:, host]
        # Way 1: drop a replica whose load the expert's other hosts take.
        for expert, lost in self._spare(host, droppable_EH, slack_H):
            yield Step((), ((expert, host),)), slack + float(flow_E[expert]), lost
        # Way 2: move a cold expert that must not be dropped to another host: into a free slot, or
        # into that of a replica that can be dropped there.
        cold = np.flatnonzero(
            self.held_EH[:, host] & ~droppable_EH[:, host] & ~self.constraints.pinned_EH[:, host]
        )
        for expert in cold[np.argsort(self.load_E[cold])][:2].tolist():
            for other in targets:
                if self.held_EH[expert, other] or not self.constraints.may_change_place(
                    self.held_EH[expert], host, other
                ):
                    continue
                moved, room = float(flow_E[expert]), slack + float(flow_E[expert])
                short = max(moved - float(slack_H[other]), 0.0)
                if fits_H[other]:
                    yield Step(((expert, other),), ((expert, host),)), room, short
                    continue
                for spare, lost in self._spare(other, droppable_EH, slack_H)[:1]:
                    if spare != expert:
                        drops = ((expert, host), (spare, other))
                        yield Step(((expert, other),), drops), room, lost + short

    def _spare(
        self, host: int, droppable_EH: np.ndarray, slack_H: np.ndarray
    ) -> list[tuple[int, float]]:
        """Return replicas on ``host`` that can be dropped, as (expert, load that loses its room).

        At most `_VICTIMS`, those that lose the least first.
        """
        assert self.split is not None
        experts = np.flatnonzero(droppable_EH[:, host])
        others_NH = self.held_EH[experts].copy()
        others_NH[:, host] = False
        flow_N = self.split.flow_EH[experts, host]
        # What the slack of the expert's other hosts cannot take is lost.
        lost_N = np.maximum(flow_N - (others_NH * slack_H).sum(axis=1), 0.0)
        # At equal losses cold experts go first: the second replicas of hot ones let later shifts
        # of the load be balanced without moves.
        order = np.lexsort((self.load_E[experts], lost_N))[:_VICTIMS]
        return [(int(experts[i]), float(lost_N[i])) for i in order]

    def _swaps(self, over_H: np.ndarray, slack_H: np.ndarray, hosts: list[int]) -> Iterator[Step]:
        """Yield steps that exchange two experts that have one replica each."""
        split = self.split
        assert split is not None
        single_E = (self.held_EH.sum(axis=1) == 1) & ~self.constraints.pinned_EH.any(axis=1)
        hot = np.argsort(-split.excess_H)[:2]
        for source in hot[split.excess_H[hot] > 0].tolist():
            here = np.flatnonzero(self.held_EH[:, source] & single_E)
            for target in hosts[:4]:
                there = np.flatnonzero(self.held_EH[:, target] & single_E)
                if not len(here) or not len(there):
                    continue
                # moved[i, j]: load that leaves `source` if here[i] and there[j] change places.
                moved = self.load_E[here][:, None] - self.load_E[there][None, :]
                fits = float(min(split.excess_H[source], slack_H[target]))
                # No more than the source's excess can be gained, and load above the target's
                # slack becomes excess there.
                gain = np.minimum(moved, split.excess_H[source]) - np.maximum(
                    moved - slack_H[target], 0.0
                )
                best = np.unravel_index(int(np.argmax(gain)), gain.shape)
                if fits > 0 and gain[best] > 0:
                    up, down = int(here[best[0]]), int(there[best[1]])
                    yield Step(
                        ((up, target), (down, source)),
                        ((up, source), (down, target)),
                        float(gain[best]),
                    )
