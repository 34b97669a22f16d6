"""A killed host's experts wait for its successor at the node's memory keeper."""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moesaic.actors.host.adoption import model_as_json, model_from_json
from moesaic.actors.host.host import ExpertHost
from moesaic.actors.host.memory import kept_memory as kept_memory_file
from moesaic.actors.host.memory.kept_memory import KeptMemory
from moesaic.actors.router.router import Router
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion
from moesaic.cluster.placement import (
    HostEntry,
    LayerPlacement,
    ModelRef,
    ModelShape,
    Placement,
    PlacementId,
    Replica,
)
from moesaic.kernels.slabs.layout import SlabLayout
from tests.helpers.pool.serving import (
    EXPERTS,
    KEY,
    Hosts,
    assert_right,
    in_background,
    inputs,
    save_model,
    serving,
)
from tests.helpers.pool.transports import DEADLINE_S, settles
from tests.helpers.processes.keepers import (
    KEEP_S,
    host_process,
    keepers,
    kept_memory,
    kill,
    node_process,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"moesaic-keeper-test-{os.getpid()}-{tmp_path.name}"


@pytest.fixture(autouse=True)
def node() -> Iterator[subprocess.Popen[bytes]]:
    with node_process() as parent:
        yield parent


def spoil(folder: Path) -> None:
    """Overwrite the checkpoint: whoever loads from it now computes something else."""
    (file,) = folder.glob("*.safetensors")
    save_file({n: t * 0 for n, t in load_file(file).items()}, file, {"format": "pt"})


def router_of(pool: Hosts, *entries: HostEntry, epoch: int = 1) -> Router:
    router = pool.router(placed=False)
    place(router, pool, *entries, epoch=epoch)
    router.wait_ready(10.0)
    return router


def place(router: Router, pool: Hosts, *entries: HostEntry, epoch: int) -> None:
    there = tuple(Replica(entry.host, 1.0) for entry in entries)
    layers = dict.fromkeys(pool.placement.layers, LayerPlacement((there,) * EXPERTS))
    router.place(Placement(PlacementId(1, epoch), {entry.host: entry for entry in entries}, layers))


def test_a_successor_takes_over_and_loads_nothing(
    folder: Path, address: str, node: subprocess.Popen[bytes]
) -> None:
    given = inputs(20)
    with serving(folder, hosts=1) as pool:
        everything = EXPERTS * len(pool.expected)
        with host_process(folder, address, node.pid) as (child, entry, adopted):
            assert adopted == 0
            router = router_of(pool, entry)
            expected = pool.answer(*given)
            assert_right(router.forward(KEY, *given), expected)
            kill(child)
        spoil(folder)
        for _ in range(2):
            with host_process(folder, address, node.pid) as (child, entry, adopted):
                assert adopted == everything
                router = router_of(pool, entry)
                assert_right(router.forward(KEY, *given), expected)
                kill(child)
        (keeper,) = keepers(node.pid)
        assert len(kept_memory(keeper)) == 1


def test_the_death_of_a_keeper_loses_nothing(
    folder: Path, address: str, node: subprocess.Popen[bytes]
) -> None:
    with host_process(folder, address, node.pid) as (child, _, _):
        (keeper,) = keepers(node.pid)
        keeper.send_signal(signal.SIGKILL)

        def has_another() -> bool:
            found = keepers(node.pid)
            return [one.pid for one in found] != [keeper.pid] and any(map(kept_memory, found))

        assert settles(has_another)
        kill(child)
    with host_process(folder, address, node.pid) as (_, _, adopted):
        assert adopted == EXPERTS * 2


def test_a_host_that_ends_in_order_leaves_no_process_and_no_memory(
    folder: Path, address: str, node: subprocess.Popen[bytes]
) -> None:
    with host_process(folder, address, node.pid) as (child, _, _):
        assert keepers(node.pid)
        child.communicate(timeout=20)
        assert settles(lambda: not keepers(node.pid))


@pytest.mark.slow
def test_memory_that_nobody_asks_for_is_freed_in_time(
    folder: Path, address: str, node: subprocess.Popen[bytes]
) -> None:
    with host_process(folder, address, node.pid, keep_s=0.5) as (child, _, _):
        (keeper,) = keepers(node.pid)
        kill(child)
        assert settles(lambda: not keeper.is_running())
    with host_process(folder, address, node.pid) as (_, _, adopted):
        assert adopted == 0


@pytest.mark.slow
def test_a_keeper_ends_with_its_node(
    folder: Path, address: str, node: subprocess.Popen[bytes]
) -> None:
    with host_process(folder, address, node.pid):
        (keeper,) = keepers(node.pid)
        node.kill()
        assert settles(lambda: not keeper.is_running())


def test_a_keeper_is_small_and_no_child(
    folder: Path, address: str, node: subprocess.Popen[bytes]
) -> None:
    with host_process(folder, address, node.pid) as (child, _, _):
        (keeper,) = keepers(node.pid)
        assert keeper.ppid() != child.pid
        assert os.getsid(keeper.pid) not in (os.getsid(0), os.getsid(child.pid))
        assert keeper.memory_info().rss < 40e6


@contextmanager
def predecessor(folder: Path, address: str, node: int) -> Iterator[KeptMemory]:
    """What a killed host has left, as its successor gets it."""
    with host_process(folder, address, node) as (child, _, _):
        kill(child)
    kept = KeptMemory(address, "kept", keep_s=KEEP_S, parent_pid=node)
    try:
        yield kept
    finally:
        kept.close()
        gc.collect()


def host_of(kept: KeptMemory) -> ExpertHost:
    return ExpertHost("kept", node="here", device="cpu", lends=True, kept=kept)


def holdings(host: ExpertHost) -> int:
    return sum(map(len, host.report().holdings.values()))


def test_an_expert_whose_bytes_have_changed_is_dropped(
    folder: Path, address: str, node: subprocess.Popen[bytes]
) -> None:
    with predecessor(folder, address, node.pid) as kept, serving(folder, hosts=1) as pool:
        (left,) = kept.left
        with mmap.mmap(left.descriptor, os.fstat(left.descriptor).st_size) as memory:
            layout = SlabLayout.read(memoryview(memory))
            start = layout.offset(KEY.layer, layout.layers[KEY.layer].tensors[0], 3)
            memory[start] ^= 1
        host = host_of(kept)
        try:
            assert settles(lambda: holdings(host) == EXPERTS * 2 - 1)
            lost = ExpertVersion(ExpertKey("m", KEY.layer, 3), 1)
            assert not host._residency.serves(lost)
            host.load([(pool.ref, pool.shape)], [lost])
            given = inputs(9)
            router = router_of(pool, host.entry())
            assert_right(router.forward(KEY, *given), pool.answer(*given))
        finally:
            host.close()


def test_what_cannot_be_used_is_loaded_again(
    folder: Path,
    address: str,
    node: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with predecessor(folder, address, node.pid) as kept, serving(folder, hosts=1) as pool:
        # As after an update of torch: the new process lays experts out otherwise.
        monkeypatch.setattr("moesaic.actors.host.memory.expert_memory._layouts", lambda *_: {})
        host = host_of(kept)
        monkeypatch.undo()
        try:
            assert "cannot be used" in caplog.text
            assert holdings(host) == 0
            wanted = [ExpertVersion(ExpertKey("m", KEY.layer, e), 1) for e in range(EXPERTS)]
            host.load([(pool.ref, pool.shape)], wanted)
            assert holdings(host) == EXPERTS
        finally:
            host.close()


def test_without_a_keeper_a_host_starts_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    kept = KeptMemory("moesaic-keeper-absent", "kept", keep_s=KEEP_S, parent_pid=os.getpid())
    host = host_of(kept)
    try:
        assert "no memory keeper" in caplog.text
        with serving(folder, hosts=1) as pool:
            host.load([(pool.ref, pool.shape)], [ExpertVersion(ExpertKey("m", KEY.layer, 0), 1)])
        assert holdings(host) == 1
    finally:
        host.close()


def test_a_model_is_the_same_after_it_was_written() -> None:
    ref = ModelRef(name="m", dtype="float32", path="/models/m", updates="/updates")
    shape = ModelShape(model="m", experts={0: 8, 1: 8}, replicas=2, exact=True, expert_bytes=7)
    assert model_from_json(model_as_json((ref, shape))) == (ref, shape)
    attached = replace(ref, path=None, config={"hidden_size": 32, "layer_types": ["a", "b"]})
    assert model_from_json(model_as_json((attached, shape))) == (attached, shape)
    # Lists come back where tuples were, so such a model is loaded again.
    assert model_as_json((replace(attached, config={"a": (1, 2)}), shape)) == {}
    with pytest.raises(ValueError, match="which model"):
        model_from_json({"ref": asdict(ref)})


def test_a_frozen_keeper_holds_no_host_up(
    folder: Path,
    address: str,
    node: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(kept_memory_file, "_LEFT_S", 0.5)
    with host_process(folder, address, node.pid):
        (keeper,) = keepers(node.pid)
        keeper.suspend()
        waiting = []
        try:
            # More of them than its socket lets wait.
            for _ in range(kept_memory_file._BACKLOG + 2):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                waiting.append(sock)
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(f"\0{address}")
            with in_background() as start:
                started = start(KeptMemory, address, "other", keep_s=KEEP_S, parent_pid=node.pid)
                started.result(DEADLINE_S).close()
            assert "no memory keeper" in caplog.text
        finally:
            for sock in waiting:
                sock.close()
            keeper.resume()


@pytest.mark.parametrize(
    "message",
    [
        b"[" * 4000,
        b"\xff",
        b"{}",
        b'{"hello": 3, "keep_s": 1.0}',
        b'{"hello": "x", "keep_s": 1e300}',
        b'{"hello": "x", "keep_s": NaN}',
        b'{"keep": "m"}',
    ],
)
def test_a_strange_message_ends_its_connection_alone(
    folder: Path, address: str, node: subprocess.Popen[bytes], message: bytes
) -> None:
    kept = KeptMemory(address, "kept", keep_s=KEEP_S, parent_pid=node.pid)
    try:
        (keeper,) = keepers(node.pid)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(20.0)
            stranger.connect(f"\0{address}")
            stranger.send(message)
            assert stranger.recv(1) == b""
        assert keeper.is_running()
        assert keepers(node.pid) == [keeper]
    finally:
        kept.close()


def test_a_host_and_its_waiting_successor_may_end_at_the_same_moment(
    folder: Path, address: str, node: subprocess.Popen[bytes]
) -> None:
    kept = KeptMemory(address, "kept", keep_s=KEEP_S, parent_pid=node.pid)
    (keeper,) = keepers(node.pid)
    hello = json.dumps({"hello": "kept", "keep_s": KEEP_S}).encode()
    try:
        pair = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        for sock in pair:
            sock.connect(f"\0{address}")
            sock.send(hello.replace(b"kept", b"pair"))
        keeper.suspend()
        for sock in pair:
            sock.close()
        keeper.resume()
        again = KeptMemory(address, "pair", keep_s=KEEP_S, parent_pid=node.pid)
        again.close()
        assert keepers(node.pid) == [keeper]
    finally:
        kept.close()
