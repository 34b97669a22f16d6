"""Names of models as clients use them: hub ids with a slash, and aliases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from moesaic.actors.endpoint.http.metrics import HttpMetrics
from moesaic.actors.endpoint.ingress import create_app
from moesaic.actors.endpoint.model_names import ModelNames
from moesaic.actors.runtime.process_labels import ProcessLabel, announce, announced
from moesaic.clients.openai_wire import models, only
from moesaic.proto.errors import RequestError
from tests.helpers.endpoint.service import BODIES, scripted_models

HUB = "Qwen/Qwen3-30B-A3B"
ALIASES = {HUB: ["gpt-4o", "team/chat"]}


METRICS = HttpMetrics()


@pytest.fixture
def http() -> Iterator[TestClient]:
    served = scripted_models(HUB, "other")
    app = create_app(models=ModelNames(served, ALIASES), bodies=BODIES, metrics=METRICS)
    with TestClient(app) as client:
        yield client


def test_all_names_are_listed_and_an_alias_says_whose_it_is(http: TestClient) -> None:
    cards = http.get("/v1/models").json()["data"]
    assert [(card["id"], card["root"]) for card in cards] == [
        (HUB, HUB), ("gpt-4o", HUB), ("team/chat", HUB), ("other", "other"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "name", "root"),
    [
        (HUB, HUB, HUB),
        ("Qwen%2FQwen3-30B-A3B", HUB, HUB),
        ("gpt-4o", "gpt-4o", HUB),
        ("team%2Fchat", "team/chat", HUB),
        ("other", "other", "other"),
    ],
)
def test_one_model_by_any_of_its_names(http: TestClient, path: str, name: str, root: str) -> None:
    card = http.get(f"/v1/models/{path}").json()
    assert (card["id"], card["root"]) == (name, root)


@pytest.mark.parametrize("name", ["Qwen", "Qwen/", "Qwen/Qwen3-30B-A3B/", "team", "GPT-4o"])
def test_nothing_else_is_a_name(http: TestClient, name: str) -> None:
    answer = http.get(f"/v1/models/{name}")
    assert answer.status_code == 404
    assert "Qwen/Qwen3-30B-A3B, gpt-4o, team/chat, other" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", [HUB, "gpt-4o", "team/chat"])
def test_the_answer_has_the_models_own_name(http: TestClient, name: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    chat = {"model": name, "messages": messages, "max_tokens": 3}
    assert http.post("/v1/chat/completions", json=chat).json()["model"] == HUB
    assert http.post("/v1/completions", json={"model": name, "prompt": "x"}).json()["model"] == HUB
    events = http.post("/v1/chat/completions", json={**chat, "stream": True}).text.split("\n\n")
    assert all(f'"model":"{HUB}"' in event for event in events[:-2])
    models = {sample.labels.get("model") for metric in METRICS for sample in metric.samples}
    assert HUB in models
    assert "gpt-4o" not in models


def test_aliases_do_not_make_a_second_model() -> None:
    cards = [{"id": "a/b", "root": "a/b", "max_model_len": 8}]
    cards.append({"id": "c", "root": "a/b", "max_model_len": 8})
    found = models({"data": cards})
    assert [(one.id, one.alias_of) for one in found] == [("a/b", None), ("c", "a/b")]
    assert only(found) == "a/b"
    with pytest.raises(RequestError, match=r"a/b, d$"):
        only([*found, *models({"data": [{"id": "d", "max_model_len": 8}]})])


def test_the_log_of_a_trunk_is_found_by_its_models_name(capsys: pytest.CaptureFixture[str]) -> None:
    announce("trunk", HUB, "local")
    assert announced(capsys.readouterr().out) == ProcessLabel("trunk", HUB, "local")
