"""A slab of another process, mapped so that it can only be read."""

from __future__ import annotations

from . import memfd
from .borrowed_device_slab import DeviceSlabReader
from .layout import SlabLayout
from .slab import SlabReader


def borrow(descriptor: int) -> SlabReader:
    """Map the slab that a descriptor from `Slab.lend` names, and close the descriptor.

    The mapping ends with the last tensor over it. Raises ValueError for what is no such slab.
    """
    slab = borrow_any(descriptor)
    if not isinstance(slab, SlabReader):
        raise ValueError("the slab's experts are on a device")
    return slab


def borrow_any(descriptor: int) -> SlabReader | DeviceSlabReader:
    """Do the same for the slab of a CPU or of a device.

    Of a device's slab only what its owner says of it is mapped; `DeviceSlabReader.take` maps the
    rest. Raises ValueError for what is no slab.
    """
    memory = memfd.borrow(descriptor)
    layout = SlabLayout.read(memoryview(memory))
    if layout.chunk_bytes:
        return DeviceSlabReader(layout, memory)
    return SlabReader(layout, memfd.readable(memory))
