"""What stands around the router service: its catalog of models, and the controller's eye on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from ray.exceptions import RayActorError, RayTaskError

from moesaic.actors.router_service import service_actor
from moesaic.actors.router_service.catalog import LOOK_S, Catalog, describe_model, layers_of
from moesaic.actors.router_service.service_actor import SILENT_S, ServiceWatch
from moesaic.cluster.placement import ModelRef, ModelShape
from moesaic.cluster.reports.status import RouterServiceProcess
from moesaic.proto.errors import ClusterError, InternalError, UnknownModel
from tests.helpers.cluster.fake_clock import FakeClock
from tests.helpers.models.architectures import tiny_model

REF = ModelRef(name="m", dtype="bfloat16", config=tiny_model("mixtral").config.to_dict())
START_S = 100.0
SHAPE = ModelShape(model="m", experts={0: 8, 1: 8}, exact=True)


# ---- the catalog --------------------------------------------------------------------------------


def test_a_model_is_described_from_its_configuration() -> None:
    model = describe_model(REF, SHAPE, layers_of(REF))
    assert (model.name, model.dtype, model.exact) == ("m", 2, True)
    assert [(one.layer, one.experts, one.hidden, one.max_top_k) for one in model.layers] == [
        (0, 8, 32, 8),
        (1, 8, 32, 8),
    ]


def test_models_that_come_are_found_and_known_ones_outlive_the_controller() -> None:
    clock = FakeClock(step_s=LOOK_S)
    served: list[tuple[ModelRef, ModelShape]] = []
    away = False

    def look() -> list[tuple[ModelRef, ModelShape]]:
        if away:
            raise ClusterError("no controller")
        return served

    known = Catalog(look, clock)
    with pytest.raises(UnknownModel, match="'m' is not served; the router service has no model"):
        known.find("m")
    served.append((REF, SHAPE))
    found = known.find("m")
    away = True
    assert known.find("m") is found
    assert known.all() == [found]
    with pytest.raises(UnknownModel, match="'other' is not served; the router service has m"):
        known.find("other")
    with pytest.raises(ClusterError, match="no controller"):
        Catalog(look).find("m")


def test_the_controller_is_not_asked_more_often_than_once_in_a_while() -> None:
    clock, looks = FakeClock(), list[float]()

    def look() -> list[tuple[ModelRef, ModelShape]]:
        looks.append(clock.now)
        return []

    known = Catalog(look, clock)
    for passed_s in (0.0, 0.5 * LOOK_S, 0.4 * LOOK_S, 0.2 * LOOK_S):
        clock.now += passed_s
        with pytest.raises(UnknownModel):
            known.find("m")
    assert looks == pytest.approx([100.0, 100.0 + 1.1 * LOOK_S])


def test_who_names_a_known_model_waits_for_nobody() -> None:
    known = Catalog(lambda: [(REF, SHAPE)])
    found = known.find("m")
    with known._lock:  # somebody asks the controller for another one
        assert known.find("m") is found


# ---- the watch ----------------------------------------------------------------------------------


PROCESS = RouterServiceProcess(
    pid=1,
    calls=3,
    rows=9,
    batches=2,
    merged_batches=1,
    refused_calls=0,
    expired_calls=0,
    expert_waits=0,
    held_calls=0,
    held_bytes=0,
)


def seen(watch: ServiceWatch) -> tuple[str, RouterServiceProcess | None]:
    status = watch.status()
    assert (status.address, status.error) == ("127.0.0.1:1", None)
    return status.state, status.process


class Actor:
    """The service's handle; `answer` is what it does when it is asked."""

    def __init__(self, answer: Callable[[], Awaitable[RouterServiceProcess]]) -> None:
        self.answer = answer
        self.report = self

    def remote(self) -> Awaitable[RouterServiceProcess]:
        return self.answer()


async def up() -> RouterServiceProcess:
    return PROCESS


async def silent() -> RouterServiceProcess:
    await asyncio.sleep(60)
    return PROCESS


async def defect() -> RouterServiceProcess:
    raise RayTaskError("report", "trace", InternalError("computes nothing any more"))


async def gone() -> RouterServiceProcess:
    raise RayActorError


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each time that the service was ended: for good or not."""
    seen: list[bool] = []
    monkeypatch.setattr(
        service_actor.ray, "kill", lambda actor, no_restart: seen.append(no_restart)
    )
    monkeypatch.setattr(service_actor, "LOOK_S", 1e9)  # tests look themselves
    monkeypatch.setattr(service_actor, "ASK_S", 0.01)
    return seen


async def watching(
    monkeypatch: pytest.MonkeyPatch, actor: Actor, clock: FakeClock | None = None
) -> ServiceWatch:
    monkeypatch.setattr(service_actor.ray, "get_actor", lambda name, namespace: actor)
    watch = ServiceWatch("n", "127.0.0.1:1", START_S, clock or FakeClock())
    watch._task.cancel()
    return watch


async def test_a_service_that_answers_is_shown(
    monkeypatch: pytest.MonkeyPatch, killed: list[bool]
) -> None:
    watch = await watching(monkeypatch, Actor(up))
    assert seen(watch) == ("starting", None)
    await watch._look()
    assert seen(watch) == ("up", PROCESS)
    assert not killed


@pytest.mark.parametrize(("answer", "ended"), [(defect, True), (gone, False)])
async def test_one_with_a_defect_is_ended_so_that_ray_starts_another(
    monkeypatch: pytest.MonkeyPatch,
    killed: list[bool],
    answer: Callable[[], Awaitable[RouterServiceProcess]],
    ended: bool,
) -> None:
    actor = Actor(up)
    watch = await watching(monkeypatch, actor)
    await watch._look()
    actor.answer = answer
    await watch._look()
    assert seen(watch) == ("restarting", None)
    assert killed == [False] * ended


async def test_a_frozen_one_is_ended_and_one_that_starts_is_not(
    monkeypatch: pytest.MonkeyPatch, killed: list[bool]
) -> None:
    actor, clock = Actor(silent), FakeClock()
    watch = await watching(monkeypatch, actor, clock)
    clock.now += START_S
    await watch._look()
    assert watch.status().state == "starting"
    actor.answer = up
    await watch._look()
    actor.answer = silent
    clock.now += SILENT_S
    await watch._look()
    assert watch.status().state == "up"
    clock.now += 1.0
    await watch._look()
    assert watch.status().state == "restarting"
    assert killed == [False]
    # It has all its time to start again.
    clock.now += START_S
    await watch._look()
    assert killed == [False]
