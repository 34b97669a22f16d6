"""Authentication over gRPC: one interceptor on each side of every connection.

A client sends its proof or key in the metadata of each RPC; a server checks it before anything else
happens. gRPC's own thread refuses an RPC without a valid one: no handler runs, no thread of the
server is taken, and the RPC does not count in ``maximum_concurrent_rpcs``. A host answers with its
own side of the proof, in its first metadata. Until then the client sends it nothing and believes
nothing, so an impostor at the port of a dead host gets nothing. This is the only file that knows
what each side shows.
"""

from __future__ import annotations

import hmac
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import grpc

from ....proto.errors import HostLost, MoesaicError, Unauthenticated
from ....proto.keys import ClusterSecret, proof_hash, reply_hash, same_key
from .border import to_grpc

# gRPC sends metadata as bytes if its name ends with -bin.
_PROOF, _ANSWER = "moesaic-proof-bin", "moesaic-answer-bin"
# HTTP's header and scheme for a bearer token (RFC 6750).
_KEY, _SCHEME = "authorization", "bearer"
# The services of a host: the prefixes of their methods on the wire.
_EXPERTS, _WEIGHTS = "/moesaic.v1.Experts/", "/moesaic.v1.Weights/"
_HEALTH = "/grpc.health.v1.Health/"

P = ParamSpec("P")
T = TypeVar("T")


# ---- a client's side -----------------------------------------------------------------------------


class _CallDetails(grpc.ClientCallDetails):
    """A copy of another call's details, with one more entry of metadata."""

    def __init__(self, of: grpc.ClientCallDetails, shown: tuple[str, str | bytes]) -> None:
        self.method = of.method
        self.timeout = of.timeout
        self.metadata = (*(of.metadata or ()), shown)
        self.credentials = of.credentials
        self.wait_for_ready = of.wait_for_ready
        self.compression = of.compression


