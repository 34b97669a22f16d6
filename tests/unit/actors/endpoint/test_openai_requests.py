"""Requests are refused by name, with the field and the value; defaults of other clients pass."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
from openai.resources.chat import Completions as ChatResource
from openai.resources.completions import Completions as CompletionsResource

from moesaic.actors.endpoint.openai import responses
from moesaic.actors.endpoint.openai.requests import (
    _IGNORED,
    _UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    parse_request,
)
from moesaic.actors.engine.engine import ExpertBounds, Sampling
from moesaic.proto.errors import ERRORS, RequestError
from tests.helpers.endpoint.openai_requests import COMPLETION, chat, completion


def test_the_least_that_is_needed() -> None:
    asked = completion()
    assert (asked.prompt, asked.temperature, asked.stop, asked.stream) == (["x"], None, None, False)
    assert [(m.role, m.content) for m in chat().messages] == [("user", "x")]


def test_null_is_the_same_as_absent() -> None:
    """Many clients send all that they know."""
    own = {"model", "messages", "prompt", "moesaic"}
    nothing = dict.fromkeys((*_UNSUPPORTED, *_IGNORED))
    assert chat(**nothing, **dict.fromkeys(ChatRequest.model_fields.keys() - own)).form is None
    completion(**nothing, **dict.fromkeys(CompletionRequest.model_fields.keys() - own))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("x", ["x"]),
        (["x", "y"], ["x", "y"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("", [""]),
    ],
)
def test_every_form_of_a_prompt(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompt == prompts


def test_stop_is_one_string_or_several() -> None:
    assert completion(stop="a").stop == ["a"]
    assert completion(stop=["a", "bc"]).stop == ["a", "bc"]
    assert completion(stop=None).stop is None


def test_sampling_is_as_asked_for_and_openais_otherwise() -> None:
    assert completion().sampling(5, ExpertBounds()) == Sampling(max_tokens=5, temperature=1.0)
    asked = completion(
        temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, repetition_penalty=1.1, seed=-4, n=2,
        frequency_penalty=-1, presence_penalty=2, logit_bias={"7": 3, "0": -100},
    )  # fmt: skip
    assert asked.choices == 2
    assert asked.sampling(5, ExpertBounds()) == Sampling(
        max_tokens=5, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, repetition_penalty=1.1,
        seed=-4, frequency_penalty=-1, presence_penalty=2, logit_bias=((7, 3.0), (0, -100.0)),
    )  # fmt: skip
    assert completion(top_k=-1).sampling(5, ExpertBounds()).top_k == 0


def test_logprobs_in_both_forms() -> None:
    assert completion().top_tokens is None
    assert completion(logprobs=0).top_tokens == 0
    assert completion(logprobs=3).sampling(1, ExpertBounds()).logprobs == 3
    assert chat(logprobs=False).top_tokens is None
    assert chat(logprobs=True).top_tokens == 0
    assert chat(logprobs=True, top_logprobs=4).top_tokens == 4
    with pytest.raises(RequestError, match=r"^top_logprobs: is only allowed with .* \(got 2\)"):
        chat(top_logprobs=2)


def test_both_names_of_the_budget() -> None:
    assert chat(max_tokens=5).token_budget == 5
    assert chat(max_completion_tokens=6).token_budget == 6
    assert chat().token_budget is None


def test_what_openai_has_passes_with_its_neutral_value_only() -> None:
    neutral = {name: values[0] for name, values in _UNSUPPORTED.items() if values}
    assert completion(**neutral) == completion()
    assert chat(**neutral) == chat()
    assert chat(**dict.fromkeys(_UNSUPPORTED)) == chat()
    assert completion(user="me", metadata={"a": "b"}) == completion()


@pytest.mark.parametrize("name", sorted(_UNSUPPORTED))
def test_any_other_value_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}=.* is not supported") as caught:
        completion(**{name: {"some": "value"}})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("resource", "kind"), [(CompletionsResource, CompletionRequest), (ChatResource, ChatRequest)]
)
def test_every_parameter_of_the_official_client_is_known(resource: Any, kind: Any) -> None:
    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    theirs = set(inspect.signature(resource.create).parameters) - own
    assert theirs <= set(kind.model_fields) | set(_UNSUPPORTED) | set(_IGNORED)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "x"}, "model", "missing parameter 'model'"),
        ({"model": "m"}, "prompt", "missing parameter 'prompt'"),
        ({"model": 5, "prompt": "x"}, "model", "model: input should be a valid string (got 5)"),
        ({**COMPLETION, "temprature": 1}, "temprature", "unknown parameter 'temprature'"),
        ({**COMPLETION, "temperature": 2.1}, "temperature", "less than or equal to 2 (got 2.1)"),
        ({**COMPLETION, "temperature": "1"}, "temperature", "valid number (got '1')"),
        ({**COMPLETION, "temperature": True}, "temperature", "valid number (got True)"),
        ({**COMPLETION, "top_p": 0}, "top_p", "greater than 0 (got 0)"),
        ({**COMPLETION, "top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({**COMPLETION, "max_tokens": 0}, "max_tokens", "greater than or equal to 1 (got 0)"),
        ({**COMPLETION, "max_tokens": 1.5}, "max_tokens", "valid integer (got 1.5)"),
        ({**COMPLETION, "stop": ""}, "stop", "string of 0 characters"),
        ({**COMPLETION, "stop": list("abcde")}, "stop", "has 5 strings; at most 4"),
        ({**COMPLETION, "stop": "x" * 2000}, "stop", "string of 2000 characters"),
        ({**COMPLETION, "stop": [1]}, "stop[0]", "valid string (got 1)"),
        ({**COMPLETION, "stream": "yes"}, "stream", "valid boolean"),
        ({**COMPLETION, "stream_options": {"x": 1}}, "stream_options.x", "unknown parameter"),
        ({**COMPLETION, "n": 0}, "n", "greater than or equal to 1 (got 0)"),
        ({**COMPLETION, "n": True}, "n", "valid integer (got True)"),
        ({**COMPLETION, "n": 65}, "n", "less than or equal to 64 (got 65)"),
        (
            {**COMPLETION, "n": 33, "prompt": ["a", "b"]},
            "n",
            "n: may be at most 32 with 2 prompts, since a request may have at most 64 choices",
        ),
        ({**COMPLETION, "echo": True, "logprobs": 1}, "echo", "echo: is not allowed with logprobs"),
        ({**COMPLETION, "logprobs": 21}, "logprobs", "less than or equal to 20 (got 21)"),
        ({**COMPLETION, "logprobs": True}, "logprobs", "valid integer (got True)"),
        ({**COMPLETION, "seed": 1.5}, "seed", "valid integer (got 1.5)"),
        ({**COMPLETION, "seed": 2**63}, "seed", "less than"),
        ({**COMPLETION, "top_k": -2}, "top_k", "greater than or equal to -1 (got -2)"),
        ({**COMPLETION, "min_p": 1.1}, "min_p", "less than or equal to 1 (got 1.1)"),
        ({**COMPLETION, "repetition_penalty": 0}, "repetition_penalty", "greater than 0 (got 0)"),
        ({**COMPLETION, "frequency_penalty": 2.1}, "frequency_penalty", "less than or equal to 2"),
        ({**COMPLETION, "presence_penalty": "1"}, "presence_penalty", "valid number (got '1')"),
        ({**COMPLETION, "logit_bias": [1]}, "logit_bias", "must map at most 1024 token ids"),
        ({**COMPLETION, "logit_bias": {"a": 1}}, "logit_bias", "has 'a': 1; token ids and numbers"),
        ({**COMPLETION, "logit_bias": {"1": True}}, "logit_bias", "has '1': True; token ids"),
        ({**COMPLETION, "logit_bias": {"1": 101}}, "logit_bias", "has the bias 101; -100 to 100"),
        ({**COMPLETION, "prompt": []}, "prompt", "must be a string"),
        ({**COMPLETION, "prompt": [1, "a"]}, "prompt", "must be a string"),
        ({**COMPLETION, "prompt": [[1], []]}, "prompt", "none of them empty"),
        ({**COMPLETION, "prompt": [True]}, "prompt", "must be a string"),
        ({**COMPLETION, "prompt": ["x"] * 65}, "prompt", "has 65 prompts; at most 64"),
        ({**COMPLETION, "prompt": {"{a}": 1}}, "prompt", "(got {'{a}': 1})"),
    ],
)
def test_bad_completions(body: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(CompletionRequest, json.dumps(body).encode())
    assert message in str(caught.value)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'{"model": "m", "prompt": NaN}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b"\xff\xfe",
        b'{"a":' * 1000,
    ],
)
def test_bodies_that_are_not_a_json_object(body: bytes) -> None:
    with pytest.raises(RequestError, match="JSON") as caught:
        parse_request(CompletionRequest, body)
    assert caught.value.param is None


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_every_error_has_an_answer(code: str) -> None:
    error = ERRORS[code]("why")
    body = responses.error_response(error, words="why").error
    assert (body.message, body.code) == ("why", code)
    assert body.type in {
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "rate_limit_error",
        "server_error",
    }
