"""What a preflight finds of the memory of cards; the cards are played."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moesaic.actors.preflight import check_cards
from moesaic.actors.preflight.preflight import preflight
from moesaic.cli.main import main
from moesaic.cluster.card_memory import (
    CONTEXT_BYTES,
    LEAST_WORKSPACE_BYTES,
    PARTLY_FILLED_BYTES,
    Card,
    HostRoom,
)
from moesaic.cluster.spec.spec import Spec
from tests.helpers.models.preflight_specs import found, only, spec_of

EXPERTS = 8 * 18432  # of the model of these tests
TRUNK_FIXED = CONTEXT_BYTES + LEAST_WORKSPACE_BYTES
FIXED = TRUNK_FIXED + PARTLY_FILLED_BYTES  # of a host
GB = 10**9


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[Card]:
    """This machine's cards; a test may put others there."""
    there = [Card("GPU-a", 80 * GB, 80 * GB)]
    monkeypatch.setattr(check_cards, "visible_cards", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(there))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(there))
    return there


def shared(folder: Path, **more: Any) -> Spec:
    """Two hosts and a trunk, each with 0.3 of a card."""
    part = {"device": "cuda", "num_gpus": 0.3}
    hosts = [{"count": 2, **part, **more.pop("hosts", {})}]
    return spec_of(folder, hosts=hosts, trunk={**part, **more.pop("trunk", {})}, **more)


def test_a_plan_says_what_each_process_takes(whole: Path, cards: list[Card]) -> None:
    checked = preflight(shared(whole))
    assert checked.findings == []
    (card,) = checked.cards
    assert [one.key for one in card.processes] == ["hosts.0", "hosts.0", "trunk"]
    assert [one.expert_bytes for one in card.processes] == [EXPERTS // 2, EXPERTS // 2, 0]
    assert [one.limit_bytes for one in card.processes] == [24 * GB] * 3
    assert card.planned_bytes == 72 * GB
    described = checked.described["m"]
    # 16,384 tokens, of two layers with two key heads and two value heads of 8 numbers in float32.
    cache = 16_384 * described.cache_token_bytes
    assert described.cache_token_bytes == 2 * 2 * 2 * 8 * 4
    read = (16_384 + 512) * described.attention_token_bytes
    assert card.processes[2].fixed_bytes == described.trunk_bytes + cache + read + TRUNK_FIXED


def test_spec_check_prints_what_is_planned(
    whole: Path, cards: list[Card], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(shared(whole).model_dump(mode="json")))
    assert main(["spec", "check", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    planned = "72.0 GB of 80.0 GB are planned (2 of hosts.0 24.0 GB each, trunk 24.0 GB)"
    assert f"card GPU-a: {planned}" in said
    assert main(["spec", "check", str(file), "--json"]) == 0
    (card,) = json.loads(capsys.readouterr().out)["cards"]
    assert (card["card"], card["memory_bytes"], card["planned_bytes"]) == (
        "GPU-a",
        80 * GB,
        72 * GB,
    )
    assert [one["planned_bytes"] for one in card["processes"]] == [24 * GB] * 3


def test_experts_that_do_not_fit_name_the_key(whole: Path, cards: list[Card]) -> None:
    small = FIXED + EXPERTS // 2
    limit = {"gpu_memory": f"{small}B"}
    assert HostRoom.within(small).expert_bytes == EXPERTS // 2
    assert found(shared(whole, hosts=limit)) == []
    one = only(shared(whole, hosts={"gpu_memory": f"{small - 1}B"}))
    assert (one.severity, one.path) == ("error", "hosts.0.gpu_memory")
    assert found(shared(whole, hosts=limit, model={"replicas": 2})) == [
        ("error", "hosts.0.gpu_memory")
    ]
    updates = {"updates": str(whole.parent / "updates")}
    assert found(shared(whole, hosts=limit, model=updates)) == [("warning", "models")]
    assert found(shared(whole, hosts={"gpu_memory": "600MB"})) == [("error", "hosts.0.gpu_memory")]


def test_a_trunk_that_does_not_fit_names_the_key(whole: Path, cards: list[Card]) -> None:
    assert found(shared(whole, trunk={"gpu_memory": "1MB"})) == [("error", "trunk.gpu_memory")]
    assert found(shared(whole, trunk={"gpu_memory": "800MB"})) == [("warning", "trunk.gpu_memory")]
    much = found(shared(whole, trunk={"cache_tokens": 1 << 28}))
    assert much == [("error", "trunk.num_gpus")]


def test_slots_and_hosts_on_the_cpu_count(whole: Path, cards: list[Card]) -> None:
    cards[:] = [Card("GPU-a", FIXED + EXPERTS // 2, None)]
    trunk = {"device": "cpu"}
    assert found(spec_of(whole, hosts=[{"count": 1, "device": "cuda"}], trunk=trunk)) == [
        ("warning", "hosts.0.gpu_memory")  # it fits without the CUDA context
    ]
    groups = [{"count": 1, "device": "cuda"}, {"count": 1, "device": "cpu", "slots": 4}]
    assert found(spec_of(whole, hosts=groups, trunk=trunk)) == []


def test_large_batches_on_a_small_part_of_a_card(whole: Path, cards: list[Card]) -> None:
    small = {"gpu_memory": "2GB", "max_batch_rows": 1 << 20, "max_queue_rows": 1 << 20}
    one = only(shared(whole, hosts=small))
    assert (one.severity, one.path) == ("warning", "hosts.0.gpu_memory")
    assert "lower max_batch_rows" in one.message


def test_what_is_free_now_is_a_warning(whole: Path, cards: list[Card]) -> None:
    cards[:] = [Card("GPU-a", 80 * GB, GB)]
    one = only(shared(whole))
    assert (one.severity, one.path) == ("warning", "hosts")
    assert "1.0 GB of 80.0 GB are free now" in one.message


def test_parts_of_cards_that_ray_cannot_reserve(whole: Path, cards: list[Card]) -> None:
    cards[:] = [Card("GPU-a", 80 * GB), Card("GPU-b", 80 * GB)]
    spec = shared(whole, hosts={"num_gpus": 0.6}, trunk={"num_gpus": 0.6})
    assert found(spec) == [("error", "trunk.num_gpus")]


def test_more_gpus_than_there_are_is_one_finding_for_each_key(
    whole: Path, cards: list[Card]
) -> None:
    spec = shared(whole, hosts={"num_gpus": 1}, trunk={"num_gpus": 0.5})
    assert found(spec) == [("error", "hosts.0.num_gpus"), ("error", "trunk.num_gpus")]


def test_ray_numbers_the_gpus_of_each_process_from_0(
    whole: Path, cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards[:] = [Card("GPU-a", 80 * GB), Card("GPU-b", 80 * GB)]
    monkeypatch.delenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", raising=False)
    second = {"hosts": {"device": "cuda:1", "count": 1}}
    one = only(shared(whole, **second))
    assert (one.severity, one.path) == ("error", "hosts.0.device")
    assert "numbered from 0; set cuda, or leave out num_gpus" in one.message
    assert found(shared(whole, hosts={"device": "cuda:1", "num_gpus": 0})) == []
    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
    assert found(shared(whole, **second)) == []


def test_a_ray_elsewhere_has_other_cards(whole: Path, cards: list[Card]) -> None:
    checked = preflight(shared(whole, hosts={"gpu_memory": "1MB"}, ray={"address": "auto"}))
    assert (checked.findings, checked.cards) == ([], [])


def test_a_machine_without_cards_has_no_plan(whole: Path, cards: list[Card]) -> None:
    cards.clear()
    assert preflight(spec_of(whole)).cards == []
