"""What hosts refuse, survive and forget in a training run."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import Tensor

from moesaic.actors.host import run_tensors
from moesaic.actors.host import training as host_training
from moesaic.actors.host.weight_store import ServedWeights
from moesaic.cluster.expert_keys import SHARED, TRUNK, ExpertKey, ExpertVersion, trunk_block
from moesaic.cluster.training.contributions import Attempt
from moesaic.cluster.training.orders import (
    Begin,
    BulkKey,
    CloseRun,
    Commit,
    Disown,
    Gather,
    GroupUpdate,
    NewlyOwned,
    OpenRun,
    Own,
    Reduce,
    Renew,
)
from moesaic.kernels.training import owned_tensors
from moesaic.proto.errors import (
    BadInput,
    Busy,
    CallError,
    Forbidden,
    HostLost,
    InternalError,
    MoesaicError,
    NotHere,
    StepLost,
    Superseded,
    UnsupportedModel,
)
from tests.helpers.pool.steps import RUN, WORKER, Steps, same, versions
from tests.helpers.pool.training import IDS, loss_of, saved, training

UPDATE: dict[int, GroupUpdate] = {0: GroupUpdate(1.0, {"lr": 0.01})}
NEXT: dict[int, GroupUpdate] = {0: GroupUpdate(0.5, {"lr": 0.02})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Steps]:
    """A run with owners, whose first attempt has begun."""
    redundancy, times = options.pop("redundancy", 0), options.pop("times", 1)
    options = {"dtype": torch.float32, "hosts": 2} | options
    with training(folder, opened=False, **options) as trunk:
        steps = Steps(trunk, redundancy=redundancy, times=times)
        steps.open()
        steps.own()
        steps.begin()
        yield steps


def test_orders_that_come_again_change_nothing(folder: Path) -> None:
    found = []
    for times in (1, 3):
        with running(folder, times=times, redundancy=1) as steps:
            for _ in range(2):
                steps.step(IDS, groups=UPDATE)
            found.append((steps.states(), steps.served()))
    (states, served), (others, also_served) = found
    assert same(states, others)
    assert same(served, also_served)


def test_orders_of_the_wrong_time_are_refused(folder: Path) -> None:
    with running(folder) as steps:
        host, attempt = steps.hosts["host-0"], steps.attempt
        later = attempt._replace(number=1)
        sources = dict.fromkeys(steps.owned_by("host-0"), ("host-0",))
        for order in (
            Commit(attempt=attempt, version=2, groups=UPDATE),
            Gather(attempt=later),
            Reduce(attempt=later, sources={}),
            Reduce(attempt=attempt, sources=sources),  # nothing is gathered yet
            Commit(attempt=later, version=2, groups=UPDATE),
        ):
            with pytest.raises(NotHere):
                host.train(order)
        before = steps.states()
        steps.backward(IDS)
        found = steps.gather()
        with pytest.raises(NotHere, match="has no gradient of worker"):
            steps.reduce(found)  # the worker has put none
        with pytest.raises(NotHere, match="is prepared in part"):
            steps.commit(UPDATE)
        steps.put_gradients()
        steps.reduce(found)
        host.train(Begin(attempt=later))
        with pytest.raises(NotHere, match="attempt 1 at step 0 of run 1 is under way on host-0"):
            host.train(Commit(attempt=attempt, version=2, groups=UPDATE))
        with pytest.raises(Superseded):
            host.train(Begin(attempt=attempt))
        assert same(steps.states(), before)
        with pytest.raises(BadInput, match="named twice"):
            host.train(Reduce(attempt=later, sources={next(iter(sources)): ("a", "a")}))
        with pytest.raises(NotHere, match="no gradient of elsewhere"):
            host.train(Reduce(attempt=later, sources={next(iter(sources)): ("elsewhere",)}))


def test_runs_follow_each_other(folder: Path) -> None:
    with running(folder) as steps:
        host = steps.hosts["host-0"]
        opened = OpenRun(run=RUN, model="m", optimizer="AdamW")
        key = steps.owned_by("host-0")[0]
        of_run: list[Callable[[int], Any]] = [
            lambda run: Own(run=run, versions=versions(1), keys={}),
            lambda run: Disown(run=run, keys=()),
            lambda run: Begin(attempt=Attempt(run, 0, 0)),
            lambda run: Gather(attempt=Attempt(run, 0, 0)),
            lambda run: Reduce(attempt=Attempt(run, 0, 0), sources={}),
            lambda run: Commit(attempt=Attempt(run, 0, 0), version=2, groups=UPDATE),
            lambda run: Renew(run=run, version=2, owners={}),
            lambda run: CloseRun(run=run),
        ]
        host.train(opened)  # again
        with pytest.raises(BadInput, match="run 1 was opened as"):
            host.train(OpenRun(run=RUN, model="m", optimizer="SGD"))
        for order in of_run:
            with pytest.raises(Superseded, match="run 0 is over: host-0 knows run 1"):
                host.train(order(RUN - 1))
            with pytest.raises(NotHere, match="run 2 is not open"):
                host.train(order(RUN + 1))
        with pytest.raises(Superseded):
            host.train(OpenRun(run=RUN - 1, model="m", optimizer="AdamW"))
        assert host.report().owned == len(steps.owned_by("host-0"))
        revision = host.report().revision
        with pytest.raises(BadInput, match=r"torch\.optim has no such class"):
            host.train(OpenRun(run=RUN + 1, model="m", optimizer="Nothing"))
        loss = loss_of(steps.trunk.model)
        for each in steps.hosts.values():
            each.train(OpenRun(run=RUN + 1, model="m", optimizer="SGD"))
        assert host.report().owned == 0
        assert host.report().revision != revision
        with pytest.raises(StepLost, match="takes no more gradients"):
            loss.backward()
        with pytest.raises(Superseded):
            host.train(of_run[0](RUN))
        with pytest.raises(NotHere), host.training.reading(BulkKey("state", key, run=RUN)):
            pass
        for _ in range(2):
            host.train(CloseRun(run=RUN + 1))
        with pytest.raises(NotHere, match="no training run is open"):
            host.training.put(BulkKey("weights", trunk_block("m", 0), run=RUN + 1), {})


def test_a_host_that_comes_back_to_a_run_begins_anew(folder: Path) -> None:
    with running(folder, replicas=2, redundancy=1) as steps:
        steps.step(IDS, groups=UPDATE)
        steps.begin()
        steps.backward(IDS)
        host, before = steps.hosts["host-1"], steps.states()
        steps.order("host-1", CloseRun(run=RUN))
        steps.order("host-1", OpenRun(run=RUN, model="m", optimizer="AdamW"))
        steps.order("host-1", Begin(attempt=steps.attempt))
        assert host.report().owned == 0
        keys = {
            key: NewlyOwned(steps.groups(key), steps.entries["host-0"])
            for key in steps.owned_by("host-1")
        }
        steps.order("host-1", Own(run=RUN, versions=versions(steps.version), keys=keys))
        assert same(steps.states(), before)
        assert not any("host-1" in (hosts or ()) for hosts in steps.gather().values())
        steps.again()
        steps.step(IDS, groups=NEXT)
        for key, (first, second) in steps.owners.items():
            assert same(steps.state(key, first), steps.state(key, second))


def test_a_peer_that_is_lost_ends_the_attempt_and_changes_nothing(folder: Path) -> None:
    with running(folder, hosts=3, replicas=3) as steps, running(folder, hosts=3, replicas=3) as one:
        for each in (steps, one):
            each.step(IDS, groups=UPDATE, exact=True)
            each.trunk.model.zero_grad()
            each.begin(exact=True)
        before, served = steps.states(), steps.served()
        steps.backward(IDS, IDS[:1])
        sources = steps.gather()
        steps.put_gradients()
        steps.links.lost = {"host-1"}
        needy = [
            host
            for host in ("host-0", "host-2")
            if any("host-1" in (sources[key] or ()) for key in steps.owned_by(host))
        ]
        assert needy
        for host in needy:
            with pytest.raises(HostLost, match="host-1"):
                steps.reduce_at(host, sources)
        assert same(steps.states(), before)
        assert same(steps.served(), served)
        steps.links.lost = set()
        steps.again()
        for each in (steps, one):
            each.step(IDS, IDS[1:], groups=UPDATE, exact=True)
        assert same(steps.states(), one.states())


def test_a_commit_that_was_interrupted_goes_on_when_it_comes_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(folder, redundancy=1) as steps, running(folder, redundancy=1) as whole:
        for each in (steps, whole):
            each.backward(IDS)
            sources = each.gather()
            each.put_gradients()
            each.reduce(sources)
        whole.commit(UPDATE)
        left, serve = [3], ServedWeights.serve

        def interrupted(self: ServedWeights, given: Any) -> None:
            given = list(given)
            serve(self, given[: left[0]])
            if left[0] < len(given):
                left[0] = 100
                raise InternalError("interrupted")

        with monkeypatch.context() as patch:
            patch.setattr(ServedWeights, "serve", interrupted)
            with pytest.raises(InternalError, match="interrupted"):
                steps.commit(UPDATE)
        version = steps.version + 1
        assert steps.version == 1
        host, key = steps.hosts["host-0"], ExpertKey("m", 0, 0)
        served = [
            one.version
            for layer, experts in host.report().holdings.items()
            for one in (ExpertVersion(layer.expert(e), v) for e, vs in experts.items() for v in vs)
        ]
        assert served.count(version) == 3
        # Its masters have the new weights already, for others to read.
        wanted = BulkKey("weights", key, version=version)
        with (
            host.training.reading(wanted) as found,
            whole.hosts["host-0"].training.reading(wanted) as due,
        ):
            assert same(found, due)
        with pytest.raises(InternalError, match="was committed as"):
            host.train(Commit(attempt=steps.attempt, version=version, groups=NEXT))
        with pytest.raises(BadInput, match="was committed as version 2, not 3"):
            host.train(Commit(attempt=steps.attempt, version=version + 1, groups=UPDATE))
        steps.commit(UPDATE)
        assert same(steps.states(), whole.states())
        assert same(steps.served(), whole.served())


@pytest.mark.parametrize("evicts", [True, False])
def test_a_new_version_waits_for_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch, evicts: bool
) -> None:
    """A host has room for two versions of an expert: the controller evicts the older one."""
    with running(folder) as steps:
        steps.backward(IDS)
        sources = steps.gather()
        steps.put_gradients()
        steps.reduce(sources)
        steps.commit(UPDATE)
        steps.renew()
        steps.attempt = Attempt(RUN, 1, 0)
        steps.begin()
        steps.reduce({**steps.gather(), **dict.fromkeys(steps.blocks, None)})
        waits = threading.Event()
        monkeypatch.setattr(host_training, "ROOM_S", 30.0 if evicts else 0.0)
        monkeypatch.setattr(host_training, "_PAUSE_S", 0.001)
        serve = ServedWeights.serve

        def watched(self: ServedWeights, given: Any) -> None:
            try:
                serve(self, given)
            except Busy:
                waits.set()
                raise

        monkeypatch.setattr(ServedWeights, "serve", watched)
        if not evicts:
            with pytest.raises(Busy):
                steps.commit(UPDATE)
            steps.evict()
            steps.commit(UPDATE)
        else:
            evicting = threading.Thread(target=lambda: (waits.wait(30), steps.evict()))
            evicting.start()
            steps.commit(UPDATE)
            evicting.join()
        assert waits.is_set()
        steps.renew()
        assert len(steps.served()) == 2 * 16


def test_what_cannot_be_owned(folder: Path) -> None:
    with running(folder) as steps:
        host, trained = steps.hosts["host-0"], {"up": 0, "down": 0}

        def own(key: ExpertKey, groups: dict[str, int], version: int = 1) -> None:
            keys = {key: NewlyOwned(groups)}
            host.train(Own(run=RUN, versions=versions(version), keys=keys))

        mine = next(k for k in steps.owned_by("host-0") if k.layer != TRUNK)
        others = [k for k in steps.owned_by("host-1") if k.layer != TRUNK]
        here = [k for k in others if host._residency.versions(k)]
        away = [k for k in others if not host._residency.versions(k)]
        owned = host.report().owned
        with pytest.raises(UnsupportedModel, match="shared tensors of layer 1 of m"):
            own(ExpertKey("m", 1, SHARED), trained)
        with pytest.raises(NotHere, match="neither its state nor its weights"):
            own(trunk_block("m", 7), {"x": 0})
        with pytest.raises(CallError, match="run 1 trains 'm'"):
            own(ExpertKey("other", 0, 0), trained)
        with pytest.raises(BadInput, match="is owned with groups"):
            own(mine, {"up": 1, "down": 0})
        for key in away:
            with pytest.raises(NotHere, match="not on this host"):
                own(key, trained)
        for key in here:
            with pytest.raises(BadInput, match=r"\['gate'\] cannot be trained"):
                own(key, {"gate": 0})
            with pytest.raises(NotHere, match="version 2"):
                own(key, trained, version=2)
        key = (here + away)[0]
        shapes, _ = host._store.expert_forms(key)
        weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for wrong in (weights["up"][:-1], weights["up"].double()[:0]):
            host.training.put(BulkKey("weights", key, run=RUN), weights | {"up": wrong})
            with pytest.raises(BadInput, match="but its model has"):
                own(key, trained)
        state = {"up.master": weights["up"], "up.commits": torch.tensor(0)}
        host.training.put(BulkKey("state", key, run=RUN), state)
        with pytest.raises(BadInput, match=r"down\.master is missing"):
            own(key, trained)
        assert host.report().owned == owned
        own(key, {"up": 0})
        assert host.report().owned == owned + 1


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
                    steps.order(owner, Own(run=RUN, versions=versions(1), keys=keys))
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
        refused(shared, {}, UnsupportedModel, "cannot be trained yet")
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
        steps.order("host-0", Own(run=RUN, versions=versions(1), keys={new: NewlyOwned({"x": 0})}))
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
        with training.reading(one) as found:
            assert same(found, host_weights(steps, key))


def test_what_is_read_does_not_change_with_a_commit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that comes in the middle of an update waits; one that came before has a copy."""
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
            steps.commit(UPDATE)
            assert same(before, tensors)
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
    with running(folder, hosts=2, replicas=2, redundancy=1) as steps:
        for end in ("commit", "again", "close"):
            steps.trunk.model.zero_grad()
            steps.backward(IDS)
            sources = steps.gather()
            held = put_and_held(steps)
            for host in steps.hosts.values():
                for key in [key for key, hosts in sources.items() if host.name in (hosts or ())]:
                    wanted = BulkKey("gradient", key, attempt=steps.attempt, source=host.name)
                    with host.training.reading(wanted) as tensors:
                        held += map(weakref.ref, tensors.values())
                        del tensors
            steps.reduce(sources)
            assert len(held) > 20
            assert all(one() is not None for one in held)
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


