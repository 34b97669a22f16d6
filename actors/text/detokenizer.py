"""Turn token ids into text piece by piece; a piece that was given out is never taken back.

Two pure filters in a row:

    token ids -> Detokenizer -> text -> StopSearch -> text that may be sent

`Detokenizer` holds back what may be the beginning of a character. `StopSearch` holds back what may
be the beginning of a stop string. Both know which characters special tokens wrote: these are
searched like all others, and hidden from the client afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .marked_text import MarkedText
from .vocabulary import Vocabulary

# Decoders write this for bytes that do not, or not yet, make a character.
_BROKEN = "\ufffd"
# A character has four bytes at most. So in a longer row of broken ones only the last three can
# still become part of a character.
_MAX_BROKEN_HELD = 3
# How many of the last prompt tokens are decoded together with the first generated token. More than
# one, since some tokens write nothing.
_CONTEXT_TOKENS = 8
_NOTHING = MarkedText()


class Written(NamedTuple):
    """What one token writes at its place.

    ``text``: its characters; for a part of a character, ``bytes:`` and its bytes as Python
    prints them. ``bytes``: its own bytes. Those of all tokens together make the text that a
    client gets, so special tokens have none. ``start``: characters before it in the whole text.
    ``offset``: characters before it in the text without special tokens. For a part of a
    character, both count up to that character.
    """

    text: str
    bytes: bytes
    start: int
    offset: int


class Detokenizer:
    """Decodes a growing list of token ids; the pieces add up to the whole decoded text.

    The tokenizer's decoder need not be additive: sentencepiece drops the space before the first
    token, and byte fallback joins neighbours. So each step decodes the tokens of the last piece
    together with the new ones and returns the difference. Special tokens write their own text,
    which no decoder changes, and end a character that lacks bytes. The ordinary text around
    them is the same as it would be without them.

    ``context`` are ids that stand before the first one and are not given out. With them a
    sentencepiece completion starts with its space.
    """

    def __init__(self, vocabulary: Vocabulary, *, context: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._decode = vocabulary.decode
        self._special, self._last = vocabulary.special, vocabulary.last
        # `_context`: tokens of the last piece given out; `_pending`: those with incomplete text.
        near = context[-_CONTEXT_TOKENS:]
        self._context = [one for one in near if one <= self._last and one not in self._special]
        self._context_text = self._decode(self._context) if self._context else ""
        self._pending: list[int] = []
        self._text = ""  # of the pending tokens
        self._sent = 0  # characters of `_text` that were given out
        self._out = 0  # characters given out
        self._out_special = 0  # those of them that special tokens wrote

    def push(self, token_ids: Sequence[int]) -> MarkedText:
        """Return the text that these tokens complete; empty while a character lacks bytes."""
        text = _NOTHING
        for token_id in token_ids:
            mark = self._special.get(token_id)
            if mark is not None:
                text += self._push_special(token_id, mark)
            elif token_id <= self._last and (piece := self._push_ordinary(token_id)):
                text += MarkedText(piece)
        return text

    def flush(self) -> MarkedText:
        """Return what was held back, at the end; broken characters become U+FFFD."""
        rest = self._text[self._sent :]
        self._pending, self._text, self._sent = [], "", 0
        self._out += len(rest)
        return MarkedText(rest)

    def look(self, token_id: int) -> Written:
        """Return what this token would write if it were pushed next."""
        begin = self._out - self._sent  # of the pending tokens' text
        mark = self._special.get(token_id)
        if mark is not None:
            start = begin + len(self._text)
            return Written(mark, b"", start, start - self._out_special)
        if token_id > self._last:
            return Written("", b"", begin, begin - self._out_special)
        before, tokens = self._text, [*self._pending, token_id]
        after = self._behind_context(tokens)
        if after is None:
            after = self._decode(tokens)
        # Broken characters at the end may turn into one character, which begins where they begin.
        kept = min(_alike(before, after), len(after.rstrip(_BROKEN)))
        start, own = begin + kept, after[kept:]
        if kept < len(before) or _BROKEN in own:
            raw = self._vocabulary.own_bytes(token_id)
            if raw is not None:
                return Written(_readable(raw), raw, start, start - self._out_special)
        return Written(own, own.encode("utf-8"), start, start - self._out_special)

    def _push_ordinary(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._behind_context(self._pending)
        if text is None:
            self._context, self._context_text = [], ""
            text = self._decode(self._pending)
        self._text = text
        whole = len(text.rstrip(_BROKEN))
        end = max(whole, len(text) - _MAX_BROKEN_HELD)
        piece = text[self._sent : end]
        self._out += len(piece)
        if text and whole == len(text):
            self._context, self._pending, self._text, self._sent = self._pending, [], "", 0
            self._context_text = self._decode(self._context)
        else:
            self._sent = max(self._sent, end)
        return piece

    def _push_special(self, token_id: int, mark: str) -> MarkedText:
        rest = _NOTHING
        if len(self._text) > self._sent:
            rest = self.flush()
            # After it a new character begins, and a space is no longer the first of the text, which
            # sentencepiece would drop.
            self._context, self._context_text = [token_id], self._decode([token_id])
        self._out += len(mark)
        self._out_special += len(mark)
        return rest + MarkedText(mark, ((0, len(mark)),))

    def _behind_context(self, token_ids: Sequence[int]) -> str | None:
        """Return the text of ``token_ids`` after the context.

        Returns None where they change the context's text, which was given out already. Byte
        fallback decodes a run of byte tokens as one, so a broken byte after good ones
        changes it; the caller then starts a new run.
        """
        text = self._decode([*self._context, *token_ids])
        begin = self._context_text
        return text[len(begin) :] if text.startswith(begin) else None


def _alike(one: str, other: str) -> int:
    """Return how many characters at the beginning are the same."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _readable(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        # OpenAI's notation; with U+FFFD all parts of characters would look the same.
        return f"bytes:{repr(raw)[2:-1]}"


