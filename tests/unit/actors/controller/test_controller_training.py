"""The controller's methods for training runs, around its state machine, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from moesaic.actors.controller.training import Training
from moesaic.cluster.expert_keys import ExpertVersion
from moesaic.cluster.placement import ModelRef
from moesaic.cluster.planner.plan import OperatorConstraints
from moesaic.cluster.training.runs import NewsRequest, TrainingRequest
from moesaic.proto.errors import ClusterError, Superseded
from tests.helpers.cluster.training_world import DAY_S, TrainingWorld


class Shell:
    """A controller's loop that ticks as soon as somebody is in a hurry."""

    def __init__(self, world: TrainingWorld, *, learns: bool = True) -> None:
        self.world = world
        self.stored: list[dict[str, object]] = []
        self.rules = True  # whether no newer controller does
        self.evicting: dict[str, list[ExpertVersion]] = {}
        self.hurried = asyncio.Event()
        self.hurries = 0
        ref = ModelRef(name="m", dtype="float32", path="/m", learns=learns)
        self.training = Training(
            control=world.control,
            models={"m": (ref, world.models[0][0])},
            store=self.store,
            evicting=self.being_evicted,
            hurry=self.hurry,
            clock=lambda: world.now,
            unix_clock=lambda: DAY_S + world.now,
        )

    def store(self) -> None:
        if not self.rules:
            raise ClusterError("a newer controller rules")
        self.stored.append(self.world.control.snapshot())

    def being_evicted(self, host: str) -> Collection[ExpertVersion]:
        return self.evicting.get(host, ())

    def hurry(self) -> None:
        self.hurries += 1
        self.hurried.set()

    async def run(self) -> None:
        while True:
            await self.hurried.wait()
            self.hurried.clear()
            self.world.tick(seconds=0.02)
            self.training.ticked()
            for name in self.world.hosts:
                while self.world.hosts[name].loading:
                    self.world.load_one(name)


async def test_a_step_from_begin_to_end() -> None:
    world = TrainingWorld()
    shell = Shell(world)
    begun = await shell.training.begin(TrainingRequest("m", "ann"))
    assert (begun.run, begun.next_version, begun.versions.models) == (1, 2, {})
    assert (begun.redundancy, begun.lease_s) == (0, 30.0)
    assert shell.stored, "the number is stored before anybody learns it"
    loop = asyncio.create_task(shell.run())
    before = world.published[-1].id
    placed = await shell.training.publish(1, world.commit(), 5.0)
    assert placed == world.published[-1].id > before
    assert shell.hurries == 1, "the tick that it asked for has found the version everywhere"
    assert shell.stored[-1]["models"] == {"m": 2}
    status = shell.training.status({})
    assert status is not None
    assert (status.version, status.steps, status.initiator) == (2, 1, "ann")
    assert await shell.training.publish(1, 2, 5.0) == placed, "its answer was lost"
    shell.training.end(1)
    assert shell.training.status({}) is None
    assert shell.stored[-1]["training"] == {"last": 1, "alive": None}
    with pytest.raises(ClusterError, match="run 1 does not live: it was ended"):
        shell.training.news(NewsRequest(1))
    loop.cancel()


async def test_a_publication_that_fails_says_why() -> None:
    world = TrainingWorld(2, replicas=1)
    shell = Shell(world)
    await shell.training.begin(TrainingRequest("m", "ann"))
    loop = asyncio.create_task(shell.run())
    with pytest.raises(ClusterError, match="version 2 of m: no host has it of expert"):
        await shell.training.publish(1, world.commit({"h0"}), 0.1)
    loop.cancel()


async def test_a_model_that_cannot_be_trained() -> None:
    shell = Shell(TrainingWorld(), learns=False)
    with pytest.raises(ClusterError, match=r"set models\.m\.train: true in the spec"):
        await shell.training.begin(TrainingRequest("m", "ann"))
    with pytest.raises(ClusterError, match="'other' does not exist"):
        await shell.training.begin(TrainingRequest("other", "ann"))


async def test_a_controller_that_rules_no_more_begins_nothing() -> None:
    world = TrainingWorld()
    shell = Shell(world)
    shell.rules = False
    with pytest.raises(ClusterError, match="a newer controller rules"):
        await shell.training.begin(TrainingRequest("m", "ann"))
    assert world.control.training.alive is None


async def test_a_model_that_is_asleep_wakes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.actors.controller.training._LOOK_S", 0.0)
    world = TrainingWorld(idle_s=10.0)
    world.rounds(20.0)
    assert world.control.idle_models.asleep
    shell = Shell(world)
    loop = asyncio.create_task(shell.run())
    assert (await shell.training.begin(TrainingRequest("m", "ann"))).run == 1
    assert not world.control.idle_models.asleep
    loop.cancel()


async def test_the_news_of_a_run() -> None:
    world = TrainingWorld(3)
    shell = Shell(world)
    await shell.training.begin(TrainingRequest("m", "ann"))
    world.kill("h2")
    world.control.set_constraints(OperatorConstraints(leaving=frozenset({"h1", "h2"})))
    world.tick()
    news = shell.training.news(NewsRequest(1))
    assert news.entries.keys() == news.domains.keys() == {"h0", "h1"}
    assert (news.leaving, news.domains["h0"]) == ({"h1"}, "h0")
    assert news.old_versions == frozenset()
    assert not shell.hurries
    shell.evicting["h0"] = [ExpertVersion(key, 1) for key in sorted(world.every())]
    assert shell.training.news(NewsRequest(1)).old_versions == {1}, "its memory is not free yet"
    assert shell.hurries, "the sooner old versions go, the sooner there is room"
    shell.training.end(1)
    await shell.training.begin(TrainingRequest("m", "bob"))
    with pytest.raises(Superseded, match=r"run 1 was followed by run 2 \(bob\)"):
        shell.training.news(NewsRequest(1))
