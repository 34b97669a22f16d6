"""A device's slab is taken over as its owner left it, at whatever moment that ended.

The device's memory is played by the CPU's. A copy of the slab, made between two lines of the
owner's code, is what a process that is killed there leaves.
"""

from __future__ import annotations

import gc
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels.ffn import ExpertForm
from moesaic.kernels.slabs import device_pool, device_slab, memfd, slot_entries
from moesaic.kernels.slabs.borrowed import borrow_any
from moesaic.kernels.slabs.borrowed_device_slab import DeviceSlabReader, LentPools
from moesaic.kernels.slabs.device_slab import DeviceSlab, SlotLayer
from moesaic.kernels.slabs.layout import LayerLayout, SlabLayout, SlotTensor
from moesaic.kernels.slabs.slab import Slab
from tests.helpers.models.slots import HostMemory

CPU = torch.device("cpu")
HIDDEN, WIDTH, EXPERTS = 24, 40, 6
Chunks = dict[int, tuple[int, int]]


def layer(width: int = WIDTH) -> SlotLayer:
    shapes = (("up", (width, HIDDEN)), ("down", (HIDDEN, width)))
    return SlotLayer(EXPERTS, ExpertForm(False, torch.relu), False, shapes, torch.float32)


LAYERS = {3: layer(), 5: layer()}


def new_slab() -> DeviceSlab:
    return DeviceSlab.create(
        "left", LAYERS, CPU, HostMemory, chunk_bytes=mmap.PAGESIZE, device_name="GPU-1"
    )


def adopt(header: int, chunks: Chunks, **changed: Any) -> DeviceSlab:
    given = {
        "layers": LAYERS,
        "device": CPU,
        "allocate": HostMemory,
        "chunk_bytes": mmap.PAGESIZE,
        "device_name": "GPU-1",
    }
    return DeviceSlab.adopt(header, chunks, **{**given, **changed})


def tensors(number: float) -> dict[str, Tensor]:
    return {name: torch.full(shape, number) for name, shape in LAYERS[3].shapes}


def number_of(layer: int, expert: int, version: int) -> float:
    return 100.0 * layer + 10.0 * expert + version


def write(slab: DeviceSlab, layer: int, expert: int, version: int) -> None:
    given = tensors(number_of(layer, expert, version))
    slab.write(layer, expert, given, version=version)


def assert_right(slab: DeviceSlab) -> None:
    """What it holds is what was written, and its header says how things are."""
    assert slab.entries.changing() == []
    assert {n: serial for n, serial in enumerate(slab._serials.tolist()) if serial} == slab.chunks()
    for layer, expert, version in slab.filled():
        for name, tensor in slab.read(layer, expert, version).items():
            expected = tensors(number_of(layer, expert, version))[name]
            assert torch.equal(tensor, expected), (layer, expert, version)
        assert slab.is_sound(layer, expert, version)


def descriptors_of(slab: DeviceSlab) -> Chunks:
    found = {}
    for chunk, serial in slab.chunks().items():
        descriptor = slab.lend_chunk(chunk, serial)
        assert descriptor is not None
        found[chunk] = serial, descriptor
    return found


def leave(slab: DeviceSlab) -> tuple[int, Chunks]:
    """End its process: only descriptors outlive it."""
    header, chunks = os.dup(slab.descriptor), descriptors_of(slab)
    slab._let_go()
    return header, chunks


def open_here() -> tuple[int, int]:
    """Descriptors, and mappings of memory that was made here."""
    gc.collect()
    mapped = Path("/proc/self/maps").read_text().count("memfd:moesaic")
    return len(list(Path("/proc/self/fd").iterdir())), mapped


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = open_here()
    yield
    assert open_here() == before


# ---- what is there afterwards -------------------------------------------------------------------


def test_it_is_adopted_as_its_owner_left_it() -> None:
    slab = new_slab()
    for expert in (0, 1, 4):
        write(slab, 3, expert, 1)
    write(slab, 5, 1, 2)
    slab.free(3, 1, 1)
    held, chunks, backed = slab.filled(), slab.chunks(), slab.backed_bytes
    generation = slab.entries.generation(slab.layout.slot(3, 0))
    adopted = adopt(*leave(slab))
    assert adopted.filled() == held == [(3, 0, 1), (3, 4, 1), (5, 1, 2)]
    assert adopted.chunks() == chunks
    assert adopted.backed_bytes == backed
    assert adopted.entries.generation(adopted.layout.slot(3, 0)) == generation
    assert_right(adopted)
    # It is filled and emptied like any other.
    write(adopted, 3, 1, 7)
    adopted.free(3, 4, 1)
    assert adopted.filled() == [(3, 0, 1), (3, 1, 7), (5, 1, 2)]
    assert_right(adopted)
    for layer, expert, version in adopted.filled():
        adopted.free(layer, expert, version)
    assert adopted.backed_bytes == 0
    adopted.close()


