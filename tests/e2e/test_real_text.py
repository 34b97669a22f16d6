"""The demo model through the endpoint writes what plain transformers writes, token for token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moesaic
from moesaic.handle import Cluster
from moesaic.models.upcycling.demo import demo_model

PROMPTS = [
    "What is a mosaic?",
    "Write a Python function that reverses a string.",
    "Name three rivers in Europe.",
    "Explain why the sky is blue in two sentences.",
    "Tell me a short story about a fox and a lantern.",
    "What should I cook with tomatoes and rice?",
    "Translate 'good morning' into French.",
    "Why do cats purr?",
    "Give me a tip for learning to play the piano.",
    "What is the capital of Japan, and what is it known for?",
]

pytestmark = [
    pytest.mark.alone,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    spec = {
        "name": f"text-{os.getpid()}",
        "models": [{"name": "demo", "path": "demo", "dtype": "float32", "replicas": 1}],
        "hosts": [{"count": 2}],
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
    }
    with moesaic.up(spec) as running:
        yield running


def plain_texts(prompts: list[str], tokens: int) -> list[str]:
    """Greedy, in fp32, one prompt after the other, without any of our code."""
    folder = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("count", "tokens"), [(2, 16), (10, 100)])
def test_the_same_tokens_alone_and_together(cluster: Cluster, count: int, tokens: int) -> None:
    expected = plain_texts(PROMPTS[:count], tokens)
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=300) as client:

        def answer(prompt: str) -> str:
            chunks = client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": prompt}],
                max_tokens=tokens,
                temperature=0,
                stream=True,
            )
            return "".join(
                chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices
            )

        alone = [answer(prompt) for prompt in PROMPTS[:count]]
        with ThreadPoolExecutor(count) as pool:
            together = list(pool.map(answer, PROMPTS[:count]))
    assert alone == expected
    assert together == expected


@pytest.mark.slow
def test_bfloat16_logits_are_within_a_stated_bound(cluster: Cluster) -> None:
    """In bf16 whole texts change with the batch even in plain transformers; logits do by little.

    Bound: 99 % of logits within 0.25, of a range of about 40.
    """
    folder = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(" ".join(PROMPTS[:4]), return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = plain(ids).logits.float()
        attached = cluster.attach(plain, name="bf16")
        difference = (attached(ids).logits.float() - expected).abs()
    assert float(difference.flatten()[::97].quantile(0.99)) <= 0.25