def test_renewing_checks_what_comes(folder: Path) -> None:
    with running(folder, replicas=2) as steps:
        steps.backward(IDS)
        sources = steps.gather()
        steps.put_gradients()
        steps.reduce(sources)
        steps.commit(UPDATE)
        host = steps.hosts["host-0"]
        keys = [key for key in steps.owned_by("host-1") if key.layer != TRUNK]
        bad, lost, *good = keys
        # As if an earlier run had left another version 2 here.
        other = {name: t + 1 for name, t in host._store.get(ExpertVersion(lost, 1)).items()}
        host._served.serve([(ExpertVersion(lost, 2), other)])
        owned = steps.hosts["host-1"].training._run
        assert owned is not None
        owned.owned.masters(bad)["up"][0, 0] = torch.nan
        steps.hosts["host-1"]._loop.call(
            lambda: steps.hosts["host-1"]._loop.release([ExpertVersion(bad, 2)])
        )
        renew = Renew(
            run=RUN, version=2, owners=dict.fromkeys([bad, *good], steps.entries["host-1"])
        )
        for _ in range(2):
            with pytest.raises(CallError, match=f"version 2 of {bad}: up has values that are not"):
                host.train(renew)
        assert not host._residency.serves(ExpertVersion(bad, 2))
        assert all(host._residency.serves(ExpertVersion(key, 2)) for key in good)
        fetched = [wanted.key for _, wanted in steps.links.fetched if wanted.kind == "weights"]
        assert sorted(fetched) == sorted([bad, bad, *good])
        with pytest.raises(Forbidden, match="serves other tensors"):
            host.train(Renew(run=RUN, version=2, owners={lost: steps.entries["host-1"]}))
        absent = ExpertKey("m", 0, 6)  # of host-0 itself
        host.release([ExpertVersion(absent, v) for v in (1, 2)])
        with pytest.raises(NotHere, match="it has nothing to renew"):
            host.train(Renew(run=RUN, version=2, owners={absent: steps.entries["host-1"]}))


def test_hosts_on_gpus_do_not_train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(folder) as steps:
        host = steps.hosts["host-0"]
        monkeypatch.setattr(host._store, "device", torch.device("cuda", 0))
        with pytest.raises(CallError, match="trained on hosts with device: cpu"):
            host.train(OpenRun(run=RUN + 1, model="m", optimizer="SGD"))
        assert host.report().owned
