"""Which requests a forward pass inside vLLM has, with a stand-in for vLLM's model runner."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.actors.engine.streams import Streams
from moesaic.actors.engine.vllm_backend import requests as requests_module
from moesaic.actors.engine.vllm_backend.requests import Requests
from moesaic.actors.router.whole_calls import PassCheck


class Router:
    """A router that notes what it is told, and says whether a pass is sound."""

    def __init__(self, *, sound: bool = True) -> None:
        self.told: list[object] = []
        self.result = torch.empty(0)
        self.begun: Callable[[], None] = lambda: None
        self._sound = sound

    def begin_step(self, check: PassCheck = PassCheck.CALLS) -> None:
        self.told.append(check)
        self.begun()

    def step_is_sound(self, result: Tensor | None = None) -> bool:
        assert result is not None
        self.told.append("sound?")
        self.result = result
        return self._sound

    @contextmanager
    def repeating(self) -> Iterator[None]:
        self.told.append("repeating")
        yield
        self.told.append("repeated")

    def end_step(self) -> None:
        self.told.append("end")


def runner_of(out: object) -> Any:
    """A runner whose model returns ``out``; vLLM's batch still has requests of the pass before."""
    runner: Any = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["old"]), passes=0)

    def forward(**_: Any) -> object:
        runner.passes += 1
        return out

    runner._model_forward = forward
    runner.execute_model = lambda _: runner._model_forward(input_ids=None)
    return runner


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
def test_a_pass_logs_its_requests_when_it_begins(
    level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(level, logger="moesaic")
    requests, router, out = Requests(Streams([])), Router(), torch.ones(4, 2)
    runner = runner_of(out)

    def begun() -> None:
        requests.log_step("r", 4)

    router.begun = begun
    requests.watch(runner, router, may_repeat=True)
    requests.added("trace-0#1", "v1")
    requests.added("other-0#2", "v2")
    found = runner.execute_model(SimpleNamespace(num_scheduled_tokens={"v1": 3, "v2": 1}))
    assert found is out
    assert not requests.in_forward
    assert router.told[0] is PassCheck.RESULT
    assert torch.equal(router.result, out)
    assert router.told[2:] == ["end"]
    said = [(vars(one)["step"], vars(one)["requests"]) for one in caplog.records]
    assert said == ([(4, ["trace-0", "other-0"])] if level == logging.DEBUG else [])


@pytest.mark.parametrize("several", [False, True])
def test_a_pass_that_is_not_sound_is_run_once_more(
    monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    """Some models return the states of more layers than the last one."""
    graphs: list[str] = []

    @contextmanager
    def without_graphs() -> Iterator[None]:
        graphs.append("off")
        yield

    monkeypatch.setattr(requests_module, "_without_graphs", without_graphs)
    requests, router, last = Requests(Streams([])), Router(sound=False), torch.ones(3, 2)
    runner = runner_of((last, [torch.zeros(1)]) if several else last)
    requests.watch(runner, router, may_repeat=True)
    runner.execute_model(SimpleNamespace(num_scheduled_tokens={"v1": 1}))
    assert runner.passes == 2
    assert router.result.shape == (1, 2), "the other rows pad the batch"
    assert router.told[1:] == ["sound?", "repeating", "repeated", "end"]
    assert graphs == ["off"]


def test_a_model_with_a_state_of_its_own_is_checked_call_by_call() -> None:
    requests, router = Requests(Streams([])), Router()
    runner = runner_of(torch.ones(1, 2))
    requests.watch(runner, router, may_repeat=False)
    runner.execute_model(SimpleNamespace(num_scheduled_tokens={"v1": 1}))
    assert router.told[0] is PassCheck.CALLS


def test_what_vllm_runs_by_itself_is_no_pass() -> None:
    requests, router = Requests(Streams([])), Router(sound=False)
    runner = runner_of(torch.ones(1, 2))
    requests.watch(runner, router, may_repeat=True)
    runner._model_forward(input_ids=None)
    assert (runner.passes, router.told) == (1, [])
