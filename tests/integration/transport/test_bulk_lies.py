"""The bulk path with peers that lie: nothing that they say is believed, and others are served."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from moesaic.actors.transport.bulk.datagrams import BulkSocket
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.actors.transport.bulk.shared import make_memory, map_memory
from moesaic.actors.transport.grpc.weights import key_to_wire
from moesaic.actors.transport.tensor_bytes import TensorBytes
from moesaic.cluster.expert_keys import ExpertVersion
from moesaic.cluster.placement import HostEntry
from moesaic.proto.errors import (
    CallError,
    Corrupted,
    HostLost,
    MoesaicError,
)
from moesaic.proto.expert_pb2 import Bulk
from tests.helpers.pool.bulk import (
    MIB,
    NODE,
    ONE,
    BulkHost,
    answer,
    bulk_host,
    lost,
    nothing_held,
    put_of,
    raw_client,
    refusal,
    serves_others,
    shared_memories,
    written,
)
from tests.helpers.pool.transports import DEADLINE_S, SECRET

GIVEN = {"up": torch.ones(1000)}


@pytest.fixture
def host() -> Iterator[BulkHost]:
    with bulk_host() as one:
        yield one


@pytest.fixture
def near() -> Iterator[BulkLinks]:
    one = BulkLinks(NODE, SECRET)
    yield one
    one.close()


# ---- clients that lie ---------------------------------------------------------------------------

Pieces = Callable[[np.ndarray], list[Bulk]]
TOTAL = 4096


def flipped(octets: np.ndarray) -> list[Bulk]:
    said = written(TOTAL, TOTAL, octets)
    octets[-1] ^= 1
    return [said]


def header_length(octets: np.ndarray) -> list[Bulk]:
    octets[:8] = 255
    return [written(TOTAL, TOTAL, octets)]


LIES: dict[str, tuple[Pieces, type[MoesaicError], str]] = {
    "beyond its end": (lambda _: [written(TOTAL + 1, TOTAL)], CallError, "bytes: 4097 of 4096"),
    "nothing": (lambda _: [written(0, TOTAL)], CallError, "bytes: 0 of 4096"),
    "backwards": (
        lambda _: [written(100, TOTAL), written(99, TOTAL)],
        CallError,
        "bytes: 99 of 4096.*after 100",
    ),
    "another total": (lambda _: [written(TOTAL, 2 * TOTAL)], CallError, "of 8192 bytes"),
    "another total later": (
        lambda _: [written(100, TOTAL), written(1 << 50, 1 << 50)],
        CallError,
        "after 100 of 4096",
    ),
    "of another transfer": (
        lambda octets: [written(100, TOTAL), written(TOTAL, TOTAL, octets, seq=7)],
        CallError,
        "of transfer 7",
    ),
    "no checksum": (lambda _: [written(TOTAL, TOTAL)], Corrupted, "checksum"),
    "the checksum of another transfer": (
        lambda octets: [
            Bulk(
                written=Bulk.Written(
                    seq=1,
                    bytes=TOTAL,
                    total_bytes=TOTAL,
                    checksum=written(TOTAL, TOTAL, octets, seq=2).written.checksum,
                )
            )
        ],
        Corrupted,
        "checksum",
    ),
    "changed meanwhile": (flipped, Corrupted, "checksum"),
    "a header that is none": (header_length, CallError, "safetensors: 4096 bytes are too few"),
    "zeros": (lambda octets: [written(TOTAL, TOTAL, octets)], CallError, "safetensors"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_put_that_lies_is_refused_and_the_connection_goes_on(
    host: BulkHost, near: BulkLinks, lie: str
) -> None:
    pieces, kind, reason = LIES[lie]
    descriptor, memory = make_memory(MIB)
    octets = memory.octets[:TOTAL]
    if lie != "zeros":
        octets[:] = 0x20
    with raw_client(host.entry) as sock:
        sock.send(put_of(TOTAL), [descriptor])
        os.close(descriptor)
        for piece in pieces(octets):
            sock.send(piece)
        code, message = refusal(sock)
        assert code == kind.__name__
        assert reason.split(".*")[-1] in message
        assert nothing_held(host, connections=1)
        assert not host.store.held

        file = TensorBytes(GIVEN)
        for _ in file.write(memory.octets):
            pass
        sock.send(put_of(file.nbytes, seq=8))
        sock.send(written(file.nbytes, file.nbytes, memory.octets[: file.nbytes], seq=8))
        assert answer(sock).done.seq == 8
        assert torch.equal(host.store.held[ONE]["up"], GIVEN["up"])
    del octets
    memory.close()
    assert serves_others(host, near)


@pytest.mark.parametrize(
    ("total", "most"), [(0, MIB), (MIB + 1, 2 * MIB), (1000, 999), ((1 << 64) - 1, 1 << 64)]
)
def test_a_size_that_cannot_be_is_refused_before_memory_is_taken(
    host: BulkHost, total: int, most: int
) -> None:
    host.store.most = most
    descriptor, memory = make_memory(MIB)
    with raw_client(host.entry) as sock:
        sock.send(put_of(total), [descriptor])
        code, message = refusal(sock)
        assert (code, message.partition(":")[0]) == ("CallError", "total_bytes")
        sock.send(put_of(total, seq=2))
        assert refusal(sock)[0] == "CallError"
    os.close(descriptor)
    memory.close()
    assert nothing_held(host)


def test_a_put_without_memory_is_refused(host: BulkHost) -> None:
    with raw_client(host.entry) as sock:
        sock.send(put_of(1000))
        assert refusal(sock)[0] == "CallError"


def bad_memories() -> dict[str, int]:
    shrinks = os.memfd_create("shrinks", os.MFD_ALLOW_SEALING)
    os.ftruncate(shrinks, MIB)
    empty, reading = os.memfd_create("empty", os.MFD_ALLOW_SEALING), os.pipe()
    os.close(reading[1])
    huge = os.memfd_create("huge", os.MFD_ALLOW_SEALING)
    os.ftruncate(huge, 1 << 40)
    return {"shrinks": shrinks, "empty": empty, "a pipe": reading[0], "huge": huge}


@pytest.mark.parametrize("kind", ["shrinks", "empty", "a pipe", "huge"])
def test_memory_that_is_not_safe_is_not_mapped(host: BulkHost, near: BulkLinks, kind: str) -> None:
    memories = bad_memories()
    with raw_client(host.entry) as sock:
        sock.send(put_of(1000), [memories[kind]])
        assert lost(sock)
    for descriptor in memories.values():
        os.close(descriptor)
    assert nothing_held(host)
    assert serves_others(host, near)


STRANGE: dict[str, bytes] = {
    "rubbish": b"\xff" * 100,
    "nothing": Bulk().SerializeToString(),
    "an answer": Bulk(done=Bulk.Done(seq=1)).SerializeToString(),
    "a piece of nothing": written(1, 1, seq=5).SerializeToString(),
    "a second Hello": Bulk(hello=Bulk.Hello(wire_version=1)).SerializeToString(),
    "a large datagram": b"\x00" * (1 << 16),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_what_is_no_request_ends_the_connection(
    host: BulkHost, near: BulkLinks, strange: str
) -> None:
    with raw_client(host.entry) as sock:
        sock._sock.send(STRANGE[strange])
        assert lost(sock)
    assert nothing_held(host)
    assert serves_others(host, near)


def test_experts_that_hosts_load_are_not_on_this_path(host: BulkHost) -> None:
    with raw_client(host.entry) as sock:
        key = key_to_wire(ExpertVersion(ONE.key, 1))
        sock.send(Bulk(get=Bulk.Get(seq=1, key=key)))
        assert refusal(sock) == (
            "CallError",
            "kind: only tensors of a training run travel on this path",
        )
        key.kind = 9  # pyright: ignore[reportAttributeAccessIssue]
        sock.send(Bulk(get=Bulk.Get(seq=2, key=key)))
        assert refusal(sock)[0] == "CallError"


# ---- hosts that lie -----------------------------------------------------------------------------


class Impostor:
    """Answers a client's requests with what a test says."""

    def __init__(self) -> None:
        self.address = f"moesaic-test-{os.getpid()}-{id(self)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + self.address)
        self._listener.listen(1)

    def entry(self) -> HostEntry:
        return HostEntry(
            host="host",
            incarnation=1,
            node=NODE,
            shm_address="",
            grpc_address="",
            bulk_address=self.address,
        )

    def answer(self, *answers: Bulk, first_too_small: bool = True) -> None:
        sock = BulkSocket(self._listener.accept()[0], "client")
        answer(sock)  # Hello
        try:
            if first_too_small:
                seq = answer(sock).get.seq
                sock.send(Bulk(too_small=Bulk.TooSmall(seq=seq, total_bytes=1000)))
            _, fds = sock.receive(time.monotonic() + DEADLINE_S)
            memory = map_memory(fds[0]) if fds else None
            for fd in fds:
                os.close(fd)
            for each in answers:
                sock.send(each)
            assert lost(sock)
            if memory is not None:
                memory.close()
        finally:
            sock.close()

    def close(self) -> None:
        self._listener.close()


