"""The lines of a log: text and JSON, their ids, and that nobody can write a line into them."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.actors.runtime.log_lines import escaped, formatter, is_log_line


def record(message: str, *args: object, name: str = "moesaic.actors.host.host_loop", **more: Any):
    made = logging.getLogger(name).makeRecord(
        name, logging.INFO, __file__, 1, message, args, more.pop("exc_info", None), extra=more
    )
    made.created = 1_700_000_000.0625
    return made


def text(one: logging.LogRecord) -> str:
    return formatter("text", "host-0").format(one)


def values(one: logging.LogRecord) -> dict[str, Any]:
    return json.loads(formatter("json", "host-0").format(one))


def test_a_line_of_text() -> None:
    ids = {"calls": ["r/1/2", "r/1/3"], "took_ms": 1.25, "who": "two words", "nothing": None}
    assert text(record("done with %d", 2, **ids)) == (
        f"2023-11-14T22:13:20.062Z info host-0[{os.getpid()}] actors.host.host_loop: done with 2 "
        'calls=r/1/2,r/1/3 took_ms=1.25 who="two words"'
    )


def test_a_line_of_json() -> None:
    ids = {"calls": ["r/1/2"], "step": 1, "hedge": False, "nothing": None}
    assert values(record("done with %d", 2, **ids)) == {
        "ts": "2023-11-14T22:13:20.062Z",
        "level": "info",
        "logger": "actors.host.host_loop",
        "process": "host-0",
        "pid": os.getpid(),
        "message": "done with 2",
        "calls": ["r/1/2"],
        "step": 1,
        "hedge": False,
    }


def test_an_id_replaces_no_key_of_every_line() -> None:
    assert values(record("m", level="x", ts="y", pid=0))["level"] == "info"


def test_a_library_keeps_its_name_and_adds_no_ids() -> None:
    found = values(record("m", name="uvicorn.error", color_message="m"))
    assert (found["logger"], "color_message" in found) == ("uvicorn.error", False)


def failed() -> logging.LogRecord:
    try:
        raise ValueError("first\n2023-11-14T22:13:20.062Z error host-0[1] x: forged")
    except ValueError:
        return record("it failed", exc_info=sys.exc_info())


def test_a_traceback_is_indented_in_text_and_a_key_in_json() -> None:
    first, *rest = text(failed()).split("\n")
    assert first.endswith("it failed")
    assert rest[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in rest)
    assert not any(map(is_log_line, rest))
    assert "ValueError: first\n" in values(failed())["exception"]


anything = st.text() | st.text('\n\r\x00\x1b\x7f\x85\u2028\u202e\ud800"\\= {a')


@given(anything, anything)
def test_no_text_makes_a_second_line(message: str, identity: str) -> None:
    for form in ("text", "json"):
        line = formatter(form, "host-0").format(record("%s", message, request_id=identity))
        assert line.isprintable()
        assert line.splitlines() == [line]
        assert is_log_line(line)
    found = values(record("%s", message, request_id=identity))
    assert (found["message"], found["request_id"]) == (message, identity)


@given(anything)
def test_what_is_printable_stays_as_it_is(given_text: str) -> None:
    assert escaped(given_text).isprintable()
    if given_text.isprintable():
        assert escaped(given_text) == given_text


@pytest.mark.parametrize(
    "line", ["", "moesaic: host host-0 of local", "2023-11-14 info", '{"a": 1}']
)
def test_other_output_is_no_line_of_ours(line: str) -> None:
    assert not is_log_line(line)
