"""A request is followed through the logs: from the endpoint to the hosts that computed for it, in
every engine; nothing of its text is logged, and by default there is no line of it at all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic.actors.engine.transformers_backend import engine as engine_file
from moesaic.actors.engine.transformers_backend.continuous_batching import BatchingLoop
from moesaic.actors.engine.transformers_backend.static_batching import StaticBatchLoop
from tests.helpers.pool.router_services import KEY, router_service
from tests.helpers.pool.served_pool import ServedPool, save_served_model, served_pool
from tests.helpers.pool.serving import LAYER, inputs
from tests.helpers.pool.serving import save_model as save_plain
from tests.helpers.processes.logged import assert_followed, calls_of, computed, logged, of, steps_of

PROMPT = "zebra xylophone quartz"
LAYERS, TOKENS = 2, 4


@pytest.fixture(scope="module", params=["continuous", "static"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedPool]:
    static = request.param == "static"
    with pytest.MonkeyPatch.context() as patch:
        if static:
            patch.setattr(engine_file, "_NOT_PACKED", ("vocab_size",))
        with served_pool(save_served_model(tmp_path_factory.mktemp("model"))) as pool:
            assert isinstance(pool.engine._loop, StaticBatchLoop if static else BatchingLoop)
            yield pool


def ask(served: ServedPool, request_id: str, **more: object) -> str:
    asked = {"model": "m", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **more}
    headers = {"x-request-id": request_id}
    answer = served.http.post("/v1/completions", json=asked, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_a_request_is_followed_to_the_hosts(served: ServedPool) -> None:
    with logged() as log:
        ask(served, "trace-1")
    edge = of(log.lines, "actors.endpoint.http.edge", request_id="trace-1")
    assert [line["message"] for line in edge] == [
        "request trace-1 goes to model m",
        "request trace-1 gets its answer",
    ]
    assert (edge[0]["model"], edge[0]["choices"]) == ("m", 1)
    assert (edge[1]["status"], edge[1]["path"]) == (200, "/v1/completions")
    assert_followed(log.lines, "trace-1-0", layers=LAYERS, steps=TOKENS)


def test_a_step_names_all_of_its_requests(served: ServedPool) -> None:
    with logged() as log:
        ask(served, "trace-2", n=2)
    both = set(steps_of(log.lines, "trace-2-0")) & set(steps_of(log.lines, "trace-2-1"))
    assert both, "two choices of a request share steps"


def test_a_text_that_becomes_a_vector_is_followed_too(served: ServedPool) -> None:
    with logged() as log:
        asked = {"model": "m", "input": PROMPT}
        headers = {"x-request-id": "vector"}
        answer = served.http.post("/v1/embeddings", json=asked, headers=headers)
        assert answer.status_code == 200, answer.text
    assert len(steps_of(log.lines, "vector")) == 1
    assert_followed(log.lines, "vector", layers=LAYERS, steps=1)


def test_nothing_of_a_request_is_logged_but_its_id(served: ServedPool) -> None:
    with logged() as log:
        text = ask(served, "secret-1")
        wrong = {"model": PROMPT, "prompt": PROMPT, "max_tokens": PROMPT}
        for path in ("/v1/completions", "/v1/chat/completions", f"/{PROMPT}"):
            assert served.http.post(path, json=wrong).status_code in (400, 404)
        headers = {"x-request-id": f"{PROMPT}\tforged", "authorization": f"Bearer {PROMPT}"}
        served.http.post(f"/v1/models?{PROMPT}", json=wrong, headers=headers)
    assert "secret-1" in log.text
    assert len(of(log.lines, "actors.endpoint.http.edge", code="RequestError")) >= 2
    for word in (*PROMPT.split(), "forged"):
        assert word not in log.text
    assert text.strip()
    assert text not in log.text
    assert text.encode("unicode_escape").decode() not in log.text


def test_by_default_a_request_makes_no_record_at_all(
    served: ServedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where Python makes a record, before anything is formatted."""
    made: list[str] = []
    make = logging.Logger.makeRecord

    def counting(self: logging.Logger, name: str, *arguments: object, **more: object):
        made.append(name)
        return make(self, name, *arguments, **more)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(logging.Logger, "makeRecord", counting)
    with logged(logging.INFO) as log:
        ask(served, "quiet")
    assert [name for name in made if name.startswith("moesaic")] == []
    assert log.text == ""


def test_a_refused_request_is_one_line_with_its_code(served: ServedPool) -> None:
    with logged(logging.INFO) as log:
        served.http.post("/v1/completions", json={}, headers={"x-request-id": "bad"})
    (line,) = log.lines
    assert (line["level"], line["request_id"], line["code"], line["status"]) == (
        "info",
        "bad",
        "RequestError",
        400,
    )


# ---- the router service --------------------------------------------------------------------------


def test_a_clients_call_is_followed_to_the_hosts(tmp_path: Path) -> None:
    with logged() as log, router_service(save_plain(tmp_path)) as service:
        service.answers(service.client(), inputs(5))
    (came,) = of(log.lines, "actors.router_service.merged_calls", layer=LAYER)
    ((router, step),) = steps_of(log.lines, came["request_id"])
    ((call_id, hosts),) = calls_of(log.lines, router, step).items()
    assert call_id == f"{router}/{step}/{LAYER}"
    assert {line["host"] for line in computed(log.lines, call_id)} == hosts
    assert KEY not in log.text
