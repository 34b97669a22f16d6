"""A memory keeper has a device's memory chunk by chunk; chunks are played by the CPU's memory."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from moesaic.actors.host.memory.kept_memory import KeptMemory, LeftMemory
from moesaic.actors.host.memory.memory_keeper import MOST_CHUNKS
from moesaic.kernels.slabs.device_slab import DeviceSlab
from tests.helpers.models.slots import chunks_in_use
from tests.helpers.pool.transports import settles
from tests.helpers.processes import slab_owner
from tests.helpers.processes.keepers import KEEP_S, keepers, node_process

MANY = 5 * MOST_CHUNKS + 7


class Chunks:
    """A model's memory on a device."""

    def __init__(self, count: int = 0) -> None:
        self.descriptor = os.memfd_create("moesaic:header")
        self.open: dict[int, int] = {}  # {chunk: descriptor}
        self.error: Exception | None = None
        self.lent: list[tuple[int, int]] = []
        self._serials: Mapping[int, int] = {}
        for chunk in range(count):
            self.map(chunk, 100 + chunk)

    def map(self, chunk: int, serial: int) -> None:
        self.open[chunk] = os.memfd_create("moesaic:chunk")
        self._serials = {**self._serials, chunk: serial}

    def unmap(self, *chunks: int) -> None:
        for chunk in chunks:
            os.close(self.open.pop(chunk))
        self._serials = {n: serial for n, serial in self._serials.items() if n not in chunks}

    def chunks(self) -> Mapping[int, int]:
        return self._serials

    def lend_chunk(self, number: int, serial: int) -> int | None:
        if self.error is not None:
            raise self.error
        self.lent.append((number, serial))
        same = self._serials.get(number) == serial
        return os.dup(self.open[number]) if same else None

    def is_in(self, left: LeftMemory) -> bool:
        """Whether just this memory was left."""
        return (
            {n: serial for n, (serial, _) in left.chunks.items()} == self._serials
            and os.path.sameopenfile(left.descriptor, self.descriptor)
            and all(os.path.sameopenfile(one, self.open[n]) for n, (_, one) in left.chunks.items())
        )

    def close(self) -> None:
        for descriptor in (self.descriptor, *self.open.values()):
            os.close(descriptor)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"moesaic-chunks-test-{os.getpid()}-{tmp_path.name}"


@pytest.fixture(autouse=True)
def node() -> Iterator[subprocess.Popen[bytes]]:
    gc.collect()  # what tests before have left
    before = len(list(Path("/proc/self/fd").iterdir()))
    with node_process() as parent:
        yield parent
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@contextmanager
def keeping(
    address: str, node: subprocess.Popen[bytes], *, dies: bool = False
) -> Iterator[KeptMemory]:
    """A host's side of the keeper; ``dies``: it ends without a word."""
    kept = KeptMemory(address, "host", keep_s=KEEP_S, parent_pid=node.pid)
    try:
        yield kept
    finally:
        if dies:
            kept._closed.set()
            kept._hang_up()
        kept.close()
        for left in kept.left:
            left.close()


