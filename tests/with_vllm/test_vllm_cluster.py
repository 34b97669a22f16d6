"""A cluster whose trunk is vLLM: the endpoint, and a host that is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

import moesaic
from tests.helpers.architectures import tiny_model
from tests.helpers.live import hosts_of
from tests.helpers.tiny import tiny_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
pytest.importorskip("vllm")

ASKED: dict[str, Any] = {"model": "m", "prompt": [5, 7, 11, 13], "max_tokens": 24, "temperature": 0}


def test_an_endpoint_over_vllm_does_not_notice_a_killed_host(tmp_path: Path) -> None:
    model = tiny_model(
        "mixtral", vocab_size=320, max_position_embeddings=512,
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    spec = {
        "name": f"vllm-{os.getpid()}",
        "models": [{"name": "m", "path": str(tmp_path), "replicas": 2}],
        "hosts": [{"count": 2, "threads": 1}],
        "trunk": {"engine": "vllm", "threads": 1, "cache_tokens": 1024},
        "endpoint": {"port": 0},
    }
    with moesaic.up(spec) as cluster, httpx.Client(base_url=cluster.url or "", timeout=60) as http:

        def text(**more: Any) -> str:
            answer = http.post("/v1/completions", json={**ASKED, **more})
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        wanted = text()
        seeded = text(temperature=1.0, seed=3)
        assert seeded != wanted
        told = http.post("/v1/completions", json={**ASKED, "logprobs": 2}).json()["choices"][0]
        assert len(told["logprobs"]["tokens"]) == 24
        assert all(1 <= len(top) <= 2 for top in told["logprobs"]["top_logprobs"])
        assert http.post("/v1/completions", json={**ASKED, "max_tokens": 10**6}).status_code == 400
        os.kill(next(iter(hosts_of(cluster).values()))["pid"], signal.SIGKILL)
        assert text() == wanted
        assert text(temperature=1.0, seed=3) == seeded
