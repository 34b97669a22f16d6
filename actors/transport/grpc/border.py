"""The border to gRPC: options of its channels and servers, and the translation of its errors.

An error of ours travels as a status whose details read `Code: message`, with a code of
proto/errors.py. Any other error is translated by its status code.
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
    client_message,
    describe_error,
    from_wire,
)
from ....proto.limits import CHUNK_BYTES, HELLO_S, MAX_CONNECTIONS

# How long closing waits for threads to end, and for the last frame to be sent.
CLOSE_S = 0.5
# A frame or weights chunk has at most CHUNK_BYTES of tensors, and a header far below this size.
_HEADER_BYTES = 64 << 10
# A status's details travel as an HTTP/2 header, which is limited to 16 KiB.
_DETAILS_CHARS = 2000

_OPTIONS = [
    ("grpc.max_receive_message_length", CHUNK_BYTES + _HEADER_BYTES),
    ("grpc.max_send_message_length", CHUNK_BYTES + _HEADER_BYTES),
    # These detect a machine that lost power after 40 s. A killed process is noticed at once,
    # because its socket closes.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # no limit
]
CHANNEL_OPTIONS = [
    *_OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    # One connection for each channel, so that tokens never queue after weights.
    ("grpc.use_local_subchannel_pool", 1),
]
# A process that is out of descriptors fails in unrelated places, so connections may take at most
# half of them.
_CONNECTIONS = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
SERVER_OPTIONS = [
    *_OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # Time limit from the TCP connection to the HTTP/2 settings.
    ("grpc.server_handshake_timeout_ms", int(HELLO_S * 1e3)),
    ("grpc.max_allowed_incoming_connections", _CONNECTIONS),
]
# Clients of the router service keep their connection between calls. Members of the cluster open one
# for each stream and transfer, so an idle connection to a host can be closed soon.
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
# The first class that matches decides. The receiver uses the code in the details, not the status.
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
# gRPC's name (proposal A6) for trailing metadata with the milliseconds until the next retry.
_PUSHBACK = "grpc-retry-pushback-ms"


def from_grpc(error: grpc.RpcError, peer: str) -> MoesaicError:
    """Return our error for a failed RPC to ``peer``."""
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
    """Return status and details of a failed RPC; a foreign exception becomes InternalError."""
    if not isinstance(error, MoesaicError):
        error = InternalError(describe_error(error))
    status = next(status for cls, status in _TO_STATUS if isinstance(error, cls))
    return status, f"{error.code}: {error}"[:_DETAILS_CHARS]


@contextlib.contextmanager
def aborting(context: grpc.ServicerContext, *, outside: bool = False) -> Iterator[None]:
    """End the RPC with the status of any exception that is raised in the block.

    A caller from ``outside`` the cluster learns nothing about its inside, only a request id, under
    which the log has the details.
    """
    try:
        yield
    except grpc.RpcError:
        raise  # the caller has left and receives no status
    except Exception as error:
        # Whatever it is, the caller gets a status.
        request_id = uuid.uuid4().hex if outside else ""
        if not isinstance(error, MoesaicError):
            log.exception(
                "gRPC: request %s of %s failed with an unexpected error",
                request_id,
                context.peer(),
                extra={"request_id": request_id},
            )
        elif outside:
            ids = {"request_id": request_id, "code": error.code}
            if error.for_clients:
                # Words for clients may quote the request.
                log.info("gRPC: request %s failed: %s", request_id, error.code, extra=ids)
            else:
                log.warning("gRPC: request %s: %s: %s", request_id, error.code, error, extra=ids)
        if isinstance(error, Busy) and error.retry_after_s is not None:
            pause = (_PUSHBACK, str(int(error.retry_after_s * 1e3)))
            context.set_trailing_metadata((pause,))
        context.abort(*(to_client(error, request_id) if outside else to_grpc(error)))


def to_client(error: Exception, request_id: str) -> tuple[grpc.StatusCode, str]:
    """Do what `to_grpc` does, for a client outside the cluster."""
    known = error if isinstance(error, MoesaicError) else InternalError()
    status, _ = to_grpc(known)
    return status, f"{known.code}: {client_message(known, request_id)}"[:_DETAILS_CHARS]


def close_channel(channel: grpc.Channel, timeout_s: float) -> None:
    """Close the channel, but wait no longer than ``timeout_s``.

    If a peer froze in the middle of a message, gRPC waits until its keepalive has ended the
    connection; its threads and the one started here end then.
    """
    closing = threading.Thread(target=channel.close, name="grpc-close", daemon=True)
    closing.start()
    closing.join(timeout_s)


class ThreadPerTask(Executor):
    """The executor of a server: one thread per task, which ends with it; `join` has a deadline."""

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
                # Any error belongs to the future, as with every executor.
                log.exception("gRPC: a thread of %s ended with an error", self._name)
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
