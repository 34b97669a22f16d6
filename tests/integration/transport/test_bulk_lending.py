"""Gradients that a host reads where a client of its node has made them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moesaic.actors.transport.bulk.lent_memory import (
    LentMemory,
    LentTensor,
    lending_messages,
    to_wire,
)
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.actors.transport.grpc.weights import key_to_wire
from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.training.contributions import Attempt
from moesaic.cluster.training.orders import BulkKey
from moesaic.proto.errors import NotHere
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
    links.lend(host.entry, {GRADIENT: given}, memory, timeout_s=DEADLINE_S)
    held = host.store.held[GRADIENT]
    assert {name: float(tensor.sum()) for name, tensor in held.items()} == {"up": 1e3, "down": 2e3}
    ones.fill_(3.0)
    assert float(held["up"].sum()) == 3e3
    assert nothing_held(host, connections=1)


def test_a_copy_is_put_of_other_tensors(
    host: BulkHost, links: BulkLinks, memory: LentMemory
) -> None:
    here, elsewhere = made(memory), torch.ones(SHAPE)
    for given in (
        {"up": elsewhere},
        {"up": here, "down": elsewhere},
        {"up": here.t()},
        {"up": here[:0]},
        {f"{number} of many names": here for number in range(1500)},  # 80 KB
    ):
        links.lend(host.entry, {GRADIENT: given}, memory, timeout_s=DEADLINE_S)
        held = host.store.held.pop(GRADIENT)
        assert all(torch.equal(held[name], tensor) for name, tensor in given.items())
        assert all(memory.find({name: tensor}) is None for name, tensor in held.items())


def of_expert(number: int) -> BulkKey:
    return GRADIENT._replace(key=GRADIENT.key._replace(expert=number))


def test_a_message_names_hundreds_of_gradients(
    host: BulkHost, links: BulkLinks, memory: LentMemory
) -> None:
    ones = made(memory)
    given = {of_expert(number): {"up": ones} for number in range(1000)}
    messages, others = lending_messages(given, memory)
    assert not others
    assert sum(map(len, messages)) == 1000
    assert len(messages) < 4
    links.lend(host.entry, given, memory, timeout_s=DEADLINE_S)
    assert host.store.held.keys() == given.keys()
    ones.fill_(3.0)
    assert all(float(held["up"].sum()) == 3e3 for held in host.store.held.values())
    assert nothing_held(host, connections=1)


def test_what_came_before_a_refused_one_is_taken_over(
    host: BulkHost, links: BulkLinks, memory: LentMemory
) -> None:
    one = {"up": made(memory)}

    def refuse_the_third(given: BulkKey) -> None:
        if given == of_expert(2):
            raise NotHere(f"{given.key} has another owner")

    host.store.on_put = refuse_the_third
    with pytest.raises(NotHere, match="another owner"):
        links.lend(host.entry, {of_expert(n): one for n in range(4)}, memory, timeout_s=DEADLINE_S)
    assert host.store.held.keys() == {of_expert(0), of_expert(1)}
    assert serves_others(host, links)


def test_memory_lasts_as_long_as_a_tensor_and_no_longer(host: BulkHost, links: BulkLinks) -> None:
    descriptors = len(open_things())
    before = mappings()
    memory = LentMemory(1 << 20, tensors=1)
    links.lend(host.entry, {GRADIENT: {"up": made(memory)}}, memory, timeout_s=DEADLINE_S)
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


def lending(key: BulkKey, tensors: list[LentTensor]) -> Bulk:
    one = Bulk.Gradient(key=key_to_wire(key), tensors=to_wire(tensors))
    return Bulk(lend=Bulk.Lend(seq=1, gradients=[one]))


@pytest.mark.parametrize("lie", LIES)
def test_what_is_lent_is_checked(
    host: BulkHost, links: BulkLinks, memory: LentMemory, lie: str
) -> None:
    tensors, other, message = LIES[lie]
    made(memory)
    descriptor = memory.descriptor if other is None else other()
    with raw_client(host.entry) as sock:
        sock.send(lending(GRADIENT, tensors), [] if descriptor is None else [descriptor])
        code, said = refusal(sock)
        assert (code, message in said) == ("CallError", True), said
        sock.send(lending(GRADIENT, [UP]), [memory.descriptor])
        assert answer(sock).HasField("done")
    if descriptor not in (None, memory.descriptor):
        os.close(descriptor)
    assert float(host.store.held[GRADIENT]["up"].sum()) == 1e3
    assert serves_others(host, links)


def test_only_gradients_are_lent_and_of_known_types(host: BulkHost, memory: LentMemory) -> None:
    with raw_client(host.entry) as sock:
        sock.send(lending(ONE, [UP]), [memory.descriptor])
        assert "weights" in refusal(sock)[1]
        unknown = lending(GRADIENT, [UP])
        unknown.lend.gradients[0].tensors[0].dtype = 99  # pyright: ignore[reportAttributeAccessIssue]
        sock.send(unknown, [memory.descriptor])
        assert "up has the unknown type 99" in refusal(sock)[1]
