"""A device's slab as a router sees it; the device's memory is played by the CPU's."""

from __future__ import annotations

import gc
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.kernels.ffn import ExpertForm
from moesaic.kernels.slabs.borrowed import borrow, borrow_any
from moesaic.kernels.slabs.borrowed_device_slab import DeviceSlabReader, LentPools
from moesaic.kernels.slabs.device_slab import DeviceSlab, SlotLayer
from moesaic.kernels.slabs.layout import SlabLayout
from tests.helpers.models.slots import HostMemory
from tests.helpers.pool.transports import settles

CPU = torch.device("cpu")
HIDDEN, WIDTH, EXPERTS = 24, 40, 6


def layer(*, bias: bool = False) -> SlotLayer:
    shapes: list[tuple[str, tuple[int, ...]]] = [("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))]
    if bias:
        shapes.append(("up_bias", (WIDTH,)))
    form = ExpertForm(transposed=False, activate=torch.relu)
    return SlotLayer(EXPERTS, form, False, tuple(shapes), torch.float32)


def slab_of(*, bias: bool = False) -> DeviceSlab:
    layers = {3: layer(bias=bias), 5: layer(bias=bias)}
    return DeviceSlab.create(
        "m", layers, CPU, HostMemory, chunk_bytes=mmap.PAGESIZE, device_name="cpu"
    )


def tensors(number: float, *, bias: bool = False) -> dict[str, Tensor]:
    return {name: torch.full(shape, number) for name, shape in layer(bias=bias).shapes}


@pytest.fixture
def slab() -> Iterator[DeviceSlab]:
    made = slab_of()
    yield made
    made.close()


@pytest.fixture
def pools() -> Iterator[LentPools]:
    made = LentPools(HostMemory)
    yield made
    made.close()


def borrowed(slab: DeviceSlab, pools: LentPools) -> DeviceSlabReader:
    reader = borrow_any(slab.lend())
    assert isinstance(reader, DeviceSlabReader)
    reader.join(pools)
    return reader


def hand_over(slab: DeviceSlab, reader: DeviceSlabReader) -> None:
    for chunk, serial in slab.chunks().items():
        descriptor = slab.lend_chunk(chunk, serial)
        assert descriptor is not None
        reader.take(chunk, serial, descriptor, lambda: None)


def place(reader: DeviceSlabReader, expert: int, layer: int = 3) -> int | None:
    slot = reader.layout.slot(layer, expert)
    return None if reader.entries.version(slot) is None else reader.place(layer, slot)


@pytest.mark.parametrize("bias", [False, True])
def test_experts_of_several_lenders_lie_in_one_tensor(pools: LentPools, bias: bool) -> None:
    slabs = [slab_of(bias=bias) for _ in range(3)]
    readers = []
    for number, slab in enumerate(slabs):
        for expert in (0, 4):
            slab.write(3, expert, tensors(10 * number + expert, bias=bias), version=1)
        readers.append(borrowed(slab, pools))
        hand_over(slab, readers[-1])
    parts = readers[0].parts(3)
    for number, reader in enumerate(readers):
        assert reader.parts(5) is parts, "layers that are alike share places"
        for expert in (0, 4):
            at = place(reader, expert)
            assert at is not None
            for part in parts.values():
                assert bool((part[at] == 10 * number + expert).all())
        assert place(reader, 1) is None
    for slab in slabs:
        slab.close()


def test_an_expert_is_within_reach_when_its_chunks_are(slab: DeviceSlab, pools: LentPools) -> None:
    reader = borrowed(slab, pools)
    slab.write(3, 2, tensors(7.0), version=1)
    assert place(reader, 2) is None
    hand_over(slab, reader)
    assert place(reader, 2) is not None


def test_memory_that_was_there_before_is_not_taken_for_what_is_there_now(
    slab: DeviceSlab, pools: LentPools
) -> None:
    slab.write(3, 2, tensors(7.0), version=1)
    reader = borrowed(slab, pools)
    hand_over(slab, reader)
    before = slab.chunks()
    slab.free(3, 2, 1)
    slab.write(3, 2, tensors(8.0), version=2)
    assert slab.chunks().keys() == before.keys()
    assert place(reader, 2) is None
    for chunk, serial in before.items():
        reader.drop(chunk, serial)
        assert slab.lend_chunk(chunk, serial) is None
    hand_over(slab, reader)
    at = place(reader, 2)
    assert at is not None
    assert bool((reader.parts(3)["up"][at] == 8.0).all())


def test_a_slab_that_was_closed_has_nothing_within_reach(pools: LentPools) -> None:
    slab = slab_of()
    slab.write(3, 2, tensors(7.0), version=1)
    reader = borrowed(slab, pools)
    hand_over(slab, reader)
    slab.close()
    assert slab.chunks() == {}
    assert reader.entries.version(reader.layout.slot(3, 2)) is None


def test_nothing_is_unmapped_while_it_is_in_use(slab: DeviceSlab, pools: LentPools) -> None:
    slab.write(3, 2, tensors(7.0), version=1)
    reader = borrowed(slab, pools)
    hand_over(slab, reader)
    at, unmapped = place(reader, 2), pools.unmapped
    assert at is not None
    up = reader.parts(3)["up"][at]
    with pools.in_use(), pools.in_use():
        reader.close()
        assert pools.unmapped == unmapped
        assert bool((up == 7.0).all())
    assert pools.unmapped > unmapped
    assert bool(up.isnan().all())


def test_computations_let_changes_pass(pools: LentPools) -> None:
    """Otherwise computations that overlap would keep a change waiting for ever."""
    order: list[str] = []

    def compute() -> None:
        with pools.in_use():
            order.append("computed")

    later = threading.Thread(target=compute)
    with pools.in_use():
        pools.change(lambda: order.append("changed"))
        later.start()
        assert settles(lambda: later.is_alive())
        assert order == []
    later.join(10.0)
    assert order == ["changed", "computed"]


def test_more_lenders_than_there_are_places_for(pools: LentPools) -> None:
    slab = slab_of()
    readers = [borrowed(slab, pools) for _ in range(16)]
    with pytest.raises(ValueError, match="16 hosts lend experts of this form already"):
        borrowed(slab, pools)
    readers[3].close()
    borrowed(slab, pools)
    slab.close()


def test_a_devices_slab_is_none_of_a_cpu(slab: DeviceSlab) -> None:
    with pytest.raises(ValueError, match="on a device"):
        borrow(slab.lend())


def test_a_chunk_that_nobody_knows_is_closed(slab: DeviceSlab, pools: LentPools) -> None:
    reader = borrowed(slab, pools)
    descriptor = os.memfd_create("chunk")
    reader.take(10_000, 1, descriptor, lambda: pytest.fail("it was mapped"))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_writes_fill_places_or_change_nothing(slab: DeviceSlab) -> None:
    for version in (1, 2):
        slab.write(3, 1, tensors(version), version=version)
    with pytest.raises(ValueError, match="2 versions of expert 1 already"):
        slab.write(3, 1, tensors(3.0), version=3)
    assert slab.versions(3, 1) == [1, 2]
    chunks = slab.chunks()
    with pytest.raises(RuntimeError):
        slab.write(3, 2, {**tensors(1.0), "up": torch.zeros(1, 7)}, version=1)
    assert slab.versions(3, 2) == []
    assert slab.chunks().keys() == chunks.keys()


def test_nothing_is_left() -> None:
    def left() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("memfd:moesaic")

    before, descriptors = left(), len(list(Path("/proc/self/fd").iterdir()))
    slab, pools = slab_of(), LentPools(HostMemory)
    slab.write(3, 1, tensors(1.0), version=1)
    reader = borrowed(slab, pools)
    hand_over(slab, reader)
    assert left() > before
    reader.close()
    pools.close()
    slab.close()
    del reader, pools, slab
    assert left() == before
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_a_layout_is_read_as_it_was_written(slab: DeviceSlab) -> None:
    read = SlabLayout.read(memoryview(borrow_bytes(slab)))
    assert read.layers == slab.layout.layers
    assert read.pools == slab.layout.pools
    assert (read.chunks, read.chunk_bytes) == (slab.layout.chunks, mmap.PAGESIZE)


def borrow_bytes(slab: DeviceSlab) -> bytes:
    descriptor = slab.lend()
    try:
        return os.pread(descriptor, slab.layout.nbytes, 0)
    finally:
        os.close(descriptor)
