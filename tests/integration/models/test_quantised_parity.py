"""Quantised checkpoints over a pool: logits and texts of the plain model that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesaic.cluster.routing.transports import TransportChoice
from tests.helpers.models.quantising import FORMS
from tests.helpers.pool.pools import pool

pytestmark = pytest.mark.numeric

PROMPT = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "hosts", "transport"),
    [
        ("gpt-oss", 2, "shm"),
        ("deepseek-v3", 3, "grpc"),
        ("qwen3", 1, "grpc"),
        ("deepseek-v4", 2, "shm"),
        ("one-scale", 2, "shm"),
    ],
)
def test_parity(name: str, hosts: int, transport: TransportChoice, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    model = FORMS[name](folder)
    with torch.no_grad(), pool(folder, hosts=hosts, transport=transport) as served:
        expected = model(PROMPT).logits
        assert float(expected.std()) > 0.1
        torch.testing.assert_close(served.trunk(PROMPT).logits, expected, atol=1e-5, rtol=1e-5)
        assert served.router.stats().calls == len(served.layers)
        wanted = model.generate(PROMPT[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)
        given = served.trunk.generate(
            PROMPT[:1], max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert torch.equal(given, wanted)
