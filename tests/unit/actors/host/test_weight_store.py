"""The memory of a host's experts: it comes with the first expert, and goes with the last."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.actors.host import weight_store
from moesaic.actors.host.memory.expert_memory import SlabMemory
from moesaic.actors.host.weight_store import ExpertStore
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion, LayerKey
from moesaic.cluster.placement import ModelRef
from moesaic.kernels.ffn import ExpertWeights
from moesaic.kernels.slabs.layer_arithmetic import CpuLayer
from moesaic.models.folder.expert_file import write_experts
from moesaic.models.trunk.experts_layers import expert_shapes, experts_layers
from moesaic.proto.errors import Busy, CheckpointError, NotHere
from tests.helpers.models.architectures import tiny_model

KEY = ExpertKey("m", 0, 1)
ONE = ExpertVersion(KEY, 1)


@pytest.fixture
def ref(tmp_path: Path) -> ModelRef:
    tiny_model("mixtral").save_pretrained(tmp_path)
    return ModelRef(name="m", path=str(tmp_path), dtype="float32")


@pytest.fixture
def store(ref: ModelRef) -> ExpertStore:
    made = ExpertStore(torch.device("cpu"))
    made.add_model(ref)
    return made


def slabs() -> int:
    """Count this process's descriptors of slabs named ``m``: a slab's own, and its mapping's."""
    gc.collect()
    links = [one.readlink() for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    return sum("memfd:moesaic:m " in str(link) for link in links)


def plain(matrix: Tensor) -> Tensor:
    return matrix.to_dense() if matrix.is_mkldnn else matrix


def experts_of(
    store: ExpertStore, version: int, others: dict[int, int] | None = None
) -> Mapping[int, ExpertWeights]:
    layer = store.layer(LayerKey(KEY.model, KEY.layer), version, others or {})
    assert isinstance(layer, CpuLayer)
    return layer.experts


def test_an_expert_that_is_dropped_gives_its_memory_back(store: ExpertStore) -> None:
    store.load(ONE)
    assert store.nbytes > 0
    wanted = {name: tensor.clone() for name, tensor in store.get(ONE).items()}
    store.drop(ONE)
    assert store.nbytes == 0
    with pytest.raises(NotHere):
        store.get(ONE)
    store.load(ONE)
    again = store.get(ONE)
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
    store.close()


def test_the_same_expert_from_two_sides_lies_there_once(store: ExpertStore) -> None:
    store.load(ONE)
    (served,) = experts_of(store, 1).values()
    before = plain(served.down).clone()
    store.put(ONE, store.get(ONE))
    assert torch.equal(plain(served.down), before), "it was not emptied meanwhile"
    store.close()


def test_a_model_of_another_kind_under_a_name_replaces_its_memory(
    store: ExpertStore, ref: ModelRef
) -> None:
    before = slabs()
    store.load(ONE)
    opened = slabs()
    assert opened > before
    store.add_model(replace(ref, dtype="bfloat16"))
    store.drop(ONE)
    store.load(ONE)
    assert slabs() == opened
    store.close()
    assert slabs() == before


def test_two_who_tell_of_one_model_at_once_share_its_memory(
    ref: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = ExpertStore(torch.device("cpu")), ExpertVersion(KEY._replace(expert=0), 1)
    both, one_is_there = threading.Barrier(2), threading.Event()
    read = weight_store.read_config

    def slowly(path: Path) -> object:
        """If both make the model, the second one is ready when the first has an expert."""
        with contextlib.suppress(threading.BrokenBarrierError):
            if both.wait(0.5):
                one_is_there.wait(5.0)
        return read(path)

    monkeypatch.setattr(weight_store, "read_config", slowly)

    def put(expert: ExpertVersion) -> None:
        store.add_model(ref)
        store.load(expert)
        one_is_there.set()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(put, (ONE, other)))
    assert experts_of(store, 1).keys() == {0, 1}
    store.close()


# ---- versions -----------------------------------------------------------------------------------

TWO, THREE = ExpertVersion(KEY, 2), ExpertVersion(KEY, 3)


def doubled(store: ExpertStore) -> dict[str, Tensor]:
    return {name: 2 * tensor for name, tensor in store.get(ONE).items()}


def downs(store: ExpertStore, version: int, **others: int) -> dict[int, Tensor]:
    named = {int(name[1:]): other for name, other in others.items()}
    experts = experts_of(store, version, named)
    return {expert: plain(weights.down).clone() for expert, weights in experts.items()}


def test_two_versions_of_an_expert_are_there_at_once(store: ExpertStore) -> None:
    other = ExpertVersion(KEY._replace(expert=2), 1)
    store.load(ONE)
    store.load(other)
    before = store.nbytes
    store.put(TWO, doubled(store))
    assert store.nbytes == before * 3 // 2
    first, second = downs(store, 1), downs(store, 2)
    assert torch.equal(second[1], 2 * first[1])
    assert (first.keys(), second.keys()) == ({1, 2}, {1})
    mixed = downs(store, 1, e1=2)
    assert torch.equal(mixed[1], second[1])
    assert torch.equal(mixed[2], first[2])
    store.drop(ONE)
    assert torch.equal(downs(store, 2)[1], second[1]), "the older one goes alone"
    with pytest.raises(NotHere, match=str(ONE)):
        store.get(ONE)
    assert store.nbytes == before
    store.close()


def test_a_third_version_waits_until_one_is_gone(store: ExpertStore) -> None:
    store.load(ONE)
    tensors = doubled(store)
    store.put(TWO, tensors)
    with pytest.raises(Busy, match=r"this host has versions 1 and 2 of it and no room for a third"):
        store.put(THREE, tensors)
    store.drop(ONE)
    store.put(THREE, tensors)
    assert downs(store, 3).keys() == {1}
    store.close()


def test_the_checkpoint_has_the_first_version_alone(store: ExpertStore) -> None:
    with pytest.raises(NotHere, match=r"version 2 of expert 1 .* is not in the checkpoint"):
        store.load(TWO)


# ---- later versions from the model's folder of updates ------------------------------------------


@pytest.fixture
def updates(tmp_path: Path) -> Path:
    (tmp_path / "updates").mkdir()
    return tmp_path / "updates"


def test_a_later_version_is_read_from_the_file_of_its_update(
    store: ExpertStore, ref: ModelRef, updates: Path
) -> None:
    store.load(ONE)
    new = doubled(store)
    write_experts(updates / "00000002.safetensors", {(0, 1): new, (0, 3): new})
    store.add_model(replace(ref, updates=str(updates)))
    store.load(TWO)
    assert all(torch.equal(store.get(TWO)[name], tensor) for name, tensor in new.items())
    with pytest.raises(CheckpointError, match="does not contain expert 2 of layer 0"):
        store.load(ExpertVersion(KEY._replace(expert=2), 2))
    with pytest.raises(CheckpointError, match=r"00000003\.safetensors"):
        store.load(THREE)
    store.close()


def test_a_file_of_another_model_is_refused(
    store: ExpertStore, ref: ModelRef, updates: Path
) -> None:
    store.load(ONE)
    new = {name: tensor[:-1] for name, tensor in doubled(store).items()}
    write_experts(updates / "00000002.safetensors", {(0, 1): new})
    store.add_model(replace(ref, updates=str(updates)))
    with pytest.raises(CheckpointError, match=r"00000002\.safetensors: expert 1 .* model takes"):
        store.load(TWO)
    store.close()


def test_an_update_is_served_in_the_models_dtype_of_today(
    store: ExpertStore, ref: ModelRef, updates: Path
) -> None:
    store.load(ONE)
    new = doubled(store)
    write_experts(updates / "00000002.safetensors", {(0, 1): new})
    store.add_model(replace(ref, updates=str(updates), dtype="bfloat16"))
    store.load(TWO)
    assert all(
        torch.equal(tensor, new[name].to(torch.bfloat16)) for name, tensor in store.get(TWO).items()
    )
    store.close()


def test_a_closed_memory_takes_nothing_more() -> None:
    layers = {layer.layer: layer for layer in experts_layers(tiny_model("mixtral"))}
    memory = SlabMemory("m", layers, torch.float32)
    parts = {name: torch.zeros(shape) for name, shape in expert_shapes(layers[0]).items()}
    memory.close()
    before = slabs()
    with pytest.raises(NotHere, match="another model has taken the place"):
        memory.keep(ONE, layers[0].form(), ExpertWeights.of(parts))
    assert slabs() == before


def test_memory_waits_for_a_next_version_while_a_run_is_open() -> None:
    layers = {layer.layer: layer for layer in experts_layers(tiny_model("mixtral"))}
    memory = SlabMemory("m", layers, torch.float32, learns=True)

    def keep(version: int) -> ExpertVersion:
        shapes = expert_shapes(layers[0]).items()
        parts = {name: torch.full(shape, float(version)) for name, shape in shapes}
        held = ONE._replace(key=ONE.key._replace(layer=0), version=version)
        memory.keep(held, layers[0].form(), ExpertWeights.of(parts))
        return held

    def resident_bytes() -> int:
        descriptor = memory.descriptor
        assert descriptor is not None
        return os.fstat(descriptor).st_blocks * 512

    held = keep(1)
    one_bytes = resident_bytes()
    memory.keep_spare(True)
    old, held = held, keep(2)
    two_bytes = resident_bytes()
    memory.drop(old)
    assert resident_bytes() == two_bytes > one_bytes
    memory.keep_spare(False)
    assert resident_bytes() == one_bytes
    old, held = held, keep(3)
    assert resident_bytes() == two_bytes
    memory.drop(old)
    assert resident_bytes() == one_bytes
    with memory.reading(held) as tensors:
        assert all((tensor == 3).all() for tensor in tensors.values())
    memory.close()
