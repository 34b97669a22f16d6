"""The memory of a device outlives its host: routers go on with it, and a successor takes it over.

The device's memory is played by the CPU's, and its kernels run in Triton's interpreter; or it is a
card's, where there is one.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from moesaic.actors.host import host as host_file
from moesaic.actors.host.host import ExpertHost
from moesaic.actors.host.memory import expert_memory
from moesaic.actors.host.memory.kept_memory import KeptMemory
from moesaic.actors.router.router import Router
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion
from moesaic.cluster.placement import HostEntry, LayerPlacement, Placement, PlacementId, Replica
from tests.helpers.models.slots import chunks_in_use
from tests.helpers.pool.lending import heard
from tests.helpers.pool.serving import (
    EXPERTS,
    KEY,
    Hosts,
    assert_right,
    inputs,
    save_model,
    serving,
    store_in_slots,
)
from tests.helpers.pool.transports import settles
from tests.helpers.processes.keepers import KEEP_S, host_process, keepers, kill, node_process

# The interpreter multiplies whole tiles with NumPy, unused rows included.
pytestmark = [
    pytest.mark.usefixtures("one_kernel_at_a_time"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
LAYERS = 2
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.timeout(240)])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"moesaic-device-test-{os.getpid()}-{tmp_path.name}"


@pytest.fixture(autouse=True)
def node() -> Iterator[subprocess.Popen[bytes]]:
    with node_process() as parent:
        yield parent


def on_device(
    folder: Path, address: str, node: int, device: str
) -> AbstractContextManager[tuple[subprocess.Popen[str], HostEntry, int]]:
    """A host whose experts lie on a device; the CPU plays one."""
    return host_process(folder, address, node, device=device, in_slots=device == "cpu")


def place(router: Router, pool: Hosts, *entries: HostEntry, epoch: int) -> None:
    there = tuple(Replica(entry.host, 1.0) for entry in entries)
    layers = dict.fromkeys(pool.placement.layers, LayerPlacement((there,) * EXPERTS))
    router.place(Placement(PlacementId(1, epoch), {entry.host: entry for entry in entries}, layers))


def forward(pool: Hosts, router: Router) -> Tensor:
    x_TH, ids_TK, weights_TK = (one.to(pool.device) for one in inputs(4))
    return router.forward(KEY, x_TH, ids_TK, weights_TK).cpu()


def has_all(router: Router) -> bool:
    router._look_after([])
    experts = [ExpertKey("m", KEY.layer, expert) for expert in range(EXPERTS)]
    return all(router._lent_experts.has(one, router.placement) for one in experts)


def chunks_of(process: psutil.Process) -> int:
    """Chunks of the memory that plays a device's that a process has descriptors of."""
    found = 0
    for one in list(Path(f"/proc/{process.pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # closed a moment ago
            found += "moesaic:chunk" in str(one.readlink())
    return found


def test_a_host_dies_and_nobody_loads_anything(
    folder: Path, device: str, address: str, node: subprocess.Popen[bytes]
) -> None:
    with serving(folder, hosts=1, on_device=True, device=device) as pool:
        forward(pool, pool.router())  # compiles kernels
        before = chunks_in_use(device)
        with on_device(folder, address, node.pid, device) as (child, entry, adopted):
            assert adopted == 0
            router, plain = pool.router(placed=False, borrows=True), pool.router(placed=False)
            for one in (router, plain):
                place(one, pool, entry, epoch=1)
                one.wait_ready(10.0)
            assert settles(lambda: has_all(router))
            lent, sent = forward(pool, router), forward(pool, plain)
            assert_right(lent, pool.answer(*inputs(4)))
            (keeper,) = keepers(node.pid)
            kept = chunks_of(keeper)
            assert device == "cuda" or kept > 0
            kill(child)
        # The trunk goes on, whether a placement still names the host or not.
        assert torch.equal(forward(pool, router), lent)
        place(router, pool, epoch=2)
        assert torch.equal(forward(pool, router), lent)
        for epoch in (3, 4):
            with on_device(folder, address, node.pid, device) as (child, entry, adopted):
                assert adopted == EXPERTS * LAYERS
                assert torch.equal(forward(pool, router), lent), "while the successor starts"
                for one in (router, plain):
                    place(one, pool, entry, epoch=epoch)
                    one.wait_ready(10.0)
                heard(router, "kept")
                assert settles(lambda: has_all(router))
                assert torch.equal(forward(pool, router), lent)
                assert torch.equal(forward(pool, plain), sent)
                assert chunks_of(keeper) == kept
                if epoch == 3:
                    kill(child)
                    continue
                child.communicate(timeout=60)  # it ends in order
        stats = router.stats()
        assert (stats.lent, stats.retries, stats.rows_lost) == (7 * 8, 0, 0)
        router.close()
        assert settles(lambda: not keepers(node.pid))
        assert settles(lambda: chunks_in_use(device) < before + 0.5)


@contextmanager
def predecessor(folder: Path, address: str, node: int) -> Iterator[KeptMemory]:
    """What a killed host has left, as its successor gets it."""
    with on_device(folder, address, node, "cpu") as (child, _, _):
        kill(child)
    kept = KeptMemory(address, "kept", keep_s=KEEP_S, parent_pid=node)
    try:
        yield kept
    finally:
        kept.close()
        gc.collect()


def host_of(kept: KeptMemory, monkeypatch: pytest.MonkeyPatch) -> ExpertHost:
    with monkeypatch.context() as patch:
        patch.setattr(host_file, "ExpertStore", store_in_slots)
        return ExpertHost("kept", node="here", device="cpu", lends=True, kept=kept)


def holdings(host: ExpertHost) -> int:
    return sum(map(len, host.report().holdings.values()))


def version_1(expert: int, layer: int = KEY.layer) -> ExpertVersion:
    return ExpertVersion(ExpertKey("m", layer, expert), 1)


def test_status_counts_what_was_adopted_and_the_keeper_frees_what_leaves(
    folder: Path,
    address: str,
    node: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with predecessor(folder, address, node.pid) as kept, serving(folder, hosts=1) as pool:
        (keeper,) = keepers(node.pid)
        there = chunks_of(keeper)
        host = host_of(kept, monkeypatch)
        try:
            report = host.report()
            assert report.adopted == holdings(host) == EXPERTS * LAYERS
            sizes = [e.nbytes for _, experts in pool.expected.values() for e in experts.values()]
            assert report.weight_bytes == sum(sizes)
            assert chunks_of(keeper) == there
            everything = [version_1(e, la) for la in pool.expected for e in range(EXPERTS)]
            host.release(everything)
            assert host.report().weight_bytes == 0
            assert chunks_of(keeper) == 0
            host.load([(pool.ref, pool.shape)], everything[:1])
            assert 0 < chunks_of(keeper) < there
            given = inputs(3)
            host.load([(pool.ref, pool.shape)], everything)
            router = replace(pool, hosts=[host]).router(placed=False)
            place(router, pool, host.entry(), epoch=1)
            router.wait_ready(10.0)
            assert_right(router.forward(KEY, *given), pool.answer(*given))
        finally:
            host.close()


@pytest.mark.slow
def test_an_expert_on_a_device_whose_bytes_have_changed_is_dropped(
    folder: Path,
    address: str,
    node: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with predecessor(folder, address, node.pid) as kept, serving(folder, hosts=1) as pool:
        (left,) = kept.left
        _, descriptor = left.chunks[min(left.chunks)]  # the first of place 0
        os.pwrite(descriptor, bytes([os.pread(descriptor, 1, 3)[0] ^ 1]), 3)
        host = host_of(kept, monkeypatch)
        try:
            assert settles(lambda: holdings(host) == EXPERTS * LAYERS - 1)
            everything = [version_1(e, la) for la in pool.expected for e in range(EXPERTS)]
            host.load([(pool.ref, pool.shape)], everything)
            assert holdings(host) == EXPERTS * LAYERS
            router = replace(pool, hosts=[host]).router(placed=False)
            place(router, pool, host.entry(), epoch=1)
            router.wait_ready(10.0)
            given = inputs(9)
            assert_right(router.forward(KEY, *given), pool.answer(*given))
        finally:
            host.close()


@pytest.mark.slow
def test_memory_of_another_card_is_freed_and_loaded_again(
    folder: Path,
    address: str,
    node: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with predecessor(folder, address, node.pid) as kept, serving(folder, hosts=1) as pool:
        (keeper,) = keepers(node.pid)
        assert chunks_of(keeper) > 0
        monkeypatch.setattr(expert_memory, "device_name", lambda _: "GPU-2")
        host = host_of(kept, monkeypatch)
        try:
            assert "its experts are on cpu, and this host is on GPU-2" in caplog.text
            assert (holdings(host), host.report().adopted) == (0, 0)
            assert chunks_of(psutil.Process()) == 0
            assert chunks_of(keeper) == 0
            host.load([(pool.ref, pool.shape)], [version_1(2)])
            assert holdings(host) == 1
            assert chunks_of(keeper) > 0
        finally:
            host.close()


@pytest.mark.slow
def test_a_host_on_a_cpu_leaves_a_devices_memory_alone(
    folder: Path,
    address: str,
    node: subprocess.Popen[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with predecessor(folder, address, node.pid) as kept:
        (keeper,) = keepers(node.pid)
        host = ExpertHost("kept", node="here", device="cpu", lends=True, kept=kept)
        try:
            assert "its experts are on the device cpu" in caplog.text
            assert holdings(host) == 0
            assert chunks_of(psutil.Process()) == 0
            assert chunks_of(keeper) == 0
        finally:
            host.close()
