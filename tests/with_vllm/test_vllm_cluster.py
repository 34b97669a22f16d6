"""A cluster whose trunk is vLLM: the endpoint, and a host that is killed."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

import moesaic
from moesaic.clients.http_client import Client
from tests.helpers.models.architectures import tiny_model
from tests.helpers.models.tiny import tiny_tokenizer
from tests.helpers.processes.live import processes_of, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
pytest.importorskip("vllm")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
ASKED: dict[str, Any] = {"model": "m", "prompt": [5, 7, 11, 13], "max_tokens": 24, "temperature": 0}


def saved(folder: Path) -> Path:
    model = tiny_model(
        "mixtral", vocab_size=320, max_position_embeddings=512,
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    model.generation_config.eos_token_id = 2
    model.config.eos_token_id = 2
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def spec(folder: Path, replicas: int, lending: str = "never") -> dict[str, Any]:
    return {
        "name": f"vllm-{lending}-{replicas}-{os.getpid()}",
        "models": [{"name": "m", "path": str(folder), "replicas": replicas}],
        "hosts": [{"count": 2, "threads": 1}],
        "trunk": {"engine": "vllm", "threads": 1, "cache_tokens": 512},
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
        "network": {"lending": lending},
    }


@pytest.mark.parametrize(("replicas", "lending"), [(2, "never"), (1, "always")])
def test_an_endpoint_over_vllm_does_not_notice_a_killed_host(
    tmp_path: Path, replicas: int, lending: str
) -> None:
    with (
        moesaic.up(spec(saved(tmp_path), replicas, lending)) as cluster,
        httpx.Client(base_url=cluster.url or "", timeout=60) as http,
    ):

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
        os.kill(next(iter(processes_of(cluster).values())).pid, signal.SIGKILL)
        assert text() == wanted
        assert text(temperature=1.0, seed=3) == seeded


def test_a_request_that_lacks_an_expert_is_parked_and_schemas_are_kept_to(tmp_path: Path) -> None:
    with (
        moesaic.up(spec(saved(tmp_path), 1)) as cluster,
        httpx.Client(base_url=cluster.url or "", timeout=120) as http,
        Client(cluster.monitoring or "") as operator,
    ):

        def engine(key: str) -> int:
            work = operator.status().engines["m"].work
            assert work is not None
            return getattr(work, key)

        long = {**ASKED, "max_tokens": 400, "logit_bias": {"2": -100}}
        wanted = http.post("/v1/completions", json=long).json()["choices"][0]["text"]
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(http.post, "/v1/completions", json=long)
            wait_until(lambda: engine("running_requests") == 1)
            os.kill(next(iter(processes_of(cluster).values())).pid, signal.SIGKILL)
            wait_until(lambda: engine("parked_requests") == 1)
            assert waiting.result(120).json()["choices"][0]["text"] == wanted
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}
        for seed in range(3):
            answer = http.post(
                "/v1/chat/completions", json={**chat, "seed": seed, "response_format": form}
            )
            assert answer.status_code == 200, answer.text
            choice = answer.json()["choices"][0]
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        refused = http.post("/v1/chat/completions", json={**chat, "response_format": bad})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "response_format"
