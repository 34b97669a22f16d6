"""How large a part of a call a router computes itself, with experts that hosts lend to it.

A lent expert is one more replica, as fast as the trunk's own threads. Whether these threads alone
are faster than threads and hosts together depends on the size of the call, on the machine, and on
what else the hosts do. So it is measured: for each size of call, all parts are tried, and the
fastest is used. The others are tried again now and then, the more rarely the slower they were, so
that trying costs a bounded fraction of the time.

This is a multi-armed bandit with few arms and a changing world; nothing here is random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# The parts that are tried: everything, parts that leave the hosts their share, and nothing.
PARTS = (1.0, 0.5, 0.33, 0.0)
# Each part is tried so often before the first decision; the fastest try counts, since the first
# ones are slow for reasons of their own.
_FIRST_TRIES = 2
# Weight of the last call in the running mean of a part's time.
_NEW = 0.1
# A call that takes longer than so many times the mean was disturbed, and counts as this.
_DISTURBED = 4.0
# A call without a result counts as one that has taken so many times as long.
_FAILED = 4.0
# What trying one other part may cost, as a fraction of all time.
_COST = 0.005
_FEWEST_BETWEEN, _MOST_BETWEEN = 16, 4096


@dataclass(frozen=True, slots=True)
class ShareChoice:
    """What was chosen for one call: `LendingShare.took` wants it back."""

    assignments: int
    part: float  # of the assignments, for the router itself

    @property
    def size(self) -> int:
        return self.assignments.bit_length()


@dataclass(slots=True)
class _Part:
    tries: int = 0  # that have begun
    times: int = 0  # that are known
    mean_s: float = math.inf  # of one assignment
    try_at: int = 0  # the number of the call that tries it again


@dataclass(slots=True)
class _Size:
    """Calls whose numbers of assignments have the same number of binary digits."""

    calls: int = 0
    parts: dict[float, _Part] = field(default_factory=lambda: {part: _Part() for part in PARTS})

    @property
    def fastest(self) -> float:
        return min(self.parts, key=lambda part: self.parts[part].mean_s)


class LendingShare:
    """The times of calls by their sizes; used under the router's lock."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def choose(self, assignments: int) -> ShareChoice:
        """Choose the part of a call with so many assignments that the router computes itself.

        `took` or `failed` has to say what became of the call.
        """
        choice = ShareChoice(assignments, self._next(assignments))
        size = self._sizes[choice.size]
        known = size.parts[choice.part]
        size.calls += 1
        if known.tries < _FIRST_TRIES:
            known.tries += 1
        elif choice.part != size.fastest:
            known.try_at = size.calls + _MOST_BETWEEN  # unless its time is known before
        return choice

    def keeps_all(self, assignments: int) -> bool:
        """Return whether `choose` would choose everything."""
        return self._next(assignments) == 1.0

    def _next(self, assignments: int) -> float:
        """Return the part of the next call with so many assignments."""
        size = self._sizes.setdefault(assignments.bit_length(), _Size())
        for part, known in size.parts.items():
            if known.tries < _FIRST_TRIES:
                return part
        fastest = size.fastest
        for part, known in size.parts.items():
            if part != fastest and size.calls + 1 >= known.try_at:
                return part
        return fastest

    def took(self, choice: ShareChoice, seconds: float) -> None:
        """Take note of how long a call has taken, from its dispatch to its result."""
        size = self._sizes[choice.size]
        known, one_s = size.parts[choice.part], seconds / max(1, choice.assignments)
        known.times += 1
        if known.times <= _FIRST_TRIES or math.isinf(known.mean_s):
            known.mean_s = min(known.mean_s, one_s)
        else:
            mean_s = min(known.mean_s, _DISTURBED * one_s)  # what failed before may be well again
            known.mean_s = mean_s + _NEW * (min(one_s, _DISTURBED * mean_s) - mean_s)
        self._plan_next_try(size, known)

    def failed(self, choice: ShareChoice) -> None:
        """Take note that a call has ended without a result; that may be due to the part chosen."""
        size = self._sizes[choice.size]
        known = size.parts[choice.part]
        known.mean_s *= _FAILED
        self._plan_next_try(size, known)

    def _plan_next_try(self, size: _Size, known: _Part) -> None:
        fastest_s = size.parts[size.fastest].mean_s
        between = _MOST_BETWEEN
        if 0 < fastest_s < math.inf and not math.isinf(known.mean_s):
            slower = known.mean_s / fastest_s - 1.0
            between = min(max(int(slower / _COST), _FEWEST_BETWEEN), _MOST_BETWEEN)
        known.try_at = size.calls + between
