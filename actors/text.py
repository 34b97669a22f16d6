"""From token ids to text, piece by piece: nothing is ever taken back once it was given out.

Two pure filters in a row:

    token ids -> Detokenizer -> text -> StopSearch -> text that may be sent

``Detokenizer`` holds back what may still be the beginning of a character, ``StopSearch`` what may
still be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A byte that does not (yet) make a character decodes to this one.
_BROKEN = "\ufffd"
# A character has four bytes at most, so of a longer row of broken ones only the last three can
# still become one.
_MAX_BROKEN_HELD = 3
# Prompt tokens that are decoded again before the first generated one; more than one because
# special tokens decode to nothing.
_CONTEXT_TOKENS = 8


class Detokenizer:
    """Decodes a growing list of token ids; the pieces add up to the decoded whole.

    ``decode`` is the tokenizer's own and need not be additive: sentencepiece drops the space before
    the first token, byte fallback joins neighbours. So each step decodes the tokens of the last
    piece together with the new ones and gives out the difference.

    ``context`` are ids that stand before the first one and are not given out: with them a
    sentencepiece completion starts with its space.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], *, context: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        # Tokens of the last piece given out, then those whose text is not complete yet.
        self._context = list(context[-_CONTEXT_TOKENS:])
        self._context_text = decode(self._context) if self._context else ""
        self._pending: list[int] = []
        self._sent = 0  # characters of the pending tokens' text that are already out

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; empty while a character lacks bytes."""
        return "".join(self._push_one(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """What was held back, at the end: broken characters come out as U+FFFD."""
        rest = self._pending_text()[self._sent :]
        self._pending, self._sent = [], 0
        return rest

    def _push_one(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._pending_text()
        whole = len(text.rstrip(_BROKEN))
        end = max(whole, len(text) - _MAX_BROKEN_HELD)
        piece = text[self._sent : end]
        if text and whole == len(text):
            self._context, self._pending, self._sent = self._pending, [], 0
            self._context_text = self._decode(self._context)
        else:
            self._sent = max(self._sent, end)
        return piece

    def _pending_text(self) -> str:
        if not self._pending:
            return ""
        text = self._decode([*self._context, *self._pending])
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # Byte fallback decodes a run of byte tokens as one: a broken byte after good ones changes
        # the text before it, which is already out. The run starts anew here.
        self._context, self._context_text = [], ""
        return self._decode(self._pending)


class StopSearch:
    """Cuts a text that arrives in pieces before the stop string that is complete first.

    How the text is cut into pieces makes no difference. Of two stop strings that end at the same
    character the longer one counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """``(text that may be sent, whether a stop string was found)``; the latter ends it."""
        text = self._held + text
        ends = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if ends:
            self._held = ""
            return text[: min(ends)[1]], True
        safe = len(text) - possible_start(text, self._stops)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


def possible_start(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins one of ``marks``, and is none of them."""
    longest = max(map(len, marks), default=0)
    for length in range(min(len(text), longest - 1), 0, -1):
        end = text[len(text) - length :]
        if any(mark.startswith(end) for mark in marks):
            return length
    return 0
