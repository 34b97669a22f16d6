"""A host's device and the packages that it needs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from moesaic.actors.runtime.devices import check_packages
from moesaic.proto.errors import ClusterError


def test_a_cpu_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_packages(torch.device("cpu"))


def test_what_a_gpu_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or None)
    with pytest.raises(ClusterError, match=r"cuda:0 needs cuda-bindings, .*pip install cuda-bind"):
        check_packages(torch.device("cuda", 0))
