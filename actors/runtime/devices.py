"""Devices by name."""

from __future__ import annotations

import torch

from ...cluster.routing.transports import CPU


def pick_device(device: str) -> torch.device:
    """Return the device of this name; `auto` is CUDA if this process can use it, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def device_name(device: torch.device) -> str:
    """Return the UUID of a CUDA device, which all processes agree on; `cpu` for any other."""
    if device.type != "cuda":
        return CPU
    return str(torch.cuda.get_device_properties(device).uuid)
