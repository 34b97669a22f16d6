"""Hosts keep activations of forward calls that are learned from, and gradients do not show it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.actors.host.memory.activations import KeptActivations
from moesaic.actors.router import connections
from moesaic.actors.router.layer_tensors import LayerTensors
from moesaic.actors.router.router import Router
from moesaic.cluster.host.residency import HostLimits
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.cluster.training.orders import CloseRun
from tests.helpers.training.disturbed import HASTY, Disturbed
from tests.helpers.training.trunks import (
    FIRST,
    IDS,
    Gradients,
    Trunk,
    assert_equal,
    enable_checkpointing,
    loss_of,
    plain_model,
    saved,
    training,
    trunk_gradients,
)

# A call to a host has several parts, of which some wait for room.
CUT = HostLimits(max_rows=4)
NARROW = RouterPolicy(deadline_s=30.0, attempt_s=10.0, window=2, split_rows=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


def kept_by(trunk: Trunk) -> list[KeptActivations]:
    return [host._loop.gradients.activations for host in trunk.pool.hosts]


def kept_bytes(trunk: Trunk) -> int:
    return sum(one.nbytes for one in kept_by(trunk))


def counts(trunk: Trunk) -> tuple[int, int, int]:
    """Backward calls that found activations, that did not, and calls that were over the limit."""
    found = kept_by(trunk)
    return (
        sum(one.taken for one in found),
        sum(one.missed for one in found),
        sum(one.dropped for one in found),
    )


def limit(trunk: Trunk, limit_bytes: int) -> None:
    """Change what hosts may keep in the attempt under way."""
    for one in kept_by(trunk):
        one.limit_bytes = limit_bytes


def half_of_a_step(trunk: Trunk) -> int:
    """Half of the bytes that a host keeps of a forward pass, in the attempt under way."""
    loss_of(trunk.model)
    return min(one.nbytes for one in kept_by(trunk)) // 2


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Collect the numbers of parts of backward calls."""
    parts: list[int] = []
    backward = Router.backward

    def counted(router: Router, tensors: LayerTensors) -> Any:
        found = backward(router, tensors)
        parts.append(found[1])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Router, "backward", counted)
        yield parts


@pytest.mark.parametrize("cut_by", ["rows", "bytes"])
def test_every_backward_call_of_an_undisturbed_step_finds_activations(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cut_by: str
) -> None:
    """Forward calls alternate between replicas; each backward half follows its own.

    A frame of a backward call is larger than that of a forward call, with fewer rows at most.
    """
    if cut_by == "bytes":
        tiny = property(lambda _: 4000)  # forward calls have 7 rows at most, backward calls 5
        monkeypatch.setattr(connections.HostConnections, "slot_bytes", tiny)
    microbatches = [IDS, 3 * IDS + 1, IDS[:1] + 11]
    plain = plain_model(folder, torch.float64)
    limits = CUT if cut_by == "rows" else None
    with (
        training(folder, hosts=2, replicas=2, limits=limits) as trunk,
        counting(monkeypatch) as parts,
    ):
        trunk.connect(NARROW)
        trunk.begin()
        losses = [loss_of(trunk.model, ids) for ids in microbatches]
        assert kept_bytes(trunk) > 0
        for loss, ids in zip(losses, microbatches, strict=True):
            loss.backward()
            loss_of(plain, ids).backward()
        taken, missed, dropped = counts(trunk)
        assert (taken, missed, dropped) == (sum(parts), 0, 0)
        assert max(parts) > 2 * len(trunk.pool.hosts), "calls are cut"
        assert kept_bytes(trunk) == 0
        assert_equal(trunk, trunk.gradients(), plain, folder, 1e-12)


def step(trunk: Trunk, number: int, limit_bytes: int | None = None) -> Gradients:
    """The gradients of an attempt, of experts and trunk; at the limit hosts keep nothing."""
    attempt = FIRST._replace(number=number)
    trunk.model.zero_grad()
    trunk.begin(attempt)
    if limit_bytes is not None:
        limit(trunk, limit_bytes)
    for ids in (IDS, IDS[:1, 2:]):
        loss_of(trunk.model, ids).backward()
    return trunk.gradients(attempt)


