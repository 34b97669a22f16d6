"""What a pod does before it ends."""

from __future__ import annotations

import asyncio
import runpy
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from moesaic.actors.endpoint.http.metrics import HttpMetrics
from moesaic.actors.endpoint.openai.answers import IndexedDeltas
from moesaic.actors.engine.served_model import TextDelta
from moesaic.cluster.metrics.families import exposition
from tests.helpers.paths import ROOT

HOOK = runpy.run_path(str(ROOT / "deploy" / "container" / "before_stop.py"))
METRICS = """\
# TYPE moesaic_requests_running gauge
moesaic_requests_running{model="a"} 2.0
moesaic_requests_running{model="b"} 1.0
moesaic_requests_running_total 9.0
"""


@pytest.fixture
def served() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and its answers; with none left it closes the connection."""
    answers: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if answers:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answers.pop(0).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/metrics", answers
    server.shutdown()
    thread.join()
    server.server_close()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_requests_of_all_models_count(served: tuple[str, list[str]]) -> None:
    url, answers = served
    answers.append(METRICS)
    assert HOOK["requests_running"](url, 5) == 3
    answers.append("# no model was asked yet\n")
    assert HOOK["requests_running"](url, 5) == 0


async def test_the_endpoint_counts_as_the_hook_reads(served: tuple[str, list[str]]) -> None:
    url, answers = served
    metrics = HttpMetrics()

    async def pieces() -> IndexedDeltas:
        yield 0, TextDelta("a", 1)
        yield 0, TextDelta("b", 1, "stop")

    answer = metrics.watch("a", 3, 0.0, pieces())
    await anext(answer)
    answers.append(exposition(metrics, "moesaic").decode())
    assert await asyncio.to_thread(HOOK["requests_running"], url, 5) == 1
    assert [piece async for piece in answer]
    answers.append(exposition(metrics, "moesaic").decode())
    assert await asyncio.to_thread(HOOK["requests_running"], url, 5) == 0


def test_an_endpoint_that_does_not_answer_is_not_an_idle_one(
    served: tuple[str, list[str]],
) -> None:
    url, _ = served
    assert HOOK["requests_running"](url, 5) is None


def test_nothing_listens_so_nothing_runs(served: tuple[str, list[str]]) -> None:
    assert HOOK["requests_running"]("http://127.0.0.1:1/metrics", 5) == 0


def test_it_waits_until_none_runs() -> None:
    clock = Clock()
    counts = iter([3.0, None, 1.0, 0.0])
    assert HOOK["wait_idle"](lambda _: next(counts), 30, clock, clock.sleep)
    assert clock.now == 101.5
    assert next(counts, "all were asked for") == "all were asked for"


@pytest.mark.parametrize("count", [1.0, None])
def test_it_waits_no_longer_than_the_drain(count: float | None) -> None:
    clock = Clock()
    assert not HOOK["wait_idle"](lambda _: count, 1.2, clock, clock.sleep)
    assert clock.now == pytest.approx(101.2)


def test_no_question_takes_longer_than_what_is_left() -> None:
    clock, asked = Clock(), list[float]()

    def silent(timeout_s: float) -> None:
        asked.append(timeout_s)
        clock.now += timeout_s

    assert not HOOK["wait_idle"](silent, 20, clock, clock.sleep)
    assert asked == pytest.approx([8, 8, 3])
    assert clock.now == pytest.approx(120)


def test_ray_learns_when_the_node_ends() -> None:
    command = HOOK["drain_command"](35.0)
    assert command[:2] == ["ray", "drain-node"]
    assert "--deadline-remaining-seconds=35" in command
    # Ray takes no 0.
    assert "--deadline-remaining-seconds=1" in HOOK["drain_command"](0)


def test_an_idle_head_ends_at_once(served: tuple[str, list[str]]) -> None:
    url, answers = served
    answers += [METRICS, "moesaic_requests_running 0.0\n"]
    words = ["head", "--settle-s=0", "--drain-s=30", f"--metrics={url}"]
    assert HOOK["main"](words) == 0
    assert answers == []
