"""Gradients that a host reads where a client of its node has made them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.actors.transport.bulk.lent_memory import LentMemory, LentTensor, to_wire
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.actors.transport.grpc.weights import key_to_wire
from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.training.contributions import Attempt
from moesaic.cluster.training.orders import BulkKey
from moesaic.proto.expert_pb2 import Bulk
from tests.helpers.pool.bulk import (
    NODE,
    ONE,
    BulkHost,
    answer,
    bulk_host,
    nothing_held,
    raw_client,
    refusal,
    serves_others,
)
from tests.helpers.pool.transports import DEADLINE_S, SECRET, open_things, settles

GRADIENT = BulkKey("gradient", ExpertKey("model", 3, 5), attempt=Attempt(1, 0, 0), source="trunk")
SHAPE = torch.Size((10, 100))


@pytest.fixture
def host() -> Iterator[BulkHost]:
    with bulk_host() as one:
        yield one


@pytest.fixture
def links() -> Iterator[BulkLinks]:
    one = BulkLinks(NODE, SECRET)
    yield one
    one.close()


@pytest.fixture
def memory() -> Iterator[LentMemory]:
    one = LentMemory(1 << 20, tensors=8)
    yield one
    one.close()


def made(memory: LentMemory, name: str = "up", value: float = 1.0) -> torch.Tensor:
    found = memory.tensor(name, SHAPE, torch.float32)
    assert found is not None
    return found.fill_(value)


def mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:moesaic:lent")


def test_a_host_reads_a_gradient_where_it_lies(
    host: BulkHost, links: BulkLinks, memory: LentMemory
) -> None:
    ones, twos = made(memory, "up"), made(memory, "down", 2.0)
    given = {"up": ones, "down": twos}
    assert links.put(host.entry, GRADIENT, given, timeout_s=DEADLINE_S, memory=memory)
    held = host.store.held[GRADIENT]
    assert {name: float(tensor.sum()) for name, tensor in held.items()} == {"up": 1e3, "down": 2e3}
    ones.fill_(3.0)
    assert float(held["up"].sum()) == 3e3
    assert nothing_held(host, connections=1)


def test_other_tensors_and_other_nodes_get_a_copy(
    host: BulkHost, links: BulkLinks, memory: LentMemory
) -> None:
    here, elsewhere = made(memory), torch.ones(SHAPE)
    far = replace(host.entry, node="there")
    for entry, given in (
        (host.entry, {"up": elsewhere}),
        (host.entry, {"up": here, "down": elsewhere}),
        (host.entry, {"up": here.t()}),
        (host.entry, {"up": here[:0]}),
        (far, {"up": here}),
    ):
        assert not links.put(entry, GRADIENT, given, timeout_s=DEADLINE_S, memory=memory)
        held = host.store.held.pop(GRADIENT)
        assert all(torch.equal(held[name], tensor) for name, tensor in given.items())
        assert all(memory.find({name: tensor}) is None for name, tensor in held.items())


def test_memory_lasts_as_long_as_a_tensor_and_no_longer(host: BulkHost, links: BulkLinks) -> None:
    descriptors = len(open_things())
    before = mappings()
    memory = LentMemory(1 << 20, tensors=1)
    links.put(host.entry, GRADIENT, {"up": made(memory)}, timeout_s=DEADLINE_S, memory=memory)
    memory.close()
    memory.close()
    assert memory.tensor("other", SHAPE, torch.float32) is None
    assert float(host.store.held[GRADIENT]["up"].sum()) == 1e3
    assert mappings() == before + 1
    host.store.held.clear()
    links.close()
    assert settles(lambda: mappings() == before)
    assert nothing_held(host)
    assert len(open_things()) == descriptors


def test_a_place_keeps_its_memory() -> None:
    memory = LentMemory(2 * SHAPE.numel() * 4, tensors=2)
    first = made(memory)
    assert made(memory, value=2.0).data_ptr() == first.data_ptr()
    with pytest.raises(ValueError, match=r"up is torch\.float32"):
        memory.tensor("up", SHAPE, torch.float64)
    elsewhere = torch.full(SHAPE, 7.0)
    held = memory.hold("key", {"down": elsewhere})
    assert memory.find(held) is not None
    assert torch.equal(held["down"], elsewhere)
    assert memory.hold("key", held) is held
    assert memory.tensor("third", SHAPE, torch.float32) is None
    given = {"third": elsewhere}
    assert memory.hold("key", given) is given
    assert float(first.sum()) == 2e3
    memory.close()


UP = LentTensor("up", torch.float32, (10, 100), 0)
HUGE = (1 << 40, 1 << 40)


def unsealed() -> int:
    descriptor = os.memfd_create("unsealed")
    os.ftruncate(descriptor, 1 << 20)
    return descriptor


def without_descriptor() -> None:
    return None


LIES: dict[str, tuple[list[LentTensor], Callable[[], int | None] | None, str]] = {
    "beyond its end": ([UP._replace(offset=2 << 20)], None, "does not lie in the memory"),
    "more than there can be": ([UP._replace(shape=HUGE)], None, "at most"),
    "between two numbers": ([UP._replace(offset=2)], None, "does not lie in the memory"),
    "a name twice": ([UP, UP._replace(offset=4096)], None, "a name comes twice"),
    "nothing": ([], None, "none, or an empty one"),
    "an empty one": ([UP._replace(shape=(0, 3))], None, "none, or an empty one"),
    "memory that may shrink": ([UP], unsealed, "sealed against shrinking"),
    "no memory": ([UP], without_descriptor, "descriptor of the memory is missing"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_lent_is_checked(
    host: BulkHost, links: BulkLinks, memory: LentMemory, lie: str
) -> None:
    tensors, other, message = LIES[lie]
    made(memory)
    descriptor = memory.descriptor if other is None else other()
    lend = Bulk.Lend(seq=1, key=key_to_wire(GRADIENT), tensors=to_wire(tensors))
    with raw_client(host.entry) as sock:
        sock.send(Bulk(lend=lend), [] if descriptor is None else [descriptor])
        code, said = refusal(sock)
        assert (code, message in said) == ("CallError", True), said
        del lend.tensors[:]
        lend.tensors.extend(to_wire([UP]))
        sock.send(Bulk(lend=lend), [memory.descriptor])
        assert answer(sock).HasField("done")
    if descriptor not in (None, memory.descriptor):
        os.close(descriptor)
    assert float(host.store.held[GRADIENT]["up"].sum()) == 1e3
    assert serves_others(host, links)


def test_only_gradients_are_lent_and_of_known_types(host: BulkHost, memory: LentMemory) -> None:
    with raw_client(host.entry) as sock:
        lend = Bulk.Lend(seq=1, key=key_to_wire(ONE), tensors=to_wire([UP]))
        sock.send(Bulk(lend=lend), [memory.descriptor])
        assert "weights" in refusal(sock)[1]
        lend = Bulk.Lend(seq=2, key=key_to_wire(GRADIENT), tensors=to_wire([UP]))
        lend.tensors[0].dtype = 99  # pyright: ignore[reportAttributeAccessIssue]
        sock.send(Bulk(lend=lend), [memory.descriptor])
        assert "up has the unknown type 99" in refusal(sock)[1]
