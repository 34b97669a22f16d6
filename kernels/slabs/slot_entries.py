"""What each slot of a slab holds, in memory that other processes read while it changes.

A slot's generation is odd while the slot is written or freed, and even otherwise. A reader that
finds the same even generation before and after it used a slot has used one expert's weights, whole.
A counter says how many changes of any slot have begun: a reader for whom it stayed the same need
not look at the generations.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from .layout import SLOT_ENTRY_BYTES, SlabLayout

_ENTRY = np.dtype(
    [
        ("generation", np.uint64),
        ("version", np.uint64),
        ("checksum", np.uint64),
        ("state", np.uint32),
        ("place", np.uint32),
    ]
)
assert _ENTRY.itemsize == SLOT_ENTRY_BYTES


class SlotState(IntEnum):
    """What a slot holds. Memory begins with zeros, so 0 is an empty slot."""

    EMPTY = 0
    READY = 1


class SlotEntries:
    """The entries of all slots, by the slots' numbers; one thread at a time writes one of them."""

    def __init__(self, layout: SlabLayout, memory: Any) -> None:
        self._slots = np.frombuffer(
            memory, dtype=_ENTRY, count=layout.slots, offset=layout.entries_start
        )
        changes = np.frombuffer(memory, np.uint64, count=1, offset=layout.changes_start)
        self._changes = changes.data  # read in each call, where an array takes twice as long

    # ---- reading --------------------------------------------------------------------------------

    @property
    def changes(self) -> int:
        """How many changes of slots have begun: nothing has changed while it stays the same."""
        return self._changes[0]

    def generation(self, slot: int) -> int:
        """Return a slot's generation, which is odd while the slot changes."""
        return int(self._slots["generation"][slot])

    def generations(self, slots: np.ndarray) -> np.ndarray:
        return self._slots["generation"][slots]

    def version(self, slot: int) -> int | None:
        """Return the version of the weights in a slot, or None if it is empty."""
        entry = self._slots[slot]
        return int(entry["version"]) if entry["state"] == SlotState.READY else None

    def checksum(self, slot: int) -> int:
        return int(self._slots["checksum"][slot])

    def place(self, slot: int) -> int:
        """Return where the weights lie that a slot holds, if the layout does not say it."""
        return int(self._slots["place"][slot])

    def filled(self) -> list[int]:
        """Return the slots that hold an expert and do not change."""
        ready = (self._slots["state"] == SlotState.READY) & (self._slots["generation"] % 2 == 0)
        return np.flatnonzero(ready).tolist()

    def changing(self) -> list[int]:
        """Return the slots that are written or freed at the moment."""
        return np.flatnonzero(self._slots["generation"] % 2).tolist()

    # ---- writing --------------------------------------------------------------------------------

    def begin(self, slot: int) -> None:
        """Say that a slot changes; only then change it. `fill` or `empty` ends the change."""
        self._begin(self._slots[slot])

    def fill(self, slot: int, version: int, *, checksum: int = 0, place: int = 0) -> None:
        """End a change: the slot holds an expert now."""
        entry = self._slots[slot]
        entry["version"] = version
        entry["checksum"] = checksum
        entry["place"] = place
        entry["state"] = SlotState.READY
        entry["generation"] += 1

    def empty(self, slot: int) -> None:
        """End a change: the slot holds nothing."""
        entry = self._slots[slot]
        entry["state"] = SlotState.EMPTY
        entry["generation"] += 1

    def take_over(self) -> list[int]:
        """Return the slots that an owner was changing when it ended; `empty` them."""
        self._changes[0] += 1  # it may have ended before it counted
        return self.changing()

    def retire(self) -> None:
        """Tell all readers that no slot may be used any more."""
        self._slots["state"] = SlotState.EMPTY
        self._begin(self._slots)

    def _begin(self, entries: Any) -> None:
        # Whoever sees the new number of changes must find the new generations: these are first.
        entries["generation"] += 1
        self._changes[0] += 1
