"""Health checks of hosts over their gRPC listener: the standard service `grpc.health.v1.Health`.

It answers three questions, by the names of services: ``startup``, ``liveness`` and ``readiness``.
`Check` answers one, `List` all of them. Only members of the cluster may ask, as they alone may use
the listener. No answer waits for the host's loop, which may be in a long batch.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ....cluster.host_answers import HostAnswers
from .border import CHANNEL_OPTIONS, close_channel, from_grpc
from .interceptors import check_answer, show_proof

_LIST = f"/{health.SERVICE_NAME}/List"
_STATUS = health_pb2.HealthCheckResponse
# Their type stubs lack `List`.
_list_request: Any = health_pb2.HealthListRequest  # pyright: ignore[reportAttributeAccessIssue]
_list_response: Any = health_pb2.HealthListResponse  # pyright: ignore[reportAttributeAccessIssue]


class HostHealth(Protocol):
    """What a host says about itself; see `cluster/host/questions.py`."""

    def probed(self) -> None: ...

    def answers(self) -> HostAnswers: ...


class _Servicer(health_pb2_grpc.HealthServicer):
    """Answers `Check` and `List`; `Watch` is not implemented."""

    def __init__(self, host: HostHealth) -> None:
        self._host = host

    def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        found = self._answers().get(request.service)
        if found is None:
            known = ", ".join(HostAnswers._fields)
            context.abort(grpc.StatusCode.NOT_FOUND, f"service: a host has only {known}")
        return found

    def List(self, request: object, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return _list_response(statuses=self._answers())

    def _answers(self) -> dict[str, health_pb2.HealthCheckResponse]:
        self._host.probed()  # whoever asks has come through the listener
        return {
            name: _STATUS(status=_STATUS.SERVING if yes else _STATUS.NOT_SERVING)
            for name, yes in self._host.answers()._asdict().items()
        }


def add_health(host: HostHealth, server: grpc.Server) -> None:
    """Let ``server`` answer health checks of ``host``."""
    health_pb2_grpc.add_HealthServicer_to_server(_Servicer(host), server)


def probe(address: str, proof: bytes, timeout_s: float) -> Future[HostAnswers]:
    """Ask the host at ``address`` all three questions, over a connection of its own.

    ``proof`` is that for the service "health" (`ClusterSecret.proof`). The future raises HostLost,
    Expired or another MoesaicError if the host does not answer, or does not prove who it is.
    """
    found: Future[HostAnswers] = Future()
    found.set_running_or_notify_cancel()
    channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    ask = show_proof(channel, proof).unary_unary(
        _LIST,
        request_serializer=_list_request.SerializeToString,
        response_deserializer=_list_response.FromString,
    )
    call: Any = ask.future(_list_request(), timeout=timeout_s)

    def end(_: object) -> None:
        try:
            check_answer(call, proof)
            statuses = call.result().statuses
            yes = (statuses[name].status == _STATUS.SERVING for name in HostAnswers._fields)
            found.set_result(HostAnswers(*yes))
        except Exception as error:
            # Whatever it is, the caller gets it.
            rpc = isinstance(error, grpc.RpcError)
            found.set_exception(from_grpc(error, address) if rpc else error)
        finally:
            close_channel(channel, 0.0)  # without waiting: this thread is the channel's own

    call.add_done_callback(end)
    return found
