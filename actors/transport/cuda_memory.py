"""Slots in device memory that a router shares with a host on the same node (CUDA IPC).

This is the counterpart of a memfd in shm.py: the router allocates, the host opens. The socket
carries handles as CUDA and torch make them, in a message whose fields are checked; nothing is
pickled. Each side waits for its own stream before it sends the frame, so that the event of one
process never holds up the loop of another.

Machines without CUDA cannot test this file: docs/design.md says what that leaves open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...proto.errors import HostLost
from ...proto.expert_pb2 import DeviceMemory, Hello

# Size of cudaIpcMemHandle_t and of cudaIpcEventHandle_t. torch may put a byte with the kind of
# allocation before the former, and since 2.11 one with the version of this form too. torch's
# reference counter is a shared-memory file with a name.
_HANDLE_BYTES = 64
_PREFIX_BYTES = 2
_MAX_NAME_BYTES = 256


class CudaMemory:
    """One side's view of the slots, as uint8 tensors on its device."""

    def __init__(self, whole: Tensor, slots: int) -> None:
        self.slots = list(whole.view(slots, -1).unbind())
        self._device = whole.device

    def written(self) -> None:
        """Wait until all processes can see what this thread has written."""
        torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        self.slots.clear()  # a view that is still in use keeps the memory alive


def share(device: torch.device, slots: int, slot_bytes: int) -> tuple[CudaMemory, DeviceMemory]:
    """Allocate a router's slots for calls in the memory of ``device``, and share them with a host.

    Returns the memory, and its CUDA IPC handles, with which the host opens the same memory. Raises
    HostLost if the memory cannot be allocated or shared.
    """
    try:
        whole = torch.empty(slots * slot_bytes, dtype=torch.uint8, device=device)
        shared = whole.untyped_storage()._share_cuda_()
        uuid = torch.cuda.get_device_properties(whole.device).uuid
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA raises the latter
        raise HostLost(f"cuda: this process cannot share memory of {device}: {error}") from error
    _, handle, _, offset, counter_handle, counter_offset, event_handle, event_needed = shared
    return CudaMemory(whole, slots), DeviceMemory(
        device=str(uuid),
        handle=handle,
        offset=offset,
        counter_handle=counter_handle,
        counter_offset=counter_offset,
        event_handle=event_handle,
        event_needed=event_needed,
    )


def open_shared(hello: Hello) -> CudaMemory:
    """Open the slots that a router's ``hello`` describes. Raises HostLost if that fails."""
    memory = hello.device_memory
    _check(memory)
    device = _by_uuid(memory.device)
    size = hello.slots * hello.slot_bytes
    try:
        storage = torch.UntypedStorage._new_shared_cuda(
            device.index,
            memory.handle,
            size,
            memory.offset,
            memory.counter_handle,
            memory.counter_offset,
            memory.event_handle,
            memory.event_needed,
        )
        whole = torch.empty(0, dtype=torch.uint8, device=device)
        whole.set_(storage, 0, (size,), (1,))  # pyright: ignore[reportArgumentType]
    except RuntimeError as error:
        raise HostLost(f"{hello.router!r}: its device memory cannot be opened: {error}") from error
    return CudaMemory(whole, hello.slots)


def _check(memory: DeviceMemory) -> None:
    for name, given, fits in (
        ("handle", memory.handle, range(_HANDLE_BYTES, _HANDLE_BYTES + _PREFIX_BYTES + 1)),
        ("event_handle", memory.event_handle, (_HANDLE_BYTES,) if memory.event_needed else None),
        ("counter_handle", memory.counter_handle, range(1, _MAX_NAME_BYTES)),
    ):
        if fits is not None and len(given) not in fits:
            raise HostLost(f"device_memory.{name}: {len(given)} bytes are not a CUDA handle")


def _by_uuid(uuid: str) -> torch.device:
    """Find a GPU by its UUID, as every process may number GPUs differently."""
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return torch.device("cuda", index)
    raise HostLost(f"device_memory.device: this process cannot use GPU {uuid!r}")
