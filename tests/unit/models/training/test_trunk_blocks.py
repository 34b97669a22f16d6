"""A trunk's parameters in blocks: whole, each once, none too large."""

from __future__ import annotations

import torch
from torch import nn

from moesaic.models.training.trunk_blocks import MOST_BYTES, trunk_blocks
from moesaic.models.training.trunk_watch import TrunkWatch


def trunk_of(*bytes_of: int) -> nn.Module:
    made = nn.Module()
    for number, size in enumerate(bytes_of):
        made.register_parameter(f"p{number}", nn.Parameter(torch.zeros(size // 4)))
    return made


def test_whole_parameters_in_their_order_up_to_the_limit() -> None:
    trunk = trunk_of(40, 24, 36, 4, 200, 64, 4)
    groups = {f"p{number}": number % 2 for number in range(7)}
    blocks = trunk_blocks(trunk, groups, most_bytes=64)
    assert [list(block) for block in blocks] == [
        ["p0", "p1"],
        ["p2", "p3"],
        ["p4"],  # larger than a block
        ["p5"],
        ["p6"],
    ]
    assert {name: group for block in blocks for name, group in block.items()} == groups
    assert trunk_blocks(trunk, dict(reversed(groups.items())), most_bytes=64) == blocks


def test_what_is_not_trained_is_left_out_and_what_is_tied_counts_once() -> None:
    trunk = trunk_of(40, 40, 40)
    trunk.register_parameter("tied", trunk.get_parameter("p2"))
    assert trunk_blocks(trunk, {"p0": 1, "p2": 3}) == [{"p0": 1, "p2": 3}]
    assert trunk_blocks(trunk, {}) == []
    assert MOST_BYTES == 8 * 1024 * 1024


def test_bytes_are_those_of_the_parameters_type() -> None:
    trunk = trunk_of(64, 64).to(torch.bfloat16)
    assert len(trunk_blocks(trunk, {"p0": 1, "p1": 1}, most_bytes=64)) == 1


def test_a_watch_sees_what_others_write() -> None:
    trunk = trunk_of(8, 8, 8)
    apart = trunk.get_parameter("p2")
    watch = TrunkWatch(trunk, {id(apart)})
    with torch.no_grad():
        apart.add_(1)
    assert watch.changed() == []
    trunk.load_state_dict(trunk.state_dict())
    assert sorted(watch.changed()) == ["p0", "p1"]
    watch.record()
    assert watch.changed() == []
    trunk.register_parameter("p1", nn.Parameter(torch.ones(2)))
    assert watch.changed() == ["p1"]
    trunk.register_parameter("more", nn.Parameter(torch.ones(2)))
    assert sorted(watch.changed()) == ["more", "p1"]
