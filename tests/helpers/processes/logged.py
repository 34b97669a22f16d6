"""What Moesaic logs in the test's own process, as JSON lines, and the way of a request in them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moesaic.actors.runtime.log_lines import formatter
from moesaic.actors.tracing.log_ids import TraceIds

Line = dict[str, Any]


class Logged:
    """The lines that have been written so far."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def lines(self) -> list[Line]:
        return [json.loads(line) for line in self.text.splitlines()]


@contextmanager
def logged(level: int = logging.DEBUG) -> Iterator[Logged]:
    """Write what Moesaic logs as JSON, at ``level``."""
    stream, ours = io.StringIO(), logging.getLogger("moesaic")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter("json", "test"))
    handler.addFilter(TraceIds())
    before = ours.level
    ours.addHandler(handler)
    ours.setLevel(level)
    try:
        yield Logged(stream)
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)


def of(lines: Iterable[Line], logger: str, **ids: Any) -> list[Line]:
    """The lines of one file with these ids."""
    return [
        line
        for line in lines
        if line["logger"] == logger and all(line.get(key) == value for key, value in ids.items())
    ]


def steps_of(lines: Iterable[Line], request_id: str) -> list[tuple[str, int]]:
    """(router, step) of every step that had a request."""
    return [
        (line["router"], line["step"])
        for line in of(lines, "actors.engine.step_log")
        if request_id in line["requests"]
    ]


def calls_of(lines: Iterable[Line], router: str, step: int) -> dict[str, set[str]]:
    """The hosts to which a router sent the calls of a step, by the calls' ids."""
    found: dict[str, set[str]] = {}
    for line in of(lines, "actors.router.call_log", router=router, step=step):
        found.setdefault(line["call_id"], set()).add(line["host"])
    return found


def computed(lines: Iterable[Line], call_id: str) -> list[Line]:
    """The batches of hosts that had a call."""
    batches = of(lines, "actors.host.host_loop")
    return [line for line in batches if "took_ms" in line and call_id in line["calls"]]


def assert_followed(lines: list[Line], request_id: str, *, layers: int, steps: int) -> None:
    """A request leads to its steps, these to their calls, and these to the hosts that computed."""
    found = steps_of(lines, request_id)
    assert len(found) == len(set(found)) >= steps
    for router, step in found:
        calls = calls_of(lines, router, step)
        assert sorted(calls) == [f"{router}/{step}/{layer}" for layer in range(layers)]
        for call_id, hosts in calls.items():
            batches = computed(lines, call_id)
            assert {line["host"] for line in batches} == hosts
            assert all(line["took_ms"] >= 0 and line["rows"] > 0 for line in batches)
