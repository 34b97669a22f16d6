"""Routers that compute with slots of a device that hosts have lent them.

The device's memory is played by the CPU's, and its kernels run in Triton's interpreter. Chunks of
memory are mapped in a range of addresses, as on a card.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.actors.host.host import ExpertHost
from moesaic.actors.router import whole_calls
from moesaic.actors.router.router import Router
from moesaic.actors.router.whole_calls import PassCheck, _Step
from moesaic.actors.trunk.trunk import run_in_steps
from moesaic.cluster.expert_keys import ExpertVersion
from moesaic.cluster.host.emulation import Emulation
from moesaic.cluster.placement import PlacementId
from moesaic.cluster.versions import WeightVersions
from moesaic.kernels.grouped.slots import StepFlags
from moesaic.models.trunk.trunk import connect_experts, load_trunk
from moesaic.proto.errors import BadExpert
from tests.helpers.pool.lending import borrowing, computed, heard, key
from tests.helpers.pool.serving import EXPERTS, KEY, Hosts, assert_right, inputs, serving
from tests.helpers.pool.transports import settles

# The interpreter multiplies whole tiles with NumPy, unused rows included.
pytestmark = [
    pytest.mark.usefixtures("one_kernel_at_a_time"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.timeout(180)])]


@pytest.fixture(params=DEVICES)
def pool(folder: Path, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    with serving(folder, lends=True, on_device=True, device=request.param) as made:
        yield made


def forward(pool: Hosts, router: Router, x_TH: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Compute a call on the pool's device; the result is on the CPU."""
    there = (one.to(pool.device) for one in (x_TH, ids, weights))
    return router.forward(KEY, *there).cpu()


def has_all(router: Router) -> bool:
    router._look_after([])
    lent = router._lent_experts
    return all(lent.has(key(expert), router.placement) for expert in range(EXPERTS))


def borrowing_all(pool: Hosts) -> Router:
    router = borrowing(pool, "host-0", "host-1")
    assert settles(lambda: has_all(router))
    return router


def mapped_chunks() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:moesaic:chunk")


def test_experts_of_two_hosts_are_computed_together(pool: Hosts) -> None:
    router = borrowing_all(pool)
    before = computed(pool)
    for tokens in (1, 5):
        given = inputs(tokens)
        assert_right(forward(pool, router, *given), pool.answer(*given))
    assert computed(pool) == before
    assert router.stats().lent == 12
    assert all(path.lent for path in router.take_load().paths)


@pytest.mark.parametrize("device", DEVICES)
def test_exact_bits_do_not_depend_on_lending_on_a_device(folder: Path, device: str) -> None:
    with serving(folder, lends=True, exact=True, on_device=True, device=device) as pool:
        plain, router = pool.router(), borrowing_all(pool)
        for tokens in (1, 4):
            given = inputs(tokens)
            assert torch.equal(forward(pool, router, *given), forward(pool, plain, *given))
        assert router.stats().lent == 10
        assert plain.stats().lent == 0


def test_what_leaves_is_sent_to_who_has_it(pool: Hosts) -> None:
    router = borrowing_all(pool)
    first, other = pool.hosts
    expert = next(e for e in range(EXPERTS) if first in pool.holders(e))
    other.load([(pool.ref, pool.shape)], [ExpertVersion(key(expert), 1)])
    first.release([ExpertVersion(key(expert), 1)])
    ids = torch.tensor([[expert, (expert + 1) % EXPERTS]])
    x_TH, _, weights_TK = inputs(1)
    layer = pool.placement.layers[KEY]
    replicas = list(layer.replicas)
    replicas[expert] = (replicas[expert][0]._replace(host=other.name),)
    layers = {**pool.placement.layers, KEY: replace(layer, replicas=tuple(replicas))}
    router.place(replace(pool.placement, id=PlacementId(1, 2), layers=layers))
    result = forward(pool, router, x_TH, ids, weights_TK)
    assert_right(result, pool.answer(x_TH, ids, weights_TK))
    assert settles(lambda: has_all(router)), "what the other host has is lent by now"


