"""Both halves of a call in the trunk's process, with experts that hosts have lent."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.actors.host.host import ExpertHost
from moesaic.actors.training import lent_layers
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion, LayerKey
from moesaic.cluster.placement import PlacementId
from moesaic.cluster.routing.lending_share import LendingShare
from moesaic.cluster.versions import WeightVersions
from moesaic.kernels.backward.ffn import PendingGradients
from moesaic.kernels.backward.kept import KeptCall
from moesaic.proto.errors import StepLost
from tests.helpers.pool.lending import SPLITS, computed, half_lent
from tests.helpers.pool.serving import EXPERTS, KEY, PATIENT
from tests.helpers.training.trunks import (
    FIRST,
    IDS,
    Trunk,
    assert_equal,
    enable_checkpointing,
    loss_of,
    plain_model,
    saved,
    training,
)

FLOAT64 = torch.float64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


@contextmanager
def lent(folder: Path, **options: Any) -> Iterator[Trunk]:
    with training(folder, borrows=True, **options) as trunk:
        trunk.begin()
        yield trunk


def learned(folder: Path) -> Any:
    """The model without a pool, with its gradients."""
    plain = plain_model(folder, FLOAT64)
    loss_of(plain).backward()
    return plain


def holders(trunk: Trunk, expert: ExpertKey) -> list[ExpertHost]:
    layer = trunk.pool.placement.layers[LayerKey(expert.model, expert.layer)]
    return [host for host in trunk.pool.hosts if host.name in layer.hosts(expert.expert)]


def weights_of(host: ExpertHost, expert: ExpertKey) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in host._store.get(ExpertVersion(expert, 1)).items()}


def refill(trunk: Trunk, expert: ExpertKey) -> None:
    """Change the slots of an expert, and write the same weights to them."""
    for host in holders(trunk, expert):
        tensors = weights_of(host, expert)
        host._store.drop(ExpertVersion(expert, 1))
        host._store.put(ExpertVersion(expert, 1), tensors)


# ---- what is computed here ----------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [None, "plain", "reentrant"])
def test_hosts_compute_nothing_and_a_token_is_counted_once(
    folder: Path, checkpointing: str | None
) -> None:
    with lent(folder) as trunk:
        if checkpointing is not None:
            enable_checkpointing(trunk.model, reentrant=checkpointing == "reentrant")
        for ids in (IDS, IDS[:1]):
            loss_of(trunk.model, ids).backward()
        router, layers = trunk.learning.router, len(trunk.pool.layers)
        stats = router.stats()
        assert (stats.calls, stats.rows) == (2 * layers, 24 * layers)
        assert stats.lent == 2 * 24 * layers
        load = router.take_load()
        assert int(load.counts[KEY].sum()) == 2 * 24
        # Each host that has lent gets an even part of the time, which is load of the pool, too.
        assert len({times.lent_s for times in load.hosts.values()}) == 1
        assert all(times.lent_s > 0 and not times.calls for times in load.hosts.values())
        assert computed(trunk.pool) == 0
        assert trunk.learning.layers == {layer.layer for layer in trunk.pool.layers}
        assert trunk.learning.take()
        assert not trunk.learning.take(), "what is taken is forgotten"


def test_a_layer_that_is_lent_in_part_is_sent_and_another_one_is_not(folder: Path) -> None:
    plain = learned(folder)
    with half_lent(folder, exact=False, learns=True, dtype=FLOAT64) as (pool, _):
        trunk = Trunk(pool, folder, FLOAT64, borrows=False)
        trunk.connect(PATIENT, borrows=True, lenders=[pool.hosts[0].name])
        trunk.open()
        trunk.begin()
        loss_of(trunk.model).backward()
        mine = trunk.learning.take()
        assert {key.layer for key in mine} == {0}
        by_hosts = trunk.gradients()
        assert {key.layer for key in by_hosts} == {KEY.layer}
        assert_equal(trunk, by_hosts | dict(mine), plain, folder, 1e-12)


@pytest.mark.parametrize("here", [True, False])
def test_a_call_that_is_better_split_is_sent_in_both_halves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    monkeypatch.setattr(LendingShare, "keeps_all", lambda *_: here)
    plain = learned(folder)
    with training(folder, borrows=True) as trunk:
        trunk.connect(SPLITS, borrows=True)
        trunk.begin()
        loss_of(trunk.model).backward()
        assert_equal(trunk, trunk.gradients(here=here), plain, folder, 1e-12)


# ---- memory that changes or goes ----------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["changed", "moved"])
def test_a_call_whose_experts_went_between_its_halves_is_sent(
    folder: Path, case: str, checkpointing: bool
) -> None:
    plain = learned(folder)
    with lent(folder, replicas=2) as trunk:
        pool, router = trunk.pool, trunk.learning.router
        if checkpointing:
            enable_checkpointing(trunk.model, reentrant=False)
        loss = loss_of(trunk.model)
        expert = KEY.expert(3)
        if case == "changed":
            refill(trunk, expert)
        else:
            layers = dict(pool.placement.layers)
            replicas = list(layers[KEY].replicas)
            lender = next(h for h in holders(trunk, expert) if h.name == replicas[3][0].host)
            lender._store.drop(ExpertVersion(expert, 1))
            replicas[3] = replicas[3][1:]
            layers[KEY] = replace(layers[KEY], replicas=tuple(replicas))
            router.place(replace(pool.placement, id=PlacementId(1, 9), layers=layers))
        loss.backward()
        mine = trunk.learning.take()
        by_hosts = trunk.gradients()
        # Activations that are computed again may as well be computed with the other replica.
        moved_here = checkpointing and case == "moved"
        assert {key.layer for key in mine} == ({0, KEY.layer} if moved_here else {0})
        assert {key.layer for key in by_hosts} == (set() if moved_here else {KEY.layer})
        assert_equal(trunk, by_hosts | dict(mine), plain, folder, 1e-12)


@pytest.mark.parametrize("half", ["keeping_forward", "kept_backward"])
def test_what_was_read_while_a_slot_changed_is_thrown_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    plain = learned(folder)
    compute = getattr(lent_layers, half)
    calls = []
    with lent(folder) as trunk:

        def disturbed(form: Any, experts: Any, *given: Any) -> Any:
            found = compute(form, experts, *given)
            calls.append(half)
            done = len(calls) - 1
            layers = sorted(trunk.pool.placement.layers)
            if half == "kept_backward":
                layers.reverse()
            refill(trunk, layers[done].expert(3))
            # The sums, or the gradient of x, as if torn weights had been read.
            given[-1 if half == "keeping_forward" else -2].mul_(2.0)
            return found

        monkeypatch.setattr(lent_layers, half, disturbed)
        loss_of(trunk.model).backward()
        assert len(calls) == len(trunk.pool.layers)
        stats = trunk.learning.router.stats()
        assert stats.calls == len(trunk.pool.layers)
        assert_equal(trunk, trunk.gradients(here=False), plain, folder, 1e-12)


def test_the_backward_half_has_the_version_of_the_forward_half(folder: Path) -> None:
    plain = learned(folder)
    experts = [KEY.expert(number) for number in range(EXPERTS)]
    with lent(folder) as trunk:
        loss = loss_of(trunk.model)
        for expert in experts:
            for host in holders(trunk, expert):
                doubled = {n: 2 * t for n, t in weights_of(host, expert).items()}
                host._store.put(ExpertVersion(expert, 2), doubled)
        versions = WeightVersions(experts=dict.fromkeys(experts, 2))
        placement = replace(trunk.pool.placement, id=PlacementId(1, 9), versions=versions)
        trunk.learning.router.place(placement)
        loss.backward()
        assert_equal(trunk, trunk.gradients(here=True), plain, folder, 1e-12)
        trunk.model.zero_grad()
        loss_of(trunk.model).backward()
        with pytest.raises(AssertionError):
            assert_equal(trunk, trunk.gradients(here=True), plain, folder, 1e-12)


# ---- the memory that this takes -----------------------------------------------------------------


@pytest.mark.parametrize("fits", [True, False])
def test_sums_that_do_not_fit_are_left_to_hosts(
    folder: Path, caplog: pytest.LogCaptureFixture, fits: bool
) -> None:
    plain = learned(folder)
    config = plain.config
    of_an_expert = 3 * config.hidden_size * config.intermediate_size
    needed = 8 * EXPERTS * config.num_hidden_layers * of_an_expert
    limit = needed if fits else needed - 1
    with training(folder, borrows=True) as trunk, caplog.at_level(logging.INFO):
        trunk.connect(PATIENT, borrows=True, sums_limit_bytes=limit)
        trunk.begin()
        loss_of(trunk.model).backward()
        stats = trunk.learning.router.stats()
        assert stats.lent == 2 * 16 * len(trunk.pool.layers), "forward calls are lent either way"
        assert_equal(trunk, trunk.gradients(here=fits), plain, folder, 1e-12)
        (line,) = [r.getMessage() for r in caplog.records if "sums of all" in r.getMessage()]
        assert f"take {needed} bytes" in line
        assert f"use {limit} " in line


@pytest.mark.parametrize("ending", ["backward", "dropped", "another attempt"])
def test_what_was_kept_goes_with_the_graph(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    kept = kept_calls(monkeypatch)
    with lent(folder) as trunk:
        loss = loss_of(trunk.model)
        assert len(kept) == len(trunk.pool.layers)
        assert all(one() is not None for one in kept)
        match ending:
            case "backward":
                loss.backward(retain_graph=True)
            case "dropped":
                del loss
            case _:
                trunk.begin(FIRST._replace(number=1))
                with pytest.raises(StepLost, match="is over"):
                    loss.backward()
                del loss
        gc.collect()
        assert not any(one() for one in kept)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_whose_activations_are_not_kept_keep_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    kept = kept_calls(monkeypatch)
    with lent(folder) as trunk:
        enable_checkpointing(trunk.model, reentrant=reentrant)
        loss_of(trunk.model).backward()
        assert trunk.gradients(here=True)
    assert kept == []


def kept_calls(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[KeptCall]]:
    found: list[weakref.ref[KeptCall]] = []
    compute = lent_layers.keeping_forward

    def noted(*given: Any) -> KeptCall:
        kept = compute(*given)
        found.append(weakref.ref(kept))
        return kept

    monkeypatch.setattr(lent_layers, "keeping_forward", noted)
    return found


# ---- attempts -----------------------------------------------------------------------------------


def test_an_attempt_that_is_over_leaves_no_sums(folder: Path) -> None:
    second = FIRST._replace(number=1)
    plain = learned(folder)
    with lent(folder) as trunk:
        loss_of(trunk.model).backward()
        trunk.model.zero_grad()
        trunk.begin(second)
        assert not trunk.learning.layers
        loss_of(trunk.model).backward()
        assert_equal(trunk, trunk.gradients(second, here=True), plain, folder, 1e-12)


def test_an_error_in_a_backward_call_ends_the_attempt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("drill")

    with lent(folder) as trunk:
        loss_of(trunk.model).backward()
        loss = loss_of(trunk.model)
        with monkeypatch.context() as patch:
            patch.setattr(PendingGradients, "accumulate", fail)
            with pytest.raises(MemoryError, match="drill"):
                loss.backward()
        with pytest.raises(StepLost, match="drill"):
            trunk.learning.take()
        with pytest.raises(StepLost, match="drill"):
            loss_of(trunk.model)
        trunk.begin(FIRST._replace(number=1))
        assert not trunk.learning.take()
