"""SIGTERM, Ctrl-C and `down`, to the process that a user starts: answers end whole, and nothing is
left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from moesaic import Client
from moesaic.proto.errors import Ending
from tests.helpers.endpoint.scripted import SLOW_S, SLOWLY
from tests.helpers.paths import ROOT
from tests.helpers.processes import started
from tests.helpers.processes.started import (
    ENVIRONMENT,
    nothing_is_left,
    wait_until,
)
from tests.integration.conftest import save_model

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]

starting = partial(started.starting, program="tests.e2e.scripted_up")
up = partial(started.up, program="tests.e2e.scripted_up")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


def asked(tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": [SLOWLY], "max_tokens": tokens, **more}


def ask(url: str, tokens: int, **more: Any) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=200) as http:
        return http.post(f"{url}/v1/completions", json=asked(tokens, **more))


def answers_running(url: str, count: int, threads: ThreadPoolExecutor, tokens: int) -> list[Any]:
    """Half of them streams."""
    found = [threads.submit(ask, url, tokens, stream=n % 2 == 0) for n in range(count)]
    time.sleep(2.0)  # all have begun; only the engine, in another process, knows
    return found


def text_of(answer: httpx.Response) -> str:
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return answer.json()["choices"][0]["text"]
    *events, last = answer.text.strip().split("\n\n")
    assert last == "data: [DONE]", last
    parts = [json.loads(event.removeprefix("data: ")) for event in events]
    return "".join(part["choices"][0]["text"] for part in parts)


def whole(running: Sequence[Future[httpx.Response]], tokens: int) -> None:
    texts = [text_of(one.result(200)) for one in running]
    assert len(set(texts)) == 1
    assert texts[0]
    for one in running:
        if one.result().headers["content-type"] == "application/json":
            assert one.result().json()["usage"]["completion_tokens"] == tokens


def refused(url: str) -> None:
    """503, and never 404, until nobody listens any more."""
    with httpx.Client(trust_env=False, timeout=10) as http:
        answer = http.post(f"{url}/v1/completions", json=asked(1))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "Ending"
        assert http.get(f"{url}/readyz").status_code == 503
        assert http.get(f"{url}/livez").status_code == 200


def test_answers_end_whole_and_new_ones_are_refused(folder: Path, tmp_path: Path) -> None:
    tokens = round(12 / SLOW_S)
    with up(folder, tmp_path) as running, ThreadPoolExecutor(4) as threads:
        url = running.url
        with httpx.Client(trust_env=False, timeout=10) as http:
            assert http.get(f"{url}/readyz").status_code == 200
        answers = answers_running(url, 4, threads, tokens)
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "4 answers are still running, at most" in running.said, running, 20)
        statuses: set[int] = set()
        with httpx.Client(trust_env=False, timeout=10) as http:
            while running.process.poll() is None:
                try:
                    statuses.add(http.get(f"{url}/v1/models").status_code)
                    if not all(one.done() for one in answers):
                        refused(url)
                except httpx.TransportError:
                    assert all(one.done() for one in answers)
                    break
        assert statuses <= {503}
        whole(answers, tokens)
        assert running.process.wait(60) == 0
        nothing_is_left(running)


@pytest.mark.slow
def test_what_takes_longer_ends_with_an_event(folder: Path, tmp_path: Path) -> None:
    with up(folder, tmp_path, drain_s=3.0) as running, ThreadPoolExecutor(4) as threads:
        answers = answers_running(running.url, 2, threads, 300)
        with Client(running.url) as client:
            stream = client.stream_complete([SLOWLY], model="m", max_tokens=300)
            next(stream)
            # As a terminal sends Ctrl-C: to all of the group.
            os.killpg(running.process.pid, signal.SIGINT)
            with pytest.raises(Ending, match="drain_s"):
                list(stream)
        streamed, other = (one.result(60) for one in answers)
        *pieces, last = streamed.text.strip().split("\n\n")
        assert pieces
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "Ending"
        assert (other.status_code, other.headers["retry-after"]) == (503, "1")
        assert running.process.wait(60) == 0
        nothing_is_left(running)


@pytest.mark.slow
def test_down_of_another_process_waits_for_what_runs(folder: Path, tmp_path: Path) -> None:
    tokens = round(8 / SLOW_S)
    router = {"router": {"port": 0}}
    with up(folder, tmp_path, **router) as running, ThreadPoolExecutor(4) as threads:
        answers = answers_running(running.url, 2, threads, tokens)
        done = subprocess.run(
            [sys.executable, "-m", "moesaic.cli.main", "down", "--name", running.name],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, "MOESAIC_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        whole(answers, tokens)
        assert running.process.wait(10) == 0
        nothing_is_left(running)


@pytest.mark.slow
@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(folder: Path, tmp_path: Path, again: signal.Signals) -> None:
    with up(folder, tmp_path) as running, ThreadPoolExecutor(2) as threads:
        answers = answers_running(running.url, 2, threads, 300)
        running.process.send_signal(signal.SIGINT)
        wait_until(lambda: "2 answers are still running" in running.said, running, 20)
        running.look()
        running.process.send_signal(again)
        assert running.process.wait(10) == 130
        nothing_is_left(running, within_s=3.0)
        for one in answers:
            with pytest.raises(httpx.TransportError):
                one.result(30)


# Seconds behind what a start says; the last one is another end.
@pytest.mark.parametrize(
    ("said", "behind_s"),
    [
        ("", 1.0),
        ("starting Ray", 0.0),
        ("starting Ray", 1.5),
        ("starting hosts", 0.5),
        ("loading experts", 0.0),
        ("starting the endpoint", 2.0),
    ],
)
@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.slow
def test_a_start_that_is_interrupted_leaves_nothing(
    folder: Path, tmp_path: Path, said: str, behind_s: float, signals: int
) -> None:
    with starting(folder, tmp_path) as running:
        wait_until(lambda: said in running.said, running, 120)
        until = time.monotonic() + behind_s
        while time.monotonic() < until:
            running.look()
            time.sleep(0.05)
        for n in range(signals):
            running.look()
            running.process.send_signal(signal.SIGTERM)
            time.sleep(0.3 * (n + 1 < signals))
        deadline = time.monotonic() + (60 if signals == 1 else 15)
        while running.process.poll() is None and time.monotonic() < deadline:
            running.look()
            time.sleep(0.02)
        assert running.process.poll() in (130, -signal.SIGTERM), running.said
        nothing_is_left(running)


@pytest.mark.slow
@pytest.mark.parametrize("behind_s", [0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0])
def test_a_second_signal_in_the_middle_of_any_step_of_ending(
    folder: Path, tmp_path: Path, behind_s: float
) -> None:
    with up(folder, tmp_path) as running:
        running.process.send_signal(signal.SIGTERM)
        time.sleep(behind_s)
        running.look()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(15) in (0, 130), running.said
        nothing_is_left(running, within_s=3.0)


@pytest.mark.slow
def test_an_answer_of_a_minute_ends_whole(folder: Path, tmp_path: Path) -> None:
    tokens = round(60 / SLOW_S)
    with up(folder, tmp_path, drain_s=90.0) as running, ThreadPoolExecutor(2) as threads:
        answers = answers_running(running.url, 2, threads, tokens)
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        whole(answers, tokens)
        assert time.monotonic() - began > 50
        assert running.process.wait(60) == 0
        nothing_is_left(running)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["Trunk", "Ingress", "RayExpertHost", "Controller"])
def test_a_frozen_part_keeps_no_ending_from_its_end(
    folder: Path, tmp_path: Path, frozen: str
) -> None:
    with up(folder, tmp_path, drain_s=5.0) as running:
        running.look()
        (part,) = [one for one in running.owned if f":{frozen}" in " ".join(one.cmdline())]
        part.suspend()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(90) == 0, running.said
        nothing_is_left(running)
