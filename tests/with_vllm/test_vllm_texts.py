"""Greedy texts over the pool are those of vLLM with its own experts, log-probabilities within 1e-4;
fp32, one case a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models.architectures import tiny_model
from tests.helpers.paths import ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
pytest.importorskip("vllm")

TOKENS = 24
# vLLM's attention on CPUs wants heads of 32 numbers or more.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
# vLLM builds these experts of `intermediate_size`, where transformers has another name for it.
_ONE_SIZE = {"intermediate_size": 48, "moe_intermediate_size": 48}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "ernie4_5_moe": {},
    "glm4_moe": {},
    "exaone_moe": {},
    "cohere2_moe": {},
    "lfm2_moe": {},
    "hunyuan_v1_moe": _ONE_SIZE,
    "flex_olmo": _ONE_SIZE,
}


def texts(way: str, folder: Path, *arguments: str) -> tuple[list[list[int]], list[list[float]]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.with_vllm.texts", way, str(folder), str(TOKENS), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return [ids for ids, _ in found], [logprobs for _, logprobs in found]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_texts_as_with_its_own_experts(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(
        architecture,
        vocab_size=320,
        max_position_embeddings=512,
        **SIZES,
        **ARCHITECTURES[architecture],
    )
    model.generation_config.eos_token_id = None
    model.config.get_text_config().eos_token_id = None
    model.save_pretrained(tmp_path)
    alone, expected = texts("alone", tmp_path)
    for way in ("pool", "compiled") if architecture == "mixtral" else ("pool",):
        found, logprobs = texts(way, tmp_path, "2")
        assert found == alone
        for one, other in zip(logprobs, expected, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
