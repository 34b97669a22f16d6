"""Experts of a running pool get new weights, and requests go over to them at one token."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from moesaic import Client
from moesaic.actors.runtime.ray_border import controller_of, namespace_of
from moesaic.actors.trunk.update import revert_experts, update_experts
from moesaic.cluster.expert_keys import ExpertKey
from moesaic.handle import Cluster
from moesaic.models.trunk.experts_layers import expert_tensors, experts_layers
from moesaic.proto.errors import CallError, ClusterError
from tests.helpers.processes.live import (
    ON_RAY,
    processes_of,
    running,
    text_in_background,
    text_of,
    wait_replaced,
    wait_until,
)
from tests.integration.conftest import save_model

pytestmark = ON_RAY

Experts = dict[ExpertKey, dict[str, Tensor]]
TOKENS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[Cluster]:
    model = {"name": "m", "path": str(folder), "replicas": 2}
    with running("updates", folder, hosts=[{"count": 2}], models=[model]) as cluster:
        yield cluster


def changed_experts(folder: Path) -> Experts:
    """Other weights for all experts."""
    from transformers import AutoModelForCausalLM

    layers = experts_layers(AutoModelForCausalLM.from_pretrained(folder))
    drawn = torch.Generator().manual_seed(7)
    return {
        ExpertKey("m", layer.layer, expert): {
            name: torch.randn(tensor.shape, generator=drawn) * 0.5
            for name, tensor in expert_tensors(layer, expert).items()
        }
        for layer in layers
        for expert in range(layer.num_experts)
    }


def plain_model(folder: Path, changed: Experts | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    by_number = {layer.layer: layer for layer in experts_layers(model)}
    for key, tensors in (changed or {}).items():
        layer = by_number[key.layer]
        parameters = dict(layer.module.named_parameters())
        parameters[layer.up_name].data[key.expert] = tensors["up"]
        parameters["down_proj"].data[key.expert] = tensors["down"]
    return model


@torch.no_grad()
def texts_switching(folder: Path, changed: Experts, prompt: Tensor) -> list[str]:
    """What is said if the weights change before each of the forward passes, and if they do not."""
    from transformers import AutoTokenizer, DynamicCache

    tokenizer = AutoTokenizer.from_pretrained(folder)
    old, new = plain_model(folder), plain_model(folder, changed)

    def next_token(model: Any, given: Tensor, cache: Any) -> Tensor:
        logits = model(given, past_key_values=cache, use_cache=True).logits
        return logits[:, -1:].argmax(dim=-1)

    # Texts that have gone over are the rows of one batch. Before each pass one more does so, with
    # the cache that the old weights have filled.
    before: Any = DynamicCache(config=old.config)
    after: Any = DynamicCache(config=old.config)
    given_old, given_new = prompt, prompt[:0]
    said_old: list[int] = []
    said_new: list[list[int]] = []
    for step in range(TOKENS):
        if step > 0:
            gone_over, after = after, DynamicCache(config=old.config)
            for number, (rows, row) in enumerate(zip(gone_over.layers, before.layers, strict=True)):
                keys = torch.cat([rows.keys, row.keys])
                after.update(keys, torch.cat([rows.values, row.values]), number)
        said_new.append(list(said_old))
        given_new = next_token(new, torch.cat([given_new, given_old]), after)
        given_old = next_token(old, given_old, before)
        said_old.append(int(given_old))
        for said, token in zip(said_new, given_new.flatten().tolist(), strict=True):
            said.append(token)

    def text(said: list[int]) -> str:
        end = tokenizer.eos_token_id
        return tokenizer.decode(said[: [*said, end].index(end)], skip_special_tokens=True)

    return [text(said) for said in (*said_new, said_old)]


def test_a_running_text_goes_over_at_one_step_and_back(pool: Cluster, folder: Path) -> None:
    from transformers import AutoTokenizer

    from tests.helpers.processes.live import TEXT

    assert pool.url is not None
    namespace, changed = namespace_of(pool.name), changed_experts(folder)
    prompt = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    texts = texts_switching(folder, changed, prompt)
    new, old = texts[0], texts[-1]
    assert new != old
    with Client(pool.url) as client:
        assert text_of(client, "m", TOKENS) == old
        with text_in_background(client, "m", TOKENS) as result:
            done = update_experts(namespace, changed)
            mixed = result()
        status = pool.status()
        assert status.placement == done.placement
        assert (done.number, done.experts, done.reverts) == (2, len(changed), None)
        assert done.volatile, "the spec names no folder"
        assert status.models[0].updated_experts == len(changed)
        assert status.models[0].volatile_experts == len(changed)
        assert text_of(client, "m", TOKENS) == new
        assert mixed not in (old, new), "it was running when the weights changed"
        assert mixed in texts
        with text_in_background(client, "m", TOKENS) as result:
            revert_experts(namespace, "m")
            result()
        assert text_of(client, "m", TOKENS) == old
    with pytest.raises(ClusterError, match="no update of its weights is in effect"):
        revert_experts(namespace, "m")


def test_weights_that_do_not_fit_change_nothing(pool: Cluster, folder: Path) -> None:
    assert pool.url is not None
    namespace = namespace_of(pool.name)
    key, tensors = next(iter(changed_experts(folder).items()))
    before = pool.status().placement
    with pytest.raises(CallError, match="its model takes"):
        update_experts(namespace, {key: {name: t[:-1] for name, t in tensors.items()}})
    with pytest.raises(CallError, match="not finite"):
        broken = {name: t / 0 for name, t in tensors.items()}
        update_experts(namespace, {key: broken})
    with pytest.raises(ClusterError, match=r"expert: 99 does not exist; .* experts 0 to 7"):
        update_experts(namespace, {key._replace(expert=99): tensors})
    with pytest.raises(ClusterError, match="of one model, not 2"):
        update_experts(namespace, {key: tensors, key._replace(model="n"): tensors})
    assert pool.status().placement == before


def is_ruled_after(pool: Cluster, term: int) -> bool:
    try:
        status = pool.status()
    except ClusterError:
        return False
    return status.controller.term > term and status.placement is not None


@pytest.mark.slow
def test_a_killed_host_and_a_killed_controller_keep_the_new_weights(
    pool: Cluster, folder: Path
) -> None:
    assert pool.url is not None
    namespace, changed = namespace_of(pool.name), changed_experts(folder)
    with Client(pool.url) as client:
        old = text_of(client, "m", 40)
        update_experts(namespace, changed)
        new = text_of(client, "m", 40)
        assert new != old
        term = pool.status().controller.term
        ray.kill(controller_of(namespace), no_restart=False)
        wait_until(lambda: is_ruled_after(pool, term))
        assert text_of(client, "m", 40) == new
        # Its experts come from their other replicas, since no file has this version.
        victim = next(iter(processes_of(pool)))
        pid = processes_of(pool)[victim].pid
        os.kill(pid, signal.SIGKILL)
        wait_replaced(pool, victim, pid)
        assert text_of(client, "m", 40) == new
        revert_experts(namespace, "m")
        assert text_of(client, "m", 40) == old


@pytest.mark.slow
def test_what_all_hosts_have_lost_can_be_put_again(pool: Cluster, folder: Path) -> None:
    assert pool.url is not None
    namespace, changed = namespace_of(pool.name), changed_experts(folder)
    with Client(pool.url) as client:
        update_experts(namespace, changed)
        new = text_of(client, "m", 40)
        for process in processes_of(pool).values():
            os.kill(process.pid, signal.SIGKILL)
        again = update_experts(namespace, changed)
        assert text_of(client, "m", 40) == new
        with pytest.raises(ClusterError, match=rf"update {again.number} of m cannot be taken back"):
            revert_experts(namespace, "m")
        assert text_of(client, "m", 40) == new
