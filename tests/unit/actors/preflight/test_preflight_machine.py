"""What a preflight finds of the machine: engines, devices, memory and room."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moesaic.actors.preflight import check_machine
from moesaic.actors.preflight.preflight import preflight
from moesaic.actors.runtime.devices import machine_memory
from moesaic.cluster.spec.spec import parse_spec
from tests.helpers.models.preflight_specs import found, only, spec_of
from tests.helpers.models.quantising import FORMS
from tests.helpers.models.tiny import tiny_tokenizer


def test_an_engine_that_is_not_installed(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one = only(spec_of(whole, trunk={"engine": "vllm"}))
    assert (one.severity, one.path) == ("error", "trunk.engine")
    assert "pip install 'moesaic[vllm]'" in one.message


def test_vllm_reads_no_quantised_trunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    FORMS["gpt-oss"](tmp_path / "m")
    for name in ("m", "m-plain"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    vllm = {"trunk": {"engine": "vllm"}}
    engine = [
        one
        for name in ("m", "m-plain")
        for one in preflight(spec_of(tmp_path / name, **vllm)).findings
        if one.path == "trunk.engine"
    ]
    assert [(one.severity, one.code) for one in engine] == [("error", "UnsupportedModel")]
    assert "quantised (mxfp4)" in engine[0].message


def test_a_quantised_checkpoint_is_not_trained(tmp_path: Path) -> None:
    FORMS["gpt-oss"](tmp_path / "m")
    for name in ("m", "m-plain"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    refused = [
        (one.severity, one.path, one.code)
        for name in ("m", "m-plain")
        for one in preflight(spec_of(tmp_path / name, model={"train": True})).findings
        if "train" in one.path
    ]
    assert refused == [("error", "models.0.train", "UnsupportedModel")]


def test_devices_and_resources_that_a_local_ray_lacks(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    group = {"count": 1, "num_gpus": 1, "resources": {"slot": 1}, "device": "cuda:0"}
    wanted: dict[str, Any] = {"hosts": [group], "trunk": {"device": "cuda"}}
    assert found(spec_of(whole, **wanted)) == [
        ("error", "hosts.0.resources"),
        ("error", "hosts.0.num_gpus"),
        ("error", "hosts.0.device"),
        ("error", "trunk.device"),
    ]
    assert found(spec_of(whole, **wanted, ray={"address": "auto"})) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    del group["resources"]
    assert found(spec_of(whole, **wanted)) == []


@pytest.mark.parametrize(
    ("group", "severity"),
    [
        ({"count": 2, "slots": 4}, None),
        ({"count": 2, "slots": 3}, "error"),
        ({"count": 2, "memory_gb": 4 * 18432 / 2**30}, None),
        ({"count": 2, "memory_gb": 3 * 18432 / 2**30}, "error"),
    ],
)
def test_room_for_experts(whole: Path, group: dict[str, Any], severity: str | None) -> None:
    wanted = [] if severity is None else [(severity, "hosts")]
    assert found(spec_of(whole, hosts=[group])) == wanted


def test_replicas_count_and_protection_is_a_constraint(whole: Path) -> None:
    hosts = [{"count": 2, "slots": 4}]
    one = only(spec_of(whole, hosts=hosts, model={"replicas": 2}))
    assert (one.severity, one.path) == ("error", "hosts")
    assert "room for 8 replicas, but 16 are needed" in one.message
    one = only(spec_of(whole, hosts=hosts, balance={"redundancy": 1}))
    assert (one.severity, one.path) == ("warning", "balance.redundancy")


def test_memory_of_this_machine(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(total: int, free: int) -> None:
        monkeypatch.setattr(check_machine, "machine_memory", lambda: (total, free))

    machine(10**12, 10**12)
    assert found(spec_of(whole)) == []
    machine(10**12, 10**8)  # the processes alone take more
    assert found(spec_of(whole)) == [("warning", "hosts")]
    # 8 experts of 18,432 bytes, and what the trunk has beside them.
    weights = 8 * 18432 + preflight(spec_of(whole)).described["m"].trunk_bytes
    machine(weights - 1, 0)
    assert found(spec_of(whole)) == [("error", "hosts")]
    machine(weights, 0)
    assert found(spec_of(whole)) == [("warning", "hosts")]
    assert found(spec_of(whole, model={"replicas": 2})) == [("error", "hosts")]
    assert found(spec_of(whole, ray={"address": "auto"})) == []
    # Hosts hold two versions of an expert while requests go over to the new one.
    updates = {"updates": str(whole.parent / "updates")}
    machine(10**12, 10**12)
    assert found(spec_of(whole, model=updates)) == []
    machine(weights + 8 * 18432 - 1, 10**12)
    assert found(spec_of(whole)) == []
    assert found(spec_of(whole, model=updates)) == [("warning", "models")]


def test_a_containers_limit_is_the_machines_memory(tmp_path: Path) -> None:
    total, free = machine_memory([])
    assert 0 < free <= total
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    assert machine_memory([str(tmp_path / name) for name in ("none", "absent")])[0] == total
    assert machine_memory([str(tmp_path / "limit")]) == (1_000_000, 1_000_000)


@pytest.mark.parametrize(
    ("limit", "used", "droppable"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_pages_of_files_are_free_in_a_container(
    tmp_path: Path, limit: str, used: str, droppable: str
) -> None:
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / used).write_text("700000\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\n{droppable} 200000\nfile 5\n")
    assert machine_memory([str(tmp_path / limit)]) == (1_000_000, 500_000)
    (tmp_path / used).write_text("1300000\n")  # above the limit for a moment
    assert machine_memory([str(tmp_path / limit)]) == (1_000_000, 0)


@pytest.mark.parametrize("address", ["local", "head:6379"])
def test_hosts_run_on_linux_alone(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_machine, "sys", SimpleNamespace(platform="darwin"))
    found = [
        str(one)
        for one in preflight(parse_spec({"ray": {"address": address}})).findings
        if one.severity == "error"
    ]
    # A Ray elsewhere has its hosts elsewhere.
    assert [one.startswith("hosts: hosts run on Linux alone") for one in found] == (
        [True] if address == "local" else []
    )
