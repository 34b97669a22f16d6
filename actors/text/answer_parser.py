"""Split an answer, as a model writes it, into thinking, tool calls, and content.

A call is JSON after ``<tool_call>``, and ends where that JSON is complete, whatever marks stand in
its strings. If no call follows the mark, the text stays content, marks included. Nothing within
thinking is a call.

Newlines next to the marks of thinking belong to the marks, as chat templates write them. So do
spaces around calls that have no text next to them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

from .detokenizer import possible_start
from .json_end import JsonEnd
from .marked_text import MarkedText
from .thinking import Thinking
from .tool_calls import BEGIN, END, ToolCall, read_calls

_NOTHING = MarkedText()
_CALL_MARK = re.compile(f"{re.escape(BEGIN)}|{re.escape(END)}")
_BETWEEN_CALLS = re.compile(r"[ \t\r\n,]*")  # between the calls in one pair of marks


@dataclass(frozen=True, slots=True)
class Parsed:
    """The parts of the answer that may be sent now."""

    content: MarkedText = _NOTHING
    reasoning: MarkedText = _NOTHING
    calls: tuple[ToolCall, ...] = ()


class AnswerParser:
    """Parses a text that arrives in pieces; how it is cut makes no difference.

    Each state is a method that takes what it can from the held text and returns whether it made
    progress; if not, it needs more text. The total time is proportional to the length of the
    text.
    """

    def __init__(self, thinking: Thinking | None = None, *, most_calls: int | None = 0) -> None:
        """Create a parser.

        ``thinking`` is None where the template has no marks of thinking; if the model
        thinks anyway, its thinking stays in the content. ``most_calls``: 0 for none, None
        for any number.
        """
        self._thinking = thinking or Thinking()
        self._splits = thinking is not None
        self._most_calls = most_calls
        self._found = 0
        self._held, self._at = _NOTHING, 0  # the text, and how much of it was taken
        self._ended = False  # no more text will come
        self._content: list[MarkedText] = []  # these three: what the next `Parsed` has
        self._reasoning: list[MarkedText] = []
        self._calls: list[ToolCall] = []
        # Spaces that are content if text follows, and dropped if a call does; None within text.
        self._gap: MarkedText | None = _NOTHING
        self._in_doubt = False  # after a mark that begins thinking, within the content
        self._kept: list[MarkedText] = []  # text that may still be a call or thinking
        self._tail = ""  # its last characters, which may begin a mark
        marks = (BEGIN, self._thinking.begin, self._thinking.end)
        self._marks = (*marks, END)
        self._mark = re.compile("|".join(map(re.escape, marks)))
        parses = self._splits or most_calls != 0
        self._state: Callable[[], bool] = self._begin if parses else self._pass

    @property
    def full(self) -> bool:
        """Whether all calls that are wanted were found; what follows is dropped."""
        return self._found > 0 and self._found == self._most_calls

    @property
    def unread(self) -> int:
        """The number of characters that are not parsed yet.

        Once the parser is full, these are the characters after the last call.
        """
        return len(self._held) - self._at

    def push(self, text: MarkedText) -> Parsed:
        self._held, self._at = self._held[self._at :] + text, 0
        while not self.full and self._state():
            pass
        parsed = Parsed(
            MarkedText.joined(self._content),
            MarkedText.joined(self._reasoning),
            tuple(self._calls),
        )
        self._content, self._reasoning, self._calls = [], [], []
        return parsed

    def flush(self) -> Parsed:
        """Parse what was held back, once the text has ended."""
        self._ended = True
        return self.push(_NOTHING)

    # ---- thinking -------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Take the beginning of the answer, which may be thinking."""
        begin = self._thinking.begin
        rest = self._held.text.lstrip()
        if rest != begin and begin.startswith(rest) and not self._ended:
            return False
        opened = self._splits and self._thinking.opened
        if rest.startswith(begin):
            self._take_mark(len(self._held) - len(rest) + len(begin))
        elif not opened:
            return self._go(self._text)
        return self._go(partial(self._newlines, self._think) if self._splits else self._think)

    def _think(self) -> bool:
        end = self._thinking.end
        text, mark, _ = self._rest().partition(end)
        if not mark and not self._ended:
            text = text[: len(text) - possible_start(text, (end,))]
        said = text.rstrip("\n") if self._splits else text
        (self._reasoning if self._splits else self._content).append(self._take(len(said)))
        if not mark and not self._ended:
            return False  # more may follow the newlines
        self._take_mark(len(text) - len(said) + len(mark))
        behind = partial(self._newlines, self._text) if self._splits else self._text
        return bool(mark) and self._go(behind)

    def _take_mark(self, characters: int) -> None:
        mark = self._take(characters)
        if not self._splits:
            self._content.append(mark)

    def _newlines(self, following: Callable[[], bool]) -> bool:
        rest = self._rest()
        self._take(len(rest) - len(rest.lstrip("\n")))
        return bool(rest.lstrip("\n") or self._ended) and self._go(following)

    # ---- text -----------------------------------------------------------------------------------

    def _pass(self) -> bool:
        self._content.append(self._take(len(self._held) - self._at))
        return False

    def _text(self) -> bool:
        if self._most_calls == 0:
            return self._go(self._pass)
        call = None
        for mark in self._mark.finditer(self._held.text, self._at):
            if mark.group() == BEGIN:
                call = mark.start()
                break
            self._in_doubt = mark.group() == self._thinking.begin
        end = len(self._held) if call is None else call
        if call is None and not self._ended:
            end -= possible_start(self._rest(), self._marks)
        self._say(self._take(end - self._at))
        if call is None:
            if self._ended and self._gap is not None and not self._found:
                self._content.append(self._gap)
            return False
        if self._in_doubt:
            return self._go(self._doubt)
        self._take(len(BEGIN))
        return self._go(partial(self._json, JsonEnd(), marked=True))

    def _say(self, text: MarkedText) -> None:
        """Take text for the client.

        Marks around what turned out not to be a call are shown, even where they are special
        tokens.
        """
        if text.special:
            marks = [mark.span() for mark in _CALL_MARK.finditer(text.text)]
            hidden = (one for one in text.special if not _within(one, marks))
            text = MarkedText(text.text, tuple(hidden))
        if self._gap is not None:
            text = self._gap + text
            if not text.text.strip():
                self._gap = text
                return
            self._gap = None
        self._content.append(text)

    def _doubt(self) -> bool:
        """Decide about a mark of a call that follows a mark of thinking within the content.

        If that thinking has an end, the mark is no call; if it has none, it was no
        thinking.
        """
        end, text = self._thinking.end, self._tail + self._rest()
        found = text.find(end)
        if found >= 0:
            self._kept.append(self._take(found + len(end) - len(self._tail)))
            self._say(MarkedText.joined(self._kept))
        else:
            self._keep()
            self._tail = text[len(text) - possible_start(text, (end,)) :]
            if not self._ended:
                return False
            self._restore()
        self._kept, self._tail, self._in_doubt = [], "", False
        return self._go(self._text)

    # ---- calls ----------------------------------------------------------------------------------

    def _json(self, json: JsonEnd, *, marked: bool) -> bool:
        """Take the JSON of a call: after a mark where ``marked``, otherwise after another call."""
        try:
            end = json.push(self._held.text, self._at)
        except ValueError:
            return self._no_call(marked=marked)
        if end is None:
            self._keep()
            if self._ended:
                return self._cut_off(marked=marked)
            return False
        self._kept.append(self._take(end - self._at))
        text = MarkedText.joined(self._kept).text
        calls = read_calls(text[_skip(text, 0) :], marked=marked)
        if not calls:
            return self._no_call(marked=marked)
        if self._most_calls is not None:
            calls = calls[: self._most_calls - self._found]
        self._calls += calls
        self._found += len(calls)
        self._kept, self._gap = [], _NOTHING
        return self._go(self._after_call)

    def _no_call(self, *, marked: bool) -> bool:
        """Return to text; a call may still follow, after a mark of its own."""
        if self._kept:
            self._restore()
        if marked:
            self._say(MarkedText(BEGIN))
        return self._go(self._text)

    def _cut_off(self, *, marked: bool) -> bool:
        self._say(MarkedText.joined([MarkedText(BEGIN if marked else ""), *self._kept]))
        self._kept = []
        return False

    def _after_call(self) -> bool:
        text = self._held.text
        behind = _skip(text, self._at)
        if len(text) - behind < len(END) and END.startswith(text[behind:]) and not self._ended:
            return False  # also if nothing follows yet
        if text.startswith(END, behind):
            self._take(behind + len(END) - self._at)
        elif text.startswith(("{", "["), behind):
            self._kept.append(self._take(behind - self._at))
            return self._go(partial(self._json, JsonEnd(), marked=False))
        return self._go(self._text)

    # ---- the held text --------------------------------------------------------------------------

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _rest(self) -> str:
        return self._held.text[self._at :]

    def _take(self, characters: int) -> MarkedText:
        self._at += characters
        return self._held[self._at - characters : self._at]

    def _keep(self) -> None:
        """Keep the whole rest until the text after it shows what it is."""
        self._kept.append(self._take(len(self._held) - self._at))

    def _restore(self) -> None:
        """Put back what was kept, as text that was not taken."""
        self._held = MarkedText.joined([*self._kept, self._held[self._at :]])
        self._kept, self._at = [], 0


def _within(one: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    """Return whether the range ``one`` lies within one of ``spans``, which are in order."""
    before = bisect_right(spans, one[0], key=itemgetter(0))
    return before > 0 and one[1] <= spans[before - 1][1]


def _skip(text: str, at: int) -> int:
    """Return the index after what may stand between calls."""
    found = _BETWEEN_CALLS.match(text, at)
    assert found is not None
    return found.end()
