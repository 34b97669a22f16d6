"""Architectures with an adapter, and those of our own, from a saved checkpoint through a pool:
logits and texts are those of the plain model, alone and 16 at a time.

Shape suffixes: T = tokens, H = hidden size, K = choices of a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.actors.engine.engine import Sampling
from moesaic.models.trunk.adapters import PoolExperts
from moesaic.models.trunk.in_pool import PoolFunction
from moesaic.models.trunk.trunk import connect_experts
from tests.helpers.endpoint.engines import running
from tests.helpers.models.architectures import ADAPTED, OWN, tiny_model
from tests.helpers.models.low_precision import assert_close_or_rerouted, in_float32
from tests.helpers.models.tiny import tiny_tokenizer
from tests.helpers.pool.pools import Pool, experts_in, pool
from tests.helpers.pool.served_pool import served_pool
from tests.helpers.pool.serving import assert_right
from tests.integration.engine.test_static_batching import (
    PROMPTS,
    TOKENS,
    by_generate,
    texts,
    unending,
)
from tests.integration.models.test_parity import PROMPT

pytestmark = pytest.mark.numeric

NAMES = sorted(ADAPTED | OWN)


def saved(folder: Path, name: str, **overrides: Any) -> Any:
    """With vectors that are not what they begin as, so that a lost one would show."""
    model = unending(tiny_model(name, **overrides))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def logits(model: Any, ids: Tensor = PROMPT) -> Tensor:
    more = {"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def recorded(served: Pool) -> list[Tensor]:
    """The ids (T, K) of every call to the pool from now on."""
    asked: list[Tensor] = []

    def noting(layer: int) -> PoolFunction:
        compute = served.router.experts("m", layer)

        def note(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            asked.append(ids_TK)
            return compute(x_TH, ids_TK, weights_TK)

        return note

    connect_experts(served.trunk, served.layers, noting)
    return asked


def swap_experts(served: Pool) -> None:
    """Neighbours on a host take each other's weights."""
    for host in served.hosts:
        for key in served.placement.layers:
            experts = experts_in(host, key)
            held = sorted(experts)
            for one, other in zip(held[::2], held[1::2], strict=False):
                experts[one], experts[other] = experts[other], experts[one]


@pytest.mark.parametrize("name", NAMES)
async def test_every_architecture(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    with torch.no_grad(), pool(tmp_path, hosts=1) as served:
        adapted = any(isinstance(module, PoolExperts) for module in served.trunk.modules())
        assert adapted == (name in ADAPTED)
        expected = logits(model)
        assert_right(logits(served.trunk), expected)
        assert served.router.stats().calls == len(served.layers)
        one_by_one = [by_generate(model, prompt) for prompt in PROMPTS]
        assert [by_generate(served.trunk, prompt) for prompt in PROMPTS[:3]] == one_by_one[:3]
        with running(served.trunk) as engine:
            assert await texts(engine, Sampling(max_tokens=TOKENS)) == one_by_one
            assert engine.stats().restarts == 0
        swap_experts(served)
        assert float((logits(served.trunk) - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name, dtype=torch.bfloat16)
    with torch.no_grad(), pool(tmp_path, dtype=torch.bfloat16, transport="grpc") as served:
        plain, truth = logits(model), logits(in_float32(model))
        assert_close_or_rerouted(logits(served.trunk), plain, truth, torch.bfloat16)
        swap_experts(served)
        with pytest.raises(AssertionError, match="tokens are off"):
            assert_close_or_rerouted(logits(served.trunk), plain, truth, torch.bfloat16)


# Tokens beyond Switch's capacity, and LongCat's zero-compute experts.
@pytest.mark.parametrize("name", ["switch_transformers", "longcat_flash"])
def test_choices_that_the_pool_does_not_compute(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    with torch.no_grad(), pool(tmp_path) as served:
        asked = recorded(served)
        ids = PROMPT.repeat(1, 4)
        assert_right(logits(served.trunk, ids), logits(model, ids))
        used = torch.cat([ids_TK.flatten() for ids_TK in asked]) >= 0
        assert 0 < int(used.sum()) < used.numel()


def test_llama4_with_several_choices(tmp_path: Path) -> None:
    """Each has an input of its own; rows stay those of the batch, so that a lost one is known."""
    model = saved(tmp_path, "llama4_text", num_experts_per_tok=3)
    with torch.no_grad(), pool(tmp_path) as served:
        asked = recorded(served)
        assert_right(logits(served.trunk), logits(model))
        assert [tuple(ids_TK.shape) for ids_TK in asked] == [(PROMPT.numel(), 1)] * 3


def test_an_encoder_begins_a_pass_of_its_own(tmp_path: Path) -> None:
    """Rows that were lost in a decoder's step are none of the next encoder's."""
    model = saved(tmp_path, "switch_transformers")
    with torch.no_grad(), pool(tmp_path) as served:
        served.router.batch.dead.add(0)
        found = served.trunk.get_encoder()(input_ids=PROMPT).last_hidden_state
        assert_right(found, model.get_encoder()(input_ids=PROMPT).last_hidden_state)


def test_an_encoder_and_a_decoder_behind_the_endpoint(tmp_path: Path) -> None:
    model = saved(tmp_path, "switch_transformers", vocab_size=320)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    with served_pool(tmp_path) as served:
        expected = tokenizer.decode(by_generate(model, PROMPTS[3]), skip_special_tokens=True)
        assert served.text(PROMPTS[3], TOKENS) == expected
