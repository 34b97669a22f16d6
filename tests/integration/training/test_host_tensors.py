"""What may be put into hosts in a training run and read from them, and when it is freed."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import Tensor

from moesaic.actors.host import run_tensors
from moesaic.actors.host import training as host_training
from moesaic.cluster.expert_keys import SHARED, TRUNK, ExpertKey, ExpertVersion, trunk_block
from moesaic.cluster.training.contributions import Attempt
from moesaic.cluster.training.orders import (
    BulkKey,
    CloseRun,
    Disown,
    GroupUpdate,
    NewlyOwned,
    Own,
    Reduce,
)
from moesaic.kernels.training import owned_tensors
from moesaic.proto.errors import (
    Busy,
    CallError,
    MoesaicError,
    NotHere,
)
from tests.helpers.training.steps import RUN, WORKER, Steps, running, same, versions
from tests.helpers.training.trunks import IDS, saved, training

UPDATE: dict[int, GroupUpdate] = {0: GroupUpdate(1.0, {"lr": 0.01})}
NEXT: dict[int, GroupUpdate] = {0: GroupUpdate(0.5, {"lr": 0.02})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


def test_what_is_put_comes_before_what_is_served(folder: Path) -> None:
    """Its state, or else its weights; experts, and blocks of the trunk."""
    with running(folder) as steps, running(folder) as other:
        other.step(IDS, groups=UPDATE)
        for key, (owner,) in steps.owners.items():
            host = steps.hosts[owner]
            groups = dict.fromkeys(steps.groups(key), 0)
            for kind in ("weights", "state"):
                steps.order(owner, Disown(run=RUN, keys=(key,)))
                given = BulkKey(kind, key, run=RUN)
                if kind == "state":
                    tensors = other.state(key, owner)
                else:
                    now = steps.parameters if key.layer == TRUNK else host_weights(steps, key)
                    tensors = {name: now[name].detach() + 1 for name in groups}
                host.training.put(given, {n: t.clone() for n, t in tensors.items()})
                if kind == "state":
                    host.training.put(
                        BulkKey("weights", key, run=RUN),
                        {name: tensors[f"{name}.master"] + 2 for name in groups},
                    )
                keys = {key: NewlyOwned(groups)}
                for _ in range(2):
                    steps.order(owner, Own(run=RUN, versions=versions(1), step=0, keys=keys))
                state = steps.state(key, owner)
                if kind == "state":
                    assert same(state, tensors)
                else:
                    assert all(torch.equal(state[f"{n}.master"], tensors[n]) for n in groups)


def host_weights(steps: Steps, key: ExpertKey) -> dict[str, Tensor]:
    one = ExpertVersion(key, 1)
    holder = next(h for h in steps.hosts.values() if h._residency.serves(one))
    return holder._store.get(one)


def test_what_may_be_put(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(folder) as steps:
        block = next(key for key in steps.blocks if steps.owners[key] == ("host-0",))
        names = steps.blocks[block]
        training, expert = steps.hosts["host-0"].training, ExpertKey("m", 0, 0)
        zeros = {name: torch.zeros(steps.parameters[name].shape) for name in names}
        gradient = BulkKey("gradient", block, attempt=steps.attempt, source=WORKER)
        new = trunk_block("m", 9)

        def refused(given: BulkKey, tensors: Any, error: type[MoesaicError], match: str) -> None:
            with pytest.raises(error, match=match):
                training.put(given, tensors)

        refused(gradient._replace(attempt=Attempt(RUN, 0, 1)), zeros, NotHere, "not under way")
        refused(gradient._replace(attempt=None), zeros, NotHere, "None is not under way")
        refused(gradient._replace(key=new), zeros, NotHere, "another owner")
        refused(gradient, {names[0]: torch.zeros(3)}, CallError, rf"gradient of {names[0]}")
        refused(gradient, zeros | {"x": torch.zeros(1 << 20)}, CallError, "bytes; it can have")
        refused(BulkKey("weights", new, run=RUN + 1), zeros, NotHere, "run 2 is not the one")
        refused(BulkKey("weights", new._replace(model="n"), run=RUN), {}, CallError, "trains 'm'")
        refused(BulkKey("state", expert._replace(expert=99), run=RUN), {}, CallError, "expert: 99")
        shared = BulkKey("weights", expert._replace(expert=SHARED), run=RUN)
        refused(shared, {"norm": torch.zeros(1 << 20)}, CallError, "bytes; it can have")
        huge = {"up": torch.zeros(1 << 20)}
        for kind in ("weights", "state"):
            refused(BulkKey(kind, expert, run=RUN), huge, CallError, "bytes; it can have")
        monkeypatch.setattr(run_tensors, "MAX_PUT_BYTES", 150)
        given = {"x": torch.zeros(25)}
        for _ in range(3):  # what is there already is replaced
            training.put(BulkKey("weights", new, run=RUN), given)
        refused(BulkKey("state", new, run=RUN), given, Busy, "100 of 150 bytes")
        refused(BulkKey("weights", trunk_block("m", 8), run=RUN), given, Busy, "100 of 150")
        refused(gradient, zeros, Busy, "100 of 150")
        steps.order(
            "host-0", Own(run=RUN, versions=versions(1), step=0, keys={new: NewlyOwned({"x": 0})})
        )
        training.put(BulkKey("weights", trunk_block("m", 8), run=RUN), given)
        training.put(BulkKey("weights", new, run=RUN), given)  # it is owned, and has used it
        refused(BulkKey("weights", trunk_block("m", 7), run=RUN), given, Busy, "100 of 150")


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor", "SGD"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_nothing_is_larger_than_its_limit(folder: Path, dtype: torch.dtype, optimizer: str) -> None:
    with training(folder, dtype=dtype, opened=False) as trunk:
        steps = Steps(trunk)
        steps.open(optimizer)
        steps.own()
        steps.begin()
        steps.backward(IDS)
        sources = steps.gather()
        found = 0
        for host in steps.hosts.values():
            for key in steps.owners:
                wanted = BulkKey("gradient", key, attempt=steps.attempt, source=host.name)
                if host.name in (sources[key] or ()):
                    found += fits(host.training, wanted)
        assert found
        steps.put_gradients()
        steps.reduce(sources)
        steps.commit(UPDATE)
        for key, (owner,) in steps.owners.items():
            host = steps.hosts[owner].training
            assert fits(host, BulkKey("state", key, run=RUN))
            assert fits(host, BulkKey("weights", key, version=2))


def fits(host: host_training.HostTraining, wanted: BulkKey) -> bool:
    with host.reading(wanted) as tensors:
        file = safetensors.torch.save(dict(tensors))
    most = host.most_bytes(wanted)
    assert len(file) <= most
    if wanted.key.layer != TRUNK:
        assert most < 1.5 * len(file) + 2048
    return True


def test_what_may_be_read(folder: Path) -> None:
    with running(folder) as steps:
        key = next(k for k in steps.owned_by("host-0") if k.layer != TRUNK)
        training, attempt = steps.hosts["host-0"].training, steps.attempt
        gradient = BulkKey("gradient", key, attempt=attempt, source="host-0")
        steps.backward(IDS)
        for wanted in (
            gradient,  # it is not gathered yet
            gradient._replace(source="host-1"),
            gradient._replace(attempt=None),
            gradient._replace(attempt=attempt._replace(number=1)),
            BulkKey("state", key, run=RUN + 1),
            BulkKey("state", next(iter(steps.owned_by("host-1"))), run=RUN),
            BulkKey("weights", key, version=2),
            BulkKey("weights", trunk_block("m", 9), version=1),
        ):
            with pytest.raises(NotHere), training.reading(wanted):
                pass
        one = BulkKey("weights", key, version=1)
        due = host_weights(steps, key)
        with training.reading(one) as found:
            assert same(found, due)


def test_what_is_read_does_not_change_with_a_commit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that comes in the middle of an update waits, and so does an update for readers."""
    with running(folder) as steps:
        steps.step(IDS, groups=UPDATE)
        steps.begin()
        steps.backward(IDS)
        sources = steps.gather()
        steps.put_gradients()
        steps.reduce(sources)
        key = next(iter(steps.blocks))
        (owner,) = steps.owners[key]
        wanted = BulkKey("state", key, run=RUN)
        update, readers = owned_tensors._Owned.update, list[threading.Thread]()
        found: list[dict[str, Tensor]] = []
        masters = {id(t) for t in steps.hosts[owner].training._run.owned.masters(key).values()}  # pyright: ignore[reportOptionalMemberAccess]

        def updating(self: owned_tensors._Owned, *given: Any) -> None:
            update(self, *given)
            if not readers and id(self.master) in masters:  # one of several is updated
                readers.append(
                    threading.Thread(target=lambda: found.append(steps.state(key, owner)))
                )
                readers[0].start()
                readers[0].join(0.1)

        monkeypatch.setattr(owned_tensors._Owned, "update", updating)
        with steps.hosts[owner].training.reading(wanted) as tensors:
            before = {name: tensor.clone() for name, tensor in tensors.items()}
            committing = threading.Thread(target=lambda: steps.commit(UPDATE))
            committing.start()
            committing.join(0.1)
            assert committing.is_alive()
            assert same(before, tensors)
        committing.join()
        readers[0].join()
        assert {int(found[0][f"{name}.commits"]) for name in steps.blocks[key]} == {2}


