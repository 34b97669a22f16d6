"""Find where a JSON object or array ends in a text that arrives in pieces, reading it once."""

from __future__ import annotations

import re

# Arguments of functions are not nested deeper. Python's own decoder fails at about a thousand.
MOST_DEPTH = 100
_SPACE = " \t\r\n"
_PLAIN = re.compile(r'[^"\\]*')  # part of a string; includes raw newlines, which models write
_SCALAR = re.compile(r"[A-Za-z0-9+.\-]*")
_CLOSES = {"{": "}", "[": "]"}


class JsonEnd:
    """Finds the end of one JSON object or array.

    It rejects other text at the first character that cannot belong to one. Numbers, literals
    and escapes are left to the decoder that reads the text afterwards.
    """

    def __init__(self) -> None:
        self._closers: list[str] = []  # closing brackets still to come, the next one last
        self._expects = "value"
        self._in_string = self._escaped = self._in_scalar = False

    def push(self, text: str, at: int = 0) -> int | None:
        """Read ``text[at:]``, and return the index in ``text`` after the end.

        Returns None where the JSON continues. Raises ValueError where it is not JSON.
        """
        while at < len(text):
            if self._in_string:
                at = self._string(text, at)
                continue
            if self._in_scalar:
                at = _found(_SCALAR, text, at)
                if at == len(text):
                    break
                self._in_scalar = False
            if text[at] not in _SPACE:
                self._take(text[at])
            at += 1
            if not self._closers and self._expects == "more":
                return at
        return None

    def _string(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        at = _found(_PLAIN, text, at)
        if at < len(text):
            self._escaped = text[at] == "\\"
            self._in_string = self._escaped
            at += 1
        return at

    def _take(self, one: str) -> None:
        """Take a character outside strings and scalars."""
        expects = self._expects
        if expects in ("value", "first value") and one in _CLOSES:
            if len(self._closers) == MOST_DEPTH:
                raise ValueError(f"nested deeper than {MOST_DEPTH}")
            self._closers.append(_CLOSES[one])
            self._expects = "first key" if one == "{" else "first value"
        elif not self._closers:
            raise ValueError(f"{one!r} begins no object or array")
        elif expects in ("value", "first value") and (one == '"' or _found(_SCALAR, one, 0)):
            self._in_string, self._in_scalar = one == '"', one != '"'
            self._expects = "more"
        elif expects in ("key", "first key") and one == '"':
            self._in_string, self._expects = True, "colon"
        elif expects == "colon" and one == ":":
            self._expects = "value"
        elif expects == "more" and one == ",":
            self._expects = "key" if self._closers[-1] == "}" else "value"
        elif expects in ("more", "first key", "first value") and one == self._closers[-1]:
            self._closers.pop()
            self._expects = "more"
        else:
            raise ValueError(f"{one!r} where a {expects} is expected")


def _found(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Return where the match ends of a pattern that matches everywhere."""
    found = pattern.match(text, at)
    assert found is not None
    return found.end()