def test_experts_that_come_and_go_change_no_result(pool: Hosts) -> None:
    """Chunks get other memory meanwhile. Nothing is fenced: the router is one that slept."""
    router, drawn = borrowing_all(pool), random.Random(5)
    given = inputs(4)
    expected = pool.answer(*given)
    epoch, at = 1, [{host.name for host in pool.holders(e)} for e in range(EXPERTS)]
    hosts = {host.name: host for host in pool.hosts}
    for _ in range(12):
        expert = drawn.randrange(EXPERTS)
        (leaves,) = drawn.sample(sorted(at[expert]), 1)
        comes = next(name for name in hosts if name != leaves)
        hosts[comes].load([(pool.ref, pool.shape)], [ExpertVersion(key(expert), 1)])
        hosts[leaves].release([ExpertVersion(key(expert), 1)])
        at[expert] = {comes}
        epoch += 1
        layer = pool.placement.layers[KEY]
        replicas = tuple(
            tuple(one._replace(host=name) for name in sorted(at[e]))
            for e, (one, *_) in enumerate(layer.replicas)
        )
        layers = {**pool.placement.layers, KEY: replace(layer, replicas=replicas)}
        router.place(replace(pool.placement, id=PlacementId(1, epoch), layers=layers))
        for _ in range(2):
            assert_right(forward(pool, router, *given), expected)
    assert router.stats().lent > 0
    assert router.stats().rows_lost == 0


def test_a_device_holds_two_versions_and_the_placement_says_which_counts(pool: Hosts) -> None:
    router = borrowing_all(pool)
    holder, given = pool.holders(3)[0], (inputs(1)[0], torch.tensor([[3, 4]]), inputs(1)[2])
    older = forward(pool, router, *given)
    changed = {n: t * 2 for n, t in holder._store.get(ExpertVersion(key(3), 1)).items()}
    holder._store.put(ExpertVersion(key(3), 2), changed)
    assert torch.equal(forward(pool, router, *given), older)
    versions = WeightVersions(experts={key(3): 2})
    router.place(replace(pool.placement, id=PlacementId(1, 9), versions=versions))
    assert settles(lambda: has_all(router))
    newer = forward(pool, router, *given)
    assert not torch.allclose(newer, older)
    assert router.stats().lent == 6


def test_an_expert_on_a_device_that_is_not_finite_is_named(pool: Hosts) -> None:
    router = borrowing_all(pool)
    holder = pool.holders(2)[0]
    changed = {n: t.clone() for n, t in holder._store.get(ExpertVersion(key(2), 1)).items()}
    changed["down"][0, 0] = torch.inf
    holder._store.put(ExpertVersion(key(2), 2), changed)
    versions = WeightVersions(experts={key(2): 2})
    router.place(replace(pool.placement, id=PlacementId(1, 9), versions=versions))
    assert settles(lambda: has_all(router))
    x_TH, _, weights_TK = inputs(2)
    lost: list[tuple[list[int], Exception]] = []
    router.batch.on_lost = lambda rows, error: lost.append((rows, error))
    out_TH = forward(pool, router, x_TH, torch.tensor([[1, 2], [0, 1]]), weights_TK)
    ((rows, error),) = lost
    assert rows == [0]
    assert isinstance(error, BadExpert)
    assert "expert 2 of layer 1 of m" in str(error)
    assert bool(out_TH[1].isfinite().all())


def test_a_call_whose_expert_left_the_table_is_sent(pool: Hosts) -> None:
    """Another thread finds a layer's experts anew while a call is computed in part."""
    router, given = borrowing_all(pool), inputs(2)
    forward(pool, router, *given)
    router._lent_experts._tables[KEY].fill_(-1)
    there = [one.to(pool.device) for one in given]
    before = computed(pool)
    assert_right(router.dispatch(KEY, *there).combine().cpu(), pool.answer(*given))
    assert computed(pool) > before


def test_nothing_of_a_device_stays_mapped(folder: Path) -> None:
    before = mapped_chunks()
    with serving(folder, lends=True, on_device=True) as pool:
        router = borrowing_all(pool)
        forward(pool, router, *inputs(2))
        own = mapped_chunks()
        router.close()
        assert mapped_chunks() < own
        # What the router mapped is gone, what the hosts mapped is not.
        assert mapped_chunks() > before
    del router, pool
    assert mapped_chunks() == before


def test_a_router_on_another_device_borrows_nothing(folder: Path) -> None:
    with serving(folder, lends=True, on_device=True) as pool:
        entries = {n: replace(e, device="GPU-1") for n, e in pool.placement.hosts.items()}
        elsewhere = replace(pool, placement=replace(pool.placement, hosts=entries))
        router = elsewhere.router(borrows=True)
        given = inputs(2)
        assert_right(forward(pool, router, *given), pool.answer(*given))
        assert router.stats().lent == 0
        (path, _) = router.take_load().paths
        assert path.why_sent == "it computes on GPU-1, this router on the CPU"


