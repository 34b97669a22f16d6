"""A layer's experts of several slabs, mapped side by side."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moesaic.kernels.ffn import ExpertWeights
from moesaic.kernels.slabs.borrowed import borrow
from moesaic.kernels.slabs.layout import COPIES, LayerLayout, Packing, SlabLayout, SlotTensor
from moesaic.kernels.slabs.side_by_side import bank_of_slabs
from moesaic.kernels.slabs.slab import Slab

EXPERTS, HIDDEN, INTERMEDIATE = 3, 32, 32  # whole pages


def layer(experts: int = EXPERTS, intermediate: int = INTERMEDIATE) -> LayerLayout:
    """A layer in the layout of vLLM's kernel; nothing here computes."""
    shapes = {"up": (2 * intermediate, HIDDEN), "down": (HIDDEN, intermediate)}
    return LayerLayout(
        experts,
        tuple(
            SlotTensor(name, shape, torch.float32, Packing.VLLM) for name, shape in shapes.items()
        ),
        fused="silu",
    )


def expert(value: float) -> ExpertWeights:
    up = torch.full((2 * INTERMEDIATE, HIDDEN), value)
    return ExpertWeights(up, torch.full((HIDDEN, INTERMEDIATE), -value), fused="silu")


@pytest.fixture
def slabs() -> Iterator[list[Slab]]:
    made = [Slab.create(f"side-{n}", SlabLayout({0: layer(), 7: layer()})) for n in range(3)]
    yield made
    for slab in made:
        slab.close()


def mapped() -> list[str]:
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[1] for line in lines if "memfd:moesaic:side-" in line]


def test_each_expert_is_found_in_its_place(slabs: list[Slab]) -> None:
    bank = bank_of_slabs([borrow(slab.lend()) for slab in slabs], 7)
    assert bank is not None
    assert bank.up_SUH.shape == (3 * COPIES * EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    # Written after it was mapped: the memory is the same.
    for number, slab in enumerate(slabs):
        for copy in range(COPIES):
            value = 10.0 * number + copy + 1
            held = slab.write(7, 2, expert(value), version=1, copy=copy)
            place = number * COPIES * EXPERTS + held.place
            assert torch.equal(bank.up_SUH[place], held.up)
            assert torch.equal(bank.down_SHI[place], held.down)
            assert float(bank.up_SUH[place, 0, 0]) == value
    assert int((bank.up_SUH != 0).flatten(1).any(dim=1).sum()) == 3 * COPIES


def test_it_can_only_be_read_and_outlives_what_it_was_made_of(slabs: list[Slab]) -> None:
    slabs[1].write(0, 0, expert(5.0), version=1)
    before = len(mapped())
    bank = bank_of_slabs([borrow(slab.lend()) for slab in slabs], 0)
    assert bank is not None
    # The borrowed slabs are gone; each of the two tensors has a part of each of them.
    assert len(mapped()) - before == 2 * len(slabs)
    assert mapped().count("r--s") == 2 * len(slabs)
    assert float(bank.up_SUH[COPIES * EXPERTS].mean()) == 5.0
    del bank
    assert len(mapped()) == before


def test_one_slab_is_not_mapped_again(slabs: list[Slab]) -> None:
    assert bank_of_slabs(slabs[:1], 0) is slabs[0].bank(0)


def test_forms_that_differ_are_not_joined(slabs: list[Slab]) -> None:
    other = Slab.create("side-other", SlabLayout({0: layer(intermediate=2 * INTERMEDIATE)}))
    assert bank_of_slabs([slabs[0], other], 0) is None
    other.close()


def test_experts_that_no_kernel_computes_together_are_not_joined() -> None:
    tensors = tuple(SlotTensor(t.name, t.shape, t.dtype) for t in layer().tensors)
    made = [Slab.create("side-plain", SlabLayout({0: LayerLayout(3, tensors)})) for _ in range(2)]
    assert bank_of_slabs(made, 0) is None
    for slab in made:
        slab.close()
