"""A host's device and the packages that it needs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from moesaic.actors.runtime.devices import check_packages, pinned_numa_node
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