def test_a_host_that_ends_takes_its_slots_back(pool: Hosts) -> None:
    router = borrowing_all(pool)
    ending: ExpertHost = pool.hosts[0]
    expert = next(e for e in range(EXPERTS) if ending in pool.holders(e))
    pool.hosts[1].load([(pool.ref, pool.shape)], [ExpertVersion(key(expert), 1)])
    ending.close()
    layer = pool.placement.layers[KEY]
    replicas = tuple(
        tuple(one._replace(host="host-1") for one in replica) for replica in layer.replicas
    )
    layers = {**pool.placement.layers, KEY: replace(layer, replicas=replicas)}
    left = {"host-1": pool.placement.hosts["host-1"]}
    router.place(replace(pool.placement, id=PlacementId(1, 2), layers=layers, hosts=left))
    x_TH, _, weights_TK = inputs(1)
    ids = torch.tensor([[expert, expert]])
    assert_right(forward(pool, router, x_TH, ids, weights_TK), pool.answer(x_TH, ids, weights_TK))
    heard(router, "host-0", "host-1")


# ---- forward passes -----------------------------------------------------------------------------


def mapped_bytes(router: Router) -> int:
    pools = router._lent_experts._pools._pools.values()
    return sum(memory.backed_bytes for pool in pools for memory in pool._memory.values())