def held(keeper: psutil.Process) -> int:
    """Chunks that a keeper has."""
    found = 0
    for one in list(Path(f"/proc/{keeper.pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # closed a moment ago
            found += "moesaic:chunk" in str(one.readlink())
    return found


@pytest.fixture
def memory() -> Iterator[Chunks]:
    made = Chunks(MANY)
    yield made
    made.close()


def test_a_successor_gets_all_chunks(
    address: str, node: subprocess.Popen[bytes], memory: Chunks
) -> None:
    with keeping(address, node, dies=True) as kept:
        assert kept.left == []
        kept.keep("m", memory)
        (keeper,) = keepers(node.pid)
        assert held(keeper) == MANY
    for _ in range(2):
        with keeping(address, node, dies=True) as kept:
            (left,) = kept.left
            assert memory.is_in(left)
            assert held(keeper) == MANY
    with keeping(address, node):
        pass
    assert settles(lambda: not keepers(node.pid)), "it has left in order"


def test_a_chunk_that_goes_is_freed_at_the_keeper(
    address: str, node: subprocess.Popen[bytes], memory: Chunks
) -> None:
    with keeping(address, node, dies=True) as kept:
        kept.keep("m", memory)
        (keeper,) = keepers(node.pid)
        memory.unmap(*range(2, MANY))
        memory.unmap(1)
        memory.map(1, 9000)
        memory.map(10_000, 2**63)
        kept.keep("m", memory)
        assert held(keeper) == 3
    with keeping(address, node) as kept:
        (left,) = kept.left
        assert memory.is_in(left)
        kept.forget("m")
        assert held(keeper) == 0


def test_what_a_successor_has_taken_over_is_not_handed_over_again(
    address: str, node: subprocess.Popen[bytes], memory: Chunks
) -> None:
    """The keeper has it all the time, and only what has changed is told."""
    with keeping(address, node, dies=True) as kept:
        kept.keep("m", memory)
    memory.unmap(0, 3)
    memory.map(3, 7777)
    (keeper,) = keepers(node.pid)
    with keeping(address, node, dies=True) as kept:
        memory.lent.clear()
        kept.keep("m", memory)
        assert memory.lent == [(3, 7777)]
        assert held(keeper) == MANY - 1
    with keeping(address, node) as kept:
        assert memory.is_in(kept.left[0])


def test_another_memory_of_a_model_takes_the_place_of_the_first(
    address: str, node: subprocess.Popen[bytes], memory: Chunks
) -> None:
    other = Chunks(3)
    with keeping(address, node) as kept:
        kept.keep("m", memory)
        kept.keep("m", other)
        (keeper,) = keepers(node.pid)
        assert held(keeper) == 3
        not_yet = Chunks()
        os.close(not_yet.descriptor)
        not_yet.descriptor = None  # pyright: ignore[reportAttributeAccessIssue]
        kept.keep("m", not_yet)
        assert held(keeper) == 0
    other.close()


def test_the_next_keeper_gets_all_chunks(
    address: str, node: subprocess.Popen[bytes], memory: Chunks
) -> None:
    with keeping(address, node, dies=True) as kept:
        kept.keep("m", memory)
        (keeper,) = keepers(node.pid)
        keeper.kill()

        def has_another() -> bool:
            found = [one for one in keepers(node.pid) if one != keeper]
            return [held(one) for one in found] == [MANY]

        assert settles(has_another)
    with keeping(address, node) as kept:
        assert memory.is_in(kept.left[0])


def test_a_keeper_without_free_descriptors_is_logged(
    address: str,
    node: subprocess.Popen[bytes],
    memory: Chunks,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with keeping(address, node, dies=True) as kept:
        first = Chunks(1)
        kept.keep("first", first)
        (keeper,) = keepers(node.pid)
        keeper.rlimit(psutil.RLIMIT_NOFILE, (100, 1000))
        for _ in range(2):
            kept.keep("m", memory)
        assert caplog.text.count("cannot have all of m") == 1
        assert "no descriptor is free" in caplog.text
        assert settles(lambda: held(keeper) == 1 + MOST_CHUNKS)
        # What it has is not lost.
        keeper.rlimit(psutil.RLIMIT_NOFILE, (1000, 1000))
        kept.keep("m", memory)
        assert held(keeper) == 1 + MANY
    with keeping(address, node) as kept:
        assert [memory.is_in(left) for left in kept.left] == [False, True]
        assert first.is_in(kept.left[0])
    first.close()


def test_a_device_that_hands_out_no_descriptor_is_logged(
    address: str,
    node: subprocess.Popen[bytes],
    memory: Chunks,
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory.error = RuntimeError("cuMemExportToShareableHandle: CUDA_ERROR_UNKNOWN")
    with keeping(address, node) as kept:
        kept.keep("m", memory)
        assert "CUDA_ERROR_UNKNOWN" in caplog.text
        memory.error = None
        kept.keep("m", memory)
        (keeper,) = keepers(node.pid)
        assert held(keeper) == MANY


def test_a_process_with_too_few_descriptors_takes_what_it_can(
    address: str,
    node: subprocess.Popen[bytes],
    memory: Chunks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with keeping(address, node, dies=True) as kept:
        kept.keep("m", memory)
    monkeypatch.setattr("moesaic.actors.host.memory.kept_memory.allow_descriptors", lambda _: None)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(one.name) for one in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2 * MOST_CHUNKS, before[1]))
    try:
        with keeping(address, node) as kept:
            (left,) = kept.left
            found = {n: serial for n, (serial, _) in left.chunks.items()}
            assert MOST_CHUNKS <= len(found) < MANY
            assert found.items() < memory.chunks().items()
            assert "too many descriptors" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_keepers_and_heirs_raise_their_limit(
    address: str, node: subprocess.Popen[bytes], memory: Chunks
) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    low, hard = min(before[0], before[1] - MANY), before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
    try:
        with keeping(address, node, dies=True) as kept:
            kept.keep("m", memory)
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (low, hard)
            (keeper,) = keepers(node.pid)
            assert keeper.rlimit(psutil.RLIMIT_NOFILE) == (min(hard, low + 2**20), hard)
        with keeping(address, node) as kept:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            assert low + MANY <= soft <= hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def connect(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(20.0)
    sock.connect(f"\0{address}")
    return sock


def test_what_a_host_has_sent_counts_though_it_read_no_answer(
    address: str, node: subprocess.Popen[bytes]
) -> None:
    """It was killed before; the system then reports a reset before what is to be read."""
    memory = Chunks(1)
    with keeping(address, node):
        (keeper,) = keepers(node.pid)
        keeper.suspend()
        with connect(address) as killed:
            hello = {"hello": "killed", "keep_s": KEEP_S}
            killed.send(json.dumps(hello).encode())
            keeper.resume()
            assert json.loads(killed.recv(100)) == {"left": 0}
            keep = [json.dumps({"keep": model}).encode() for model in "mn"]
            socket.send_fds(killed, keep[:1], [memory.descriptor])
            # An answer is there, which stays unread.
            assert killed.recv(100, socket.MSG_PEEK)
            keeper.suspend()
            socket.send_fds(killed, keep[1:], [memory.descriptor])
        keeper.resume()
        after = KeptMemory(address, "killed", keep_s=KEEP_S, parent_pid=node.pid)
        assert [left.model for left in after.left] == ["m", "n"]
        for left in after.left:
            left.close()
        after.close()
    memory.close()


@pytest.mark.parametrize(
    "message",
    [
        {"forget": "m"},
        {"keep": "m", "chunks": []},
        {"leave": True},
        {"next": False},
    ],
)
def test_who_has_not_heard_all_that_was_left_may_change_nothing(
    address: str, node: subprocess.Popen[bytes], memory: Chunks, message: dict[str, object]
) -> None:
    with keeping(address, node):
        other = KeptMemory(address, "other", keep_s=KEEP_S, parent_pid=node.pid)
        other.keep("m", memory)
        other._closed.set()
        other._hang_up()
        other.close()
        with connect(address) as strange:
            strange.send(json.dumps({"hello": "other", "keep_s": KEEP_S}).encode())
            assert json.loads(strange.recv(100)) == {"left": 7}
            strange.send(json.dumps(message).encode())
            assert strange.recv(100) == b""
        again = KeptMemory(address, "other", keep_s=KEEP_S, parent_pid=node.pid)
        (left,) = again.left
        assert memory.is_in(left)
        left.close()
        again.close()


@pytest.mark.parametrize("chunks", [[[1, 2], [3, 4]], [[1]], [["1", 2]], [7], [[1, 2, 3]], "m", {}])
def test_strange_chunks_end_their_connection_alone(
    address: str, node: subprocess.Popen[bytes], chunks: object
) -> None:
    memory = Chunks(1)
    with keeping(address, node) as kept:
        (keeper,) = keepers(node.pid)
        with connect(address) as strange:
            strange.send(json.dumps({"hello": "other", "keep_s": 0.0}).encode())
            assert json.loads(strange.recv(100)) == {"left": 0}
            socket.send_fds(strange, [json.dumps({"keep": "m"}).encode()], [memory.descriptor])
            assert json.loads(strange.recv(100)) == {"done": True}
            keep = json.dumps({"keep": "m", "chunks": chunks}).encode()
            socket.send_fds(strange, [keep], [memory.open[0]])
            assert strange.recv(100) == b""
        kept.keep("m", memory)
        assert settles(lambda: held(keeper) == 1)
    memory.close()


# ---- a slab, whose owner is killed --------------------------------------------------------------


def assert_whole(slab: DeviceSlab, device: str, layer: int, expert: int, version: int) -> None:
    expected = slab_owner.weights(device, expert)
    for name, tensor in slab.read(layer, expert, version).items():
        assert torch.equal(tensor.cpu(), expected[name])
    assert slab.is_sound(layer, expert, version)


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.timeout(180)])]


@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_owners_slab_is_there_to_the_bit(
    address: str, node: subprocess.Popen[bytes], device: str
) -> None:
    torch.zeros(1, device=device)  # its context takes memory, too
    before = chunks_in_use(device)
    command = [sys.executable, "-m", slab_owner.__name__, address, str(node.pid), device]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        owner.kill()
        owner.wait(60)
    kept = KeptMemory(address, slab_owner.HOST, keep_s=KEEP_S, parent_pid=node.pid)
    (left,) = kept.left
    slab = slab_owner.adopt(device, left)
    kept.keep("m", slab)
    held = [(1, expert, 1 + expert) for expert in range(slab_owner.EXPERTS) if expert != 2]
    assert slab.filled() == held
    for one in held:
        assert_whole(slab, device, *one)
    assert slab.backed_bytes > 0
    # Its memory can be handed on once more, and changed.
    for chunk, serial in slab.chunks().items():
        descriptor = slab.lend_chunk(chunk, serial)
        assert descriptor is not None
        os.close(descriptor)
    slab.write(0, 0, slab_owner.weights(device, 7), version=9)
    assert slab.is_sound(0, 0, 9)
    kept.keep("m", slab)
    for one in slab.filled():
        slab.free(*one)
    assert slab.backed_bytes == 0
    kept.keep("m", slab)
    assert chunks_in_use(device) < before + 0.5, "neither here nor at the keeper"
    slab.close()
    kept.close()
    del slab
    gc.collect()
