"""Experts in slots of a device: its memory is played by the CPU's, and a card's where one is.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.actors.host.memory.expert_memory import SlabMemory, SlotMemory
from moesaic.actors.host.memory.kept_memory import LeftMemory
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion
from moesaic.kernels.ffn import ExpertWeights
from moesaic.kernels.slabs.bounded_memory import MemoryBudget
from moesaic.kernels.slabs.layer_arithmetic import MissingExpert
from moesaic.models.trunk.experts_layers import expert_shapes, experts_layers
from moesaic.proto.errors import Busy, NotHere
from tests.helpers.models.architectures import tiny_model
from tests.helpers.models.slots import HostMemory

# The interpreter multiplies whole tiles with NumPy, unused rows included.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
LAYERS = {layer.layer: layer for layer in experts_layers(tiny_model("mixtral"))}
EXPERTS = LAYERS[0].num_experts


def expert(number: int, version: int = 1, layer: int = 0) -> ExpertVersion:
    return ExpertVersion(ExpertKey("m", layer, number), version)


def read(memory: SlabMemory | SlotMemory, wanted: ExpertVersion) -> dict[str, Tensor]:
    with memory.reading(wanted) as tensors:
        return {name: tensor.clone() for name, tensor in tensors.items()}


def weights(seed: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    hidden = LAYERS[0].hidden_size
    width = dict(expert_shapes(LAYERS[0]))["down"][1]
    return ExpertWeights(
        up=torch.randn(2 * width, hidden, generator=generator) / hidden**0.5,
        down=torch.randn(hidden, width, generator=generator) / width**0.5,
    )


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


Made = tuple[SlotMemory, list[HostMemory]]


@pytest.fixture
def made(device: torch.device) -> Iterator[Made]:
    parts: list[HostMemory] = []

    def allocate(nbytes: int) -> HostMemory:
        parts.append(HostMemory(nbytes))
        return parts[-1]

    options: dict[str, Any] = {}
    if device.type == "cpu":
        options = {"allocate": allocate, "chunk_bytes": mmap.PAGESIZE}
    memory = SlotMemory("m", LAYERS, torch.float32, device, **options)
    yield memory, parts
    memory.close()


def keep(memory: SlotMemory | SlabMemory, given: ExpertVersion, found: ExpertWeights) -> None:
    memory.keep(given, LAYERS[given.key.layer].form(), found)


def compute(
    memory: SlotMemory | SlabMemory,
    device: torch.device,
    ids: list[list[int]],
    *,
    version: int = 1,
    others: dict[int, int] | None = None,
    exact: bool = False,
    layer: int = 0,
    change: Callable[[Tensor], object] = lambda x: None,
) -> tuple[Tensor, list[int]]:
    arithmetic = memory.layer(layer, version, others or {})
    ids_TK = torch.tensor(ids, dtype=torch.int32)
    generator = torch.Generator().manual_seed(7)
    x_TH = torch.randn(len(ids), LAYERS[0].hidden_size, generator=generator)
    change(x_TH)
    x_TH, weights_TK = x_TH.to(device), torch.rand(ids_TK.shape, generator=generator).to(device)
    shape = (*ids_TK.shape, x_TH.shape[1]) if exact else x_TH.shape
    out = torch.full(shape, torch.nan, device=device)
    ids_TK = ids_TK.to(arithmetic.ids_device)
    arithmetic.compute(x_TH, ids_TK, weights_TK, out, exact=exact)
    return out.cpu(), arithmetic.bad_experts(x_TH, ids_TK, out)


@pytest.mark.parametrize("exact", [False, True])
def test_slots_compute_what_a_cpus_memory_computes(
    made: Made, device: torch.device, exact: bool
) -> None:
    memory, _ = made
    other = SlabMemory("m", LAYERS, torch.float32)
    for number in range(4):
        for one in (memory, other):
            keep(one, expert(number), weights(number))
    keep(memory, expert(2, 5), weights(12))
    keep(other, expert(2, 5), weights(12))
    for named in ({}, {2: 5}):
        ids = [[0, 2], [3, -1], [1, 2]]
        mine, bad = compute(memory, device, ids, others=named, exact=exact)
        theirs, _ = compute(other, torch.device("cpu"), ids, others=named, exact=exact)
        assert torch.allclose(mine, theirs, atol=1e-5)
        assert bad == []
    other.close()


def test_what_is_dropped_gives_its_memory_back(made: Made, device: torch.device) -> None:
    memory, parts = made
    for number in range(EXPERTS):
        keep(memory, expert(number), weights(number))
    held = memory.nbytes
    assert held == EXPERTS * weights(0).nbytes
    full = sum(part.backed_bytes for part in parts)
    before = read(memory, expert(1))
    for number in range(EXPERTS):
        if number != 1:
            memory.drop(expert(number))
    assert memory.nbytes == held // EXPERTS
    assert device.type == "cuda" or sum(part.backed_bytes for part in parts) < full
    assert all(torch.equal(before[name], t) for name, t in read(memory, expert(1)).items())
    with pytest.raises(NotHere):
        read(memory, expert(0))
    keep(memory, expert(0), weights(0))
    found, _ = compute(memory, device, [[0, 1]])
    assert bool(found.isfinite().all())


def test_it_has_two_versions_of_an_expert_and_no_third(made: Made, device: torch.device) -> None:
    memory, _ = made
    keep(memory, expert(1), weights(1))
    keep(memory, expert(1, 2), weights(2))
    keep(memory, expert(1, 2), weights(2))
    with pytest.raises(Busy, match="versions 1 and 2 of it and no room for a third"):
        keep(memory, expert(1, 3), weights(3))
    first, second = (compute(memory, device, [[1]], version=v)[0] for v in (1, 2))
    assert not torch.allclose(first, second)
    memory.drop(expert(1))
    keep(memory, expert(1, 3), weights(3))
    assert torch.equal(compute(memory, device, [[1]], version=2)[0], second)
    assert torch.equal(compute(memory, device, [[1]], version=9, others={1: 2})[0], second)


def test_layers_share_slots_and_not_weights(made: Made, device: torch.device) -> None:
    memory, parts = made
    keep(memory, expert(0), weights(1))
    keep(memory, expert(0, layer=1), weights(2))
    assert device.type == "cuda" or len(parts) == 2, "one range for up, one for down"
    first, second = (compute(memory, device, [[0]], layer=number)[0] for number in (0, 1))
    assert not torch.allclose(first, second)


def test_experts_that_make_rows_infinite_are_named(made: Made, device: torch.device) -> None:
    memory, _ = made
    broken = weights(2)
    broken.down[0, 0] = torch.inf
    for number in (0, 1):
        keep(memory, expert(number), weights(number))
    keep(memory, expert(2), broken)
    assert compute(memory, device, [[0, 1], [1, 2]])[1] == [2]
    assert compute(memory, device, [[0, 1], [1, 0]])[1] == []

    def poison(x_TH: Tensor) -> None:
        x_TH[0, 0] = torch.nan

    # The caller's own rows are at fault.
    assert compute(memory, device, [[0, 1], [1, 0]], change=poison)[1] == []
    assert compute(memory, device, [[0, 1], [2, 0]], change=poison)[1] == [2]


def test_a_budget_bounds_what_is_mapped(device: torch.device) -> None:
    """Of all models of a host together."""
    if device.type == "cuda":
        pytest.skip("a card's chunks are larger than these experts")
    # Each expert has a chunk for each of its tensors, and layers share chunks of one pool.
    chunk, parts = mmap.PAGESIZE, 2

    def memory(budget: MemoryBudget) -> SlotMemory:
        return SlotMemory(
            "m",
            LAYERS,
            torch.float32,
            device,
            allocate=HostMemory,
            chunk_bytes=chunk,
            budget=budget,
        )

    need = MemoryBudget()
    whole = memory(need)
    for number in range(EXPERTS):
        keep(whole, expert(number), weights(number))
    all_bytes = need.used_bytes
    assert all_bytes >= EXPERTS * weights(0).nbytes
    whole.close()
    assert need.used_bytes == 0

    budget = MemoryBudget(all_bytes - parts * chunk, "hosts.0.gpu_memory")
    first, second = memory(budget), memory(budget)
    for number in range(EXPERTS - 1):
        keep(first, expert(number), weights(number))
    taken = budget.used_bytes
    for one in (first, second):
        with pytest.raises(Busy, match=r"expert .* no room .*hosts\.0\.gpu_memory leaves 0 MiB"):
            for number in range(EXPERTS - 1, 2 * EXPERTS):
                keep(one, expert(number % EXPERTS, 2), weights(number))
    assert taken <= budget.used_bytes <= all_bytes - parts * chunk
    for number in range(EXPERTS - 1):
        first.drop(expert(number))
    second.close()
    assert budget.used_bytes < taken
    first.close()
    assert budget.used_bytes == 0


def test_nothing_is_left_when_it_is_closed(made: Made) -> None:
    memory, parts = made
    keep(memory, expert(0), weights(0))
    memory.close()
    assert memory.nbytes == 0
    assert all(part.closed for part in parts)


def test_an_expert_that_left_is_an_error_and_not_a_smaller_sum(
    made: Made, device: torch.device
) -> None:
    memory, _ = made
    for number in (0, 1):
        keep(memory, expert(number), weights(number))
    memory.drop(expert(1))
    with pytest.raises(MissingExpert, match="in no slot"):
        compute(memory, device, [[0, 1], [0, 0]])


def test_other_weights_of_a_version_replace_what_was_not_served(
    made: Made, device: torch.device
) -> None:
    memory, _ = made
    keep(memory, expert(1), weights(1))
    keep(memory, expert(1), weights(2))
    assert torch.equal(read(memory, expert(1))["up"], weights(2).up)
    assert memory.nbytes == weights(0).nbytes


def test_tables_do_not_pile_up(made: Made) -> None:
    memory, _ = made
    keep(memory, expert(0), weights(0))
    for version in range(3000):
        memory.layer(0, 1, {0: version})
    assert len(memory._slab._tables) <= 1024


# ---- the memory of an earlier process -----------------------------------------------------------


def left_by(memory: SlotMemory) -> LeftMemory:
    """What a memory keeper has of it."""
    assert memory.descriptor is not None
    left = LeftMemory("m", os.dup(memory.descriptor))
    for chunk, serial in memory.chunks().items():
        descriptor = memory.lend_chunk(chunk, serial)
        assert descriptor is not None
        left.chunks[chunk] = serial, descriptor
    return left


def another(device: torch.device) -> SlotMemory:
    options: dict[str, Any] = {}
    if device.type == "cpu":
        options = {"allocate": HostMemory, "chunk_bytes": mmap.PAGESIZE}
    return SlotMemory("m", LAYERS, torch.float32, device, **options)


def test_a_successor_computes_the_same_bits(made: Made, device: torch.device) -> None:
    memory, _ = made
    for number in range(3):
        keep(memory, expert(number), weights(number))
    keep(memory, expert(2, 5), weights(12))
    keep(memory, expert(0, layer=1), weights(7))
    ids, named = [[0, 2], [1, -1], [1, 2]], {2: 5}
    before, _ = compute(memory, device, ids, others=named)
    heir = another(device)
    held = heir.adopt(left_by(memory), {0: LAYERS[0].form()})
    assert held == [expert(0), expert(1), expert(2), expert(2, 5)]
    assert heir.nbytes == 4 * weights(0).nbytes
    after, bad = compute(heir, device, ids, others=named)
    assert torch.equal(after, before)
    assert bad == []
    assert all(map(heir.is_sound, [*held, expert(3)]))
    # Layer 1 has no form here, so its experts were freed.
    with pytest.raises(NotHere):
        read(heir, expert(0, layer=1))
    with pytest.raises(Busy):
        keep(heir, expert(2, 6), weights(13))
    heir.drop(expert(2))
    keep(heir, expert(2, 6), weights(13))
    assert torch.equal(compute(heir, device, ids, others=named)[0], before)
    heir.close()


def test_what_was_loaded_stays(made: Made, device: torch.device) -> None:
    memory, _ = made
    keep(memory, expert(0), weights(0))
    heir = another(device)
    keep(heir, expert(1), weights(1))
    left = left_by(memory)
    with pytest.raises(ValueError, match="loaded meanwhile"):
        heir.adopt(left, {0: LAYERS[0].form()})
    left.close()
    assert torch.equal(read(heir, expert(1))["up"].cpu(), weights(1).up)
    heir.close()
