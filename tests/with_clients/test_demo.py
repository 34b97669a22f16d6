"""The client libraries against a cluster that serves the demo model."""

# Installed by `make test-clients` alone.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any, Literal

import litellm
import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# The demo's answer has no near tie, which another CPU or a cached prefix would decide otherwise.
ASKED = "Is the capital of France Paris? Answer with one sentence."
QUESTION: Any = [{"role": "user", "content": ASKED}]


class Capital(BaseModel):
    """The capital of a country."""

    city: Literal["Paris", "Rome", "Madrid"]


def test_openai(demo_url: str) -> None:
    with openai.OpenAI(base_url=f"{demo_url}/v1", api_key="none", timeout=120) as client:
        asked: dict[str, Any] = {"model": "demo", "messages": QUESTION, "max_tokens": 30}
        answer = client.chat.completions.create(**asked, temperature=0)
        assert "Paris" in (answer.choices[0].message.content or "")
        with client.chat.completions.stream(**asked, temperature=0) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == answer.choices[0].message.content
        parsed = client.chat.completions.parse(**asked, temperature=0, response_format=Capital)
        assert isinstance(parsed.choices[0].message.parsed, Capital)
        vectors = client.embeddings.create(model="demo", input=["Paris", "Rome"]).data
        assert len(vectors) == 2


def test_langchain(demo_url: str) -> None:
    model = ChatOpenAI(
        model="demo", base_url=f"{demo_url}/v1", api_key=SecretStr("none"), temperature=0
    )
    assert "Paris" in str(model.invoke(QUESTION, max_tokens=30).content)
    assert "Paris" in "".join(str(one.content) for one in model.stream(QUESTION, max_tokens=30))
    form = model.with_structured_output(Capital, method="json_schema")
    assert isinstance(form.invoke(QUESTION), Capital)
    vectors = OpenAIEmbeddings(
        model="demo",
        base_url=f"{demo_url}/v1",
        api_key=SecretStr("none"),
        check_embedding_ctx_length=False,
    ).embed_documents(["Paris", "Rome"])
    assert len(vectors) == 2


def test_litellm(demo_url: str) -> None:
    answer: Any = litellm.completion(
        "openai/demo",
        QUESTION,
        api_base=f"{demo_url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=30,
    )
    assert "Paris" in answer.choices[0].message.content
