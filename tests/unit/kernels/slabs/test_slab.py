"""Slabs: every form of expert computes the same bits from one, and its memory comes and goes.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size.
"""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels import onednn
from moesaic.kernels.ffn import ExpertForm, ExpertWeights, can_pack, loop_kernel, pack, unpack
from moesaic.kernels.slabs.layout import (
    COPIES,
    PAGE_BYTES,
    LayerLayout,
    Packing,
    SlabLayout,
    SlotTensor,
)
from moesaic.kernels.slabs.slab import Slab, layer_layout
from tests.helpers.models.forms import HIDDEN, KINDS, random_experts

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


def in_layout(form: ExpertForm, expert: ExpertWeights) -> ExpertWeights:
    """As hosts keep it."""
    return pack(form, expert) if can_pack(CPU, expert.up.dtype) else expert


def slab_of(kind: str, dtype: torch.dtype, *, layers: int = 1, experts: int = 4) -> Slab:
    form = KINDS[kind].form
    example = in_layout(form, random_experts(KINDS[kind], [0], dtype=dtype)[0])
    return Slab.create(
        "test", SlabLayout(dict.fromkeys(range(layers), layer_layout(experts, example)))
    )


def computed(form: ExpertForm, experts: dict[int, ExpertWeights], dtype: torch.dtype) -> Tensor:
    drawn = torch.Generator().manual_seed(1)
    x_TH = torch.randn(9, HIDDEN, generator=drawn).to(dtype)
    ids_TK = torch.randint(0, len(experts), (9, 2), generator=drawn, dtype=torch.int32)
    out_TH = torch.empty(9, HIDDEN)
    loop_kernel(form, experts, x_TH, ids_TK, torch.rand(9, 2, generator=drawn), out_TH)
    return out_TH


@pytest.fixture
def slab() -> Iterator[Slab]:
    made = slab_of("gated", torch.float32)
    yield made
    made.close()


def fill(slab: Slab, expert: int, *, version: int = 1, copy: int = 0) -> ExpertWeights:
    given = random_experts(KINDS["gated"], [expert], seed=version)[expert]
    packed = in_layout(KINDS["gated"].form, given)
    return slab.write(0, expert, packed, version=version, copy=copy)


def blocks(slab: Slab) -> int:
    return os.fstat(slab.descriptor).st_blocks


# ---- what is computed ---------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_from_a_slab(kind: str, dtype: torch.dtype) -> None:
    form = KINDS[kind].form
    plain = random_experts(KINDS[kind], range(4), dtype=dtype)
    kept = {number: in_layout(form, expert) for number, expert in plain.items()}
    slab = slab_of(kind, dtype)
    lent = {number: slab.write(0, number, expert, version=1) for number, expert in kept.items()}
    assert torch.equal(computed(form, lent, dtype), computed(form, kept, dtype))
    for number, expert in plain.items():
        restored = unpack(form, slab.view(0, number)).tensors()
        assert restored.keys() == expert.tensors().keys()
        assert all(torch.equal(restored[n], t) for n, t in expert.tensors().items())
    slab.close()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_torch_still_makes_packed_tensors_over_other_memory() -> None:
    """The names that this needs are private; a torch without them is noticed here first."""
    assert onednn.available()
    assert slab_of("gated", torch.float32).layout.layers[0].tensors[0].packing is Packing.ONEDNN


def test_views_outlive_the_slab(slab: Slab) -> None:
    kept = fill(slab, 1)
    before = unpack(KINDS["gated"].form, kept).up.clone()
    slab.close()
    del slab
    gc.collect()
    assert torch.equal(unpack(KINDS["gated"].form, kept).up, before)


# ---- slots --------------------------------------------------------------------------------------


def test_two_versions_of_an_expert(slab: Slab) -> None:
    fill(slab, 2, version=1)
    fill(slab, 2, version=2, copy=1)
    assert (slab.version(0, 2), slab.version(0, 2, 1), slab.version(0, 3)) == (1, 2, None)
    first, second = (unpack(KINDS["gated"].form, slab.view(0, 2, copy)) for copy in range(COPIES))
    assert not torch.equal(first.up, second.up)


def test_a_slot_is_not_written_twice(slab: Slab) -> None:
    fill(slab, 0)
    with pytest.raises(ValueError, match="already holds expert 0"):
        fill(slab, 0, version=2)
    assert slab.version(0, 0) == 1


