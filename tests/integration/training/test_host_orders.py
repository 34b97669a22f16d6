"""What hosts refuse, survive and forget in a training run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
    Finish,
    Gather,
    GroupUpdate,
    NewlyOwned,
    OpenRun,
    Own,
    Reduce,
    Renew,
)
from moesaic.proto.errors import (
    BadInput,
    Busy,
    CallError,
    Forbidden,
    HostLost,
    InternalError,
    NotHere,
    StepLost,
    Superseded,
)
from tests.helpers.training.steps import RUN, running, same, versions
from tests.helpers.training.trunks import IDS, loss_of, saved

UPDATE: dict[int, GroupUpdate] = {0: GroupUpdate(1.0, {"lr": 0.01})}
NEXT: dict[int, GroupUpdate] = {0: GroupUpdate(0.5, {"lr": 0.02})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


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
            Commit(attempt=attempt, version=2, step=1, groups=UPDATE),
            Gather(attempt=later),
            Reduce(attempt=later, sources={}),
            Reduce(attempt=attempt, sources=sources),  # nothing is gathered yet
            Commit(attempt=later, version=2, step=1, groups=UPDATE),
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
            host.train(Commit(attempt=attempt, version=2, step=1, groups=UPDATE))
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
        of_run_1 = Commit(attempt=Attempt(RUN, 0, 0), version=2, step=1, groups=UPDATE)
        of_run: list[Callable[[int], Any]] = [
            lambda run: Own(run=run, versions=versions(1), step=0, keys={}),
            lambda run: Disown(run=run, keys=()),
            lambda run: Begin(attempt=Attempt(run, 0, 0)),
            lambda run: Gather(attempt=Attempt(run, 0, 0)),
            lambda run: Reduce(attempt=Attempt(run, 0, 0), sources={}),
            lambda run: Commit(attempt=Attempt(run, 0, 0), version=2, step=1, groups=UPDATE),
            lambda run: Renew(run=run, version=2, owners={}),
            lambda run: Finish(run=run, commit=of_run_1),
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
        steps.order("host-1", Own(run=RUN, versions=versions(steps.version), step=0, keys=keys))
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
            host.train(Commit(attempt=steps.attempt, version=version, step=1, groups=NEXT))
        with pytest.raises(BadInput, match="was committed as version 2, not 3"):
            host.train(Commit(attempt=steps.attempt, version=version + 1, step=1, groups=UPDATE))
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
            host.train(Own(run=RUN, versions=versions(version), step=0, keys=keys))

        mine = next(k for k in steps.owned_by("host-0") if k.layer != TRUNK)
        others = [k for k in steps.owned_by("host-1") if k.layer != TRUNK]
        here = [k for k in others if host._residency.versions(k)]
        away = [k for k in others if not host._residency.versions(k)]
        owned = host.report().owned
        with pytest.raises(BadInput, match=r"of shared tensors of layer 1 of m .* its model has"):
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