def test_it_is_adopted_again_and_again() -> None:
    slab = new_slab()
    write(slab, 3, 0, 1)
    serials = set(slab.chunks().values())
    for version in (2, 3):
        write(slab, 3, version, version)
        slab = adopt(*leave(slab))
        slab.free(3, version, version)
        write(slab, 5, version, version)
        new = set(slab.chunks().values()) - serials
        assert min(new, default=99) > max(serials)
        serials |= new
        assert_right(slab)
    slab.close()


def test_serial_numbers_go_on_after_memory_that_has_gone() -> None:
    """A router may still have what the owner unmapped last."""
    slab = new_slab()
    write(slab, 3, 0, 1)
    write(slab, 3, 1, 1)
    seen = set(slab.chunks().values())
    slab.free(3, 1, 1)
    adopted = adopt(*leave(slab))
    kept = set(adopted.chunks().values())
    write(adopted, 3, 1, 2)
    assert not (set(adopted.chunks().values()) - kept) & seen
    adopted.close()


def test_slots_without_their_memory_are_empty() -> None:
    slab = new_slab()
    for expert in range(EXPERTS):
        write(slab, 3, expert, 1)
    header, chunks = leave(slab)
    pool = slab.layout.pool(3)
    lost = pool.chunks(slab.entries.place(slab.layout.slot(3, 2)))[0]
    other = pool.chunks(slab.entries.place(slab.layout.slot(3, 5)))[-1]
    os.close(chunks.pop(lost)[1])
    chunks[other] = chunks[other][0] + 100, chunks[other][1]
    gone = {
        expert
        for expert in range(EXPERTS)
        if {lost, other} & set(pool.chunks(slab.entries.place(slab.layout.slot(3, expert))))
    }
    assert {2, 5} <= gone < set(range(EXPERTS))
    adopted = adopt(header, chunks)
    assert {expert for _, expert, _ in adopted.filled()} == set(range(EXPERTS)) - gone
    assert_right(adopted)
    for expert in sorted(gone):
        write(adopted, 3, expert, 1)
    assert len(adopted.filled()) == EXPERTS
    assert_right(adopted)
    adopted.close()


def test_memory_that_no_slot_uses_is_freed() -> None:
    slab = new_slab()
    write(slab, 3, 0, 1)
    stale = descriptors_of(slab)
    slab.free(3, 0, 1)
    write(slab, 3, 1, 2)
    header, chunks = leave(slab)
    unknown = os.memfd_create("chunk")
    for chunk, (serial, descriptor) in stale.items():
        if chunk in chunks:
            os.close(descriptor)
        else:
            chunks[chunk] = serial, descriptor
    chunks[10_000] = 1, unknown
    adopted = adopt(header, chunks)
    assert adopted.filled() == [(3, 1, 2)]
    assert adopted.chunks().keys() == set(adopted.layout.pool(3).chunks(0))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(unknown)
    adopted.close()


def test_a_slab_that_its_owner_had_closed_is_empty() -> None:
    slab = new_slab()
    write(slab, 3, 0, 1)
    header, chunks = os.dup(slab.descriptor), descriptors_of(slab)
    slab.close()
    adopted = adopt(header, chunks)
    assert adopted.filled() == []
    assert adopted.chunks() == {}
    write(adopted, 3, 0, 2)
    assert_right(adopted)
    adopted.close()


def test_who_had_borrowed_it_sees_what_its_next_owner_does() -> None:
    slab = new_slab()
    pools = LentPools(HostMemory)
    for expert in (0, 1):
        write(slab, 3, expert, 1)
    reader = borrow_any(slab.lend())
    assert isinstance(reader, DeviceSlabReader)
    reader.join(pools)
    for chunk, (serial, descriptor) in descriptors_of(slab).items():
        reader.take(chunk, serial, descriptor, lambda: None)
    slots = [reader.layout.slot(3, expert) for expert in (0, 1)]
    before = [reader.place(3, slot) for slot in slots]
    header, chunks = leave(slab)
    # The keeper did not have the memory of expert 1.
    mine, lost = (slab.layout.pool(3).chunks(slab.entries.place(slot)) for slot in slots)
    for chunk in set(lost) - set(mine):
        os.close(chunks.pop(chunk)[1])
    adopted = adopt(header, chunks)
    assert reader.place(3, slots[0]) == before[0]
    assert reader.entries.version(slots[0]) == 1
    assert reader.entries.version(slots[1]) is None
    write(adopted, 3, 1, 2)
    assert reader.entries.version(slots[1]) == 2
    assert reader.place(3, slots[1]) is None, "it has other memory now"
    at = before[0]
    assert at is not None
    assert bool((reader.parts(3)["up"][at] == number_of(3, 0, 1)).all())
    reader.close()
    pools.close()
    adopted.close()


