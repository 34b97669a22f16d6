"""What training takes on hosts, and whether a run begins where it does not fit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from moesaic.cluster.expert_keys import ExpertKey, trunk_block
from moesaic.cluster.placement import HostEntry
from moesaic.cluster.training.host_memory import (
    HostMemory,
    TrainedBytes,
    memory_of_hosts,
    pool_memory,
    shortage,
)
from moesaic.cluster.training.orders import CloseRun, Opened, OpenRun, Order
from moesaic.cluster.training.run_plan import PoolNow, RunPlan, Trained
from moesaic.cluster.training.steps import TrainingSteps
from moesaic.cluster.versions import WeightVersions
from moesaic.proto.errors import ClusterError, MoesaicError

MB = 1_000_000
FLOAT32 = TrainedBytes(version=4 * MB, gradient=4 * MB, added=4 * MB, master=4 * MB, state=8 * MB)
BFLOAT16 = FLOAT32._replace(version=2 * MB)
BLOCK = TrainedBytes(master=3 * MB, state=6 * MB)
EXPERT, TRUNK = ExpertKey("m", 0, 0), trunk_block("m", 0)


def megabytes(memory: HostMemory) -> dict[str, float]:
    return {
        "at rest": memory.at_rest / MB,
        "learning": memory.learning / MB,
        "reduced": memory.reduced / MB,
    }


def of_host(one: TrainedBytes, *, owns: bool, replicas: int = 1, lent: bool = False) -> HostMemory:
    """Of a host that serves an expert, with others if there are several replicas."""
    serving = ["a", "b", "c"][:replicas]
    owners = {EXPERT: ("a",) if owns else ("d",)}
    return memory_of_hosts({EXPERT: one}, owners, {EXPERT: serving}, lent=lent)["a"]


def test_bytes_of_a_parameter_on_an_owner() -> None:
    keys = ("at rest", "learning", "reduced")
    for one, expected in ((FLOAT32, (24, 24, 24)), (BFLOAT16, (20, 20, 20))):
        assert megabytes(of_host(one, owns=True)) == dict(zip(keys, expected, strict=True))


def test_an_owner_sums_up_what_several_hosts_have() -> None:
    assert of_host(FLOAT32, owns=True, replicas=2).reduced == 28 * MB
    assert of_host(BFLOAT16, owns=True, replicas=3).reduced == 24 * MB
    assert of_host(FLOAT32, owns=True, replicas=2).learning == 24 * MB


def test_another_replica() -> None:
    assert megabytes(of_host(FLOAT32, owns=False)) == {
        "at rest": 12,
        "learning": 12,
        "reduced": 12,
    }
    assert of_host(BFLOAT16, owns=False).learning == 8 * MB


def test_what_a_trunk_computes_is_put_into_owners_alone() -> None:
    for replicas in (1, 2):
        sent, lent = (
            of_host(FLOAT32, owns=True, replicas=replicas, lent=lent) for lent in (False, True)
        )
        assert (lent.learning, lent.reduced) == (20 * MB, 24 * MB)
        assert lent.peak <= sent.peak


def test_an_owner_that_serves_nothing() -> None:
    found = memory_of_hosts(
        {EXPERT: FLOAT32, TRUNK: BLOCK}, {EXPERT: ("a", "b"), TRUNK: ("b",)}, {EXPERT: ("a",)}
    )
    assert found["a"].reduced == 24 * MB  # its own gradients are the sum
    assert found["b"].at_rest == 12 * MB + 9 * MB
    assert found["b"].reduced == found["b"].peak == 16 * MB + 12 * MB


def test_exact_sums_and_kept_activations_count_while_a_host_learns() -> None:
    exact = FLOAT32._replace(added=8 * MB)
    assert of_host(exact, owns=True).learning == 28 * MB
    assert of_host(exact, owns=True).reduced == 32 * MB
    kept = memory_of_hosts({EXPERT: FLOAT32}, {EXPERT: ("a",)}, {EXPERT: ("a",)}, kept=5 * MB)["a"]
    assert kept.learning == kept.peak == 29 * MB
    assert kept.at_rest == 24 * MB


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("redundancy", [0, 1, 2])
def test_a_pool_is_the_sum_of_its_hosts(replicas: int, redundancy: int) -> None:
    hosts = ["a", "b", "c", "d"]
    keys = [ExpertKey("m", 0, expert) for expert in range(8)]

    def some(at: int, count: int) -> tuple[str, ...]:
        return tuple(hosts[(at + n) % len(hosts)] for n in range(count))

    holders = {key: some(key.expert, replicas) for key in keys}
    owners = {key: some(key.expert, 1 + redundancy) for key in keys}
    owners[TRUNK] = some(1, 1 + redundancy)
    sizes = {**dict.fromkeys(keys, BFLOAT16), TRUNK: BLOCK}
    summed = sum(memory_of_hosts(sizes, owners, holders).values(), HostMemory())
    experts = TrainedBytes(*(len(keys) * part for part in BFLOAT16))
    found = pool_memory(experts, BLOCK, replicas=replicas, redundancy=redundancy, hosts=4)
    assert found == summed


def test_a_pool_has_no_more_replicas_and_owners_than_hosts() -> None:
    found = pool_memory(FLOAT32, BLOCK, replicas=5, redundancy=9, hosts=2)
    assert found == pool_memory(FLOAT32, BLOCK, replicas=2, redundancy=1, hosts=2)


def test_hosts_of_a_machine_share_what_is_free() -> None:
    one = of_host(FLOAT32, owns=True)  # it needs 20 MB besides the 4 MB that it serves
    planned = {"a": one, "b": one, "c": one}
    nodes = {"a": "n", "b": "n", "c": "o"}
    assert shortage(planned, nodes, dict.fromkeys("abc", 40 * MB)) == ""
    # Hosts look one after the other, so the least that one of them has found counts.
    why = shortage(planned, nodes, {"a": 90 * MB, "b": 39 * MB, "c": 20 * MB})
    assert why.startswith("a, b on n need 0.0 GB of memory besides")
    assert shortage(planned, nodes, {"a": 90 * MB, "b": 90 * MB, "c": 19 * MB}).startswith("c on o")
    assert shortage(planned, nodes, {"a": None, "b": 20 * MB, "c": None}) == ""


# ---- a run that begins --------------------------------------------------------------------------


def entry(host: str) -> HostEntry:
    return HostEntry(host=host, incarnation=1, node="n", shm_address="", grpc_address="")


def open_run(free_bytes: Mapping[str, int | None], redundancy: int = 0) -> list[Order]:
    """Begin a run over two hosts of one machine, and return the orders of one of them."""
    keys = [ExpertKey("m", 0, expert) for expert in range(4)]
    plan = RunPlan(
        run=1,
        model="m",
        optimizer="AdamW",
        settings={},
        tensors={key: Trained(groups={"w": 0}, memory=FLOAT32) for key in keys},
        redundancy=redundancy,
    )
    pool = PoolNow(
        entries={host: entry(host) for host in free_bytes},
        domains={host: host for host in free_bytes},
        holders={key: ("ab"[key.expert % 2],) for key in keys},
    )
    steps = TrainingSteps(plan, pool, versions=WeightVersions(), next_version=2)
    exchange, seen = steps.open(), list[Order]()
    orders = next(exchange)
    while True:
        seen.append(orders["a"])
        answers: dict[str, Opened | MoesaicError | None] = {
            host: Opened(free_bytes[host]) if isinstance(order, OpenRun) else None
            for host, order in orders.items()
        }
        try:
            orders = exchange.send(answers)
        except StopIteration:
            return seen


def test_a_run_does_not_begin_where_memory_is_short() -> None:
    enough = 4 * 20 * MB
    assert isinstance(open_run({"a": enough, "b": enough})[0], CloseRun)
    open_run({"a": None, "b": None})
    with pytest.raises(ClusterError) as caught:
        open_run({"a": enough, "b": enough - 1})
    message = str(caught.value)
    assert message.startswith("m cannot be trained with AdamW here: a, b on n need 0.1 GB")
    assert "less redundancy" in message
    with pytest.raises(ClusterError, match=r"need 0\.1 GB"):
        open_run({"a": enough, "b": enough}, redundancy=1)
