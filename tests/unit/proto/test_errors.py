"""The one tree of errors: what the docstring draws, what crosses the wire, what HTTP answers."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, ClassVar

import grpc
import httpx
import pytest

from moesaic.actors.endpoint.http import monitoring_app
from moesaic.actors.endpoint.http.edge import error_answer, event_stream
from moesaic.actors.endpoint.http.metrics import HttpMetrics
from moesaic.actors.endpoint.openai.responses import error_response
from moesaic.actors.serve.replica.trunk import ErrorValue
from moesaic.actors.transport.grpc.border import from_grpc, to_grpc
from moesaic.cli import main as command_line
from moesaic.clients.openai_wire import error_of, mapping_errors
from moesaic.cluster.service.web_guard import WebGuard
from moesaic.proto import errors
from moesaic.proto.errors import (
    ERRORS,
    BadInput,
    InternalError,
    MoesaicError,
    RequestError,
    Retryable,
    describe_error,
    from_wire,
)
from moesaic.proto.expert_pb2 import Frame

ALL = sorted(ERRORS.items())
NAMES = [name for name, _ in ALL]


def general_words(cls: type[MoesaicError]) -> str:
    return (cls.__doc__ or "").partition("\n")[0]


every_class = pytest.mark.parametrize("cls", [cls for _, cls in ALL], ids=NAMES)


def drawn_tree() -> dict[str, str | None]:
    """{class: parent} as the module's docstring draws it."""
    parents: dict[str, str | None] = {}
    above: list[str] = []
    for indented in (errors.__doc__ or "").splitlines():
        line = indented.removeprefix("    ")
        found = re.match(r"^((?:[|`] {3}| {4})*)(?:\|-- |`-- )?(\w+)(?:  .*)?$", line)
        if not found or found[2] not in vars(errors):
            continue
        depth = 0 if line[0] not in "|`" else len(found[1]) // 4 + 1
        parents[found[2]] = above[depth - 1] if depth else None
        above = [*above[:depth], found[2]]
    return parents


def test_the_drawn_tree_is_the_real_one() -> None:
    real = {name: None if cls is MoesaicError else cls.__bases__[0].__name__ for name, cls in ALL}
    assert drawn_tree() == real


def test_every_error_of_the_module_is_in_the_table() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == set(ERRORS)
    assert len(ERRORS) >= 18


@every_class
def test_errors_cross_the_wire_as_themselves(cls: type[MoesaicError]) -> None:
    text = "expert 3 of layer 1 of m: größer than 10 %"
    frame = Frame()
    frame.refusal.code, frame.refusal.message = cls(text).code, text
    arrived = Frame.FromString(frame.SerializeToString()).refusal
    again = from_wire(arrived.code, arrived.message)
    assert type(again) is cls
    assert str(again) == text
    assert again.code == cls.__name__


@every_class
def test_errors_cross_http_as_themselves(cls: type[MoesaicError]) -> None:
    error = cls("prompt: too long")
    if isinstance(error, RequestError):
        error.param = "prompt"
    again = error_of(error_response(error).model_dump()["error"])
    assert type(again) is cls
    assert str(again) == ("prompt: too long" if cls.for_clients else general_words(cls))
    if isinstance(again, RequestError):
        assert again.param == "prompt"


@every_class
def test_errors_cross_ray_as_themselves(cls: type[MoesaicError]) -> None:
    error = cls("boom")
    if isinstance(error, RequestError):
        error.param = "model"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (str(again), vars(again)) == ("boom", vars(error))


@pytest.mark.parametrize("code", ["", "KeyError", "Exception", "busy", "Busy ", "__class__"])
def test_unknown_codes_are_internal_errors_that_name_the_code(code: str) -> None:
    error = from_wire(code, "something")
    assert type(error) is InternalError
    assert str(error) == f"{code}: something"


# What the endpoint answers, and whether a client may send the same request again.
STATUS = {
    "RequestError": 400,
    "UnknownModel": 404,
    "BodyTooLarge": 413,
    "Unauthenticated": 401,
    "Forbidden": 403,
    "Busy": 429,
    "Expired": 504,
    "NotHere": 503,
    "NoAnswer": 503,
    "Ending": 503,
    "HostLost": 503,
    "ExpertUnavailable": 503,
    "EngineError": 503,
    "BadExpert": 500,
    "InternalError": 500,
    "ClusterError": 500,
}


