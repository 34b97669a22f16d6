"""An ingress follows another plan: limits, aliases, and a trunk that does not start."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from moesaic.actors.engine.engine import RequestLimits
from moesaic.actors.serve.replica import ingress
from moesaic.actors.serve.replica.ingress import Ingress
from moesaic.actors.serve.replica.ingress_plan import IngressPlan, ModelPlan
from tests.helpers.models.tiny import tiny_tokenizer

LIMITS = RequestLimits(max_prompt_tokens=100, max_total_tokens=100, max_requests=4, vocab_size=50)


class Method:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def remote(self, *_: Any) -> Any:
        return self.answer()


class Handle:
    """A trunk's handle whose limits are the test's."""

    def __init__(self, limits: RequestLimits | None) -> None:
        self.found = limits
        self.limits = Method(self._limits)

    def options(self, **_: Any) -> Handle:
        return self

    async def _limits(self) -> RequestLimits:
        while self.found is None:
            await asyncio.sleep(3600)
        return self.found


def own_class() -> Any:
    wrapped: Any = Ingress.func_or_class
    return next(one for one in wrapped.__mro__ if "_follow" in vars(one))


def ingress_of(plan: IngressPlan) -> Any:
    own = own_class()
    made = own.__new__(own)
    own.__init__(made, lambda: plan)
    return made


async def begin(made: Any) -> None:
    await made.__serve_build_asgi_app__()


def model_plan(handle: Handle, **more: Any) -> ModelPlan:
    trunk: Any = handle
    return ModelPlan(trunk=trunk, tokenizer=tiny_tokenizer, **more)


def test_a_trunk_that_was_started_anew_tells_its_limits() -> None:
    """A spec with more `cache_tokens` lets prompts be longer."""

    async def run() -> None:
        handle = Handle(LIMITS)
        made = ingress_of(IngressPlan(models={"m": model_plan(handle)}))
        await begin(made)
        assert made._names["m"].limits.max_prompt_tokens == 100
        handle.found = replace(LIMITS, max_prompt_tokens=1000, max_total_tokens=1000)
        await made.refresh()
        await asyncio.sleep(0.05)
        assert made._names["m"].limits.max_prompt_tokens == 1000

    asyncio.run(run())


def test_an_ingress_starts_although_one_trunk_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its predecessor has died, and a model that came since has a trunk that cannot start."""
    monkeypatch.setattr(ingress, "OTHERS_S", 0.01)

    async def run() -> None:
        plans = {"m": model_plan(Handle(LIMITS)), "broken": model_plan(Handle(None))}
        made = ingress_of(IngressPlan(models=plans))
        await asyncio.wait_for(begin(made), 5.0)
        assert list(made._names) == ["m"]

    asyncio.run(run())


def test_an_alias_moves_when_its_new_model_answers() -> None:
    async def run() -> None:
        old, new = Handle(LIMITS), Handle(None)
        first = {"old": model_plan(old, aliases=["chat"])}
        made = ingress_of(IngressPlan(models=first))
        await begin(made)
        then = {"old": model_plan(old), "new": model_plan(new, aliases=["chat"])}
        made._find_plan = lambda: IngressPlan(models=then)
        await made.refresh()
        assert "chat" in made._names, "requests for the alias get 404 while its model is loaded"

    asyncio.run(run())
