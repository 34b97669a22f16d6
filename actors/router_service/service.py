"""The router service: experts' layers over gRPC, for clients without Ray and torch.

It has a router like every trunk. It checks each call completely before merging it with others
(`merged_calls.py`), so that a client's mistake affects no other client. The same server has gRPC's
own services for health and reflection. Everything but a health check requires the key.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from torch import Tensor

from ...cluster.batching.batch_queue import MergePolicy
from ...cluster.expert_keys import LayerKey
from ...cluster.reports.status import RouterServiceProcess
from ...cluster.tracing.context import HEADER
from ...proto.errors import CallError, ClusterError, Expired
from ...proto.expert_pb2 import DType
from ...proto.limits import HELLO_S
from ...proto.router_pb2 import (
    DESCRIPTOR,
    ComputeHead,
    ComputeReply,
    ComputeRequest,
    LayerInfo,
    ModelsReply,
    ModelsRequest,
)
from ...proto.router_pb2_grpc import RouterServicer, add_RouterServicer_to_server
from ...proto.router_wire import RouterLayout, chunks, join_chunks
from ...proto.wire import DTYPE_FROM_WIRE
from ..router.router import Router
from ..transport.budget import SharedLimit
from ..transport.grpc.border import CLOSE_S, ROUTER_SERVICE_OPTIONS, ThreadPerTask, aborting
from ..transport.grpc.interceptors import ClientAuthInterceptor, answered_at_once
from ..transport.grpc.stalls import StallWatcher
from .catalog import Catalog
from .merged_calls import MergedCalls

SERVICE = DESCRIPTOR.services_by_name["Router"].full_name
_CHECK = f"/{health.SERVICE_NAME}/Check"
# RPCs that the server handles, each in a thread, per call that may be held. It refuses calls beyond
# the held ones with a reason; gRPC itself refuses RPCs beyond this number.
_LOOKED_AT = 4
# The part of these that may still be without a head, so that they cannot have a place yet.
_SILENT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePolicy:
    merge: MergePolicy = field(default_factory=MergePolicy)
    max_call_bytes: int = 64 << 20  # limit for one call's tensors
    call_s: float = 60.0  # longest time that a call may take, whatever its deadline


class RouterService:
    """A gRPC server over a router; it does not close the router, which its owner does."""

    def __init__(
        self,
        router: Router,
        catalog: Catalog,
        *,
        key: str,
        bind: str = "127.0.0.1:0",
        policy: ServicePolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Serve clients that show ``key``, at ``bind`` (ip:port; port 0: any free one).

        Raises ClusterError if this process cannot listen on ``bind``.
        """
        policy = policy or ServicePolicy()
        self._health = health.HealthServicer()
        self._threads = ThreadPerTask("router-service")
        self._server = grpc.server(
            self._threads,  # pyright: ignore[reportArgumentType]  # gRPC submits, and no more
            interceptors=[ClientAuthInterceptor(key, {_CHECK: _anybodys_check(self._health)})],
            options=ROUTER_SERVICE_OPTIONS,
            maximum_concurrent_rpcs=_LOOKED_AT * policy.merge.max_calls,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        known = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(known, self._server)
        try:
            port = self._server.add_insecure_port(bind)
        except RuntimeError as error:
            raise ClusterError(f"router: cannot listen on {bind}: {error}") from error
        self.address = f"{bind.rpartition(':')[0]}:{port}"
        self._calls = MergedCalls(
            router, policy.merge, on_defect=self._health.enter_graceful_shutdown, clock=clock
        )
        self._stalls = StallWatcher()
        servicer = _Servicer(self._calls, catalog, policy, self._stalls)
        add_RouterServicer_to_server(servicer, self._server)
        self._server.start()
        for service in ("", SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def report(self) -> RouterServiceProcess:
        """Return counts for `status`. Raises InternalError if a defect ended the service."""
        return self._calls.report()

    def drain(self, drain_s: float) -> int:
        """Report the service as not serving, refuse new calls, and return how many are held.

        The held calls have ``drain_s`` seconds to finish.
        """
        self._health.enter_graceful_shutdown()
        self._calls.drain(drain_s)
        return self._calls.running

    @property
    def running(self) -> int:
        """The number of calls that are held."""
        return self._calls.running

    def close(self) -> None:
        """Stop serving; calls that have not finished after `CLOSE_S` get a retryable error."""
        self._health.enter_graceful_shutdown()
        self._server.stop(CLOSE_S).wait(2 * CLOSE_S)
        self._calls.close()
        self._stalls.close()
        self._threads.join(CLOSE_S)


def _anybodys_check(servicer: health.HealthServicer) -> grpc.RpcMethodHandler:
    """Return a handler for health checks of clients without the key.

    It does not read the request, so a slow client cannot hold a thread. It reports the state of
    the whole server, whatever service the request names.
    """

    def check(requests: object, context: grpc.ServicerContext) -> health_pb2.HealthCheckResponse:
        return servicer.Check(health_pb2.HealthCheckRequest(), context)

    return grpc.stream_unary_rpc_method_handler(
        answered_at_once(check),
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )


class _Servicer(RouterServicer):
    def __init__(
        self, calls: MergedCalls, catalog: Catalog, policy: ServicePolicy, stalls: StallWatcher
    ) -> None:
        self._calls = calls
        self._stalls = stalls
        most = _SILENT * policy.merge.max_calls
        self._unannounced = SharedLimit(most, "calls that have not said what they are")
        self._catalog = catalog
        self._call_s = policy.call_s
        # Half of the room, because the answer needs as much as the call.
        self._max_call_bytes = min(policy.max_call_bytes, policy.merge.max_bytes // 2)

    def Compute(  # noqa: N802
        self, request_iterator: Iterator[ComputeRequest], context: grpc.ServicerContext
    ) -> Iterator[ComputeReply]:
        with aborting(context, outside=True):
            left_s = self._time_left(context)
            with (
                self._unannounced.holding(),
                self._stalls.watching(context.cancel, min(left_s, HELLO_S)),
            ):
                first = next(request_iterator, None)
            if first is None or not first.HasField("head"):
                raise CallError("head: the first message of a call has none")
            head = first.head
            layout, layer = self._check_head(head)
            with self._calls.call(
                context.peer(),
                LayerKey(head.model, head.layer),
                rows=layout.rows,
                size_bytes=layout.call_bytes + layout.reply_bytes,
                timeout_s=left_s,
                cut=context.cancel,
                traceparent=_traceparent(context),
            ) as ticket:
                if not context.add_callback(ticket.over.set):
                    return
                with self._stalls.watching(context.cancel) as progress:
                    parts = _parts(first, request_iterator, progress.moved)
                    data = join_chunks(parts, layout.call_bytes, head.crc32)
                ticket.x_TH, ticket.ids_TK, ticket.weights_TK = _tensors(layout, head, data)
                _check_values(ticket.x_TH, ticket.ids_TK, ticket.weights_TK, head, layer)
                y_TH = self._calls.compute(ticket, self._time_left(context))
                if not context.is_active():
                    return
                with self._stalls.watching(context.cancel) as progress:
                    for reply in _reply(y_TH):
                        yield reply
                        progress.moved()

    def Models(  # noqa: N802
        self, request: ModelsRequest, context: grpc.ServicerContext
    ) -> ModelsReply:
        with aborting(context, outside=True):
            return ModelsReply(models=self._catalog.all(), max_call_bytes=self._max_call_bytes)

    def _time_left(self, context: grpc.ServicerContext) -> float:
        left_s = context.time_remaining()
        if left_s is None:
            return self._call_s
        if left_s <= 0:
            raise Expired("the call's deadline had passed when it arrived")
        return min(left_s, self._call_s)

    def _check_head(self, head: ComputeHead) -> tuple[RouterLayout, LayerInfo]:
        """Check a call's head against its model and the limits.

        Raises CallError and UnknownModel.
        """
        layout = RouterLayout.of(head)
        model = self._catalog.find(head.model)
        if head.dtype != model.dtype:
            raise CallError(
                f"dtype: {DType.Name(head.dtype)}, but {head.model} is computed in "
                f"{DType.Name(model.dtype)}"
            )
        layer = next((one for one in model.layers if one.layer == head.layer), None)
        if layer is None:
            known = ", ".join(str(one.layer) for one in model.layers)
            raise CallError(
                f"layer: layer {head.layer} of {head.model} has no experts; choose one of "
                f"layers {known}"
            )
        if head.hidden != layer.hidden:
            raise CallError(f"hidden: {head.hidden}, but {head.model} has {layer.hidden}")
        if head.top_k > layer.max_top_k:
            raise CallError(f"top_k: {head.top_k} assignments of {layer.experts} experts")
        if layout.call_bytes > self._max_call_bytes:
            raise CallError(
                f"rows: {head.rows} rows take {layout.call_bytes:,} bytes, a call may have "
                f"{self._max_call_bytes:,}; send fewer rows in one call"
            )
        return layout, layer


def _traceparent(context: grpc.ServicerContext) -> list[str]:
    return [str(value) for key, value in context.invocation_metadata() if key == HEADER]


def _parts(
    first: ComputeRequest, rest: Iterator[ComputeRequest], moved: Callable[[], None]
) -> Iterator[bytes]:
    yield first.data
    for request in rest:
        if request.HasField("head"):
            raise CallError("head: only the first message of a call may have one")
        if request.data:
            moved()
        yield request.data


def _tensors(
    layout: RouterLayout, head: ComputeHead, data: bytearray
) -> tuple[Tensor, Tensor, Tensor]:
    """Return views (x_TH, ids_TK, weights_TK) of a call's bytes."""
    whole = torch.frombuffer(data, dtype=torch.uint8)
    ids = whole[: layout.weights_offset].view(torch.int32)
    weights = whole[layout.weights_offset : layout.x_offset].view(torch.float32)
    x = whole[layout.x_offset :].view(DTYPE_FROM_WIRE[head.dtype])
    assignments = layout.rows, layout.top_k
    return x.view(layout.rows, layout.hidden), ids.view(assignments), weights.view(assignments)


def _check_values(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, head: ComputeHead, layer: LayerInfo
) -> None:
    """Check ids and values: one that is not finite would look like an expert's defect.

    Raises CallError.
    """
    wrong_TK = (ids_TK < -1) | (ids_TK > layer.experts)
    if wrong_TK.any():
        row, column = wrong_TK.nonzero()[0].tolist()
        raise CallError(
            f"ids: row {row} has {int(ids_TK[row, column])}; layer {head.layer} of {head.model} "
            f"has the experts 0 to {layer.experts - 1}, and -1 is an unused assignment"
        )
    for name, tensor in (("hidden", x_TH), ("weights", weights_TK)):
        finite = tensor.isfinite()
        if not finite.all():
            row = int((~finite).nonzero()[0, 0])
            raise CallError(f"{name}: row {row} has a value that is not finite")


def _reply(y_TH: Tensor) -> Iterator[ComputeReply]:
    data = y_TH.view(torch.uint8).numpy().reshape(-1).data
    crc32 = zlib.crc32(data)
    for part in chunks(data):
        yield ComputeReply(crc32=crc32, data=part)
        crc32 = 0  # only the first message has the checksum
