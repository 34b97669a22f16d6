"""The border to gRPC: how its channels and servers are set up, and how its errors become ours.

An error of ours crosses as a status whose details read `Code: message`, with a code of
proto/errors.py; everything else is judged by its status code.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

import grpc

from ....proto.errors import (
    ERRORS,
    BadInput,
    Busy,
    CallError,
    ClusterError,
    EngineError,
    ExpertUnavailable,
    Expired,
    Forbidden,
    HostLost,
    InternalError,
    MoesaicError,
    NotHere,
    Retryable,
    Unauthenticated,
    UnknownModel,
    from_wire,
    in_words,
    words_for_client,
)
from ....proto.limits import CHUNK_BYTES, HELLO_S, MAX_CONNECTIONS

# How long closing waits for threads, and for a last frame to leave.
CLOSE_S = 0.5
# A frame or weights chunk holds CHUNK_BYTES of tensors and a header, which is far smaller.
_HEADER_BYTES = 64 << 10
# Details travel as an HTTP/2 header, and those are limited to 16 KiB.
_DETAILS_CHARS = 2000

_OPTIONS = [
    ("grpc.max_receive_message_length", CHUNK_BYTES + _HEADER_BYTES),
    ("grpc.max_send_message_length", CHUNK_BYTES + _HEADER_BYTES),
    # A machine that lost its power is noticed after 40 s; a killed process at once, by its socket.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
]
CHANNEL_OPTIONS = [
    *_OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    # A connection of its own for each channel: weights never stand before a token.
    ("grpc.use_local_subchannel_pool", 1),
]
# A process that is at the end of its descriptors fails in places that have nothing to do with its
# peers, so connections have at most half of them.
_CONNECTIONS = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
SERVER_OPTIONS = [
    *_OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # From TCP's connection until HTTP/2's settings.
    ("grpc.server_handshake_timeout_ms", int(HELLO_S * 1e3)),
    ("grpc.max_allowed_incoming_connections", _CONNECTIONS),
]
# Clients of the router service keep a connection between their calls; members of the cluster make
# one for each stream and transfer.
ROUTER_SERVICE_OPTIONS = [*SERVER_OPTIONS, ("grpc.max_connection_idle_ms", 60_000)]
HOST_OPTIONS = [
    *SERVER_OPTIONS,
    ("grpc.max_connection_idle_ms", int(HELLO_S * 1e3)),
    ("grpc.max_concurrent_streams", 8),
]

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_FROM_STATUS: dict[grpc.StatusCode, type[MoesaicError]] = {
    grpc.StatusCode.CANCELLED: HostLost,
    grpc.StatusCode.UNAVAILABLE: HostLost,
    grpc.StatusCode.DEADLINE_EXCEEDED: Expired,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Busy,
    grpc.StatusCode.INVALID_ARGUMENT: CallError,
    grpc.StatusCode.UNIMPLEMENTED: ClusterError,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Forbidden,
}
# The first class that fits decides; the receiver reads the code in the details.
_TO_STATUS: tuple[tuple[type[MoesaicError], grpc.StatusCode], ...] = (
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (Forbidden, grpc.StatusCode.PERMISSION_DENIED),
    (BadInput, grpc.StatusCode.INVALID_ARGUMENT),
    (NotHere, grpc.StatusCode.NOT_FOUND),
    (Busy, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Expired, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Retryable, grpc.StatusCode.UNAVAILABLE),
    (ExpertUnavailable, grpc.StatusCode.UNAVAILABLE),
    (EngineError, grpc.StatusCode.UNAVAILABLE),
    (ClusterError, grpc.StatusCode.FAILED_PRECONDITION),
    (MoesaicError, grpc.StatusCode.INTERNAL),
)
# gRPC's own name (proposal A6): trailing metadata with the milliseconds until another try.
_PUSHBACK = "grpc-retry-pushback-ms"


def from_grpc(error: grpc.RpcError, peer: str) -> MoesaicError:
    """Our error for a failed RPC to ``peer``."""
    if not isinstance(error, grpc.Call):
        return HostLost(f"{peer}: the connection ended")
    status, details = error.code(), error.details() or ""
    code, colon, message = details.partition(": ")
    if colon and code in ERRORS:
        known = from_wire(code, f"{peer}: {message}")
        if isinstance(known, Busy):
            known.retry_after_s = _pushback_s(error)
        return known
    return _FROM_STATUS.get(status, InternalError)(f"{peer}: {status.name}: {details}")


def _pushback_s(call: grpc.Call) -> float | None:
    for name, value in call.trailing_metadata() or ():
        if name == _PUSHBACK and str(value).isdecimal():
            return int(value) / 1e3
    return None


def to_grpc(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Status and details of a failed RPC. A foreign exception is an InternalError."""
    if not isinstance(error, MoesaicError):
        error = InternalError(in_words(error))
    status = next(status for cls, status in _TO_STATUS if isinstance(error, cls))
    return status, f"{error.code}: {error}"[:_DETAILS_CHARS]


@contextlib.contextmanager
def aborting(context: grpc.ServicerContext, *, outside: bool = False) -> Iterator[None]:
    """End the RPC with the status of whatever is raised inside. A caller from ``outside`` of the
    cluster is told nothing of its inside: an id, under which the log has the rest."""
    try:
        yield
    except grpc.RpcError:
        raise  # the caller has gone; there is nobody to tell
    except Exception as error:
        request_id = uuid.uuid4().hex if outside else ""
        if not isinstance(error, MoesaicError):
            log.exception("gRPC: request %s of %s: a defect", request_id, context.peer())
        elif outside and not error.for_clients:
            log.warning("gRPC: request %s: %s: %s", request_id, error.code, error)
        if isinstance(error, Busy) and error.retry_after_s is not None:
            pause = (_PUSHBACK, str(int(error.retry_after_s * 1e3)))
            context.set_trailing_metadata((pause,))
        context.abort(*(to_client(error, request_id) if outside else to_grpc(error)))


def to_client(error: Exception, request_id: str) -> tuple[grpc.StatusCode, str]:
    """`to_grpc` for a client outside of the cluster."""
    known = error if isinstance(error, MoesaicError) else InternalError()
    status, _ = to_grpc(known)
    return status, f"{known.code}: {words_for_client(known, request_id)}"[:_DETAILS_CHARS]


def close_channel(channel: grpc.Channel, timeout_s: float) -> None:
    """Close, but wait no longer than ``timeout_s``.

    gRPC itself waits for a peer that is frozen in the middle of a message until its keepalive has
    ended the connection; its threads and this one go then.
    """
    closing = threading.Thread(target=channel.close, name="grpc-close", daemon=True)
    closing.start()
    closing.join(timeout_s)


class Threads(Executor):
    """The threads of a server, one for each task: they end with it, and `join` has a deadline."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._running: set[threading.Thread] = set()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                log.exception("gRPC: a thread of %s ended", self._name)
                future.set_exception(error)
            finally:
                with self._lock:
                    self._running.discard(thread)

        thread = threading.Thread(target=run, name=self._name, daemon=True)
        with self._lock:
            self._running.add(thread)
        thread.start()
        return future

    def join(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        with self._lock:
            running = list(self._running)
        for thread in running:
            thread.join(max(0.0, until - time.monotonic()))
