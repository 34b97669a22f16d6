"""docs/spec.md is what the code says, and the code says it of every key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from moesaic.cli.main import main
from moesaic.cluster.spec.page import _below, spec_page
from moesaic.cluster.spec.spec import Spec, parse_spec
from moesaic.cluster.spec.words import WORDS
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "spec.md"


def models() -> Iterator[type[BaseModel]]:
    yield Spec
    for _, model in _below(Spec, ""):
        yield model


def test_every_key_has_words_and_no_words_are_of_nothing() -> None:
    keys = {model.__name__: set(model.model_fields) for model in models()}
    assert {name: set(words) for name, words in WORDS.items()} == keys


def test_the_page_is_made_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spec", "docs"]) == 0
    assert capsys.readouterr().out == spec_page()
    assert PAGE.read_text() == spec_page(), "`make spec` writes it anew"


@pytest.mark.parametrize(
    "row",
    [
        "| `port` | integer | `8000` | >= 0, <= 65535 | Port to listen on; 0 takes a free one. |",
        "| `engine` | `transformers`, `vllm` | `transformers` |  | The engine that batches",
        "| `idle_s` | number or null | `null` | >= 1, <= 31536000 |",
        "| `name` | string | needed | 128 characters or fewer, `^[A-Za-z0-9]",
        "| `aliases` | list of strings | `[]` | 128 characters or fewer, `^[A-Za-z0-9]",
        "| `cors_origins` | list of strings | `[]` |",
        "| `budget` | number or string | `0.05` |",
        "| `hosts` | list of mappings | see below |",
        "| `threads` | integer or `auto` | `auto` | >= 1 |",
        "## `hosts[].emulate`",
        "## `endpoint.limits`",
    ],
)
def test_keys_types_defaults_and_bounds(row: str) -> None:
    assert row in spec_page()


def test_the_schema_for_editors_has_the_words() -> None:
    schema = Spec.model_json_schema()
    assert schema["properties"]["hosts"]["description"] == WORDS["Spec"]["hosts"]
    limits = schema["$defs"]["LimitSpec"]["properties"]
    assert limits["body_mb"]["description"] == WORDS["LimitSpec"]["body_mb"]
    assert parse_spec({}).name == "local"
