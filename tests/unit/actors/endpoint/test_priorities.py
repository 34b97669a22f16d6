"""The priority of a request is bounded by the spec."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from moesaic.actors.endpoint.ingress import create_app
from moesaic.actors.engine.engine import RequestLimits
from moesaic.actors.engine.served_model import ServedModel
from moesaic.cluster.spec.parts import LimitSpec
from tests.helpers.endpoint.service import BODIES, TOKENIZER, Script

WIDE = RequestLimits(max_prompt_tokens=2000, max_total_tokens=4000, max_requests=8, vocab_size=320)


@pytest.mark.parametrize(
    ("spec", "passes", "refused"),
    [
        ({}, (0, 5, 2**31 - 1), (-1, -(2**31))),
        ({"min_priority": -2, "max_priority": 3}, (-2, 0, 3), (-3, 4, -(2**31), 2**31 - 1)),
        ({"max_priority": 0}, (0,), (1,)),
    ],
)
def test_nobody_goes_before_others_unless_the_spec_allows_it(
    spec: dict[str, int], passes: tuple[int, ...], refused: tuple[int, ...]
) -> None:
    script = Script()
    served = ServedModel("m", TOKENIZER, WIDE.within(LimitSpec(**spec)), script.generate)
    http = TestClient(create_app(models={"m": served}, bodies=BODIES))
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    asked: tuple[tuple[str, dict[str, Any]], ...] = (
        ("completions", {"prompt": "x"}),
        ("chat/completions", chat),
    )
    for path, body in asked:
        said = {"model": "m", "max_tokens": 2, **body}
        for priority in passes:
            assert http.post(f"/v1/{path}", json={**said, "priority": priority}).status_code == 200
            assert script.sampling is not None and script.sampling.priority == priority
        assert http.post(f"/v1/{path}", json=said).status_code == 200
        for priority in refused:
            answer = http.post(f"/v1/{path}", json={**said, "priority": priority})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "priority")
            assert f"priority is {priority};" in error["message"]