@every_class
def test_statuses_are_sane(cls: type[MoesaicError]) -> None:
    if issubclass(cls, BadInput):
        assert 400 <= cls.http_status < 500, "the caller's mistake"
        assert cls.http_status not in (408, 429), "not one that goes away by itself"
    else:
        assert cls.http_status in (408, 429) or 500 <= cls.http_status < 600
    # Clients (and the openai package) retry by status; both must say the same.
    assert cls.retryable == (cls.http_status in (408, 429, 503, 504))
    if issubclass(cls, Retryable):
        assert cls.retryable
    if cls.__name__ in STATUS:
        assert cls.http_status == STATUS[cls.__name__]


# ---- no empty messages ---------------------------------------------------------------------------


class _Ended(grpc.RpcError, grpc.Call):
    """A failed RPC as a client sees it."""

    def __init__(self, status: grpc.StatusCode, details: str) -> None:
        self._said = status, details

    def code(self) -> grpc.StatusCode:
        return self._said[0]

    def details(self) -> str:
        return self._said[1]

    def trailing_metadata(self) -> Any:
        return ()


def _ended(error: MoesaicError) -> grpc.RpcError:
    return _Ended(*to_grpc(error))  # pyright: ignore[reportAbstractUsage]


class _Connected:
    """What `event_stream` needs of a request whose client stays."""

    scope: ClassVar[dict[str, Any]] = {"state": {"request_id": "the-id"}}

    async def receive(self) -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError


async def _sse(error: Exception) -> dict[str, Any]:
    """The event of an error behind the first chunk."""

    async def chunks() -> AsyncGenerator[Any, None]:
        yield error_response(InternalError("a chunk"))
        raise error

    request: Any = _Connected()
    response = await event_stream(request, chunks())
    lines = [line async for line in response.body_iterator]
    return json.loads(str(lines[-1]).removeprefix("data: "))


