"""Peers that a host does not want: they say nothing, or half of it, or too much."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from moesaic.actors.transport.grpc.border import from_grpc
from moesaic.actors.transport.grpc.stream import METHOD, SERVICE
from moesaic.cluster.placement import HostEntry
from moesaic.proto import keys
from moesaic.proto.errors import MoesaicError
from moesaic.proto.expert_pb2 import Frame
from moesaic.proto.keys import Plane, secret_of_process
from moesaic.proto.wire import WIRE_VERSION

# What an HTTP/2 client says first: its preface and empty settings, and that it has heard ours.
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\0\4\1\0\0\0\0"
Metadata = tuple[tuple[str, str | bytes], ...]


def shown(entry: HostEntry, plane: Plane) -> Metadata:
    """What a member of the cluster shows: a stranger may be one that has gone mad."""
    proof = secret_of_process().proof(plane, entry.target)
    return (("moesaic-proof-bin", keys.proof_hash(proof)),)


@contextmanager
def connections(address: str, count: int, says: bytes = b"") -> Iterator[list[socket.socket]]:
    """TCP connections that say this and then nothing."""
    ip, _, port = address.rpartition(":")
    made = [socket.create_connection((ip, int(port)), 20.0) for _ in range(count)]
    try:
        for each in made:
            each.sendall(says)
        yield made
    finally:
        for each in made:
            each.close()


def ended(connection: socket.socket) -> bool:
    """Reads until the other side has closed; False when it does not for as long as the timeout."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def hello(router: str = "stranger", *, group: str = "") -> bytes:
    frame = Frame()
    frame.hello.wire_version, frame.hello.router = WIRE_VERSION, router
    frame.hello.group = group
    return frame.SerializeToString()


class Stream:
    """A stream of frames to a host: what is sent is up to the test."""

    def __init__(self, entry: HostEntry) -> None:
        self._channel = grpc.insecure_channel(
            entry.grpc_address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")
        self._call = call(iter(self._frames.get, None), metadata=shown(entry, "experts"))

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self._frames.put(message)

    def hear(self) -> Frame:
        return Frame.FromString(next(self._call))

    def error(self) -> MoesaicError:
        """How it ends."""
        try:
            for _ in self._call:
                pass
        except grpc.RpcError as error:
            return from_grpc(error, "host")
        raise AssertionError("it ended without an error")

    def close(self) -> None:
        self._frames.put(None)
        self._call.cancel()
        self._channel.close()
