"""Devices by name."""

from __future__ import annotations

import torch

from ...cluster.routing.transports import CPU


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where this process may use it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def device_name(device: torch.device) -> str:
    """The UUID of a CUDA device, which is the same in every process; `cpu` for any other."""
    if device.type != "cuda":
        return CPU
    return str(torch.cuda.get_device_properties(device).uuid)
