"""The Ray shell: ingress and trunks in processes of their own, on a real local Ray."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import httpx
import openai
import pytest

from tests.helpers.endpoint.serve_app import endpoint_app
from tests.helpers.paths import ROOT
from tests.helpers.processes.live import program_ray

# Before Ray is imported: no telemetry, and all on the loopback interface.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

from ray import serve
from ray.serve.config import HTTPOptions

from moesaic.actors.engine.engine import Delta, Sampling
from moesaic.actors.runtime.ports import free_port
from moesaic.actors.serve.replica import trunk_client
from moesaic.actors.serve.replica.trunk import ErrorValue, Trunk
from moesaic.clients.http_client import Client
from moesaic.cluster.reports.status import EngineStatus
from moesaic.cluster.spec.monitoring import MonitoringSpec
from moesaic.proto.errors import ERRORS, EngineError, RequestError, UnknownModel, client_message
from tests.helpers.endpoint.engines import reference, tiny_engine
from tests.helpers.endpoint.scripted import (
    CODES,
    COUNT,
    DEFECT,
    DIE,
    ERROR,
    LATE_ERROR,
    WAIT,
    cluster_status,
    scripted_engine,
)
from tests.helpers.models.tiny import tiny_mixtral, tiny_tokenizer

# Ray's own processes are slow to start when others use the machine.
pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def monitoring() -> str:
    return f"http://127.0.0.1:{free_port('127.0.0.1')}"


@pytest.fixture(scope="module")
def url(monitoring: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The replicas import the factories from this folder.
    root = ROOT
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])}}
    with program_ray(4, runtime_env=environment):
        try:
            serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
            factories = {"tiny": tiny_engine, "script": scripted_engine}
            trunks = {
                name: Trunk.options(name=f"Trunk-{name}").bind(factory)
                for name, factory in factories.items()
            }
            watched = MonitoringSpec(port=int(monitoring.rpartition(":")[2]))
            tokenizers = dict.fromkeys(trunks, tiny_tokenizer)
            serve.run(endpoint_app(trunks, tokenizers, status=cluster_status, monitoring=watched))
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def operator(url: str, monitoring: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=monitoring, timeout=60) as client:
        yield client


def running(operator: httpx.Client, model: str) -> int:
    return operator.get("/status").json()["engines"][model]["work"]["running_requests"]


def wait_until_idle(operator: httpx.Client, model: str) -> None:
    deadline = time.monotonic() + 20
    while running(operator, model):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def script(what: int, **more: Any) -> dict[str, Any]:
    return {"model": "script", "prompt": [what], "max_tokens": 10, **more}


def test_text_through_all_processes(url: str) -> None:
    ids = tiny_tokenizer()("the quick").input_ids
    answer = reference(tiny_mixtral(max_positions=4096), ids, 20)
    expected = tiny_tokenizer().decode(answer, skip_special_tokens=True)
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": "the quick", "max_tokens": 20, "temperature": 0
    }  # fmt: skip
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        assert client.completions.create(**asked).choices[0].text == expected
        chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert len(chunks) > 5
    with Client(url) as ours:
        assert len(list(ours.stream_chat("hi", model="tiny", max_tokens=20, temperature=0))) > 5


def test_status_holds_the_trunks_and_what_the_caller_adds(
    http: httpx.Client, operator: httpx.Client
) -> None:
    status = operator.get("/status").json()
    assert status["healthy"] is True
    assert [host["name"] for host in status["cluster"]["hosts"]] == ["h0"]
    assert set(status["engines"]) == {"tiny", "script"}
    assert 'moesaic_engine_running_requests{model="tiny"} 0.0' in operator.get("/metrics").text
    for path in ("/status", "/metrics"):
        assert http.get(path).status_code == 404, "the endpoint does not tell"
    assert http.get("/v1/models/tiny").json()["max_model_len"] == 4096


@pytest.mark.parametrize("code", CODES)
def test_every_error_crosses_with_its_type(http: httpx.Client, code: str) -> None:
    number = CODES.index(code)
    answer = http.post("/v1/completions", json=script(ERROR + number))
    assert answer.status_code == ERRORS[code].http_status
    error = answer.json()["error"]
    # Ray adds it once more.
    request_id = answer.headers["x-request-id"].partition(", ")[0]
    told = (error["message"], error["code"])
    words = client_message(ERRORS[code](f"this is {code}"), request_id)
    assert told == (words, code)
    assert error["param"] == ("prompt" if issubclass(ERRORS[code], RequestError) else None)
    answer = http.post("/v1/completions", json=script(LATE_ERROR + number, stream=True))
    assert answer.status_code == 200
    events = answer.text.strip().split("\n\n")
    assert len(events) == 4
    assert f'"code":"{code}"' in events[-1]


def test_a_defect_in_the_trunk_is_an_answer_too(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json=script(DEFECT))
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "InternalError"
    assert "KeyError" not in answer.text and "a defect" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_request_in_the_engine(
    url: str, stream: bool, operator: httpx.Client
) -> None:
    body = {"model": "tiny", "prompt": "the", "max_tokens": 4000, "temperature": 0}
    with httpx.Client(base_url=url, timeout=httpx.Timeout(30, read=0.5)) as leaving:
        if stream:
            with leaving.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                lines = answer.iter_lines()
                next(lines)
                assert running(operator, "tiny") == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post("/v1/completions", json=body)
    wait_until_idle(operator, "tiny")
    assert operator.get("/status").json()["engines"]["tiny"]["work"]["steps"] < 4000


def test_going_away_while_the_engine_is_silent(url: str, operator: httpx.Client) -> None:
    with httpx.Client(base_url=url, timeout=httpx.Timeout(30, read=0.5)) as leaving:
        with pytest.raises(httpx.ReadTimeout):
            leaving.post("/v1/completions", json=script(WAIT))
        with (
            pytest.raises(httpx.ReadTimeout),
            leaving.stream("POST", "/v1/completions", json=script(WAIT, stream=True)) as answer,
        ):
            list(answer.iter_lines())
    wait_until_idle(operator, "script")


def test_many_at_once(http: httpx.Client) -> None:
    def ask(n: int) -> str:
        return http.post("/v1/completions", json=script(COUNT, max_tokens=n)).json()["choices"][0][
            "text"
        ]

    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(ask, range(1, 65)))
    tokenizer = tiny_tokenizer()
    assert texts == [tokenizer.decode([40 + k % 50 for k in range(n)]) for n in range(1, 65)]


def test_a_trunk_that_dies_ends_its_streams_with_an_error_and_comes_back(
    http: httpx.Client,
) -> None:
    answer = http.post("/v1/completions", json=script(DIE, stream=True))
    assert answer.status_code == 200
    events = answer.text.strip().split("\n\n")
    assert '"code":"EngineError"' in events[-1]
    assert "Actor" not in events[-1], "Ray's words are not for clients"
    assert len(events) > 1
    deadline = time.monotonic() + 60
    while http.post("/v1/completions", json=script(COUNT)).status_code != 200:
        assert time.monotonic() < deadline
    assert http.get("/readyz?model=script").status_code == 200


def test_failures_keep_type_message_and_field() -> None:
    for error in (UnknownModel("no", param="model"), RequestError("bad"), EngineError("x")):
        back = ErrorValue.of(error).error()
        assert type(back) is type(error)
        assert str(back) == str(error)
        assert getattr(back, "param", None) == getattr(error, "param", None)


class FakeHandle:
    """A handle whose stream gives some items and then ends, or never goes on."""

    def __init__(self, items: list[Any], *, hangs: bool, healthy: bool = True) -> None:
        self._items, self._hangs, self._healthy = items, hangs, healthy
        self.cancelled = False
        self.generate = self.status = self

    def options(self, *, stream: bool) -> FakeHandle:
        return self

    def remote(self, *args: Any) -> FakeHandle:
        return self

    def __await__(self) -> Generator[Any, None, EngineStatus]:
        yield from asyncio.sleep(0).__await__()
        return EngineStatus(
            healthy=self._healthy, starts_on_demand=False, last_error="stuck", work=None
        )

    async def __anext__(self) -> Any:
        if self._items:
            return self._items.pop(0)
        if self._hangs:
            await asyncio.Event().wait()
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize(
    ("handle", "message"),
    [
        (FakeHandle([((1,), None)], hangs=False), "ended too early"),
        (FakeHandle([((1,), None)], hangs=True, healthy=False), "does not answer: stuck"),
    ],
)
async def test_a_stream_that_does_not_go_on(
    monkeypatch: pytest.MonkeyPatch, handle: FakeHandle, message: str
) -> None:
    monkeypatch.setattr(trunk_client, "PATIENCE_S", 0.01)
    stream = trunk_client.TrunkClient(cast(Any, handle)).generate("a", [5], Sampling(max_tokens=3))
    assert await anext(stream) == Delta((1,))
    with pytest.raises(EngineError, match=message):
        await anext(stream)
    assert handle.cancelled


async def test_a_trunk_that_is_only_slow_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk_client, "PATIENCE_S", 0.001)
    handle = FakeHandle([], hangs=True)
    stream = trunk_client.TrunkClient(cast(Any, handle)).generate("a", [5], Sampling(max_tokens=3))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await anext(stream)
    assert handle.cancelled
