"""Logits and texts through the pool equal those of plain transformers.

In float32 the largest difference is 1e-5. In 16 bits partial sums are rounded in another place than
in transformers, and a near tie may be routed otherwise: see ``tests.helpers.models.low_precision``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesaic.cluster.routing.transports import TransportChoice
from tests.helpers.models.architectures import ARCHITECTURES, tiny_model
from tests.helpers.models.low_precision import assert_close_or_rerouted, in_float32
from tests.helpers.pool.pools import experts_in, pool

pytestmark = pytest.mark.numeric

NAMES = sorted(ARCHITECTURES)
# Their caches do not go through `generate` with random weights alike, or have none.
PROMPT = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(1))


def transports(index: int) -> TransportChoice:
    return "grpc" if index % 2 else "shm"


@pytest.mark.parametrize(("index", "name"), list(enumerate(NAMES)), ids=NAMES)
def test_every_architecture(index: int, name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    hosts = 1 + index % 4
    replicas = min(hosts, 1 + index // 4 % 2)
    with (
        torch.no_grad(),
        pool(tmp_path, hosts=hosts, replicas=replicas, transport=transports(index)) as served,
    ):
        expected = model(PROMPT).logits
        torch.testing.assert_close(served.trunk(PROMPT).logits, expected, atol=1e-5, rtol=1e-5)
        assert served.router.stats().calls == len(served.layers)
        wanted = model.generate(PROMPT[:1], max_new_tokens=12, do_sample=False)
        assert torch.equal(
            served.trunk.generate(PROMPT[:1], max_new_tokens=12, do_sample=False), wanted
        )


@pytest.mark.parametrize("transport", ["shm", "grpc"])
@pytest.mark.parametrize(("hosts", "replicas"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 1), (4, 2)])
def test_any_number_of_hosts_and_replicas(
    hosts: int, replicas: int, transport: TransportChoice, tmp_path: Path
) -> None:
    model = tiny_model("mixtral", num_experts_per_tok=4)
    model.save_pretrained(tmp_path)
    with (
        torch.no_grad(),
        pool(tmp_path, hosts=hosts, replicas=replicas, transport=transport) as served,
    ):
        torch.testing.assert_close(
            served.trunk(PROMPT).logits, model(PROMPT).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe"])
def test_every_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=dtype)
    model.save_pretrained(tmp_path)
    with torch.no_grad(), pool(tmp_path, dtype=dtype) as served:
        given, plain = served.trunk(PROMPT).logits, model(PROMPT).logits
        assert_close_or_rerouted(given, plain, in_float32(model)(PROMPT).logits, dtype)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_two_swapped_experts_would_show(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    with torch.no_grad(), pool(tmp_path, hosts=1) as served:
        before = served.trunk(PROMPT).logits
        key = max(served.placement.layers)
        experts = experts_in(served.hosts[0], key)
        used = served.router.stats().rows
        assert used > 0
        for first in range(0, 8, 2):
            experts[first], experts[first + 1] = experts[first + 1], experts[first]
        assert float((served.trunk(PROMPT).logits - before).abs().max()) > 1e-2


def test_exact_results_do_not_depend_on_placement_or_batch(tmp_path: Path) -> None:
    """K = 4 on three and four hosts: with K = 2 a wrong order of summation would not show."""
    model = tiny_model("mixtral", num_experts_per_tok=4)
    model.save_pretrained(tmp_path)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    ids = torch.stack([torch.randperm(8)[:4] for _ in range(9)])
    weights = torch.rand(9, 4)
    results = []
    for hosts, replicas in ((1, 1), (3, 1), (3, 2), (4, 2), (4, 4)):
        with torch.no_grad(), pool(tmp_path, hosts=hosts, replicas=replicas, exact=True) as served:
            experts = served.router.experts("m", 1)
            whole = experts(x, ids, weights)
            single = torch.cat(
                [experts(x[t : t + 1], ids[t : t + 1], weights[t : t + 1]) for t in range(9)]
            )
            assert torch.equal(whole, single), "a row's bits depend on its batch-mates"
            results.append(whole)
            torch.testing.assert_close(
                served.trunk(PROMPT).logits, model(PROMPT).logits, atol=1e-5, rtol=1e-5
            )
    for result in results[1:]:
        assert torch.equal(result, results[0]), "the bits depend on the placement"


def test_backward_is_refused_not_ignored(tmp_path: Path) -> None:
    from moesaic.proto.errors import UnsupportedModel

    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    with pool(tmp_path) as served:
        served.trunk.get_input_embeddings().weight.requires_grad_(True)
        loss = served.trunk(PROMPT).logits.sum()
        with pytest.raises(UnsupportedModel, match="was opened to be served"):
            loss.backward()
