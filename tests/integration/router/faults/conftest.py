"""A pool that every test here harms in some way, and that must go on afterwards.

It has one replica of each expert, so that nothing is hidden by another host's answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from tests.helpers.models.tiny import tiny_tokenizer
from tests.helpers.pool.host_calls import PROMPT
from tests.helpers.pool.served_pool import (
    ServedPool,
    save_served_model,
    served_pool,
    tiny_served_model,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPool]:
    with served_pool(save_served_model(tmp_path_factory.mktemp("model"))) as running:
        yield running


@pytest.fixture(scope="module")
def good_text(served: ServedPool) -> str:
    """What plain transformers says."""
    model = tiny_served_model()
    ids = torch.tensor([PROMPT])
    whole = cast(Any, model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    text = tiny_tokenizer().decode(whole[0, len(PROMPT) :], skip_special_tokens=True)
    assert isinstance(text, str)
    assert text
    return text


@pytest.fixture(autouse=True)
def goes_on(served: ServedPool, good_text: str) -> Iterator[None]:
    """After every test: the same good answer, the same hosts, nothing restarted."""
    yield
    assert served.text(PROMPT) == good_text
    assert all(host._loop.alive for host in served.hosts)
    assert all(host.report().loop.queued_rows == 0 for host in served.hosts)
    assert set(served.pool.router.stats().hosts.values()) == {"up"}
    assert served.engine.stats().restarts == 0
