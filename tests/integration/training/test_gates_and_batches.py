"""Gates learn from the balancing loss, and a batch is the same however it is dealt out.

| what goes wrong elsewhere | here |
|---|---|
| the balancing loss is computed and reaches no gate | `test_the_balancing_loss_reaches_the_gates` |
| it is asked for where there is none, and something else happens | `test_asking_for_...` |
| it counts once a worker, or once a microbatch | `test_a_batch_is_the_same_...` |
| gradients of experts grow with hosts, replicas or workers | `test_a_batch_is_the_same_...` |
| layers that run again choose other experts, silently | `test_logits_that_differ_...` |
| a step hangs where workers have batches of different sizes, or none | `test_workers_with_...` |
| padding counts in the balancing loss | `test_padding_...` |
| a batch of one sequence, or of one token, is a special case | `test_one_sequence` |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.cluster.expert_keys import ExpertKey
from moesaic.models.trunk.routing_record import RoutingRecord
from tests.helpers.training.trunks import (
    FIRST,
    IDS,
    Gradients,
    assert_equal,
    assert_near,
    enable_checkpointing,
    expected,
    gradients_of,
    learning_together,
    loss_of,
    plain_model,
    saved,
    tolerance_of,
    training,
    trunk_gradients,
)

# Of each kind: softmax before and after the choice, adapters with and without a capacity.
WITH_BALANCING_LOSS = ("mixtral", "qwen3_moe", "gpt_oss", "phimoe", "dbrx", "switch_transformers")
OTHERS_WITH_BALANCING_LOSS = (
    *("deepseek_v4", "ernie4_5_moe", "flex_olmo", "flint", "granitemoe", "granitemoe_swa"),
    *("granitemoehybrid", "granitemoeshared", "jamba", "jetmoe", "laguna", "mellum", "minimax"),
    *("minimax_m2", "minimax_m3_vl_text", "olmoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_next"),
    "qwen4_exp_text",
)
MICROBATCHES = [IDS[:, :5], IDS[:1], IDS[1:, 2:], IDS.flip(1)]
TOLERANCE = tolerance_of("mixtral")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


def set_coefficient(model: Any, value: float) -> None:
    """Where transformers has read it from the configuration, under one of two names."""
    name = "aux_loss_coef" if hasattr(model, "aux_loss_coef") else "router_aux_loss_coef"
    setattr(model, name, value)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "architecture",
    [
        *WITH_BALANCING_LOSS,
        *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS_WITH_BALANCING_LOSS),
    ],
)
def test_the_balancing_loss_reaches_the_gates(
    architecture: str, checkpointing: bool, tmp_path: Path
) -> None:
    """Its gradient equals plain transformers', and a larger coefficient gives the gates another."""
    folder = saved(tmp_path, architecture)
    found: dict[float, dict[str, Tensor]] = {}
    last = FIRST._replace(number=1)
    with training(folder, hosts=3) as trunk:
        if checkpointing and trunk.model.supports_gradient_checkpointing:
            enable_checkpointing(trunk.model, reentrant=False)
        for attempt, coefficient in ((FIRST, 0.0), (last, 0.1)):
            trunk.model.zero_grad()
            trunk.begin(attempt)
            set_coefficient(trunk.model, coefficient)
            loss_of(trunk.model, output_router_logits=True).backward()
            found[coefficient] = trunk_gradients(trunk.model)
        plain = plain_model(folder, torch.float64)
        set_coefficient(plain, 0.1)
        loss_of(plain, output_router_logits=True).backward()
        assert_equal(trunk, trunk.gradients(last), plain, folder, tolerance_of(architecture))
    changed = {n for n, grad in found[0.0].items() if not torch.allclose(grad, found[0.1][n])}
    assert any("gate" in name or "router" in name for name in changed), changed


def test_asking_for_the_balancing_loss_of_an_architecture_that_has_none(tmp_path: Path) -> None:
    """As in plain transformers it changes nothing."""
    asked = {"router_aux_loss_coef": 0.1, "output_router_logits": True}
    folder = saved(tmp_path, "deepseek_v3", **asked)
    plain = plain_model(folder, torch.float64)
    plain.config.output_router_logits = False
    loss_of(plain).backward()
    with training(folder) as trunk:
        trunk.begin()
        loss_of(trunk.model, output_router_logits=True).backward()
        assert_equal(trunk, trunk.gradients(), plain, folder, TOLERANCE)


# (workers, hosts, replicas)
LAYOUTS = [(1, 1, 1), (2, 4, 3), (4, 2, 1)]


