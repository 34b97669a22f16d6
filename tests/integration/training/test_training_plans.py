"""Memory and bytes of a training step are those of the formulas, over hosts in this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from moesaic.actors.host.training import HostTraining
from moesaic.actors.runtime.devices import machine_memory
from moesaic.cluster.expert_keys import TRUNK
from moesaic.cluster.training.host_memory import HostMemory
from moesaic.cluster.training.orders import Opened, OpenRun
from moesaic.cluster.training.step_bytes import (
    TrainingStep,
    all_to_all_bytes,
    call_bytes,
    hosts_of_token,
)
from moesaic.proto.errors import ClusterError
from tests.helpers.pool.serving import PATIENT
from tests.helpers.training.counting import MovedBytes, Peaks, counting
from tests.helpers.training.runs import optimizing, training_pool
from tests.helpers.training.trunks import loss_of, saved

F32, BF16 = torch.float32, torch.bfloat16
MOMENTUM = {"optimizer": "SGD", "momentum": 0.9}
HIDDEN, LAYERS, TOP_K = 128, 2, 2
IDS = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    hosts: int
    replicas: int
    redundancy: int
    dtype: torch.dtype = F32
    lent: bool = False
    optimizer: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        words = [f"{self.hosts} hosts", f"{self.replicas} replicas", f"{self.redundancy} more"]
        return ", ".join([*words, str(self.dtype)[6:], "lent" if self.lent else "sent"])


CASES = [
    Case(1, 1, 0),
    Case(2, 1, 0),
    Case(3, 2, 0, BF16),
    Case(2, 2, 1, F32, optimizer=tuple(MOMENTUM.items())),
    Case(4, 2, 1, BF16),
    Case(2, 1, 1, BF16),
    Case(2, 1, 0, BF16, lent=True),
    Case(3, 2, 1, F32, lent=True),
]


@dataclass
class Measured:
    """The second step of a run: the first one has made the optimizer's state."""

    case: Case
    moments: dict[str, dict[str, int]]
    moved: MovedBytes
    planned: dict[str, HostMemory]
    step: TrainingStep


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 192}
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral", **sizes)


@pytest.fixture(scope="module", params=CASES, ids=str)
def measured(folder: Path, request: pytest.FixtureRequest) -> Iterator[Measured]:
    case: Case = request.param
    options: dict[str, Any] = {"dtype": case.dtype, "borrows": case.lent, **dict(case.optimizer)}
    # A hedge would be a call that no formula knows.
    policy = replace(PATIENT, hedge_min_s=PATIENT.deadline_s)
    pooled = {"hosts": case.hosts, "replicas": case.replicas, "borrows": case.lent}
    with (
        pytest.MonkeyPatch.context() as patch,
        training_pool(folder, dtype=case.dtype, **pooled) as pool,
        optimizing(pool, folder, redundancy=case.redundancy, policy=policy, **options) as trained,
    ):
        model, optimizer = trained
        loss_of(model, IDS).backward()
        optimizer.step()
        optimizer.zero_grad()
        peaks = Peaks(pool, patch)
        with counting(patch) as moved:
            loss_of(model, IDS).backward()
            peaks.look("learned")
            optimizer.step()
            optimizer.zero_grad()
            peaks.look("at rest")
        run: Any = optimizer.run
        sizes = {key: one.memory for key, one in run._plan.tensors.items()}
        step = TrainingStep(
            tokens=IDS.numel(),
            layers=LAYERS,
            hidden=HIDDEN,
            top_k=TOP_K,
            hosts=case.hosts,
            replicas=case.replicas,
            redundancy=case.redundancy,
            weight_bytes=case.dtype.itemsize,
            expert_parameters=sum(one.gradient for one in sizes.values()) // 4,
            trunk_parameters=sum(o.master for k, o in sizes.items() if k.layer == TRUNK) // 4,
            lent=case.lent,
        )
        planned = run.lead.planned_memory(lent=case.lent)
    yield Measured(case, peaks.found, moved, planned, step)


