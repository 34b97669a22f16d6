"""Answers of a JSON schema, with tokens drawn by chance: whatever the model wants, they fit."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from moesaic.actors.engine import Sampling
from moesaic.actors.grammar import Grammars
from moesaic.actors.sampling import RequestSampler, choose
from moesaic.proto.errors import RequestError
from tests.helpers.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCABULARY, EOS = 330, [2]  # a model's vocabulary may be larger than its tokenizer's
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"enum": ["red", "blue"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    },
]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(lambda: TOKENIZER, VOCABULARY, EOS)


def answer(grammars: Grammars, schema: dict[str, Any], seed: int, most: int = 400) -> list[int]:
    asked = Sampling(max_tokens=most, temperature=1.0, seed=seed)
    sampler = RequestSampler(asked, [1], (), grammars.begin(json.dumps(schema)))
    assert not sampler.plain
    generator = torch.Generator().manual_seed(0)
    tokens: list[int] = []
    for _ in range(most):
        logits_V = torch.zeros(VOCABULARY)
        (token,) = choose(logits_V[None], [sampler], generator).tolist()
        sampler.chose(token, logits_V)
        if token in EOS:
            return tokens
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_whatever_is_drawn_fits(grammars: Grammars, schema: dict[str, Any]) -> None:
    for seed in range(8):
        text = TOKENIZER.decode(answer(grammars, schema, seed))
        assert isinstance(text, str)
        if schema.get("properties", {}).keys() == {"a"}:
            continue  # more properties may follow without end
        jsonschema.validate(json.loads(text), schema)


def test_a_greedy_answer_ends_where_it_is_complete(grammars: Grammars) -> None:
    grammar = grammars.begin('{"enum": ["red"]}')
    for token in TOKENIZER('"red"').input_ids:
        assert grammar.allowed()[token]
        grammar.take(token)
    assert np.flatnonzero(grammar.allowed()).tolist() == EOS
    grammar.take(EOS[0])
    assert np.flatnonzero(grammar.allowed()).tolist() == EOS


def test_it_goes_on_behind_what_was_generated(grammars: Grammars) -> None:
    ids = TOKENIZER('"red"').input_ids
    grammar = grammars.begin('{"enum": ["red", "blue"]}', already=ids[:-1])
    assert grammar.allowed()[ids[-1]]


def test_tokens_beyond_the_tokenizer_never_come(grammars: Grammars) -> None:
    allowed_V = grammars.begin('{"type": "object"}').allowed()
    assert allowed_V.shape == (VOCABULARY,)
    assert not allowed_V[len(TOKENIZER) :].any()


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(RequestError, match="ends a text"):
        Grammars(lambda: TOKENIZER, VOCABULARY, []).begin('{"type": "object"}')


@pytest.mark.parametrize("schema", ["{", '{"type": "nothing"}', '{"$ref": "#/nowhere"}', "[1]"])
def test_a_schema_that_is_none_is_refused(grammars: Grammars, schema: str) -> None:
    with pytest.raises(RequestError, match="response_format") as caught:
        grammars.begin(schema)
    assert caught.value.param == "response_format"
