"""The controller follows another deployment: what is refused changes nothing, what begins ends."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from moesaic.actors.controller import reshaping, sizing
from moesaic.actors.controller.reshaping import Reshaping
from moesaic.actors.controller.sizing import Sizing
from moesaic.actors.host.report import HostReport
from moesaic.cluster.placement import ModelRef, ModelShape
from moesaic.cluster.spec.deployment import DeployedModel, Deployment, regrouped
from moesaic.cluster.spec.spec import Spec, parse_spec
from moesaic.proto.errors import ClusterError
from tests.helpers.cluster.control_world import shape
from tests.helpers.cluster.fleet_world import FleetWorld


def spec_of(*names: str, replicas: int = 1, **values: Any) -> Spec:
    models = [{"name": name, "path": f"/{name}", "replicas": replicas} for name in names]
    return parse_spec({"models": models, "endpoint": None, **values})


def deployed(spec: Spec) -> list[DeployedModel]:
    return [
        DeployedModel(
            ref=ModelRef(name=one.name, dtype="float32", path=one.path),
            shape=shape(one.name, replicas=one.replicas),
            top_k=2,
        )
        for one in spec.models
    ]


def first(spec: Spec) -> Deployment:
    groups = dict(enumerate(spec.hosts))
    models = deployed(spec)
    return Deployment(id="1", spec=spec, models=models, groups=groups, order=list(groups)).as_stored


def another(before: Deployment, spec: Spec) -> Deployment:
    groups, order = regrouped(before, spec)
    after = replace(before, spec=spec, models=deployed(spec), groups=groups, order=order)
    return after.as_stored


class Followed:
    """A `Reshaping` around a simulated pool, with a store in memory."""

    def __init__(self, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stored = first(spec)
        monkeypatch.setattr(reshaping, "store_deployment", self.store)
        monkeypatch.setattr(sizing, "store_fleet", lambda *_: None)
        shapes = [(one.shape, True) for one in self.stored.models]
        self.world = FleetWorld([group.fleet for group in spec.hosts], shapes)
        self.world.finish()
        self.models = {one.ref.name: (one.ref, one.shape) for one in self.stored.models}
        self.reports: dict[str, HostReport] = {}
        self.forgotten: list[tuple[str, ModelRef]] = []
        self.sizing = Sizing(
            self.world.control, self.world.fleet, "n", lambda: None, lambda: self.world.now
        )
        self.reshaping = Reshaping(
            deployment=self.stored,
            control=self.world.control,
            sizing=self.sizing,
            models=self.models,
            reports=self.reports,
            adopt=self.adopt,
            forget=lambda host, ref: self.forgotten.append((host, ref)),
            namespace="n",
            clock=lambda: self.world.now,
        )

    def store(self, namespace: str, deployment: Deployment) -> None:
        self.stored = deployment

    def adopt(self, ref: ModelRef, one: ModelShape) -> None:
        self.world.control.add_model(one, on_disk=True, fits=True)
        self.models[ref.name] = ref, one

    async def follow(self, before: Deployment, spec: Spec) -> Deployment:
        after = another(before, spec)
        await self.reshaping.follow(before.to_json(), after, "test")
        return after


SMALL: Any = {"hosts": [{"count": 3, "min_count": 1}]}


@pytest.mark.parametrize("change", ["a new model", "more replicas"])
def test_replicas_beyond_the_hosts_that_are_there_change_nothing(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The spec has three hosts; the autoscaler or an operator has left one of them."""
    followed = Followed(spec_of("m", **SMALL), monkeypatch)
    followed.world.scale(1)
    followed.world.finish()
    before = followed.stored
    wanted = spec_of("m", replicas=2, **SMALL)
    if change == "a new model":
        both = [wanted.models[0].model_copy(update={"replicas": 1, "name": "m", "path": "/m"})]
        both.append(wanted.models[0].model_copy(update={"name": "new", "path": "/new"}))
        wanted = wanted.model_copy(update={"models": tuple(both)})
    with pytest.raises(ClusterError, match="replicas"):
        asyncio.run(followed.follow(before, wanted))
    assert followed.stored.to_json() == before.to_json(), "no later controller could start"


def test_two_stages_follow_each_other_after_a_group_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`carry_out` compares the second stage with the first one as it has sent it."""
    two: list[Any] = [{"count": 2}, {"count": 1, "threads": 3}]
    followed = Followed(spec_of("m", "n", hosts=two), monkeypatch)

    async def run() -> None:
        one = spec_of("m", "n", hosts=two[:1])
        await followed.follow(followed.stored, one)
        followed.world.finish()
        assert sorted(followed.world.hosts) == ["host-0", "host-1"]
        # The next change replaces a model: it leaves first, and then it comes.
        between = await followed.follow(followed.stored, spec_of("n", hosts=two[:1]))
        followed.reshaping._leaving.clear()
        followed.models.pop("m")
        await followed.follow(between, one)

    asyncio.run(run())
    assert sorted(followed.reshaping.deployment.names) == ["m", "n"]


def test_a_change_that_was_refused_is_not_stored_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's GCS answers after the controller has said that nothing has changed."""
    followed = Followed(spec_of("m", hosts=[{"count": 2}]), monkeypatch)
    monkeypatch.setattr(reshaping, "STORE_S", 0.01)
    answers, stored = threading.Event(), threading.Event()

    def late(namespace: str, deployment: Deployment) -> None:
        answers.wait(10)
        followed.store(namespace, deployment)
        stored.set()

    monkeypatch.setattr(reshaping, "store_deployment", late)

    async def run() -> None:
        before, wanted = followed.stored, spec_of("m", hosts=[{"count": 3}])
        with pytest.raises(ClusterError, match="cannot be stored"):
            await followed.follow(before, wanted)
        answers.set()
        await asyncio.to_thread(stored.wait, 10)
        await asyncio.sleep(0)
        # Whoever reads the store now can change the cluster.
        await followed.follow(followed.stored, wanted)

    asyncio.run(run())


def test_a_later_controller_lets_hosts_forget_a_model_that_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The controller before has died after it had stored that the model is gone."""
    followed = Followed(spec_of("m", hosts=[{"count": 2}]), monkeypatch)
    world, ref = followed.world, ModelRef(name="old", dtype="float32", path="/old")
    old = shape("old")
    world.models.append((old, True))
    world.on_disk.add("old")
    world.control.add_model(old, on_disk=True)
    world.finish()
    world.models.pop()
    world.take_over()
    # The simulated pool knows that hosts may evict the last replicas of a model that is asleep.
    world.control.idle_models.keep_asleep(["old"])
    later = Followed.__new__(Followed)
    later.__dict__.update(followed.__dict__)
    later.reshaping = Reshaping(
        deployment=followed.stored,
        control=world.control,
        sizing=followed.sizing,
        models=followed.models,
        reports=followed.reports,
        adopt=followed.adopt,
        forget=lambda host, ref: followed.forgotten.append((host, ref)),
        namespace="n",
        clock=lambda: world.now,
    )
    for _ in range(60):
        for name, host in world.hosts.items():
            report = _Report(host.observe().holdings, [(ref, old)])
            followed.reports[name] = report  # pyright: ignore[reportArgumentType]
            later.reshaping.own_holdings(name, report)  # pyright: ignore[reportArgumentType]
        later.reshaping.tick()
        world.finish(1)
    held = {one.key.model for host in world.hosts.values() for one in host.held}
    assert held == {"m"}, "the experts of a model that is gone take room for ever"


class _Report:
    def __init__(self, holdings: Any, models: Any) -> None:
        self.holdings, self.models = holdings, models