def test_changed_bytes_are_noticed() -> None:
    slab = new_slab()
    write(slab, 3, 0, 1)
    assert slab.is_sound(3, 0, 1)
    (_, descriptor), *others = descriptors_of(slab).values()
    os.pwrite(descriptor, b"\1", 17)
    for one in (descriptor, *(other for _, other in others)):
        os.close(one)
    assert not slab.is_sound(3, 0, 1)
    with pytest.raises(KeyError):
        slab.is_sound(3, 0, 2)
    slab.close()


# ---- a process is killed between any two lines --------------------------------------------------


@dataclass
class Killed:
    """Copies of a slab as its owner would have left it, and what it should hold at least."""

    slab: DeviceSlab
    kept: Chunks = field(default_factory=dict)  # descriptors that the keeper has
    left: list[tuple[int, Chunks, set[tuple[int, int, int]], set[int]]] = field(
        default_factory=list
    )
    serials: set[int] = field(default_factory=set)  # that were given so far
    sure: set[tuple[int, int, int]] = field(default_factory=set)

    def keep(self) -> None:
        """Let the keeper have everything that is there."""
        self.close_kept()
        self.kept = descriptors_of(self.slab)
        self.sure = set(self.slab.filled())

    def close_kept(self) -> None:
        for _, descriptor in self.kept.values():
            os.close(descriptor)
        self.kept = {}

    def copy(self) -> None:
        header = _copy(self.slab.descriptor, "header")
        kept = {n: (serial, _copy(one, "chunk")) for n, (serial, one) in self.kept.items()}
        self.serials.update(int(one) for one in self.slab._serials)
        self.left.append((header, kept, set(self.sure), set(self.serials)))

    @contextmanager
    def at_every_line(self, *, quick: bool) -> Iterator[None]:
        """Copy it before each line of the slab's code; ``quick``: the keeper hears all at once."""
        files = {module.__file__ for module in (device_slab, device_pool, slot_entries)}

        def local(frame: FrameType, event: str, _: object) -> Any:
            if event == "line":
                sys.settrace(None)
                if quick and not self.slab._lock.locked():
                    self.close_kept()
                    self.kept = descriptors_of(self.slab)
                self.copy()
                sys.settrace(trace)
            return local

        def trace(frame: FrameType, event: str, _: object) -> Any:
            return local if frame.f_code.co_filename in files else None

        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(None)


def _copy(descriptor: int, name: str) -> int:
    size = os.fstat(descriptor).st_size
    copied, memory = memfd.create(name, size, os.pread(descriptor, size, 0))
    memory.close()
    return copied


# What happens to the slab: experts that leave, and then one that comes.
CHANGES: Mapping[str, tuple[list[tuple[int, int, int]], tuple[int, int, int] | None]] = {
    "filled": ([], (3, 2, 1)),
    "filled beside another version": ([], (3, 1, 2)),
    "freed": ([(3, 1, 1)], None),
    "freed and filled again": ([(3, 1, 1)], (5, 4, 3)),
    "freed and filled elsewhere": ([(3, 0, 1), (3, 1, 1)], (5, 4, 3)),
}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_killed_owner_leaves_whole_experts(change: str, quick: bool) -> None:
    slab = new_slab()
    killed = Killed(slab)
    for expert in (0, 1):
        write(slab, 3, expert, 1)
    killed.keep()
    leave_it, comes = CHANGES[change]
    killed.sure -= set(leave_it)
    with killed.at_every_line(quick=quick):
        for one in leave_it:
            slab.free(*one)
        if comes is not None:
            write(slab, *comes)
    killed.close_kept()
    slab.close()
    assert len(killed.left) > 40
    held = set()
    for header, chunks, sure, serials in killed.left:
        adopted = adopt(header, chunks)
        assert sure <= set(adopted.filled())
        assert_right(adopted)
        held |= set(adopted.filled())
        before = set(adopted.chunks().values())
        write(adopted, 5, 0, 9)
        assert not (set(adopted.chunks().values()) - before) & serials
        assert_right(adopted)
        adopted.close()
    if comes is not None and quick:
        assert comes in held, "some kills came after it had filled the slot"


