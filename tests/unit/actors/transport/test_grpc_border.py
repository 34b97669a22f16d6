"""Errors over gRPC: every class of the tree as a status and back."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from moesaic.actors.transport.grpc.border import aborting, from_grpc, to_client, to_grpc
from moesaic.proto.errors import (
    ERRORS,
    BadInput,
    Busy,
    ClusterError,
    Expired,
    Forbidden,
    HostLost,
    InternalError,
    MoesaicError,
    Unauthenticated,
)

# What gRPC's own clients and proxies take for worth another try, or for a matter of time.
WORTH_ANOTHER = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
MISTAKES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
}


class Failed(grpc.RpcError, grpc.Call):
    """A failed RPC as a client has it."""

    def __init__(self, status: grpc.StatusCode, details: str, *trailing: tuple[str, str]) -> None:
        self._said = status, details, trailing

    def code(self) -> grpc.StatusCode:
        return self._said[0]

    def details(self) -> str:
        return self._said[1]

    def trailing_metadata(self) -> Any:
        return self._said[2]

    def initial_metadata(self) -> tuple[()]:
        return ()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> float:
        return 0.0

    def cancel(self) -> bool:
        return False

    def add_callback(self, callback: object) -> bool:
        return False


@pytest.mark.parametrize("cls", ERRORS.values(), ids=ERRORS)
def test_every_class_crosses(cls: type[MoesaicError]) -> None:
    status, details = to_grpc(cls("expert 3: größer"))
    back = from_grpc(Failed(status, details), "peer")
    assert type(back) is cls
    assert str(back) == "peer: expert 3: größer"
    if issubclass(cls, BadInput):
        assert status in MISTAKES
    elif cls.retryable and cls.__name__ != "NotHere":  # which is about a host, not a moment
        assert status in WORTH_ANOTHER
    else:
        assert status not in WORTH_ANOTHER


def test_the_pause_of_busy_crosses() -> None:
    status, details = to_grpc(Busy("full"))
    pushback = "grpc-retry-pushback-ms"
    for value, seconds in (("250", 0.25), ("-1", None), ("soon", None)):
        back = from_grpc(Failed(status, details, (pushback, value)), "peer")
        assert isinstance(back, Busy)
        assert back.retry_after_s == seconds


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, HostLost),
        (grpc.StatusCode.CANCELLED, HostLost),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Expired),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Busy),
        (grpc.StatusCode.UNIMPLEMENTED, ClusterError),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, Forbidden),
        (grpc.StatusCode.UNKNOWN, InternalError),
    ],
)
def test_what_grpc_says_itself_has_a_class(
    status: grpc.StatusCode, cls: type[MoesaicError]
) -> None:
    assert type(from_grpc(Failed(status, "connect: refused"), "peer")) is cls


def test_a_foreign_error_is_a_defect_of_ours() -> None:
    assert to_grpc(KeyError("x")) == (grpc.StatusCode.INTERNAL, "InternalError: KeyError: 'x'")


class _Call:
    """A call of a client, as far as `aborting` knows it."""

    def __init__(self) -> None:
        self.ended: tuple[grpc.StatusCode, str] | None = None

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def abort(self, status: grpc.StatusCode, details: str) -> None:
        self.ended = status, details


INSIDE = "10.0.0.7:5123: ActorDiedError in /srv/moesaic/actors/host.py:12"


@pytest.mark.parametrize("cls", [*ERRORS.values(), KeyError])
def test_a_client_outside_of_the_cluster_hears_nothing_of_its_inside(
    cls: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    for outside in (True, False):
        call: Any = _Call()
        caplog.clear()
        with aborting(call, outside=outside):
            raise cls(INSIDE)
        assert call.ended is not None
        status, details = call.ended
        assert status == to_grpc(cls(INSIDE))[0]
        if not outside or (issubclass(cls, MoesaicError) and cls.for_clients):
            assert INSIDE in details, "hosts and routers hear all"
            continue
        assert not any(
            word in details for word in ("10.0.0.7", "5123", "ActorDied", "/srv", "KeyE")
        )
        (record,) = caplog.records
        told = details.rpartition("(request ")[2].removesuffix(")")
        assert len(told) == 32 and told in record.getMessage(), "the log has it, by the id"
        assert INSIDE in (record.exc_text or "") + record.getMessage()
        assert from_grpc(Failed(status, details), "peer").retryable == getattr(
            cls, "retryable", False
        )


def test_words_for_clients_are_told_whole() -> None:
    busy = to_client(Busy("8 calls are held"), "id")
    assert busy == (grpc.StatusCode.RESOURCE_EXHAUSTED, "Busy: 8 calls are held")
