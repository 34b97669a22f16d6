"""How a run is begun, and which processes train together."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from ...proto.errors import BadInput


class Crew(NamedTuple):
    """The processes that train together, as one of them sees it."""

    workers: int  # how many there are
    name: str | None  # of this one, which no other has; None: any


ALONE = Crew(1, None)


class RunOptions(NamedTuple):
    """How a process begins a run, or takes part in one."""

    redundancy: int | None = None  # how many hosts may be lost with what they own; None: as in spec
    exact: bool | None = None  # who computes what does not change a bit; None: as in the spec
    succeed: bool = False  # it takes the place of a process that is gone
    crew: Crew = ALONE


def crew_of(workers: int | None) -> Crew:
    """Return who trains together: ``workers`` processes, or as the environment says.

    torchrun, Ray Train and accelerate set RANK and WORLD_SIZE. Raises BadInput.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        rank, size = distributed.get_rank(), distributed.get_world_size()
    count = (size or 1) if workers is None else workers
    if count < 1:
        raise BadInput(f"workers: {count}: it must be 1 or more")
    if count == 1:
        return ALONE
    return Crew(count, None if rank is None else f"worker-{rank:04d}")


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise BadInput(f"{variable}: {text!r} must be a whole number") from None
