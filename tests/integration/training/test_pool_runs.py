"""Whole runs over hosts in this process: RunOptimizer, its run, owners, replicas, checkpoints."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.actors.training.giving import GivenGradients
from moesaic.actors.training.lead import driver as driver_module
from moesaic.cluster.expert_keys import ExpertVersion
from moesaic.cluster.placement import PlacementId
from moesaic.cluster.training.orders import Commit, Order, Reduce
from moesaic.cluster.training.run_plan import PoolNow
from moesaic.proto.errors import CheckpointError, ClusterError, StepLost
from tests.helpers.pool.transports import settles
from tests.helpers.training.disturbed import HASTY, Disturbed
from tests.helpers.training.runs import optimizing, training_pool
from tests.helpers.training.trunks import assert_near, loss_of, saved
from tests.helpers.training.whole_steps import (
    assert_same_model,
    microbatches,
    one_step,
    plain_run,
    states,
    stepped_as_plain,
)

F64 = torch.float64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.mark.parametrize("borrows", [False, True])
@pytest.mark.parametrize(
    ("hosts", "replicas", "redundancy"), [(1, 1, 0), (2, 1, 0), (3, 2, 0), (3, 2, 1), (3, 3, 2)]
)
def test_steps_are_those_of_the_plain_model(
    folder: Path, hosts: int, replicas: int, redundancy: int, borrows: bool
) -> None:
    with stepped_as_plain(folder, hosts, replicas, redundancy, borrows=borrows) as (pool, _):
        pass
    assert pool.ended
    assert all(host.report().owned == 0 for host in pool.hosts.hosts)


@pytest.mark.parametrize("architecture", ["gpt_oss", "deepseek_v3", "nemotron_h", "qwen2_moe"])
def test_a_step_of_other_architectures(tmp_path: Path, architecture: str) -> None:
    folder = saved(tmp_path, architecture)
    # AdamW's first step divides a gradient by its own size.
    tolerance = 1e-5 if architecture == "nemotron_h" else 1e-12
    plain, _ = plain_run(folder, 1)
    with (
        training_pool(folder, replicas=2) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        one_step(model, optimizer, 0)
        assert_same_model(pool, model, plain, tolerance)


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_goes_on_from_a_checkpoint_with_other_hosts_and_replicas(
    folder: Path, tmp_path: Path, steps: int
) -> None:
    plain, expected = plain_run(folder, 2 + steps)
    with (
        training_pool(folder, hosts=3, replicas=2) as pool,
        optimizing(pool, folder, redundancy=1) as (model, optimizer),
    ):
        for step in range(2):
            one_step(model, optimizer, step)
        model.save_pretrained(tmp_path / "saved")
        kept = optimizer.state_dict()
        before = states(optimizer, pool)
    for hosts in (1, 4):
        with (
            training_pool(folder, hosts=hosts) as pool,
            optimizing(pool, folder, run=9) as (model, optimizer),
        ):
            one_step(model, optimizer, 7)  # it is forgotten
            optimizer.load_state_dict(kept)
            after = states(optimizer, pool)
            assert before.keys() == after.keys()
            for key, tensors in before.items():
                assert all(torch.equal(after[key][name], one) for name, one in tensors.items())
            found = [one_step(model, optimizer, step) for step in range(2, 2 + steps)]
            assert torch.tensor(found).sub(torch.tensor(expected[2:])).abs().max() < 1e-12
            assert_same_model(pool, model, plain, 1e-12 if steps < 20 else 1e-11)
    # The folder is a whole model, too.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=F64, output_loading_info=True
    )
    again, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    reference, _ = plain_run(folder, 2)
    for name, wanted in reference.named_parameters():
        assert_near(again.get_parameter(name).detach(), wanted.detach(), 1e-12, name)


def test_a_checkpoint_is_written_beside_the_next_step(folder: Path, tmp_path: Path) -> None:
    with (
        training_pool(folder) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        one_step(model, optimizer, 0)
        before = states(optimizer, pool)
        saving = optimizer.save(tmp_path / "saved", wait=False)
        kept = optimizer.state_dict()
        one_step(model, optimizer, 1)
        assert saving.done() and saving.exception() is None, "a commit waits for what is read"
        optimizer.load_state_dict(kept)
        after = states(optimizer, pool)
        for key, tensors in before.items():
            assert all(torch.equal(after[key][name], one) for name, one in tensors.items())


@pytest.mark.parametrize("damage", ["flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(
    folder: Path, tmp_path: Path, damage: str
) -> None:
    with (
        training_pool(folder) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        one_step(model, optimizer, 0)
        model.save_pretrained(tmp_path)
        kept = optimizer.state_dict()
        one_step(model, optimizer, 1)
        before = states(optimizer, pool)
        file = next((tmp_path / "state").glob("layer-*.safetensors"))
        if damage == "flip":
            content = bytearray(file.read_bytes())
            content[-5] ^= 1
            file.write_bytes(content)
        elif damage == "remove":
            file.unlink()
        else:
            (tmp_path / "manifest.json").write_text("{")
        named = "manifest" if damage == "manifest" else r"expert 0 of layer \d"
        with pytest.raises(CheckpointError, match=named):
            optimizer.load_state_dict(kept)
        after = states(optimizer, pool)
        for key, tensors in before.items():
            assert all(torch.equal(after[key][name], one) for name, one in tensors.items())


@pytest.mark.parametrize("when", [Reduce, Commit])
def test_a_host_that_is_lost_costs_the_step_alone_with_redundancy(
    folder: Path, when: type[Order]
) -> None:
    plain, expected = plain_run(folder, 3)
    with (
        training_pool(folder, hosts=3, replicas=2) as pool,
        optimizing(pool, folder, redundancy=1) as (model, optimizer),
    ):
        found = [one_step(model, optimizer, 0)]
        victim = pool.hosts.hosts[2].name

        def gate(host: str, order: Order) -> bool:
            if isinstance(order, when) and host == victim:
                pool.gone.add(victim)
            return True

        pool.gate = gate
        try:
            found.append(one_step(model, optimizer, 1))
            assert when is Commit, "what was decided is done"
        except StepLost as error:
            assert when is Reduce
            assert victim in str(error)
            optimizer.zero_grad()
            pool.lose(victim)
            found.append(one_step(model, optimizer, 1))
        pool.lose(victim)
        optimizer.run.lead.driver.look()  # pyright: ignore[reportAttributeAccessIssue]
        found.append(one_step(model, optimizer, 2))
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)
        owners = optimizer.run.lead.steps.owners  # pyright: ignore[reportAttributeAccessIssue]
        assert {len(hosts) for hosts in owners.values()} == {2}


def test_gradients_lie_elsewhere_if_a_host_may_still_read_them(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A host that is thought lost may go on with a commit, when the next gradients are written."""
    with (
        training_pool(folder, hosts=2, replicas=2, borrows=True) as pool,
        optimizing(pool, folder, redundancy=1, borrows=True) as (model, optimizer),
    ):
        run: Any = optimizer.run
        one_step(model, optimizer, 0)
        memory = run._given.memory
        own = {("host-0", 1), ("host-1", 1)}
        assert {(host, 1) for host, _ in run._given._readers} == own
        one_step(model, optimizer, 1)
        assert run._given.memory is memory, "all hosts have forgotten what they were given"
        pool.gate = lambda host, order: not (host == "host-1" and isinstance(order, Commit))
        one_step(model, optimizer, 2)
        assert run._given.memory is not memory
        assert not run._given._readers
    caplog.clear()  # pytest keeps the errors that were logged, and with them all that led to them
    gc.collect()
    assert settles(lambda: "memfd:moesaic:lent" not in Path("/proc/self/maps").read_text())