def assert_same(trunk: dict[str, Tensor], first: Gradients, second: Gradients) -> None:
    assert first.keys() == second.keys() != set()
    for key, tensors in first.items():
        assert tensors.keys() == second[key].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second[key][name]), f"{key} {name}"


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_the_same_bits_whatever_is_kept(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = saved(tmp_path, architecture)
    with training(folder, dtype=dtype, limits=CUT) as trunk:
        trunk.begin(FIRST)
        half = half_of_a_step(trunk)
        kept = step(trunk, 1)
        of_trunk = {name: grad.clone() for name, grad in trunk_gradients(trunk.model).items()}
        taken, missed, _ = counts(trunk)
        assert taken > 0
        assert missed == 0
        for number, limit_bytes in ((2, 0), (3, half)):
            again = step(trunk, number, limit_bytes)
            assert_same(of_trunk, kept, again)
            for name, grad in trunk_gradients(trunk.model).items():
                assert torch.equal(grad, of_trunk[name]), name
            taken, missed, _ = counts(trunk)
            assert missed > 0
            assert (taken > 0) == (limit_bytes > 0)


def test_a_call_whose_answer_is_lost_computes_its_activations_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it counts once, with the bits that it would have had."""
    disturbed = Disturbed(3)
    with training(folder, hosts=2) as trunk:
        trunk.connect(HASTY)
        whole = step(trunk, 0)
        assert counts(trunk)[1] == 0
        second = FIRST._replace(number=1)
        trunk.begin(second)
        for ids in (IDS, IDS[:1, 2:]):
            loss = loss_of(trunk.model, ids)
            with disturbed.backward(monkeypatch):
                loss.backward()
        assert disturbed.counts["lost"] > 0
        taken, missed, _ = counts(trunk)
        assert taken > 0
        assert missed > 0
        assert_same({}, whole, trunk.gradients(second))


def test_what_is_over_the_limit_is_computed_again(folder: Path) -> None:
    plain = plain_model(folder, torch.float64)
    loss_of(plain).backward()
    with training(folder, hosts=2, limits=CUT) as trunk:
        trunk.begin()
        small = half_of_a_step(trunk)
        trunk.begin(FIRST._replace(number=1))
        limit(trunk, small)
        loss = loss_of(trunk.model)
        assert all(0 < one.nbytes <= small for one in kept_by(trunk))
        loss.backward()
        assert min(counts(trunk)) > 0
        found = trunk.gradients(FIRST._replace(number=1))
        assert_equal(trunk, found, plain, folder, 1e-12)


def test_calls_of_others_neither_keep_nor_take_anything(folder: Path) -> None:
    plain = plain_model(folder, torch.float64)
    loss_of(plain).backward()
    with training(folder) as trunk:
        trunk.begin()
        loss = loss_of(trunk.model)
        before = kept_bytes(trunk)
        for _ in range(3):
            with torch.no_grad():
                loss_of(trunk.model)
        assert kept_bytes(trunk) == before > 0
        loss.backward()
        assert counts(trunk)[1] == 0
        assert_equal(trunk, trunk.gradients(), plain, folder, 1e-12)


@pytest.mark.parametrize("why", ["checkpointed", "exact", "no attempt", "lent"])
def test_nothing_is_kept_that_serves_no_backward_half(
    folder: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """Layers whose activations the trunk does not keep would be kept by hosts instead."""
    plain = plain_model(folder, torch.float64)
    loss_of(plain).backward()
    borrows, exact = why == "lent", why == "exact"
    with training(folder, borrows=borrows, exact=exact) as trunk:
        trunk.begin()
        if why == "checkpointed":
            enable_checkpointing(trunk.model, reentrant=False)
        if why == "no attempt":
            for host in trunk.pool.hosts:
                host._loop.call(host._loop.gradients.activations.end)
        loss = loss_of(trunk.model)
        assert kept_bytes(trunk) == 0
        loss.backward()
        taken, missed, dropped = counts(trunk)
        assert (taken, dropped) == (0, 0)
        assert (missed == 0) == borrows
        assert_equal(trunk, trunk.gradients(), plain, folder, 1e-12)


@pytest.mark.parametrize("ends", ["gathered", "another attempt", "closed run", "closed host"])
def test_activations_are_freed_when_nobody_needs_them(folder: Path, ends: str) -> None:
    with training(folder) as trunk:
        trunk.begin()
        loss = loss_of(trunk.model)
        assert all(one.nbytes > 0 for one in kept_by(trunk))
        if ends == "gathered":
            trunk.on_hosts()
        elif ends == "another attempt":
            trunk.begin(FIRST._replace(number=1))
        for host in trunk.pool.hosts:
            if ends == "closed run":
                host.train(CloseRun(run=FIRST.run))
            elif ends == "closed host":
                host.close()
        assert kept_bytes(trunk) == 0
        del loss


def test_the_limit_is_a_part_of_the_memory_that_is_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.actors.host.gradients.machine_memory", lambda: (64_000, 16_000))
    with training(folder) as trunk:
        trunk.begin()
        assert {one.limit_bytes for one in kept_by(trunk)} == {2000}
