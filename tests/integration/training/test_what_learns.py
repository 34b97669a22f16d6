"""Which parameters learn, which experts got tokens, and what is refused before the first step.

| what goes wrong elsewhere | here |
|---|---|
| experts learn nothing if the trunk is frozen, or all of it but the head | `test_frozen_...` |
| a step hangs, or fails, where experts or a whole host get no token | `test_experts_...` |
| one expert is active, the loss looks fine, and nobody sees it | `test_experts_...` |
| layers that run again, or calls that are repeated, count tokens twice | `test_each_token_...` |
| adapters on "all linear layers" reach no expert, and nothing says so | `test_adapters_...` |
| quantised weights look as if they learned | `test_quantised_weights` |
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moesaic.actors.transport.shm import ShmSession
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.training.orders import Gather, Gathered
from moesaic.models.trunk.experts_layers import is_experts_module
from moesaic.models.trunk.trainable import check_trainable
from moesaic.proto.errors import UnsupportedModel
from tests.helpers.models.architectures import tiny_model
from tests.helpers.training.disturbed import HASTY, Disturbed
from tests.helpers.training.trunks import (
    FIRST,
    IDS,
    assert_equal,
    enable_checkpointing,
    loss_of,
    plain_model,
    saved,
    tolerance_of,
    training,
)

TOLERANCE = tolerance_of("mixtral")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


def is_of_expert(name: str) -> bool:
    return ".experts." in name


# Whether a parameter of the trunk learns, by its name.
FROZEN: dict[str, Callable[[str], bool]] = {
    "trunk": lambda name: False,
    "all but lm_head": lambda name: name == "lm_head.weight",
    "gates": lambda name: not name.endswith("gate.weight"),
    "attention": lambda name: "self_attn" not in name,
}


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parts_of_the_trunk(folder: Path, frozen: str, checkpointing: str) -> None:
    learns = FROZEN[frozen]
    plain = plain_model(folder, torch.float64)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(is_of_expert(name) or learns(name))
    loss_of(plain).backward()
    with training(folder, hosts=3) as trunk:
        for name, parameter in trunk.model.named_parameters():
            parameter.requires_grad_(learns(name))
        if checkpointing != "none":
            enable_checkpointing(trunk.model, reentrant=checkpointing == "reentrant")
        trunk.begin()
        loss_of(trunk.model).backward()
        assert_equal(trunk, trunk.gradients(), plain, folder, TOLERANCE)


def test_experts_and_hosts_without_tokens_step_after_step(tmp_path: Path) -> None:
    """A gate sends everything to two experts; load reports show that the others are idle."""
    model = tiny_model("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[:2] += 100.0
    model.save_pretrained(tmp_path)
    plain = plain_model(tmp_path, torch.float64)
    loss_of(plain).backward()
    steps = 20
    with training(tmp_path, hosts=4) as trunk:
        for step in range(steps):
            attempt = FIRST._replace(step=step)
            trunk.model.zero_grad()
            trunk.begin(attempt)
            loss_of(trunk.model).backward()
            gathered = [host.train(Gather(attempt=attempt)) for host in trunk.pool.hosts]
            found = [isinstance(one, Gathered) and len(one.keys) > 0 for one in gathered]
            assert not all(found), "a host has no token in any layer"
            assert any(found)
        trunk.model.zero_grad()
        last = FIRST._replace(step=steps)
        trunk.begin(last)
        loss_of(trunk.model).backward()
        gradients = trunk.gradients(last)
        assert {key.expert for key in gradients} == {0, 1}
        assert_equal(trunk, gradients, plain, tmp_path, TOLERANCE)
        tokens = IDS.numel() * (steps + 1)
        for counts in trunk.learning.router.take_load().counts.values():
            assert counts.tolist() == [tokens, tokens] + [0] * 6


@pytest.mark.parametrize(
    ("checkpointing", "lossy"),
    [("none", True), ("reentrant", False), ("non-reentrant", True)],
)
def test_each_token_counts_once(
    folder: Path, checkpointing: str, lossy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Load reports have what the gates of a plain model choose. ``lossy``: calls are repeated."""
    plain = plain_model(folder, torch.float64)
    chosen = choices_of(plain)
    microbatches = [IDS[:, : 2 + number] for number in range(4)]
    disturbed = Disturbed(5)
    with training(folder) as trunk:
        if checkpointing != "none":
            enable_checkpointing(trunk.model, reentrant=checkpointing == "reentrant")
        if lossy:
            trunk.connect(HASTY)
            monkeypatch.setattr(
                ShmSession,
                "send_reply",
                lambda session, frame, buffer: disturbed.send_reply(session, frame, buffer),
            )
        trunk.begin()
        for ids in microbatches:
            loss_of(plain, ids)
            loss_of(trunk.model, ids).backward()
        monkeypatch.undo()
        assert bool(disturbed.counts["lost"]) == lossy
        counts = trunk.learning.router.take_load().counts
    for layer in (0, 1):
        assert counts[LayerKey("m", layer)].tolist() == [chosen[layer, e] for e in range(8)]


def choices_of(model: Any) -> Counter[tuple[int, int]]:
    """Count the assignments of each (layer, expert) from now on."""
    counts: Counter[tuple[int, int]] = Counter()
    experts = [module for module in model.modules() if is_experts_module(module)]
    for number, module in enumerate(experts):
        module.register_forward_pre_hook(
            lambda _, args, number=number: counts.update(
                (number, expert) for expert in args[1].flatten().tolist()
            )
        )
    return counts


# ---- what is refused ----------------------------------------------------------------------------


def test_a_trunk_can_be_trained(folder: Path) -> None:
    with training(folder) as trunk:
        check_trainable(trunk.model)


def test_adapters_that_reach_no_expert(folder: Path) -> None:
    """A layer counts as an adapter if its class is one of PEFT's."""

    class Linear(nn.Linear):
        __module__ = "peft.tuners.lora.layer"

    with training(folder) as trunk:
        for layer in trunk.model.model.layers:
            layer.self_attn.q_proj = Linear(32, 32)
        with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn\.q_proj.* no expert"):
            trunk.learning.watch(trunk.model)


def test_adapters_of_peft_on_all_linear_layers(folder: Path) -> None:
    pytest.importorskip("peft")
    peft: Any = importlib.import_module("peft")
    with training(folder) as trunk:
        config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(trunk.model, config)
        assert not any(is_of_expert(name) for name, _ in adapted.named_parameters())
        with pytest.raises(UnsupportedModel, match="reach no expert"):
            check_trainable(adapted)


def test_quantised_weights(folder: Path) -> None:
    with training(folder) as trunk:
        trunk.model.config.quantization_config = {"quant_method": "fp8"}
        with pytest.raises(UnsupportedModel, match="quantised, and have no gradients"):
            trunk.learning.watch(trunk.model)