@contextmanager
def no_waits(device: str) -> Iterator[None]:
    """Let PyTorch raise an error where it would wait for a GPU."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[StepFlags]:
    """Each time that a router has waited for the device."""
    found: list[StepFlags] = []
    ask = StepFlags.read

    def asked(flags: StepFlags) -> tuple[bool, bool]:
        found.append(flags)
        return ask(flags)

    monkeypatch.setattr(StepFlags, "read", asked)
    return found


def test_a_pass_waits_for_the_device_once(pool: Hosts, waits: list[StepFlags]) -> None:
    router, given = borrowing_all(pool), inputs(2)
    expected = pool.answer(*given)
    forward(pool, router, *given)  # finds what is within reach, and compiles the kernels
    waits.clear()
    router.begin_step(PassCheck.DEVICE)
    there = [one.to(pool.device) for one in given]
    with no_waits(pool.device):
        results = [router.forward(KEY, *there) for _ in range(3)]
    assert waits == []
    assert router.step_is_sound()
    router.end_step()
    assert len(waits) == 1
    for result in results:
        assert_right(result.cpu(), expected)
    forward(pool, router, *given)
    assert len(waits) == 2, "outside of a pass, each call is checked"
    assert router.stats().lent == 20


def test_rows_that_pad_a_batch_may_hold_anything(pool: Hosts) -> None:
    router, (x, ids, weights) = borrowing_all(pool), inputs(3)
    x[2] = torch.nan
    router.begin_step(PassCheck.RESULT)
    result = forward(pool, router, x, ids, weights)
    assert router.step_is_sound(result[:2])
    assert not router.step_is_sound(result)
    assert not router.step_is_sound(), "nothing says that the other rows are finite"
    router.end_step()
    assert_right(result[:2], pool.answer(x[:2], ids[:2], weights[:2]))


def test_a_pass_over_slots_that_changed_is_not_sound(pool: Hosts) -> None:
    router, given = borrowing_all(pool), inputs(3)
    expected = pool.answer(*given)
    expert = int(given[1][0, 0])
    (holder,) = pool.holders(expert)
    weights = holder._store.get(ExpertVersion(key(expert), 1))
    router.begin_step(PassCheck.DEVICE)
    forward(pool, router, *given)
    holder.release([ExpertVersion(key(expert), 1)])
    assert not router.step_is_sound()
    holder._store.put(ExpertVersion(key(expert), 1), weights)
    with router.repeating():
        holder.load([(pool.ref, pool.shape)], [ExpertVersion(key(expert), 1)])
        assert_right(forward(pool, router, *given), expected)
    router.end_step()


def test_nothing_is_unmapped_during_a_pass(pool: Hosts) -> None:
    router, given = borrowing_all(pool), inputs(1)
    before = mapped_bytes(router)
    router.begin_step(PassCheck.DEVICE)
    forward(pool, router, *given)
    for host in pool.hosts:
        host.emulate(Emulation())  # such hosts take back what they lent
    assert settles(lambda: router._look_after([]) or not router._lent_experts)
    assert mapped_bytes(router) == before > 0
    router.end_step()
    assert mapped_bytes(router) == 0


@pytest.mark.parametrize("unsound", [False, True])
def test_a_model_runs_over_a_device(
    folder: Path,
    pool: Hosts,
    waits: list[StepFlags],
    monkeypatch: pytest.MonkeyPatch,
    unsound: bool,
) -> None:
    router = borrowing_all(pool)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain.to(pool.device)
    trunk: Any = load_trunk(folder, dtype=torch.float32, device=torch.device(pool.device))
    connect_experts(trunk, pool.layers, lambda layer: router.experts("m", layer))
    run_in_steps(trunk, router)
    ids = torch.tensor([[3, 1, 4, 1, 5]], device=pool.device)
    if unsound:
        monkeypatch.setattr(_Step, "is_sound", lambda *_: False)
    with torch.no_grad():
        torch.testing.assert_close(trunk(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
        assert len(waits) == (len(pool.layers) if unsound else 1)  # each call is checked by itself
        # Here each pass goes on with a cache, which must not be written to twice.
        made = trunk.generate(ids, max_new_tokens=4, do_sample=False)
        assert made.tolist() == plain.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    assert router.stats().rows_lost == 0


def test_calls_in_a_captured_graph_are_checked_by_the_passes_that_run_it(
    pool: Hosts, waits: list[StepFlags], monkeypatch: pytest.MonkeyPatch
) -> None:
    router, given = borrowing_all(pool), inputs(2)
    there = [one.to(pool.device) for one in given]
    router.forward(KEY, *there)
    waits.clear()
    with monkeypatch.context() as patch:
        patch.setattr(whole_calls, "is_capturing", lambda _: True)
        router.forward(KEY, *there)
    assert waits == []

    def a_pass(graph: Callable[[], object]) -> bool:
        router.begin_step(PassCheck.DEVICE)
        try:
            graph()
            return router.step_is_sound()
        finally:
            router.end_step()

    flags = router.whole_calls._captured_flags
    assert flags is not None
    assert a_pass(lambda: None)
    assert len(waits) == 1
    assert not a_pass(lambda: flags.both[1].fill_(1)), "a sum was not finite"
    assert a_pass(lambda: None)
    expert = int(given[1][0, 0])
    (holder,) = pool.holders(expert)
    assert not a_pass(lambda: holder.release([ExpertVersion(key(expert), 1)]))
    router._lent_experts.changed(KEY)
    table = router._lent_experts._tables[KEY]
    before = table.tolist()[0]
    assert a_pass(lambda: None), "the table says that the expert has gone"
    assert table.tolist()[0] == [-1 if e == expert else place for e, place in enumerate(before)]
    router._lent_experts.clear()
    a_pass(lambda: None)
    assert set(table.tolist()[0]) == {-1}


@pytest.mark.cuda
@pytest.mark.timeout(180)
def test_a_captured_graph_stays_right_when_experts_move(folder: Path) -> None:
    with serving(folder, lends=True, on_device=True, device="cuda") as pool:
        router = borrowing_all(pool)
        there = [one.to(pool.device) for one in inputs(3)]
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            router.forward(KEY, *there)
        side.synchronize()
        with torch.cuda.graph(graph):
            out_TH = router.forward(KEY, *there)
        for seed, leaves in ((1, None), (2, 0), (3, 1)):
            if leaves is not None:
                moved = ExpertVersion(key(leaves), 1)
                (holder,) = pool.holders(leaves)
                (other,) = (host for host in pool.hosts if host is not holder)
                other.load([(pool.ref, pool.shape)], [moved])
                layer = router.placement.layers[KEY] if router.placement else None
                assert layer is not None
                replicas = list(layer.replicas)
                replicas[leaves] = (replicas[leaves][0]._replace(host=other.name),)
                layers = {**pool.placement.layers, KEY: replace(layer, replicas=tuple(replicas))}
                router.place(replace(pool.placement, id=PlacementId(1, 10 + seed), layers=layers))
                assert settles(lambda: has_all(router))
                holder.release([moved])
            given = inputs(3, seed=seed)
            for static, new in zip(there, given, strict=True):
                static.copy_(new)
            router.begin_step(PassCheck.DEVICE)
            graph.replay()
            assert router.step_is_sound()
            router.end_step()
            assert_right(out_TH.cpu(), pool.answer(*given))
        assert router.take_load().counts[KEY].sum() >= 18
