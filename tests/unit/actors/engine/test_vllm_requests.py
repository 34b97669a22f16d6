"""Which requests a forward pass inside vLLM has, with a stand-in for vLLM's model runner."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from moesaic.actors.engine.streams import Streams
from moesaic.actors.engine.vllm_backend.requests import Requests


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
def test_a_pass_logs_its_requests_when_it_begins(
    level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(level, logger="moesaic")
    requests = Requests(Streams([]))
    # vLLM's batch still has the requests of the pass before.
    runner: Any = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["old"]))
    runner.execute_model = lambda scheduled: "done"
    ended: list[bool] = []
    requests.watch(
        runner, lambda: requests.log_step("r", 4), lambda: ended.append(requests.in_forward)
    )
    requests.added("trace-0#1", "v1")
    requests.added("other-0#2", "v2")
    found = runner.execute_model(SimpleNamespace(num_scheduled_tokens={"v1": 3, "v2": 1}))
    assert (found, requests.in_forward, ended) == ("done", False, [False])
    said = [(vars(one)["step"], vars(one)["requests"]) for one in caplog.records]
    assert said == ([(4, ["trace-0", "other-0"])] if level == logging.DEBUG else [])
