"""The bulk path with strangers, and peers that stall or are killed: what they held is free."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import torch

from moesaic.actors.transport.bulk import server as bulk_server
from moesaic.actors.transport.bulk.datagrams import BulkSocket
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.actors.transport.bulk.shared import make_memory, map_memory
from moesaic.actors.transport.grpc.weights import key_to_wire
from moesaic.cluster.placement import HostEntry
from moesaic.proto.errors import (
    Busy,
    Expired,
    HostLost,
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
    lost,
    nothing_held,
    put_of,
    raw_client,
    refusal,
    serves_others,
    shared_memories,
    written,
)
from tests.helpers.pool.transports import DEADLINE_S, SECRET, open_things, process, settles
from tests.helpers.processes.frozen import freeze

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
        sock.send(Bulk(get=Bulk.Get(seq=1, key=key_to_wire(ONE))), [descriptor])
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
        sock.send(Bulk(get=Bulk.Get(seq=seq, key=key_to_wire(ONE))))
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
        freeze(child.pid)
        with pytest.raises(Expired):
            near.put(entry, ONE, GIVEN, timeout_s=0.1)
        with pytest.raises(Expired), near.get(entry, ONE, timeout_s=0.1):
            pass
        assert shared_memories() == 0, "the host may write into it when it wakes"
        child.send_signal(signal.SIGCONT)
        near.put(entry, ONE, GIVEN, timeout_s=DEADLINE_S)
