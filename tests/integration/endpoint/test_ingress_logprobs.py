"""Log-probabilities and usage as the endpoint words them, with the official client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.helpers.endpoint.engines import reference
from tests.helpers.endpoint.service import MESSAGES, TEXT, TOKENIZER, Service, chat_ids


def test_log_probabilities_in_both_forms(official: openai.OpenAI, service: Service) -> None:
    ids = chat_ids()
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    whole = official.chat.completions.create(
        **asked, messages=MESSAGES, logprobs=True, top_logprobs=3
    )
    found = whole.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    tokens = reference(service.model, ids, 6)
    with torch.inference_mode():
        logits = service.model(torch.tensor([[*ids, *tokens[:-1]]])).logits[0, len(ids) - 1 :]
    want = torch.log_softmax(logits.float(), dim=-1)
    for place, (one, token) in enumerate(zip(found.content, tokens, strict=True)):
        said = str(TOKENIZER.decode([token]))
        assert one.token == said or (one.token.startswith("bytes:\\x") and "\ufffd" in said)
        assert one.logprob == pytest.approx(float(want[place, token]), abs=1e-4)
        assert one.bytes is not None
        assert said.startswith(bytes(one.bytes).decode(errors="replace"))
        best = want[place].topk(3)
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
    streamed = [
        one
        for chunk in official.chat.completions.create(
            **asked, messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True
        )
        for choice in chunk.choices
        if choice.logprobs is not None
        for one in choice.logprobs.content or ()
    ]
    assert [one.token for one in streamed] == [one.token for one in found.content]
    text = official.completions.create(**asked, prompt=ids, logprobs=2).choices[0]
    assert text.logprobs is not None
    assert text.logprobs.tokens == [one.token for one in found.content]
    raw = [bytes(one.bytes or ()) for one in found.content]
    assert b"".join(raw).decode(errors="replace") == text.text == whole.choices[0].message.content
    assert text.logprobs.text_offset is not None
    for said, at in zip(text.logprobs.tokens or (), text.logprobs.text_offset, strict=True):
        assert said.startswith("bytes:\\x") or text.text[at:].startswith(said)
    assert text.logprobs.top_logprobs is not None
    assert all(1 <= len(top) <= 2 for top in text.logprobs.top_logprobs)


def test_a_character_of_several_tokens_has_its_bytes_and_its_place(
    service: Service, official: openai.OpenAI
) -> None:
    asked: dict[str, Any] = {"model": "org/script", "max_tokens": 200}
    chat = official.chat.completions.create(
        **asked, messages=MESSAGES, logprobs=True, top_logprobs=1
    ).choices[0]
    assert chat.logprobs is not None
    found = chat.logprobs.content or ()
    assert b"".join(bytes(one.bytes or ()) for one in found).decode() == TEXT
    assert any(one.token.startswith("bytes:\\x") for one in found)
    options: dict[str, Any]
    for options in ({}, {"stop": "本"}):
        one = official.completions.create(**asked, prompt="the", logprobs=1, **options).choices[0]
        assert one.logprobs is not None
        places = list(zip(one.logprobs.tokens or (), one.logprobs.text_offset or (), strict=True))
        for said, at in places:
            assert said.startswith("bytes:\\x") or one.text[at:].startswith(said)
        assert max(at for _, at in places) == len(one.text) - 1


def test_none_of_the_likeliest_tokens(official: openai.OpenAI, http: httpx.Client) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 3, "temperature": 0}
    chat = official.chat.completions.create(
        **asked, messages=MESSAGES, logprobs=True, top_logprobs=0
    )
    found = chat.choices[0].logprobs
    assert found is not None
    assert [one.top_logprobs for one in found.content or ()] == [[]] * 3
    for unused in ({}, {"logprobs": False}, {"logprobs": None}):
        body = {**asked, "messages": MESSAGES, "top_logprobs": 0, **unused}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["logprobs"] is None
    text = official.completions.create(**asked, prompt="the", logprobs=0).choices[0].logprobs
    assert text is not None
    # The token that was chosen is always there, as with OpenAI.
    assert text.top_logprobs == [
        {said: logprob}
        for said, logprob in zip(text.tokens or (), text.token_logprobs or (), strict=True)
    ]


@pytest.mark.parametrize(
    ("path", "said"),
    [("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/completions", {"prompt": "the"})],
)
def test_usage_is_null_in_the_chunks_before_the_last(
    http: httpx.Client, path: str, said: dict[str, Any]
) -> None:
    def chunks(**options: Any) -> list[dict[str, Any]]:
        body = {"model": "tiny", "max_tokens": 4, "stream": True, **said, **options}
        lines = http.post(path, json=body).text.splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    *before, last = chunks(stream_options={"include_usage": True})
    assert before
    assert all("usage" in chunk and chunk["usage"] is None for chunk in before)
    assert last["usage"]["completion_tokens"] == 4
    assert last["choices"] == []
    for options in ({}, {"stream_options": {"include_usage": False}}):
        assert all(chunk.get("usage") is None for chunk in chunks(**options))