class _Showing(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds one entry to the metadata of every RPC, without a cost per message."""

    def __init__(self, name: str, value: str | bytes) -> None:
        self._shown = name, value

    def intercept_unary_unary(
        self, continuation: Any, client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        return continuation(_CallDetails(client_call_details, self._shown), request)

    def intercept_unary_stream(
        self, continuation: Any, client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        return continuation(_CallDetails(client_call_details, self._shown), request)

    def intercept_stream_unary(
        self, continuation: Any, client_call_details: grpc.ClientCallDetails, request_iterator: Any
    ) -> Any:
        return continuation(_CallDetails(client_call_details, self._shown), request_iterator)

    def intercept_stream_stream(
        self, continuation: Any, client_call_details: grpc.ClientCallDetails, request_iterator: Any
    ) -> Any:
        return continuation(_CallDetails(client_call_details, self._shown), request_iterator)


class _Proving(_Showing):
    """Shows a proof, and waits for the host's answer to it before it sends or receives anything.

    Streams in both directions are an exception: their reader calls `check_answer`. An RPC with a
    request stream and one response must be called as a future: a plain call blocks until the
    response, so the answer could not be checked before.
    """

    def __init__(self, proof: bytes) -> None:
        super().__init__(_PROOF, proof_hash(proof))
        self._proof = proof

    def intercept_unary_stream(
        self, continuation: Any, client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        call = super().intercept_unary_stream(continuation, client_call_details, request)
        check_answer(call, self._proof)
        return call

    def intercept_stream_unary(
        self, continuation: Any, client_call_details: grpc.ClientCallDetails, request_iterator: Any
    ) -> Any:
        decided, proven = threading.Event(), False

        def once_proven() -> Iterator[Any]:
            decided.wait()
            if proven:
                yield from request_iterator

        try:
            details = client_call_details
            call = super().intercept_stream_unary(continuation, details, once_proven())
            check_answer(call, self._proof)
            proven = True
        finally:
            decided.set()
        return call


def check_answer(call: Any, proof: bytes) -> None:
    """Wait until a host has answered ``proof`` with its own side of it. Raises HostLost if wrong.

    Also return if the RPC has ended with an error, which the caller receives next.
    """
    given = dict(call.initial_metadata() or ()).get(_ANSWER)
    if given is not None and hmac.compare_digest(given, reply_hash(proof)):
        return
    if given is None and call.code() is not grpc.StatusCode.OK:
        return
    call.cancel()
    raise HostLost("the server that answered did not prove that it is the host that was called")


def show_proof(channel: grpc.Channel, proof: bytes) -> grpc.Channel:
    """Wrap ``channel`` to a host that also knows ``proof`` (`ClusterSecret.proof`)."""
    return grpc.intercept_channel(channel, _Proving(proof))


def show_key(channel: grpc.Channel, key: str) -> grpc.Channel:
    """Wrap ``channel`` to a router service so that it shows ``key``."""
    return grpc.intercept_channel(channel, _Showing(_KEY, f"Bearer {key}"))


# ---- a server's side -----------------------------------------------------------------------------


class _AtOnce(ThreadPoolExecutor):
    """Runs tasks at once in the submitting thread, which is gRPC's own; they must not block.

    It never starts a thread. gRPC requires this base class for the executor of a behaviour.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            # Any error belongs to the future, from which gRPC takes it.
            done.set_exception(error)
        return done


_at_once = _AtOnce(max_workers=1)


def answered_at_once(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a gRPC behaviour as never waiting, not even for a message.

    It then runs without a thread of its own, and does not count as a concurrent RPC.
    """
    behaviour.experimental_thread_pool = _at_once  # pyright: ignore[reportFunctionMemberAccess]
    return behaviour


def _refusing(error: MoesaicError) -> grpc.RpcMethodHandler:
    """Return a handler for any method that refuses with ``error`` before it reads a message."""
    status, details = to_grpc(error)

    def refuse(messages: Iterator[bytes], context: grpc.ServicerContext) -> None:
        context.abort(status, details)

    return grpc.stream_stream_rpc_method_handler(answered_at_once(refuse))


class _AuthInterceptor(grpc.ServerInterceptor, ABC):
    """Lets RPCs in that `_admits` accepts, and refuses all others."""

    def __init__(self, refusal: str) -> None:
        self._refusing = _refusing(Unauthenticated(refusal))

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        details: Any = handler_call_details  # its attributes are not declared
        method: str = details.method
        if self._admits(method, dict(details.invocation_metadata)):
            return self._opened(method, continuation(handler_call_details))
        return self._otherwise(method)

    @abstractmethod
    def _admits(self, method: str, metadata: Mapping[str, str | bytes]) -> bool: ...

    def _opened(
        self, method: str, handler: grpc.RpcMethodHandler | None
    ) -> grpc.RpcMethodHandler | None:
        return handler

    def _otherwise(self, method: str) -> grpc.RpcMethodHandler:
        return self._refusing


def _answering(handler: Any, given: bytes) -> grpc.RpcMethodHandler:
    """Wrap ``handler`` so that it first sends ``given`` as metadata.

    Messages of a stream pass through as they are, without a cost per message.
    """

    def first(behaviour: Callable[[Any, grpc.ServicerContext], T]) -> Any:
        def run(request: Any, context: grpc.ServicerContext) -> T:
            context.send_initial_metadata(((_ANSWER, given),))
            return behaviour(request, context)

        return run

    codec = handler.request_deserializer, handler.response_serializer
    if handler.stream_stream is not None:
        return grpc.stream_stream_rpc_method_handler(first(handler.stream_stream), *codec)
    if handler.stream_unary is not None:
        return grpc.stream_unary_rpc_method_handler(first(handler.stream_unary), *codec)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(first(handler.unary_stream), *codec)
    return grpc.unary_unary_rpc_method_handler(first(handler.unary_unary), *codec)


class HostAuthInterceptor(_AuthInterceptor):
    """Admits members of the host's own cluster whose proof is for this host.

    Each service has a proof of its own; a method of any other service is refused.
    """

    def __init__(self, secret: ClusterSecret, target: str) -> None:
        """Accept only proofs that are made with ``secret`` for ``target`` (`keys.target`)."""
        super().__init__(
            "proof: it is missing, or belongs to another cluster, host or incarnation; only "
            "members of the cluster may connect to its hosts"
        )
        self._proofs = {
            _EXPERTS: secret.proof("experts", target),
            _WEIGHTS: secret.proof("weights", target),
            _HEALTH: secret.proof("health", target),
        }

    def _proof(self, method: str) -> bytes | None:
        return next((p for name, p in self._proofs.items() if method.startswith(name)), None)

    def _admits(self, method: str, metadata: Mapping[str, str | bytes]) -> bool:
        given, proof = metadata.get(_PROOF), self._proof(method)
        return (
            proof is not None
            and isinstance(given, bytes)
            and hmac.compare_digest(given, proof_hash(proof))
        )

    def _opened(
        self, method: str, handler: grpc.RpcMethodHandler | None
    ) -> grpc.RpcMethodHandler | None:
        proof = self._proof(method)
        assert proof is not None
        return None if handler is None else _answering(handler, reply_hash(proof))


class ClientAuthInterceptor(_AuthInterceptor):
    """Admits clients that show the key; others reach only the methods in ``open_to_all``."""

    def __init__(self, key: str, open_to_all: Mapping[str, grpc.RpcMethodHandler]) -> None:
        """Ask for ``key``, except for the methods in ``open_to_all``.

        These must be `answered_at_once`, because a client without the key could otherwise hold a
        thread by sending slowly.
        """
        super().__init__(
            "authorization: the router service asks for its key, as `Bearer KEY`; set "
            "MOESAIC_ROUTER_KEY to the key, which is in the session file on the machine that "
            "started the cluster"
        )
        self._key = key
        self._open_to_all = dict(open_to_all)

    def _admits(self, method: str, metadata: Mapping[str, str | bytes]) -> bool:
        scheme, _, given = str(metadata.get(_KEY, "")).partition(" ")
        return scheme.lower() == _SCHEME and same_key(given.strip(), self._key)

    def _otherwise(self, method: str) -> grpc.RpcMethodHandler:
        return self._open_to_all.get(method, self._refusing)