def test_a_run_that_does_not_fit_is_refused_before_its_first_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"host-0": 10**9, "host-1": 10**9}
    monkeypatch.setattr(HostTraining, "_opened", lambda self: Opened(free[self._host]))
    with training_pool(folder, dtype=F32) as pool:
        with optimizing(pool, folder, dtype=F32) as (_, optimizer):
            run: Any = optimizer.run
            planned = run.lead.planned_memory().values()
        # The hosts are on one machine, which they share.
        needed = sum(one.peak - one.weights for one in planned)
        free["host-1"] = needed
        with optimizing(pool, folder, dtype=F32, run=2):
            pass
        free["host-1"] -= 1
        with (
            pytest.raises(
                ClusterError, match="m cannot be trained with AdamW here: host-0, host-1"
            ),
            optimizing(pool, folder, dtype=F32, run=3),
        ):
            raise AssertionError("it must not begin")
        assert [host.report().owned for host in pool.hosts.hosts] == [0, 0]
        assert pool.ended
        with optimizing(pool, folder, dtype=F32, run=4, optimizer="SGD"):
            pass  # no state, so there is room


def test_a_host_says_what_its_machine_has_free(folder: Path) -> None:
    total, _ = machine_memory()
    with training_pool(folder, dtype=F32, hosts=1) as pool:
        (host,) = pool.hosts.hosts
        for _ in range(2):  # an order that comes again is answered again
            opened = host.train(OpenRun(run=1, model="m", optimizer="SGD"))
            assert isinstance(opened, Opened)
            assert opened.free_bytes is not None
            assert 0 < opened.free_bytes <= total


def test_memory_of_a_run_goes_back_to_the_system(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    folder = saved(tmp_path, "mixtral", **sizes)
    process = psutil.Process()
    with training_pool(folder, dtype=BF16, hosts=1) as pool:
        with optimizing(pool, folder, dtype=BF16) as (model, optimizer):
            loss_of(model, IDS).backward()
            optimizer.step()
            run: Any = optimizer.run
            (planned,) = run.lead.planned_memory().values()
            used = process.memory_info().rss
        assert used - process.memory_info().rss > 0.8 * (planned.masters + planned.state)


def test_memory_of_a_host_is_within_ten_percent_of_the_plan(measured: Measured) -> None:
    assert len(measured.planned) == measured.case.hosts
    for host, plan in measured.planned.items():
        found = {moment: most[host] for moment, most in measured.moments.items() if host in most}
        for moment, planned in {
            "at rest": plan.at_rest,
            "learned": plan.learning,
            "Reduce": plan.reduced,
            "Commit": plan.at_rest,
        }.items():
            assert found[moment] == pytest.approx(planned, rel=0.10), (host, moment)
        assert max(found.values()) == pytest.approx(plan.peak, rel=0.10)


def test_a_step_moves_the_bytes_of_the_formula(measured: Measured) -> None:
    case, moved, planned = measured.case, measured.moved, measured.step.bytes()
    found = {
        "gradient": planned.expert_gradients,
        "weights": planned.expert_weights,
        "trunk": planned.trunk,
    }
    assert {kind: moved.bulk[kind] for kind in found} == pytest.approx(found, rel=0.01)
    assert not moved.bulk.keys() - found.keys()
    assert (moved.calls == 0) == case.lent
    if case.lent:
        return
    # Both halves of a call have the same rows.
    rows, width = moved.rows / 2, case.dtype.itemsize
    columns = moved.cells / moved.rows
    assert moved.calls == pytest.approx(call_bytes(rows, HIDDEN, width, columns), rel=0.02)
    # Gates of a random model do not choose evenly, and never an expert twice.
    copies = rows / (IDS.numel() * LAYERS)
    assert copies == pytest.approx(hosts_of_token(case.hosts, TOP_K), rel=0.2)
    # Ids and gate weights are 2 % of it with so small a hidden size.
    ratio = moved.calls / all_to_all_bytes(rows, HIDDEN)
    assert ratio == pytest.approx({F32: 2.5, BF16: 2.0}[case.dtype], rel=0.025)