HOST_LIES: dict[str, tuple[Bulk, type[MoesaicError]]] = {
    "more than there is room for": (written(2 * MIB, 2 * MIB, seq=2), HostLost),
    "an answer to another request": (written(1000, 1000, seq=1), HostLost),
    "something else": (Bulk(done=Bulk.Done(seq=2)), HostLost),
    "beyond its end": (written(1001, 1000, seq=2), CallError),
    "a checksum of something else": (written(1000, 1000, seq=2), Corrupted),
    "zeros": (written(1000, 1000, np.zeros(1000, np.uint8), seq=2), CallError),
}


@pytest.mark.parametrize("lie", HOST_LIES)
def test_a_host_that_lies_is_not_believed(near: BulkLinks, lie: str) -> None:
    impostor = Impostor()
    said, kind = HOST_LIES[lie]
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(impostor.answer, said)
        with pytest.raises(kind), near.get(impostor.entry(), ONE, timeout_s=DEADLINE_S):
            pass
        near.close()
        answering.result(DEADLINE_S)
    impostor.close()
    assert shared_memories() == 0


def test_a_host_that_asks_for_more_memory_than_a_transfer_may_have(near: BulkLinks) -> None:
    impostor = Impostor()
    huge = Bulk(too_small=Bulk.TooSmall(seq=2, total_bytes=1 << 60))
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(impostor.answer, huge)
        with (
            pytest.raises(CallError, match="total_bytes: 1152921504606846976 bytes are more"),
            near.get(impostor.entry(), ONE, timeout_s=DEADLINE_S),
        ):
            pass
        near.close()
        answering.result(DEADLINE_S)
    impostor.close()
