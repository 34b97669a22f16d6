"""Strangers at an endpoint behind Ray Serve's proxy, and a client beside them that is served."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest

from tests.helpers.endpoint.serve_app import endpoint_app
from tests.helpers.paths import ROOT
from tests.helpers.processes.live import program_ray

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

from ray import serve

from moesaic.actors.runtime.ports import free_port
from moesaic.actors.serve.replica.trunk import Trunk
from moesaic.actors.serve.serve_border import ServeAddress, start_serve
from moesaic.cluster.spec.monitoring import MonitoringSpec
from moesaic.cluster.spec.parts import EndpointSpec, LimitSpec
from tests.helpers.endpoint.scripted import COUNT, WAIT, scripted_engine
from tests.helpers.models.tiny import tiny_tokenizer

pytestmark = [
    pytest.mark.alone,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

BODY_S = 3.0
LIMITS = LimitSpec(body_s=BODY_S, body_mb=1.0, bodies_mb=4.0)
PORT, MONITORING = free_port("127.0.0.1"), free_port("127.0.0.1")
ASKED: dict[str, Any] = {"model": "script", "prompt": [COUNT], "max_tokens": 5}
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    root = ROOT
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])}}
    with program_ray(4, runtime_env=environment):
        try:
            start_serve(ServeAddress("127.0.0.1", PORT), "strangers")
            trunk = Trunk.options(name="Trunk-script").bind(scripted_engine)
            app = endpoint_app(
                {"script": trunk},
                {"script": tiny_tokenizer},
                endpoint=EndpointSpec(limits=LIMITS),
                monitoring=MonitoringSpec(port=MONITORING),
            )
            serve.run(app)
            with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
                yield client
        finally:
            serve.shutdown()


def answered(http: httpx.Client) -> float:
    """The honest client; gives how long it waited."""
    began = time.monotonic()
    answer = http.post(PATH, json=ASKED)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == tiny_tokenizer().decode(list(range(40, 45)))
    return time.monotonic() - began


def sent(body: bytes = b"", length: int | None = None, *more: str) -> socket.socket:
    """A connection with the head of a request and some of its body."""
    head = [f"POST {PATH} HTTP/1.1", "Host: localhost", *more]
    head.append(f"Content-Length: {len(body) + 10 if length is None else length}")
    one = socket.create_connection(("127.0.0.1", PORT), 20)
    one.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + body)
    return one


def answer_of(one: socket.socket, begun: bytes = b"") -> bytes:
    """What comes on a connection, with what has come before."""
    one.settimeout(30)
    found = begun
    while b"\r\n\r\n" not in found or not found.endswith(b"}"):
        part = one.recv(65_536)
        if not part:
            break
        found += part
    return found


def test_half_sent_bodies_end_at_their_deadline_and_cost_others_nothing(
    http: httpx.Client,
) -> None:
    alone = sorted(answered(http) for _ in range(20))[18]
    with ExitStack() as stack:
        began = time.monotonic()
        strangers = [stack.enter_context(sent(b'{"mod', 1_000_000)) for _ in range(200)]
        beside = sorted(answered(http) for _ in range(20))[18]
        assert beside < max(2 * alone, 1.0)
        answers = [answer_of(one) for one in strangers]
        took_s = time.monotonic() - began
        assert {answer.split(b" ")[1] for answer in answers} == {b"408"}
        assert all(b"connection: close" in answer.lower() for answer in answers)
        assert b"endpoint.limits.body_s" in answers[0]
        assert BODY_S * 0.9 < took_s < BODY_S + 15
    answered(http)


def test_beyond_the_budget_nothing_is_read(http: httpx.Client) -> None:
    for _ in range(5):
        with ExitStack() as stack:
            held = [stack.enter_context(sent(b"x" * 990_000, 1_000_000)) for _ in range(4)]
            refused = refused_at_once()
            if not refused:
                continue  # a slow machine: the first of them may not pass for honest any more
            assert b" 503 " in refused and b"retry-after: 1" in refused.lower()
            assert b'"Overloaded"' in refused
            answered(http)
            time.sleep(1.0)
            # What is held back goes when its room is wanted.
            large = {**ASKED, "prompt": "x" * 900_000}
            answer = http.post(PATH, json=large)
            assert answer.status_code == 400
            assert "prompt" in answer.json()["error"]["message"]
            assert any(b" 503 " in answer_of(one) for one in held)
            break
    else:
        raise AssertionError("nobody was refused")
    answered(http)


def refused_at_once() -> bytes:
    """The answer to a request of which the head alone is sent, if there is one."""
    until = time.monotonic() + 0.9  # so long may bodies take that come from honest clients
    while time.monotonic() < until:
        with sent(length=900_000) as one:
            # Ray's proxy asks the ingress as soon as the head is there.
            one.settimeout(0.2)
            try:
                begun = one.recv(65_536)
            except TimeoutError:
                continue  # the others' bytes are still on their way
            return answer_of(one, begun)
    return b""


def test_what_is_announced_too_large_is_refused_before_it_is_sent(http: httpx.Client) -> None:
    with sent(length=1_000_001) as one:
        assert b" 413 " in answer_of(one)


def proxy() -> psutil.Process:
    return listener(PORT)


def listener(port: int) -> psutil.Process:
    (pid,) = {
        one.pid
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port
    }
    return psutil.Process(pid)


def test_a_head_without_end_does_not_fill_the_proxy(http: httpx.Client) -> None:
    answered(http)
    before = proxy().memory_info().rss
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", PORT), 20) as one:
            one.sendall(f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n".encode())
            line = b"X-More: " + b"x" * 60_000 + b"\r\n"
            with pytest.raises(OSError):
                for _ in range(2000):  # 120 MB
                    one.sendall(line)
        answered(http)
    assert proxy().memory_info().rss < before + 32e6


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": f"evil.example:{PORT}"},
        {"origin": "https://evil.example"},
        {"origin": "null", "content-type": "text/plain"},
    ],
)
def test_pages_of_others_are_refused(http: httpx.Client, headers: dict[str, str]) -> None:
    for path in (PATH, "/v1/models"):
        answer = http.request("POST" if path == PATH else "GET", path, headers=headers, json=ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "Forbidden")
    for mine in ({"host": f"localhost:{PORT + 1}"}, {"origin": "http://127.0.0.1:3000"}):
        assert http.post(PATH, headers=mine, json=ASKED).status_code == 200


def test_rays_own_pages_do_not_tell_of_its_applications(http: httpx.Client) -> None:
    for path in ("/-/routes", "/-/routes/"):
        answer = http.get(path)
        assert answer.status_code == 404
        assert set(answer.json()) == {"error"}
    for path in ("/status", "/metrics"):
        assert http.get(path).status_code == 404


def running() -> int:
    return int(
        httpx.get(f"http://127.0.0.1:{MONITORING}/status").json()["engines"]["script"]["work"][
            "running_requests"
        ]
    )


def test_a_client_cannot_have_ray_ignore_that_it_left(http: httpx.Client) -> None:
    body = b'{"model": "script", "prompt": [%d], "max_tokens": 5, "stream": true}' % WAIT
    with sent(body, len(body), "x-request-disconnect-disabled: ?1") as one:
        one.settimeout(30)
        assert b" 200 " in one.recv(65_536)
        assert running() == 1
    until = time.monotonic() + 20
    while running():
        assert time.monotonic() < until


@pytest.mark.slow
def test_monitoring_comes_back_with_its_ingress(http: httpx.Client) -> None:
    answered(http)
    first = listener(MONITORING)
    os.kill(first.pid, signal.SIGKILL)
    first.wait(20)
    until = time.monotonic() + 90
    while True:
        assert time.monotonic() < until
        try:
            answer = httpx.get(f"http://127.0.0.1:{MONITORING}/status", timeout=10)
            break
        except httpx.TransportError:
            time.sleep(0.2)
    assert answer.json()["healthy"] is True
    assert listener(MONITORING).pid != first.pid
    answered(http)


def test_nothing_is_told_when_nobody_is_there(http: httpx.Client) -> None:
    """Behind the end of the application; and its monitoring has ended with it."""
    serve.delete("default")
    answer = http.get("/v1/models")
    assert answer.status_code in (404, 503)
    assert set(answer.json()) == {"error"}
    with socket.create_server(("127.0.0.1", MONITORING)):
        pass