def test_an_expert_of_another_form_leaves_the_slot_empty(slab: Slab) -> None:
    other = random_experts(KINDS["gated-bias"], [0])[0]
    with pytest.raises(ValueError, match="its experts consist of up, down, but"):
        slab.write(0, 0, other, version=1)
    wide = random_experts(KINDS["gated"], [0], hidden=2 * HIDDEN)[0]
    with pytest.raises((ValueError, RuntimeError)):
        slab.write(0, 0, in_layout(KINDS["gated"].form, wide), version=1)
    assert slab.version(0, 0) is None
    assert slab.generation(0, 0) % 2 == 0
    assert blocks(slab) <= 2 * PAGE_BYTES // 512, "only the header"
    fill(slab, 0)


@pytest.mark.parametrize("kind", ["gated", "gated-bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_slot_holds(kind: str, dtype: torch.dtype) -> None:
    slab = slab_of(kind, dtype)
    first, second = (
        in_layout(KINDS[kind].form, random_experts(KINDS[kind], [0], dtype=dtype, seed=seed)[0])
        for seed in (1, 2)
    )
    assert not slab.holds(0, 0, first)
    slab.write(0, 0, first, version=1)
    assert slab.holds(0, 0, first)
    assert not slab.holds(0, 0, second)
    assert not slab.holds(0, 1, first)
    slab.close()


def test_whoever_read_meanwhile_notices(slab: Slab) -> None:
    fill(slab, 3)
    before = slab.generation(0, 3)
    slab.free(0, 3)
    fill(slab, 3, version=7)
    assert slab.generation(0, 3) > before
    assert slab.generation(0, 3) % 2 == 0


@pytest.mark.parametrize("change", ["write", "free", "retire", "adopt"])
def test_a_change_is_announced_before_a_byte_changes(
    slab: Slab, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever compares only the number of changes must not miss one."""
    fill(slab, 1)
    before, generation = slab.entries.changes, slab.generation(0, 2 if change == "write" else 1)
    seen: list[tuple[int, int]] = []

    def look(*given: Any) -> Any:
        seen.append((slab.entries.changes, slab.generation(0, 2 if change == "write" else 1)))
        return real(*given)

    name = "_bytes" if change == "write" else "_punch"
    real = getattr(slab, name)
    monkeypatch.setattr(slab, name, look)
    match change:
        case "write":
            fill(slab, 2)
        case "free":
            slab.free(0, 1)
        case "retire":
            slab.retire()
            seen.append((slab.entries.changes, slab.generation(0, 1)))
        case _:
            # Its owner ended after the first of its two steps.
            slab.entries._slots[slab.layout.slot(0, 1)]["generation"] += 1
            monkeypatch.setattr(Slab, "_punch", lambda _, *given: look(*given))
            Slab.adopt(os.dup(slab.descriptor)).close()
    assert seen[0] == (before + 1, generation + 1)


def test_changed_bytes_are_noticed(slab: Slab) -> None:
    fill(slab, 1)
    assert slab.is_sound(0, 1)
    tensor = slab.layout.layers[0].tensors[0]
    with mmap.mmap(slab.descriptor, slab.layout.nbytes) as memory:
        memory[slab.layout.offset(0, tensor, 1) + 5] ^= 1
    assert not slab.is_sound(0, 1)


# ---- memory -------------------------------------------------------------------------------------


def test_memory_comes_and_goes_with_experts(slab: Slab) -> None:
    fill(slab, 0)
    one = blocks(slab)
    fill(slab, 1)
    assert blocks(slab) > one
    assert slab.nbytes == 2 * slab.layout.layers[0].expert_bytes
    slab.free(0, 1)
    slab.free(0, 1)
    assert blocks(slab) == one
    assert slab.nbytes == slab.layout.layers[0].expert_bytes


def test_memory_is_sparse() -> None:
    big = LayerLayout(256, (SlotTensor("up", (4096, 14336), torch.bfloat16),))
    slab = Slab.create("big", SlabLayout(dict.fromkeys(range(58), big)))
    assert slab.layout.nbytes > 3 * 2**40
    assert blocks(slab) * 512 == PAGE_BYTES, "the manifest"
    slab.close()


def test_the_size_is_sealed_and_the_bytes_are_not(slab: Slab) -> None:
    for size in (slab.layout.nbytes - PAGE_BYTES, slab.layout.nbytes + PAGE_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(slab.descriptor, size)
    fill(slab, 0)
    slab.free(0, 0)
    fill(slab, 0)


def test_a_reader_cannot_write(slab: Slab) -> None:
    fill(slab, 0)
    reader = os.open(f"/proc/self/fd/{slab.descriptor}", os.O_RDONLY)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(reader, slab.layout.nbytes)
        with mmap.mmap(reader, slab.layout.nbytes, prot=mmap.PROT_READ) as memory:
            offset = slab.layout.offset(0, slab.layout.layers[0].tensors[0], 0)
            assert any(memory[offset : offset + 64])
    finally:
        os.close(reader)


def open_here() -> list[str]:
    """Descriptors and mappings of slabs in this process."""
    links = [str(one.readlink()) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [one for one in [*links, *lines] if "memfd:moesaic:left" in one]


def test_nothing_is_left() -> None:
    slab = Slab.create("left", slab_of("gated", torch.float32).layout)
    kept = fill(slab, 0)
    assert len(open_here()) == 3, "the descriptor, the mapping's own, and the mapping"
    slab.close()
    slab.close()
    del slab, kept
    gc.collect()
    assert open_here() == []


def test_a_slab_is_adopted_as_its_owner_left_it() -> None:
    slab = slab_of("gated", torch.float32, layers=2)
    for expert in (0, 1, 2):
        fill(slab, expert)
    slab.free(0, 1)
    entry = slab.entries._slots[slab.layout.slot(0, 3)]
    entry["generation"] += 1  # its owner ended while it wrote
    generation = int(entry["generation"])
    adopted = Slab.adopt(os.dup(slab.descriptor))
    assert adopted.layout.layers == slab.layout.layers
    assert adopted.filled() == [(0, 0, 0, 1), (0, 2, 0, 1)]
    assert adopted.nbytes == 2 * slab.layout.layers[0].expert_bytes
    assert adopted.generation(0, 3) == generation + 1
    for expert in (0, 2):
        given = random_experts(KINDS["gated"], [expert], seed=1)[expert]
        assert adopted.holds(0, expert, in_layout(KINDS["gated"].form, given))
        assert adopted.is_sound(0, expert)
    # It can be written to, and who has the old mapping sees it.
    fill(adopted, 3, version=4)
    assert slab.version(0, 3) == 4
    adopted.close()
    slab.close()


def test_what_is_no_slab_is_not_adopted() -> None:
    for seals in (0, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL):
        other = os.memfd_create("other", os.MFD_ALLOW_SEALING)
        os.ftruncate(other, 1 << 16)
        if seals:
            fcntl.fcntl(other, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(ValueError, match=r"begin as a slab|not sealed"):
            Slab.adopt(other)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(other)


# ---- the layout ---------------------------------------------------------------------------------

TENSORS = st.lists(
    st.tuples(st.integers(1, 70), st.integers(1, 70), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=4,
)


@given(st.lists(st.tuples(st.integers(1, 9), TENSORS), min_size=1, max_size=4))
def test_places_are_pages_of_their_own(drawn: list) -> None:
    layers = {
        3 * number: LayerLayout(
            experts,
            tuple(SlotTensor(f"t{i}", (a, b), dtype) for i, (a, b, dtype) in enumerate(tensors)),
        )
        for number, (experts, tensors) in enumerate(drawn)
    }
    layout = SlabLayout(layers)
    places = sorted(
        (start := layout.offset(layer, tensor, expert, copy), start + tensor.stride_bytes)
        for layer, shape in layers.items()
        for tensor in shape.tensors
        for expert in range(shape.experts)
        for copy in range(COPIES)
    )
    slots = [
        layout.slot(layer, expert, copy)
        for layer, shape in layers.items()
        for copy in range(COPIES)
        for expert in range(shape.experts)
    ]
    assert slots == list(range(layout.slots))
    assert places[0][0] >= 32 * layout.slots
    assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
    assert places[-1][1] == layout.nbytes
    assert all(start % PAGE_BYTES == 0 for start, _ in places)


def test_places_that_do_not_exist(slab: Slab) -> None:
    for expert, copy in ((4, 0), (-1, 0), (0, COPIES)):
        with pytest.raises(IndexError, match="no place for copy"):
            slab.layout.slot(0, expert, copy)
