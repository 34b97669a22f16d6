"""docs/spec.md is what the code says, and the code says it of every key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from moesaic.cli.main import main
from moesaic.cluster.spec.page import _below, spec_page
from moesaic.cluster.spec.parts import Resources
from moesaic.cluster.spec.spec import Spec, parse_spec
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "spec.md"


def models() -> Iterator[type[BaseModel]]:
    yield Spec
    for _, model in _below(Spec, ""):
        yield model


KEYS = [(model, key) for model in models() for key in model.model_fields]


@pytest.mark.parametrize(
    ("model", "key"), [pytest.param(*one, id=f"{one[0].__name__}.{one[1]}") for one in KEYS]
)
def test_every_key_says_what_it_means(model: type[BaseModel], key: str) -> None:
    said = model.model_json_schema()
    meaning = said.get("$defs", {}).get(model.__name__, said)["properties"][key]["description"]
    assert meaning.endswith("."), "a description is made of sentences"
    assert len(meaning.split()) >= 5, "whoever sees only the key and this text knows what it does"
    assert "\n" not in meaning, "editors would show the source's line breaks"


@pytest.mark.parametrize("model", list(dict.fromkeys(models())))
def test_every_part_says_what_it_is(model: type[BaseModel]) -> None:
    said = model.model_json_schema()["description"]
    first, *more = said.split("\n\n")
    assert model.__doc__ is not None
    assert first == " ".join(model.__doc__.replace("``", "`").split("\n\n")[0].split())
    assert all("\n" not in paragraph for paragraph in more)
    assert f"\n\n{said}\n\n| key |" in spec_page(), "the page keeps the paragraphs apart"


def test_inherited_keys_keep_what_they_mean() -> None:
    for key, field in Resources.model_fields.items():
        assert field.description
        for part in Resources.__subclasses__():
            assert part.model_fields[key].description == field.description


def test_the_page_is_made_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spec", "docs"]) == 0
    assert capsys.readouterr().out == spec_page()
    assert PAGE.read_text() == spec_page(), "`make spec` writes it anew"


@pytest.mark.parametrize(
    "row",
    [
        "| `port` | integer | `8000` | >= 0, <= 65535 | Port on which the HTTP endpoint listens.",
        "| `engine` | `transformers`, `vllm` | `transformers` |  | The engine that batches",
        "| `idle_s` | number or null | `null` | >= 1, <= 31536000 |",
        "| `name` | string | needed | length <= 128, `^[A-Za-z0-9]",
        "| `aliases` | list of strings | `[]` | length <= 128, `^[A-Za-z0-9]",
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


def test_the_schema_for_editors_has_the_meanings() -> None:
    schema = Spec.model_json_schema()
    assert schema["properties"]["hosts"]["description"].startswith("Groups of identical expert")
    limits = schema["$defs"]["LimitSpec"]["properties"]
    assert limits["body_mb"]["description"].endswith("refused with status 413.")
    assert parse_spec({}).name == "local"
