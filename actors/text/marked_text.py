"""Text that records which of its characters special tokens wrote.

Searches in an answer (stop strings, tool calls, thinking) see the whole text; the client gets what
is left without special tokens. Text that only looks like a special token, but was spelled with
ordinary ones, is ordinary text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text; ``special`` has the ranges ``[start, end)`` that special tokens wrote, in order."""

    text: str = ""
    special: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.text)

    def __add__(self, other: MarkedText) -> MarkedText:
        if not self.text:
            return other
        if not other.text:
            return self
        moved = ((start + len(self), end + len(self)) for start, end in other.special)
        return MarkedText(self.text + other.text, (*self.special, *moved))

    def __getitem__(self, part: slice) -> MarkedText:
        """Return a part without a step; a special range that is cut stays special on both sides."""
        start, end, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"a step of {step}; only contiguous parts can be taken")
        first = bisect_right(self.special, start, key=itemgetter(1))
        last = bisect_left(self.special, end, key=itemgetter(0))
        clipped = ((max(s, start), min(e, end)) for s, e in self.special[first:last])
        return MarkedText(
            self.text[start:end], tuple((s - start, e - start) for s, e in clipped if s < e)
        )

    @staticmethod
    def joined(parts: Iterable[MarkedText]) -> MarkedText:
        """Return all parts as one text, in time proportional to its length."""
        texts: list[str] = []
        special: list[tuple[int, int]] = []
        length = 0
        for part in parts:
            special += ((start + length, end + length) for start, end in part.special)
            texts.append(part.text)
            length += len(part)
        return MarkedText("".join(texts), tuple(special))

    @property
    def visible(self) -> str:
        """The text without special tokens."""
        if not self.special:
            return self.text
        pieces, at = [], 0
        for start, end in self.special:
            pieces.append(self.text[at:start])
            at = end
        return "".join(pieces) + self.text[at:]