class StopSearch:
    """Cuts a text that arrives in pieces before the stop string that is complete first.

    Stop strings are searched for in the whole text and in the text without special tokens. How
    the text is cut into pieces makes no difference. Of two stop strings that end at the same
    character the longer one counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = _NOTHING

    def push(self, text: MarkedText) -> tuple[MarkedText, bool]:
        """Return the text that may be sent, and whether a stop string was found.

        A stop string ends the text.
        """
        if not self._stops:
            return text, False
        text = self._held + text
        safe = len(text) - possible_start(text.text, self._stops)
        found = list(self._found(text.text))
        if text.special:
            # Places in the visible text are mapped to places in the whole text.
            visible, places = text.visible, _places(text)
            found += ((places[end - 1] + 1, places[start]) for end, start in self._found(visible))
            if length := possible_start(visible, self._stops):
                safe = min(safe, places[-length])
        if found:
            self._held = _NOTHING
            return text[: min(found)[1]], True
        if safe == len(text):
            self._held = _NOTHING
            return text, False
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> MarkedText:
        """Return what was held back, when the text ends without a stop string."""
        held, self._held = self._held, _NOTHING
        return held

    def _found(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield (end, start) of the first place of each stop string."""
        for stop in self._stops:
            if (start := text.find(stop)) >= 0:
                yield start + len(stop), start


def _places(text: MarkedText) -> list[int]:
    """Return the index in the whole text of each visible character."""
    places: list[int] = []
    at = 0
    for start, end in text.special:
        places += range(at, start)
        at = end
    places += range(at, len(text))
    return places


def possible_start(text: str, marks: Sequence[str]) -> int:
    """Return the length of the longest end of ``text`` that may be the beginning of a mark.

    A whole mark does not count.
    """
    longest = max(map(len, marks), default=0)
    for length in range(min(len(text), longest - 1), 0, -1):
        end = text[len(text) - length :]
        if any(mark.startswith(end) for mark in marks):
            return length
    return 0
