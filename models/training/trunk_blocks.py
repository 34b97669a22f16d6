"""How a trunk's parameters are dealt into blocks, each of which has owners of its own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

# Small enough that several hosts share the work of a small trunk, too.
MOST_BYTES = 8 * 2**20


def trunk_blocks(
    trunk: nn.Module, groups: Mapping[str, int], *, most_bytes: int = MOST_BYTES
) -> list[dict[str, int]]:
    """Return the blocks: the group of each of their parameters, by name.

    ``groups`` names the parameters that are trained; tied ones count once, under their first name.
    A block has whole parameters, in the model's order, with at most ``most_bytes`` together in
    their own type. A larger one is a block by itself. The same model and groups give the same
    blocks.
    """
    blocks: list[dict[str, int]] = []
    room = 0
    for name, parameter in trunk.named_parameters():
        if name not in groups:
            continue
        if not blocks or parameter.nbytes > room:
            blocks.append({})
            room = most_bytes
        blocks[-1][name] = groups[name]
        room -= parameter.nbytes
    return blocks
