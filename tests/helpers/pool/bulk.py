"""Hosts with a training run's tensors, in this process and in others, and raw clients of theirs.

python -m tests.helpers.pool.bulk host
python -m tests.helpers.pool.bulk half-a-put ADDRESS
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from moesaic.actors.transport.bulk.datagrams import BulkSocket
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.actors.transport.bulk.server import BulkServer
from moesaic.actors.transport.bulk.shared import make_memory
from moesaic.actors.transport.grpc.stream import GrpcListener
from moesaic.actors.transport.grpc.weights import Weights, key_to_wire
from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.placement import HostEntry
from moesaic.cluster.training.orders import BulkKey
from moesaic.proto.errors import HostLost, NotHere
from moesaic.proto.expert_pb2 import Bulk
from moesaic.proto.keys import target
from moesaic.proto.wire import WIRE_VERSION
from tests.helpers.pool.transports import DEADLINE_S, SECRET, settles

NODE = "here"
MIB = 1 << 20
ONE = BulkKey("weights", ExpertKey("model", 3, 5), version=1)
# A get of it never comes to an end.
STUCK = ONE._replace(version=99)


class DictBulkStore:
    """A training run's tensors in memory."""

    def __init__(self) -> None:
        self.held: dict[BulkKey, dict[str, Tensor]] = {}
        self.on_read: Callable[[BulkKey], object] = lambda _: None
        self.on_put: Callable[[BulkKey], object] = lambda _: None
        self.most = 256 * MIB
        self.readers = 0
        self._lock = threading.Lock()

    def most_bytes(self, key: BulkKey) -> int:
        if key.key.model != "model":
            raise NotHere(f"model {key.key.model!r} is unknown to this host")
        return self.most

    @contextlib.contextmanager
    def reading(self, wanted: BulkKey) -> Iterator[Mapping[str, Tensor]]:
        with self._lock:
            self.readers += 1
        try:
            self.on_read(wanted)
            if wanted not in self.held:
                raise NotHere(f"{wanted} is not on this host")
            yield self.held[wanted]
        finally:
            with self._lock:
                self.readers -= 1

    def put(self, given: BulkKey, tensors: Mapping[str, Tensor]) -> None:
        self.on_put(given)
        self.held[given] = dict(tensors)


@dataclass(frozen=True)
class BulkHost:
    entry: HostEntry
    store: DictBulkStore
    server: BulkServer
    listener: GrpcListener

    @property
    def weights(self) -> Weights:
        return self.listener._weights

    def held_bytes(self) -> int:
        """Bytes that this host counts as arriving, over both paths."""
        return self.server._arriving.held + self.weights._bytes.held


@contextlib.contextmanager
def bulk_host(*, incarnation: int = 1, store: DictBulkStore | None = None) -> Iterator[BulkHost]:
    meant = target("host", incarnation)
    store = store or DictBulkStore()
    listener = GrpcListener(bulk=store, secret=SECRET, target=meant)
    server = BulkServer(store, secret=SECRET, target=meant)
    entry = HostEntry(
        host="host",
        incarnation=incarnation,
        node=NODE,
        shm_address="",
        grpc_address=listener.address,
        bulk_address=server.address,
    )
    try:
        yield BulkHost(entry, store, server, listener)
    finally:
        server.close()
        listener.close()


def shared_memories() -> int:
    """The mappings of memory for transfers in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:moesaic:bulk")


# ---- a client that says what it likes -----------------------------------------------------------


def connected(address: str) -> BulkSocket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect("\0" + address)
    return BulkSocket(sock, "host")


@contextlib.contextmanager
def raw_client(entry: HostEntry) -> Iterator[BulkSocket]:
    """A connection that has said Hello, if the host has not refused it before."""
    sock = connected(entry.bulk_address)
    proof = SECRET.proof("bulk", entry.target)
    try:
        with contextlib.suppress(HostLost):
            sock.send(Bulk(hello=Bulk.Hello(wire_version=WIRE_VERSION, proof=proof)))
        yield sock
    finally:
        sock.close()


def put_of(total: int, seq: int = 1, key: BulkKey = ONE) -> Bulk:
    return Bulk(put=Bulk.Put(seq=seq, key=key_to_wire(key), total_bytes=total))


def written(end: int, total: int, octets: np.ndarray | None = None, seq: int = 1) -> Bulk:
    """A piece; with ``octets`` it has their checksum."""
    checksum = 0 if octets is None else xxhash.xxh3_64_intdigest(octets.data, seq)
    message = Bulk.Written(seq=seq, bytes=end, total_bytes=total, checksum=checksum)
    return Bulk(written=message)


def answer(sock: BulkSocket) -> Bulk:
    message, fds = sock.receive(time.monotonic() + DEADLINE_S)
    assert not fds
    return message


def refusal(sock: BulkSocket) -> tuple[str, str]:
    message = answer(sock)
    assert message.HasField("refusal"), message
    return message.refusal.code, message.refusal.message


def lost(sock: BulkSocket) -> bool:
    try:
        return not answer(sock)
    except HostLost:
        return True


def serves_others(host: BulkHost, links: BulkLinks) -> bool:
    key, given = ONE._replace(version=2), torch.ones(1000)
    links.put(host.entry, key, {"up": given}, timeout_s=DEADLINE_S)
    with links.get(host.entry, key, timeout_s=DEADLINE_S) as tensors:
        return torch.equal(tensors["up"], given)


def nothing_held(host: BulkHost, connections: int = 0) -> bool:
    return settles(
        lambda: (
            len(host.server._serving) == connections
            and host.held_bytes() == 0
            and host.store.readers == 0
        )
    )


# ---- processes ----------------------------------------------------------------------------------


def run_host() -> None:
    def wait_for_ever(wanted: BulkKey) -> None:
        if wanted == STUCK:
            print("stuck", flush=True)
            threading.Event().wait()

    with bulk_host() as host:
        host.store.on_read = wait_for_ever
        host.store.held[ONE] = {"up": torch.ones(1000)}
        print(json.dumps(asdict(host.entry)), flush=True)
        sys.stdin.read()


def run_half_a_put(about: str) -> None:
    entry = HostEntry(**json.loads(about))
    descriptor, memory = make_memory(64 * MIB)
    with raw_client(entry) as sock:
        sock.send(put_of(64 * MIB), [descriptor])
        sock.send(written(MIB, 64 * MIB))
        print("written", flush=True)
        sys.stdin.read()
    memory.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["host"]:
            run_host()
        case ["half-a-put", about]:
            run_half_a_put(about)
