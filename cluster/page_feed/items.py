"""What the page shows, as named items with revisions.

Whoever tells its revision gets what has changed since then. The controller keeps such a store, the
ingress has a copy of it with items of its own, and each open page has a copy of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

# Removed items that are remembered. A copy from before that gets everything.
_REMEMBERED = 4096


class FeedRevision(NamedTuple):
    """The state of a store: the term of the controller that keeps it, and a count of changes."""

    term: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemChanges:
    """What makes the items of ``since`` those of ``revision``."""

    since: FeedRevision | None  # None: the values are all items that there are
    revision: FeedRevision
    values: Mapping[str, Any]  # JSON values; arrays of unsigned integers may stand in them
    removed: tuple[str, ...] = field(default=())

    @property
    def empty(self) -> bool:
        return self.since == self.revision


class ItemStore:
    """Items with the revision at which each last changed."""

    def __init__(self, term: int) -> None:
        """Start without items; ``term`` tells this store from those of other controllers."""
        self._term = term
        self._count = 0
        self._changed = False
        self._values: dict[str, Any] = {}
        self._stamps: dict[str, int] = {}
        self._removed: dict[str, int] = {}  # the oldest first
        self._complete_since = 0  # all removals after this one are in `_removed`

    @property
    def revision(self) -> FeedRevision:
        return FeedRevision(self._term, self._count)

    @property
    def values(self) -> Mapping[str, Any]:
        return self._values

    def put(self, name: str, value: Any) -> None:
        """Set an item, which changes it only if the value differs."""
        if name in self._values and same_value(self._values[name], value):
            return
        self._values[name] = value
        self._stamps[name] = self._count + 1
        self._removed.pop(name, None)
        self._changed = True

    def remove(self, name: str) -> None:
        """Remove an item, if it is there."""
        if name not in self._values:
            return
        del self._values[name], self._stamps[name]
        self._removed[name] = self._count + 1
        self._changed = True

    def put_group(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Set all items whose names begin with ``prefix``: those that are not given go."""
        for name in [one for one in self._values if one.startswith(prefix)]:
            if name.removeprefix(prefix) not in values:
                self.remove(name)
        for name, value in values.items():
            self.put(prefix + name, value)

    def commit(self) -> bool:
        """End a round of changes, which get one revision; return whether there was any."""
        changed, self._changed = self._changed, False
        self._count += changed
        while len(self._removed) > _REMEMBERED:
            oldest = next(iter(self._removed))
            self._complete_since = max(self._complete_since, self._removed.pop(oldest))
        return changed

    def since(self, known: FeedRevision | None) -> ItemChanges:
        """Return what has changed since ``known``, or all items if that is of no use here."""
        if not self._reaches(known):
            return ItemChanges(since=None, revision=self.revision, values=dict(self._values))
        assert known is not None
        since = known.number
        values = {name: self._values[name] for name, at in self._stamps.items() if at > since}
        removed = tuple(name for name, at in self._removed.items() if at > since)
        return ItemChanges(since=known, revision=self.revision, values=values, removed=removed)

    def _reaches(self, known: FeedRevision | None) -> bool:
        return (
            known is not None
            and known.term == self._term
            and self._complete_since <= known.number <= self._count
        )


def applied(items: Mapping[str, Any], changes: ItemChanges) -> dict[str, Any]:
    """Return ``items``, which are those of ``changes.since``, after the changes."""
    kept = {} if changes.since is None else dict(items)
    for name in changes.removed:
        kept.pop(name, None)
    kept.update(changes.values)
    return kept


def same_value(one: Any, other: Any) -> bool:
    """Return whether two values of items are equal; arrays also in their type."""
    if one is other:
        return True
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return (
            isinstance(one, np.ndarray)
            and isinstance(other, np.ndarray)
            and one.dtype == other.dtype
            and np.array_equal(one, other)
        )
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_value(one[k], other[k]) for k in one)
    return type(one) is type(other) and bool(one == other)
