"""The memory of a host's experts: it comes with the first expert, and goes with the last."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.actors.host.weight_store import ExpertStore
from moesaic.cluster.placement import ExpertKey, LayerKey, ModelRef
from moesaic.proto.errors import NotHere
from tests.helpers.architectures import tiny_model

KEY = ExpertKey("m", 0, 1)


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


def test_an_expert_that_is_dropped_gives_its_memory_back(store: ExpertStore) -> None:
    store.load(KEY)
    assert store.nbytes > 0
    wanted = {name: tensor.clone() for name, tensor in store.get(KEY).items()}
    store.drop(KEY)
    assert store.nbytes == 0
    with pytest.raises(NotHere):
        store.get(KEY)
    store.load(KEY, version=2)
    again = store.get(KEY)
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
    store.close()


def test_the_same_expert_from_two_sides_lies_there_once(store: ExpertStore) -> None:
    store.load(KEY)
    (served,) = store.layer(LayerKey(KEY.model, KEY.layer))[1].values()
    before = plain(served.down).clone()
    store.put(KEY, store.get(KEY))
    assert torch.equal(plain(served.down), before), "it was not emptied meanwhile"
    store.close()


def test_a_model_of_another_kind_under_a_name_replaces_its_memory(
    store: ExpertStore, ref: ModelRef
) -> None:
    before = slabs()
    store.load(KEY)
    opened = slabs()
    assert opened > before
    store.add_model(replace(ref, dtype="bfloat16"))
    store.drop(KEY)
    store.load(KEY)
    assert slabs() == opened
    store.close()
    assert slabs() == before