# ---- what is not adopted ------------------------------------------------------------------------


def other_header(**changed: Any) -> int:
    layouts = {number: one.layout() for number, one in LAYERS.items()}
    given: dict[str, Any] = {"chunk_bytes": mmap.PAGESIZE, "device": "GPU-1", **changed}
    layout = SlabLayout(given.pop("layers", layouts), **given)
    header, memory = memfd.create("other", layout.nbytes, layout.header())
    memory.close()
    return header


def header_of_a_cpu() -> int:
    plain = LayerLayout(2, (SlotTensor("up", (4, 4), torch.float32),))
    slab = Slab.create("cpu", SlabLayout({3: plain}))
    header = os.dup(slab.descriptor)
    slab.close()
    return header


def header_of_nothing() -> int:
    header, memory = memfd.create("nothing", 1 << 16, b"")
    memory.close()
    return header


REFUSED: Mapping[str, tuple[Callable[[], int], str]] = {
    "other shapes": (
        lambda: other_header(layers={n: layer(WIDTH + 1).layout() for n in LAYERS}),
        "another layout",
    ),
    "other layers": (lambda: other_header(layers={3: layer().layout()}), "another layout"),
    "other chunks": (lambda: other_header(chunk_bytes=2 * mmap.PAGESIZE), "another layout"),
    "other device": (
        lambda: other_header(device="GPU-2"),
        "experts are on GPU-2, and this host is on GPU-1",
    ),
    "a CPU's": (header_of_a_cpu, "memory of a CPU"),
    "no slab": (header_of_nothing, "begin as a slab"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_slab_is_refused_and_closed(kind: str) -> None:
    slab = new_slab()
    write(slab, 3, 0, 1)
    chunks = descriptors_of(slab)
    make, why = REFUSED[kind]
    with pytest.raises(ValueError, match=why):
        adopt(make(), chunks)
    slab.close()


def test_a_devices_slab_is_none_of_a_cpu() -> None:
    slab = new_slab()
    with pytest.raises(ValueError, match="on the device GPU-1"):
        Slab.adopt(os.dup(slab.descriptor))
    slab.close()


@pytest.mark.parametrize("place", [1, 10_000])
def test_entries_that_contradict_each_other_are_refused(place: int) -> None:
    slab = new_slab()
    for expert in (0, 1):
        write(slab, 3, expert, 1)
    assert slab.entries.place(slab.layout.slot(3, 1)) == 1
    slab.entries._slots["place"][slab.layout.slot(3, 0)] = place
    with pytest.raises(ValueError, match=f"names place {place}"):
        adopt(*leave(slab))


class _Broken(HostMemory):
    """Maps two chunks, and no more."""

    def adopt(self, chunk: int, descriptor: int, *, writable: bool = False) -> None:
        if len(self.chunks) >= 2:
            os.close(descriptor)
            raise RuntimeError("cuMemImportFromShareableHandle: CUDA_ERROR_INVALID_DEVICE")
        super().adopt(chunk, descriptor, writable=writable)


def test_a_chunk_that_cannot_be_mapped_leaves_nothing() -> None:
    slab = new_slab()
    for expert in range(EXPERTS):
        write(slab, 3, expert, 1)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_DEVICE"):
        adopt(*leave(slab), allocate=_Broken)


@pytest.mark.parametrize("ranges", [0, 1])
def test_addresses_that_cannot_be_had_leave_nothing(ranges: int) -> None:
    slab = new_slab()
    write(slab, 3, 0, 1)
    made = []

    def allocate(nbytes: int) -> HostMemory:
        if len(made) == ranges:
            raise RuntimeError("cuMemAddressReserve: CUDA_ERROR_OUT_OF_MEMORY")
        made.append(nbytes)
        return HostMemory(nbytes)

    with pytest.raises(RuntimeError, match="cuMemAddressReserve"):
        adopt(*leave(slab), allocate=allocate)


def test_a_layer_of_another_dtype_is_another_layout() -> None:
    slab = new_slab()
    layers = {number: replace(one, dtype=torch.bfloat16) for number, one in LAYERS.items()}
    with pytest.raises(ValueError, match="another layout"):
        adopt(*leave(slab), layers=layers)