def test_a_batch_is_the_same_whoever_computes_it(folder: Path) -> None:
    """Four microbatches as 1 x 4, 2 x 2 and 4 x 1, on pools of several sizes."""
    found: dict[tuple[int, int, int], tuple[dict[str, Tensor], Gradients]] = {}
    for workers, hosts, replicas in LAYOUTS:
        with learning_together(folder, workers, hosts=hosts, replicas=replicas) as trunks:
            for trunk in trunks:
                trunk.begin()
            for number, ids in enumerate(MICROBATCHES):
                batch_loss(trunks[number % workers].model, ids).backward()
            gradients = trunk_gradients(*(trunk.model for trunk in trunks))
            found[workers, hosts, replicas] = gradients, gradients_of(trunks)
    plain = plain_model(folder, torch.float64)
    for ids in MICROBATCHES:
        batch_loss(plain, ids).backward()
    wanted = expected(plain, folder)
    for layout, (of_trunk, of_experts) in found.items():
        for name, grad in wanted[0].items():
            assert_near(of_trunk[name], grad, TOLERANCE, f"{layout}: {name}")
        for key, name, grad in named(of_experts):
            assert_near(grad, wanted[1][key][name], TOLERANCE, f"{layout}: {key} {name}")
        assert of_experts.keys() == found[1, 1, 1][1].keys()


def batch_loss(model: Any, ids: Tensor) -> Tensor:
    """A microbatch's part of the batch's loss."""
    set_coefficient(model, 0.1)
    return loss_of(model, ids, output_router_logits=True) / len(MICROBATCHES)


def named(gradients: Gradients) -> Iterator[tuple[ExpertKey, str, Tensor]]:
    for key, tensors in gradients.items():
        for name, tensor in tensors.items():
            yield key, name, tensor


@pytest.mark.parametrize("recorded", [True, False])
def test_logits_that_differ_when_layers_run_again_give_an_error_of_their_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """Not the error of other experts, which comes if the choices are not recorded."""
    if not recorded:
        monkeypatch.setattr(RoutingRecord, "run", lambda _, function, *args: function(*args))
    ids = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(0))
    plain = plain_model(folder, torch.float64)
    loss_of(plain, ids).backward()
    with training(folder) as trunk:
        enable_checkpointing(trunk.model, reentrant=False)
        trunk.begin()
        loss = loss_of(trunk.model, ids)
        generator = torch.Generator().manual_seed(1)
        for layer in trunk.model.model.layers:
            weight = layer.mlp.gate.weight
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.data = weight.data + 2e-3 * noise  # 1e-2 of the logits of 32 features
        loss.backward()
        found = trunk.gradients()
    wanted = expected(plain, folder)[1]
    worst = max(
        float((grad - wanted[key][name]).abs().max() / wanted[key][name].abs().max())
        for key, name, grad in named(found)
    )
    assert (worst < 0.05) == recorded, worst


def test_workers_with_batches_of_different_sizes_or_none(folder: Path) -> None:
    """Each in a thread of its own; the third has nothing to do in this step."""
    plain = plain_model(folder, torch.float64)
    batches = [[IDS, IDS[:1, :3]], [IDS[1:, :2]], []]
    for ids in itertools.chain.from_iterable(batches):
        loss_of(plain, ids).backward()
    with learning_together(folder, 3, hosts=2) as trunks, ThreadPoolExecutor(3) as threads:
        for trunk in trunks:
            trunk.begin()
        steps = [
            threads.submit(lambda t=t, b=b: [loss_of(t.model, ids).backward() for ids in b])
            for t, b in zip(trunks, batches, strict=True)
        ]
        for step in steps:
            step.result(timeout=30)
        assert_equal(trunks, gradients_of(trunks), plain, folder, TOLERANCE)


def test_padding_counts_in_no_loss_and_no_gradient(folder: Path) -> None:
    """A padded sequence gives the gradients of the same sequence alone."""
    padded = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = (padded != 0).long()
    labels = padded.masked_fill(mask == 0, -100)
    given = {"input_ids": padded, "attention_mask": mask, "labels": labels}
    plain = plain_model(folder, torch.float64)
    set_coefficient(plain, 0.1)
    loss_of(plain, output_router_logits=True).backward()
    with training(folder) as trunk:
        set_coefficient(trunk.model, 0.1)
        trunk.begin()
        trunk.model(**given, output_router_logits=True, use_cache=False).loss.backward()
        assert_equal(trunk, trunk.gradients(), plain, folder, TOLERANCE)


@pytest.mark.parametrize("ids", [IDS[:1], IDS[:1, :2]], ids=["sequence", "two tokens"])
def test_one_sequence(folder: Path, ids: Tensor) -> None:
    plain = plain_model(folder, torch.float64)
    loss_of(plain, ids).backward()
    with training(folder, hosts=3, replicas=2) as trunk:
        trunk.begin()
        loss_of(trunk.model, ids).backward()
        assert_equal(trunk, trunk.gradients(), plain, folder, TOLERANCE)
