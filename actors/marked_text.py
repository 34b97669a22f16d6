"""Text in which the characters of special tokens are known.

What searches an answer (stop strings, calls of tools, thinking) sees the whole text; what a client
gets is what is left without special tokens. A text that merely looks like a special token and was
spelled with ordinary ones is ordinary text.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MarkedText:
    """``special``: the ranges ``[start, end)`` of ``text`` that special tokens wrote, in order."""

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
        """A part without a step; a special range that is cut stays special on both sides."""
        start, end, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"a step of {step}; only contiguous parts can be taken")
        if not self.special:
            return MarkedText(self.text[start:end])
        clipped = ((max(s, start) - start, min(e, end) - start) for s, e in self.special)
        return MarkedText(self.text[start:end], tuple((s, e) for s, e in clipped if s < e))

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
