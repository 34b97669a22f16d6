"""Devices: their names, their memory, and the packages that a host needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moesaic.actors.runtime import devices
from moesaic.actors.runtime.devices import (
    card_limit,
    check_packages,
    device_name,
    gpu_count,
    limit_torch,
    pinned_numa_node,
    visible_cards,
)
from moesaic.cluster.card_memory import Card, CardShare
from moesaic.proto.errors import ClusterError


def test_a_cpu_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_packages(torch.device("cpu"))


def test_what_a_gpu_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or None)
    with pytest.raises(ClusterError, match=r"cuda:0 needs cuda-bindings, .*pip install cuda-bind"):
        check_packages(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("cpus", "node"), [({0, 1, 8}, 0), ({2}, 1), ({1, 2}, None), (set(range(12)), None)]
)
def test_a_process_is_pinned_to_a_numa_node_if_all_its_cpus_are_there(
    tmp_path: Path, cpus: set[int], node: int | None
) -> None:
    for number, text in enumerate(("0-1,8-9", "2-7,10,11")):
        folder = tmp_path / f"node{number}"
        folder.mkdir()
        (folder / "cpulist").write_text(f"{text}\n")
    assert pinned_numa_node(tmp_path, cpus) == node


def test_a_machine_with_one_numa_node_has_none_to_be_pinned_to(tmp_path: Path) -> None:
    (tmp_path / "node0").mkdir()
    (tmp_path / "node0" / "cpulist").write_text("0-3\n")
    assert pinned_numa_node(tmp_path, {0}) is None
    assert pinned_numa_node(tmp_path / "none", {0}) is None


# ---- cards --------------------------------------------------------------------------------------


class FakeNvml:
    """NVML as ctypes loads it: cards by name, with (total, free) bytes."""

    def __init__(self, cards: dict[str, tuple[int, int]], failure: int = 0) -> None:
        self._cards = cards
        self._failure = failure
        self.open = 0

    def nvmlInit_v2(self) -> int:  # noqa: N802
        self.open += not self._failure
        return self._failure

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:  # noqa: N802
        if name.decode() not in self._cards:
            return 6  # not found
        handle._obj.value = 1 + list(self._cards).index(name.decode())
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, found: Any) -> int:  # noqa: N802
        total, free = list(self._cards.values())[handle.value - 1]
        found._obj.total, found._obj.free = total, free
        return 0


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What PyTorch says of this process's GPUs; a test may put others there."""
    there = [SimpleNamespace(uuid=f"uuid-{n}", total_memory=100 + n) for n in range(2)]

    def properties(device: torch.device | int) -> SimpleNamespace:
        return there[device if isinstance(device, int) else device.index or 0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(there))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(there))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return there


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeNvml | None], None]:
    def use(library: FakeNvml | None) -> None:
        def load(name: str) -> FakeNvml:
            if library is None:
                raise OSError(f"{name}: cannot open shared object file")
            return library

        monkeypatch.setattr(devices.ctypes, "CDLL", load)

    return use


UseNvml = Callable[[FakeNvml | None], None]


@pytest.mark.parametrize("visible", [None, "0,1", "1,0", "GPU-uuid-0,GPU-uuid-1"])
def test_cards_and_what_is_free_on_them(
    visible: str | None,
    gpus: list[SimpleNamespace],
    nvml: UseNvml,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    library = FakeNvml({"GPU-uuid-1": (120, 7), "GPU-uuid-0": (120, 9)})
    nvml(library)
    # NVML's total has what the driver keeps for itself, too.
    assert visible_cards() == [Card("uuid-0", 100, 9), Card("uuid-1", 101, 7)]
    assert library.open == 0, "it is shut down again"
    assert gpu_count() == 2


@pytest.mark.parametrize("library", [None, FakeNvml({}), FakeNvml({}, failure=9)])
def test_without_nvml_nobody_knows_what_is_free(
    library: FakeNvml | None, gpus: list[SimpleNamespace], nvml: UseNvml
) -> None:
    nvml(library)
    assert visible_cards() == [Card("uuid-0", 100), Card("uuid-1", 101)]
    assert library is None or library.open == 0


def test_instances_of_a_gpu_are_cards_of_their_own(
    gpus: list[SimpleNamespace], nvml: UseNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    del gpus[1]  # CUDA shows a process one instance
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    nvml(FakeNvml({"MIG-a": (20, 19), "MIG-b": (40, 33)}))
    assert visible_cards() == [Card("MIG-a", 20, 19), Card("MIG-b", 40, 33)]
    assert gpu_count() == 2
    nvml(FakeNvml({"MIG-b": (40, 33)}))
    assert visible_cards() == [Card("MIG-a", 100), Card("MIG-b", 40, 33)]
    nvml(None)
    assert visible_cards() == [Card("MIG-a", 100)], "the one that CUDA shows"


def test_a_machine_without_cards_does_not_ask(gpus: list[SimpleNamespace], nvml: UseNvml) -> None:
    gpus.clear()
    nvml(FakeNvml({}))
    assert visible_cards() == []


def test_the_same_card_has_the_same_name_in_every_process(
    gpus: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = torch.device("cuda", 1)
    assert device_name(second) == "uuid-1"
    # A process that Ray gave the second card alone: by index, or by UUID.
    for visible in ("1", "GPU-uuid-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        gpus[:] = [SimpleNamespace(uuid="uuid-1", total_memory=101)]
        assert device_name(torch.device("cuda")) == "uuid-1"
    # Two instances of one GPU are two devices, even where CUDA gives both the GPU's UUID.
    for visible in ("MIG-a", "MIG-b"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert device_name(torch.device("cuda")) == visible
        assert device_name(torch.device("cuda", 0)) == visible
    assert device_name(torch.device("cpu")) == "cpu"


def test_a_limit_is_one_of_the_whole_card_or_the_instance(gpus: list[SimpleNamespace]) -> None:
    device = torch.device("cuda")
    assert card_limit(device, CardShare(key="trunk", num_gpus=0.3)) == 30
    assert card_limit(device, CardShare(key="trunk", gpu_memory=0.5, num_gpus=1)) == 50
    assert card_limit(device, CardShare(key="trunk", num_gpus=1)) is None
    with pytest.raises(ClusterError, match=r"trunk\.gpu_memory: 0\.0 GB, but cuda has 0\.0 GB"):
        card_limit(device, CardShare(key="trunk", gpu_memory=101))


def test_pytorch_is_told_its_part(
    gpus: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, int]] = []
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda part, number: told.append((part, number)),
    )
    limit_torch(torch.device("cuda"), 25)
    limit_torch(torch.device("cuda", 1), 500)
    assert told == [(0.25, 0), (1.0, 1)]