def put_and_held(steps: Steps) -> list[weakref.ref[Any]]:
    """Put gradients of zero for the trunk's blocks; return what knows whether they are freed."""
    held: list[weakref.ref[Any]] = []
    for key, names in steps.blocks.items():
        given = BulkKey("gradient", key, attempt=steps.attempt, source=WORKER)
        for host in steps.owners[key]:
            shapes = {name: tuple(steps.parameters[name].shape) for name in names}
            memory = {name: numpy.zeros(shape, numpy.float32) for name, shape in shapes.items()}
            held += map(weakref.ref, memory.values())
            tensors = {name: torch.from_numpy(one) for name, one in memory.items()}
            steps.hosts[host].training.put(given, tensors)
    return held


def test_gradients_are_freed(folder: Path) -> None:
    """What hosts add up themselves keeps its memory for the next sums, until the run ends."""
    with running(folder, hosts=2, replicas=2, redundancy=1) as steps:
        kept: list[weakref.ref[Any]] = []
        for end in ("commit", "again", "close"):
            steps.trunk.model.zero_grad()
            steps.backward(IDS)
            sources = steps.gather()
            held, own = put_and_held(steps), list[weakref.ref[Any]]()
            for host in steps.hosts.values():
                for key in [key for key, hosts in sources.items() if host.name in (hosts or ())]:
                    wanted = BulkKey("gradient", key, attempt=steps.attempt, source=host.name)
                    with host.training.reading(wanted) as tensors:
                        own += map(weakref.ref, tensors.values())
                        del tensors
            steps.reduce(sources)
            assert len(held) > 5
            assert len(own) > 15
            assert all(one() is not None for one in held + own)
            kept += own
            if end == "commit":
                steps.commit(UPDATE)
            elif end == "again":
                steps.again()
            else:
                steps.every(CloseRun(run=RUN))
            assert [one() for one in held if one() is not None] == []
            if end == "commit":
                steps.finish()
                steps.begin()
        assert [one() for one in kept if one() is not None] == []
        assert sum(host.report().owned for host in steps.hosts.values()) == 0


def test_what_was_put_is_freed_when_it_is_summed_up(folder: Path) -> None:
    with running(folder) as steps:
        steps.gather()
        key = next(iter(steps.blocks))
        (owner,) = steps.owners[key]
        (name, *_) = steps.blocks[key]
        shape = tuple(steps.parameters[name].shape)

        def put(source: str) -> weakref.ref[Any]:
            memory = numpy.ones(shape, numpy.float32)
            given = BulkKey("gradient", key, attempt=steps.attempt, source=source)
            steps.hosts[owner].training.put(given, {name: torch.from_numpy(memory)})
            return weakref.ref(memory)

        replaced = put("a")
        held = [put(source) for source in "ab"]
        assert replaced() is None
        assert all(found() is not None for found in held)
        reduce = Reduce(attempt=steps.attempt, sources={key: ("a", "b")})
        answer = steps.order(owner, reduce)
        assert [found() for found in held] == [None, None]
        assert steps.order(owner, reduce) == answer
        assert put("a")() is None
