"""A client's side of the router service, in bytes; `moesaic.RouterClient` is built on it.

It imports neither Ray nor torch; a test checks this.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from ...cluster.tracing.context import HEADER
from ...proto.errors import ClusterError
from ...proto.router_pb2 import (
    ComputeHead,
    ComputeReply,
    ComputeRequest,
    ModelsReply,
    ModelsRequest,
)
from ...proto.router_pb2_grpc import RouterStub
from ...proto.router_wire import RouterLayout, chunks, join_chunks
from ..transport.grpc.border import CHANNEL_OPTIONS, CLOSE_S, close_channel, from_grpc
from ..transport.grpc.interceptors import show_key


class RouterChannel:
    """One connection to a router service; thread-safe.

    The first call opens the connection, and a later one reopens it if it was lost.
    """

    def __init__(self, address: str, key: str) -> None:
        """Prepare a connection to ``address`` (host:port) that shows ``key`` to the service."""
        self._address = address
        self._closed = False
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = RouterStub(show_key(self._channel, key))

    def close(self) -> None:
        self._closed = True
        close_channel(self._channel, CLOSE_S)

    def models(self, timeout_s: float) -> ModelsReply:
        """Ask for the models. Raises Unauthenticated, Expired, HostLost and ClusterError."""
        with self._mapped():
            return self._stub.Models(ModelsRequest(), timeout=timeout_s)

    def compute(
        self, head: ComputeHead, data: memoryview, timeout_s: float, traceparent: str | None = None
    ) -> bytearray:
        """Send a call, and return the bytes of its answer. Sets the checksum of ``head``.

        ``traceparent`` names the caller's span. Raises the error that the service answered,
        Expired and HostLost.
        """
        head.crc32 = zlib.crc32(data)
        layout = RouterLayout.of(head)
        with self._mapped():
            metadata = None if traceparent is None else ((HEADER, traceparent),)
            requests = _requests(head, data)
            replies = self._stub.Compute(requests, timeout=timeout_s, metadata=metadata)
            try:
                first: ComputeReply = next(replies)
                return join_chunks(_parts(first, replies), layout.reply_bytes, first.crc32)
            except StopIteration:
                raise ClusterError(
                    f"{self._address}: the server closed the stream without sending a reply"
                ) from None
            finally:
                replies.cancel()  # ends an unfinished stream; does nothing to a finished one

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            if self._closed:
                raise ClusterError(f"{self._address}: this client is closed")
            yield
        except grpc.RpcError as error:
            raise from_grpc(error, self._address) from error
        except ValueError as error:  # gRPC raises this if the channel was closed meanwhile
            raise ClusterError(f"{self._address}: {error}") from error


def _requests(head: ComputeHead, data: memoryview) -> Iterator[ComputeRequest]:
    for at, part in enumerate(chunks(data)):
        yield ComputeRequest(head=None if at else head, data=part)


def _parts(first: ComputeReply, rest: Iterator[ComputeReply]) -> Iterator[bytes]:
    yield first.data
    for reply in rest:
        yield reply.data
