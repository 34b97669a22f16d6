"""Memory of a card that is mapped in chunks, in this process and in another."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from moesaic.kernels.slabs.device_memory import DeviceMemory

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(180)]

CHUNK = 4 << 20
CARD = torch.device("cuda", 0)


@pytest.fixture
def memory() -> Iterator[DeviceMemory]:
    made = DeviceMemory(CARD, 4 * CHUNK, chunk_bytes=CHUNK)
    yield made
    made.close()


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(CARD)[0]


def test_only_what_is_mapped_takes_memory(memory: DeviceMemory) -> None:
    before = free_bytes()
    for chunk in (0, 1):
        memory.map(chunk)
    assert memory.backed_bytes == 2 * CHUNK
    assert before - free_bytes() == 2 * CHUNK
    memory.unmap(0)
    assert memory.backed_bytes == CHUNK
    memory.unmap(1)
    assert memory.backed_bytes == 0
    assert free_bytes() == before


def test_a_tensor_reads_what_was_written_to_mapped_chunks(memory: DeviceMemory) -> None:
    memory.map(0)
    rows = memory.tensor(4 * CHUNK).view(torch.bfloat16).view(4, -1)
    rows[0] = 3.0
    memory.map(2)
    rows[2] = 5.0
    assert float(rows[0].float().mean()) == 3.0
    assert float(rows[2].float().mean()) == 5.0
    memory.unmap(0)
    assert float(rows[2].float().mean()) == 5.0


def test_a_tensor_does_not_need_its_first_chunk(memory: DeviceMemory) -> None:
    numbers = memory.tensor(2 * CHUNK).view(torch.float32)
    assert memory.backed_bytes == 0
    memory.map(1)
    numbers[-1] = 2.0
    assert float(numbers[-1]) == 2.0


def test_a_chunk_outside_is_an_error(memory: DeviceMemory) -> None:
    with pytest.raises(IndexError, match="chunk 4"):
        memory.map(4)


def test_more_than_there_is_is_an_error_that_changes_nothing() -> None:
    before = free_bytes()
    total = torch.cuda.mem_get_info(CARD)[1]
    huge = DeviceMemory(CARD, 2 * total, chunk_bytes=total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"no \d+ MiB left for experts"):
            huge.map(0)
        assert huge.backed_bytes == 0
    finally:
        huge.close()
    assert free_bytes() >= before


# ---- another process ----------------------------------------------------------------------------

# It makes two chunks, fills them with 7 and sends their descriptors.
MAKER = """
import socket, sys, time, torch
from moesaic.kernels.slabs.device_memory import DeviceMemory
memory = DeviceMemory(torch.device("cuda", 0), 2 * {chunk}, chunk_bytes={chunk})
for chunk in (0, 1):
    memory.map(chunk)
memory.tensor(2 * {chunk}).view(torch.float32).fill_(7.0)
torch.cuda.synchronize()
theirs = socket.socket(fileno=int(sys.argv[1]))
socket.send_fds(theirs, [b"here"], [memory.descriptor(chunk) for chunk in (0, 1)])
time.sleep(600)
"""
# It maps descriptors read-only and writes to them.
WRITER = """
import sys, torch
from moesaic.kernels.slabs.device_memory import DeviceMemory
memory = DeviceMemory(torch.device("cuda", 0), {chunk}, chunk_bytes={chunk})
memory.adopt(0, int(sys.argv[1]))
numbers = memory.tensor({chunk}).view(torch.float32)
assert float(numbers.mean()) == 7.0
numbers.fill_(1.0)
torch.cuda.synchronize()
"""


@dataclass(frozen=True, slots=True)
class Made:
    process: subprocess.Popen[bytes]
    descriptors: list[int]

    def kill(self) -> None:
        """Kill it, and wait until the driver has freed its memory."""
        self.process.kill()
        self.process.wait(60)


@pytest.fixture
def maker() -> Iterator[Made]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", MAKER.format(chunk=CHUNK), str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as child:
        theirs.close()
        ours.settimeout(120)
        _, descriptors, _, _ = socket.recv_fds(ours, 16, 2)
        assert len(descriptors) == 2
        yield Made(child, descriptors)
        child.kill()
    ours.close()


def test_memory_outlives_the_process_that_made_it(maker: Made, memory: DeviceMemory) -> None:
    for chunk, descriptor in enumerate(maker.descriptors):
        memory.adopt(chunk, descriptor)
    numbers = memory.tensor(2 * CHUNK).view(torch.float32)
    assert float(numbers.mean()) == 7.0
    maker.kill()
    assert float(numbers.sum()) == 7.0 * numbers.numel()
    before = free_bytes()
    for chunk in (0, 1):
        memory.unmap(chunk)
    assert free_bytes() - before >= 2 * CHUNK


def test_memory_of_a_dead_process_can_be_changed_and_handed_on(
    maker: Made, memory: DeviceMemory
) -> None:
    maker.kill()
    for chunk, descriptor in enumerate(maker.descriptors):
        memory.adopt(chunk, descriptor, writable=True)
    before = free_bytes()
    numbers = memory.tensor(2 * CHUNK).view(torch.float32)
    numbers.add_(1.0)
    other = DeviceMemory(CARD, CHUNK, chunk_bytes=CHUNK)
    other.adopt(0, memory.descriptor(1))
    assert float(other.tensor(CHUNK).view(torch.float32).mean()) == 8.0
    other.close()
    for chunk in (0, 1):
        memory.unmap(chunk)
    for descriptor in maker.descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    assert free_bytes() - before >= 2 * CHUNK


def test_memory_that_was_mapped_to_be_read_cannot_be_written(maker: Made) -> None:
    mine, other = maker.descriptors
    os.close(other)
    written = subprocess.run(
        [sys.executable, "-c", WRITER.format(chunk=CHUNK), str(mine)],
        pass_fds=[mine],
        capture_output=True,
        text=True,
        timeout=120,
    )
    os.close(mine)
    assert written.returncode != 0
    assert "AcceleratorError" in written.stderr or "CUDA error" in written.stderr, written.stderr