@pytest.mark.parametrize("message", ["", " ", "\n"])
@every_class
async def test_no_error_has_an_empty_message_at_any_border(
    cls: type[MoesaicError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = cls(message)
    body = json.loads(bytes(error_answer(error).body))["error"]
    event = (await _sse(error))["error"]
    told = {
        "itself": str(error),
        "http": body["message"],
        "sse": event["message"].removesuffix(" (request the-id)"),
        "sdk": str(error_of({**body, "message": message})),
        "ray": str(ErrorValue.of(error).error()),
        "grpc": str(from_grpc(_ended(error), "peer")).removeprefix("peer: "),
        "wire": str(from_wire(error.code, message)),
    }

    def run(**_: Any) -> None:
        raise error

    monkeypatch.setattr(command_line, "app", run)
    assert command_line.main([]) == 1
    told["command line"] = capsys.readouterr().err.removeprefix("error: ").strip()
    words = general_words(cls)
    assert told == dict.fromkeys(told, words)
    assert len(words) > 15
    assert words.endswith(".") and "``" not in words, "a sentence for whoever reads an error"


@pytest.mark.parametrize("error", [TimeoutError(), AssertionError(), OSError(), KeyError("x")])
async def test_foreign_errors_have_words_at_every_border(error: Exception) -> None:
    try:
        raise error
    except Exception as caught:
        words = describe_error(caught)
    name = type(error).__name__
    assert re.fullmatch(rf"{name}: 'x'|{name} in test_errors.py:\d+", words)
    assert describe_error(type(error)("x")).startswith(f"{name}: ")
    assert describe_error(TimeoutError()) == "TimeoutError"
    told = (await _sse(error))["error"]["message"]
    assert told == f"{general_words(InternalError)} (request the-id)"
    assert to_grpc(error)[1].startswith(f"InternalError: {name}")


@pytest.mark.parametrize("kind", [httpx.ConnectError, httpx.ReadError, httpx.ReadTimeout])
def test_connections_that_fail_without_a_word(kind: type[httpx.TransportError]) -> None:
    with pytest.raises(MoesaicError) as caught, mapping_errors():
        raise kind("")
    assert not str(caught.value).endswith(": ")
    assert kind.__name__ in str(caught.value)


def test_an_error_of_the_system_without_a_word_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(**_: Any) -> None:
        raise OSError

    monkeypatch.setattr(command_line, "app", run)
    assert command_line.main([]) == 1
    assert capsys.readouterr().err.startswith("error: OSError in test_errors.py:")


def test_nobody_writes_a_foreign_error_that_may_be_empty() -> None:
    """`describe_error` says something for every exception; this form is empty for a timeout."""
    root = Path(errors.__file__).resolve().parents[1]
    rooms = ("actors", "cluster", "kernels", "models", "proto", "src/moesaic")
    form = re.compile(r"type\((\w+)\)\.__name__\}: \{\1\}")
    files = [file for room in rooms for file in (root / room).rglob("*.py")]
    assert len(files) > 100
    assert [str(file) for file in files if form.search(file.read_text())] == []


# ---- what clients are told -----------------------------------------------------------------------

INSIDE = "10.0.0.7:5123: ActorDiedError in /srv/moesaic/actors/host.py:12, actor 3f2a"


@pytest.mark.parametrize("cls", [*(cls for _, cls in ALL), KeyError, OSError])
async def test_what_is_of_the_inside_reaches_the_log_and_no_client(
    cls: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    public = issubclass(cls, MoesaicError) and cls.for_clients
    body = json.loads(bytes(error_answer(cls(INSIDE), "the-id").body))["error"]
    event = (await _sse(cls(INSIDE)))["error"]
    assert body == event
    assert body["code"] == (cls.__name__ if issubclass(cls, MoesaicError) else "InternalError")
    if public:
        assert body["message"] == INSIDE
        assert not caplog.records
        return
    for word in ("10.0.0.7", "5123", "ActorDied", "/srv", ".py", "3f2a", "KeyError", "OSError"):
        assert word not in str(body)
    assert body["message"].endswith(" (request the-id)")
    assert len(caplog.records) == 2
    for record in caplog.records:
        logged = record.getMessage() + str(record.exc_info and record.exc_info[1])
        assert "request the-id" in logged and "10.0.0.7" in logged


# What is written for clients; whoever adds to it looks at every message of the class.
FOR_CLIENTS = {
    "BadExpert", "BodyTooLarge", "Busy", "CallError", "Corrupted", "Ending", "ExpertUnavailable",
    "Expired", "Forbidden", "Interrupted", "Overloaded", "RequestError", "SlowBody",
    "Unauthenticated", "UnknownModel",
}  # fmt: skip


def test_which_errors_are_written_for_clients() -> None:
    assert {name for name, cls in ALL if cls.for_clients} == FOR_CLIENTS


# ---- expected waits ------------------------------------------------------------------------------


async def test_a_slow_cluster_is_no_defect_of_the_endpoint(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitoring_app, "STATUS_TIMEOUT_S", 0.01)

    async def never() -> Any:
        await asyncio.Event().wait()
        raise AssertionError

    app = monitoring_app.monitoring_app(
        status=never, engines=never, metrics=HttpMetrics(), guard=WebGuard.of("127.0.0.1")
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        metrics = await client.get("/metrics")
        answer = await client.get("/status")
    assert (metrics.status_code, "moesaic_requests_running" in metrics.text) == (200, True)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"] == {
        "message": "the cluster's status did not arrive within 0.01 s; ask again",
        "type": "server_error",
        "param": None,
        "code": "NoAnswer",
    }
    # One line in the log says so.
    (line,) = [record for record in caplog.records if record.name.startswith("moesaic")]
    assert line.exc_info is None and "did not arrive" in line.getMessage()


def test_the_status_waits_a_little_longer_than_its_parts() -> None:
    """So that they say what is late; clients and health checks often give up after 10 s."""
    from moesaic.actors.serve.replica import trunk_client

    assert trunk_client.QUESTION_TIMEOUT_S < monitoring_app.STATUS_TIMEOUT_S <= 6.0


async def test_who_did_not_answer_and_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    from moesaic.actors.serve.replica import controller_link, trunk_client

    async def late() -> None:
        await asyncio.Event().wait()

    async def failing(error: Exception) -> None:
        raise error

    monkeypatch.setattr(controller_link, "QUESTION_TIMEOUT_S", 0.01)
    monkeypatch.setattr(trunk_client, "QUESTION_TIMEOUT_S", 0.01)
    monkeypatch.setattr(trunk_client, "START_TIMEOUT_S", 0.01)
    with pytest.raises(
        MoesaicError, match=r"the controller did not answer within 0\.01 s"
    ) as caught:
        await controller_link.answered(late())
    assert caught.value.http_status == 503
    with pytest.raises(MoesaicError, match="the controller is being restarted") as caught:
        await controller_link.answered(failing(ActorDiedError()))
    assert caught.value.http_status == 503
    defect = RayTaskError("status", "trace", KeyError("x"))
    with pytest.raises(InternalError, match="its status: KeyError: 'x'"):
        await controller_link.answered(failing(defect))

    class Silent(trunk_client.TrunkClient):
        def __init__(self) -> None:
            self.cold_start_s = None

        async def _question(self, method: str) -> Any:
            await late()

    status = await Silent().status()
    assert (status.healthy, status.work) == (False, None)
    assert status.last_error == "the trunk did not answer within 0.01 s"
    with pytest.raises(MoesaicError, match=r"the trunk did not start within 0\.01 s"):
        await Silent().limits()