@pytest.mark.parametrize("kind", [ClusterError, MemoryError, KeyboardInterrupt])
def test_any_error_while_gradients_are_given_ends_the_attempt(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """They are forgotten by then: a second try would commit a step without them."""
    plain, expected = plain_run(folder, 2)

    def fail(*_: object) -> Any:
        raise kind("as planned")

    with (
        training_pool(folder, borrows=True) as pool,
        optimizing(pool, folder, borrows=True) as (model, optimizer),
    ):
        found = [one_step(model, optimizer, 0)]
        with monkeypatch.context() as patch:
            patch.setattr(GivenGradients, "give", fail)
            with pytest.raises(StepLost if kind is ClusterError else kind, match="as planned"):
                one_step(model, optimizer, 1)
        if kind is not ClusterError:  # StepLost was raised already, and all gradients are gone
            with pytest.raises(StepLost, match="as planned"):
                optimizer.step()
        optimizer.zero_grad()
        found.append(one_step(model, optimizer, 1))
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)


def test_without_redundancy_a_lost_owner_ends_the_run(folder: Path) -> None:
    with (
        training_pool(folder, hosts=2, replicas=2) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        one_step(model, optimizer, 0)
        pool.lose(pool.hosts.hosts[1].name)
        with pytest.raises(StepLost, match="host-1 is gone"):
            one_step(model, optimizer, 1)
        with pytest.raises(ClusterError, match=r"host-1.*go back to a checkpoint"):
            optimizer.zero_grad()


def test_owners_leave_a_host_that_is_drained(folder: Path) -> None:
    plain, expected = plain_run(folder, 3)
    with (
        training_pool(folder, hosts=3) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        found = [one_step(model, optimizer, 0)]
        pool.leaving.add("host-1")
        optimizer.run.lead.driver.look()  # pyright: ignore[reportAttributeAccessIssue]
        assert pool.alive["host-1"].report().owned == 0
        found += [one_step(model, optimizer, step) for step in (1, 2)]
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)


def test_gradients_that_are_dropped_leave_no_trace(folder: Path) -> None:
    plain, expected = plain_run(folder, 2)
    with (
        training_pool(folder, replicas=2) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        loss_of(model).backward()
        optimizer.zero_grad()
        found = [one_step(model, optimizer, 0)]
        loss_of(model).backward()
        model.zero_grad()
        found.append(one_step(model, optimizer, 1))
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)


@pytest.mark.slow
def test_ten_steps_with_answers_lost_damaged_and_late(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of the undisturbed run."""
    plain, expected = plain_run(folder, 10)
    disturbed, found = Disturbed(3), []
    with (
        training_pool(folder) as pool,
        optimizing(pool, folder, policy=HASTY) as (model, optimizer),
    ):
        for step in range(10):
            mean = 0.0
            for ids in microbatches(step):
                loss = loss_of(model, ids) / 2
                with disturbed.backward(monkeypatch):
                    loss.backward()
                mean += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            found.append((mean, float(norm)))
        assert min(disturbed.counts[kind] for kind in ("lost", "damaged", "late")) > 0
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-11)


def test_a_host_that_serves_an_expert_since_the_last_look_gets_the_step_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other host that served it may have died, and then no host would have the new version."""
    monkeypatch.setattr(driver_module, "LOOK_S", 0.1)
    plain, expected = plain_run(folder, 2)
    with training_pool(folder, hosts=3, replicas=2) as pool:
        late, knows = pool.hosts.hosts[2], [False]
        now, publish = pool.now, pool.publish

        def stale(*given: Any, **named: Any) -> PoolNow:
            found = now(*given, **named)
            known = {
                key: tuple(host for host in hosts if knows[0] or host != late.name)
                for key, hosts in found.holders.items()
            }
            return replace(found, holders=known)

        def publish_where_all_have_it(version: int, timeout_s: float) -> PlacementId:
            keys = [key for key, hosts in now().holders.items() if late.name in hosts]
            assert keys
            knows[0] = True
            has = late._residency.serves
            assert settles(lambda: all(has(ExpertVersion(key, version)) for key in keys))
            return publish(version, timeout_s)

        monkeypatch.setattr(pool, "now", stale)
        monkeypatch.setattr(pool, "publish", publish_where_all_have_it)
        with optimizing(pool, folder) as (model, optimizer):
            found = []
            for step in range(2):
                knows[0] = False
                found.append(one_step(model, optimizer, step))
            assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-12
            assert_same_model(pool, model, plain, 1e-12)
