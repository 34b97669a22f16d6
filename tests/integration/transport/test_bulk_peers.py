"""The bulk path with peers that lie, stall, or are killed: what they held is free again."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from moesaic.actors.transport.bulk import server as bulk_server
from moesaic.actors.transport.bulk.datagrams import BulkSocket
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.actors.transport.bulk.shared import make_memory, map_memory
from moesaic.actors.transport.grpc.weights import to_wire
from moesaic.actors.transport.tensor_bytes import TensorBytes
from moesaic.cluster.expert_keys import ExpertVersion
from moesaic.cluster.placement import HostEntry
from moesaic.proto.errors import (
    Busy,
    CallError,
    Corrupted,
    Expired,
    HostLost,
    MoesaicError,
    Unauthenticated,
)
from moesaic.proto.expert_pb2 import Bulk
from moesaic.proto.wire import WIRE_VERSION
from tests.helpers.pool.bulk import (
    MIB,
    NODE,
    ONE,
    STUCK,
    BulkHost,
    bulk_host,
    connected,
    put_of,
    raw_client,
    shared_memories,
    written,
)
from tests.helpers.pool.transports import DEADLINE_S, SECRET, open_things, process, settles

GIVEN = {"up": torch.ones(1000)}
MODULE = "tests.helpers.pool.bulk"


@pytest.fixture
def host() -> Iterator[BulkHost]:
    with bulk_host() as one:
        yield one


@pytest.fixture
def near() -> Iterator[BulkLinks]:
    one = BulkLinks(NODE, SECRET)
    yield one
    one.close()


def until() -> float:
    return time.monotonic() + DEADLINE_S


def answer(sock: BulkSocket) -> Bulk:
    message, fds = sock.receive(until())
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


def serves_others(host: BulkHost, near: BulkLinks) -> bool:
    near.put(host.entry, ONE._replace(version=2), GIVEN, timeout_s=DEADLINE_S)
    with near.get(host.entry, ONE._replace(version=2), timeout_s=DEADLINE_S) as tensors:
        return torch.equal(tensors["up"], GIVEN["up"])


def nothing_held(host: BulkHost, connections: int = 0) -> bool:
    return settles(
        lambda: (
            len(host.server._serving) == connections
            and host.held_bytes() == 0
            and host.store.readers == 0
        )
    )


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
        key = to_wire(ExpertVersion(ONE.key, 1))
        sock.send(Bulk(get=Bulk.Get(seq=1, key=key)))
        assert refusal(sock) == (
            "CallError",
            "kind: only tensors of a training run travel on this path",
        )
        key.kind = 9
        sock.send(Bulk(get=Bulk.Get(seq=2, key=key)))
        assert refusal(sock)[0] == "CallError"


# ---- who may connect ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shown", ["nothing", "rubbish", "of calls", "no Hello", "of another start"]
)
def test_without_the_proof_nothing_is_mapped(
    host: BulkHost, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = []
    monkeypatch.setattr(bulk_server, "map_memory", lambda fd: mapped.append(fd) or map_memory(fd))
    proofs = {
        "nothing": b"",
        "rubbish": os.urandom(32),
        "of calls": SECRET.proof("shm", host.entry.target),
        "of another start": SECRET.proof("bulk", replace(host.entry, incarnation=2).target),
    }
    descriptor, memory = make_memory(MIB)
    sock = connected(host.entry.bulk_address)
    if shown == "no Hello":
        sock.send(put_of(1000), [descriptor])
    else:
        hello = Bulk.Hello(wire_version=WIRE_VERSION, proof=proofs[shown])
        sock.send(Bulk(hello=hello), [descriptor])
    assert refusal(sock)[0] == Unauthenticated.__name__
    assert lost(sock)
    assert not mapped
    sock.close()
    os.close(descriptor)
    memory.close()
    assert nothing_held(host)


def test_another_version_of_the_wire(host: BulkHost) -> None:
    sock = connected(host.entry.bulk_address)
    proof = SECRET.proof("bulk", host.entry.target)
    sock.send(Bulk(hello=Bulk.Hello(wire_version=WIRE_VERSION + 1, proof=proof)))
    code, message = refusal(sock)
    assert (code, message.partition(":")[0]) == ("CallError", "wire_version")
    sock.close()


def test_more_connections_than_a_host_takes(
    host: BulkHost, near: BulkLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_server, "MAX_BULK_CONNECTIONS", 2)
    with raw_client(host.entry), raw_client(host.entry):
        assert settles(lambda: len(host.server._serving) == 2)
        with pytest.raises(Busy, match="2 connections are in use"):
            near.put(host.entry, ONE, GIVEN, timeout_s=0.05)
        threads = threading.active_count()
        with raw_client(host.entry) as third:
            assert refusal(third)[0] == "Busy"
        assert threading.active_count() == threads
    assert nothing_held(host)
    assert serves_others(host, near)


# ---- peers that stall or die --------------------------------------------------------------------


def test_a_silent_connection_ends(host: BulkHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_server, "HELLO_S", 0.05)
    sock = connected(host.entry.bulk_address)
    assert lost(sock)
    sock.close()
    assert nothing_held(host)


def test_a_put_that_stalls_ends(
    host: BulkHost, near: BulkLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_server, "STALL_S", 0.3)
    before = open_things()
    descriptor, memory = make_memory(64 * MIB)
    with raw_client(host.entry) as sock:
        sock.send(put_of(64 * MIB), [descriptor])
        sock.send(written(MIB, 64 * MIB))
        assert settles(lambda: host.held_bytes() == 64 * MIB)
        assert lost(sock)
    os.close(descriptor)
    memory.close()
    assert nothing_held(host)
    assert settles(lambda: all(a <= b for a, b in zip(open_things(), before, strict=True)))
    assert shared_memories() == 0
    assert serves_others(host, near)


def test_puts_wait_for_room(
    host: BulkHost, near: BulkLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.server._arriving, "most", 64 * MIB)
    descriptor, memory = make_memory(64 * MIB)
    with ThreadPoolExecutor(1) as pool:
        with raw_client(host.entry) as sock:
            sock.send(put_of(64 * MIB), [descriptor])
            assert settles(lambda: host.held_bytes() == 64 * MIB)
            with pytest.raises(Busy, match="bytes of tensors that are put: 67108864 of"):
                near.put(host.entry, ONE, GIVEN, timeout_s=0.05)
            putting = pool.submit(near.put, host.entry, ONE, GIVEN, timeout_s=DEADLINE_S)
        putting.result(DEADLINE_S)
    os.close(descriptor)
    memory.close()


def test_a_client_that_never_reads_holds_up_nobody(host: BulkHost, near: BulkLinks) -> None:
    """Its host writes into its memory, says so, and has left the store: it waits for nobody."""
    host.store.held[ONE] = {"up": torch.ones(8 * MIB)}
    descriptor, memory = make_memory(40 * MIB)
    with raw_client(host.entry) as sock:
        sock.send(Bulk(get=Bulk.Get(seq=1, key=to_wire(ONE))), [descriptor])
        assert settles(lambda: memory.octets[32 * MIB - 1] != 0)
        assert settles(lambda: host.store.readers == 0)
        assert serves_others(host, near)
        for seq in range(2, 9):  # until there is no room for what it does not read
            if not host.server._serving or lost_send(sock, seq):
                break
        assert settles(lambda: host.store.readers == 0)
        assert serves_others(host, near)
    os.close(descriptor)
    memory.close()
    assert settles(lambda: len(host.server._serving) == 1)


def lost_send(sock: BulkSocket, seq: int) -> bool:
    try:
        sock.send(Bulk(get=Bulk.Get(seq=seq, key=to_wire(ONE))))
    except HostLost:
        return True
    return False


def test_a_client_that_is_killed_in_the_middle_of_a_put(host: BulkHost, near: BulkLinks) -> None:
    about = json.dumps(asdict(host.entry))
    before = open_things()
    with process("half-a-put", about, module=MODULE) as (child, _):
        assert settles(lambda: host.held_bytes() == 64 * MIB)
        child.kill()
        assert nothing_held(host)
    assert settles(lambda: all(a <= b for a, b in zip(open_things(), before, strict=True)))
    assert shared_memories() == 0
    assert not host.store.held
    assert serves_others(host, near)


@pytest.mark.parametrize("node", [NODE, "elsewhere"])
def test_a_host_that_is_killed_in_the_middle_of_a_get(node: str) -> None:
    links = BulkLinks(node, SECRET)
    with process("host", module=MODULE) as (child, line), ThreadPoolExecutor(1) as pool:
        entry = HostEntry(**json.loads(line))
        with links.get(entry, ONE, timeout_s=DEADLINE_S) as tensors:
            assert torch.equal(tensors["up"], torch.ones(1000))
        del tensors
        before = open_things()

        def get() -> None:
            with links.get(entry, STUCK, timeout_s=DEADLINE_S):
                pass

        getting = pool.submit(get)
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "stuck"
        child.kill()
        with pytest.raises(HostLost):
            getting.result(DEADLINE_S)
        with pytest.raises(HostLost):
            links.put(entry, ONE, GIVEN, timeout_s=DEADLINE_S)
        assert settles(lambda: open_things()[0] <= before[0])
    links.close()
    assert shared_memories() == 0


def test_a_host_that_freezes(near: BulkLinks) -> None:
    with process("host", module=MODULE) as (child, line):
        entry = HostEntry(**json.loads(line))
        near.put(entry, ONE, GIVEN, timeout_s=DEADLINE_S)
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(Expired):
            near.put(entry, ONE, GIVEN, timeout_s=0.1)
        with pytest.raises(Expired), near.get(entry, ONE, timeout_s=0.1):
            pass
        assert shared_memories() == 0, "the host may write into it when it wakes"
        child.send_signal(signal.SIGCONT)
        near.put(entry, ONE, GIVEN, timeout_s=DEADLINE_S)


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
            _, fds = sock.receive(until())
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
        with pytest.raises(CallError, match="total_bytes: 1152921504606846976 bytes are more"):
            with near.get(impostor.entry(), ONE, timeout_s=DEADLINE_S):
                pass
        near.close()
        answering.result(DEADLINE_S)
    impostor.close()
