"""The formula for the bytes of a training step, against what a step moves, token by token."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from moesaic.cluster.training.step_bytes import (
    StepBytes,
    TrainingStep,
    call_bytes,
    hosts_of_token,
)

STEP = TrainingStep(
    tokens=1000,
    layers=3,
    hidden=4096,
    top_k=2,
    hosts=4,
    weight_bytes=4,
    expert_parameters=10_000,
    trunk_parameters=700,
)


@pytest.mark.parametrize(("hosts", "top_k"), [(1, 4), (2, 2), (3, 2), (4, 3)])
def test_the_hosts_of_a_token(hosts: int, top_k: int) -> None:
    choices = list(itertools.product(range(hosts), repeat=top_k))
    mean = sum(len(set(one)) for one in choices) / len(choices)
    assert hosts_of_token(hosts, top_k) == pytest.approx(mean)


@pytest.mark.parametrize(("weight_bytes", "ratio"), [(4, 2.5), (2, 2.0), (8, 5.0)])
def test_calls_against_an_all_to_all_in_bfloat16(weight_bytes: int, ratio: float) -> None:
    step = replace(STEP, weight_bytes=weight_bytes)
    assert step.bytes().calls / step.all_to_all == pytest.approx(ratio)
    assert replace(step, lent=True).bytes().calls == 0


def test_ids_and_gates_are_little() -> None:
    whole, rows = call_bytes(100, 4096, 2, columns=2), call_bytes(100, 4096, 2)
    assert whole - rows == 100 * 2 * 20  # ids twice, gates and their gradients in float32
    assert whole < 1.001 * rows


@pytest.mark.parametrize(
    ("replicas", "redundancy", "lent", "gradients", "weights", "trunk"),
    [
        (1, 0, False, 0, 0, 2),
        (2, 0, False, 1, 1, 2),
        (3, 0, False, 2, 2, 2),
        (1, 1, False, 1, 0, 3),  # the other owner serves no replica
        (2, 1, False, 2, 0, 3),
        (2, 2, False, 4, 0, 4),  # two owners lack one of two sources, the third one both
        (3, 1, False, 4, 1, 3),
        (1, 0, True, 1, 0, 2),
        (2, 1, True, 2, 0, 3),
    ],
)
def test_what_takes_the_bulk_path(
    replicas: int, redundancy: int, lent: bool, gradients: int, weights: int, trunk: int
) -> None:
    """The numbers say how often all parameters travel."""
    for weight_bytes, wide in ((4, 4), (2, 4), (8, 8)):
        step = replace(
            STEP,
            replicas=replicas,
            redundancy=redundancy,
            lent=lent,
            weight_bytes=weight_bytes,
        )
        found = step.bytes()
        assert found == StepBytes(
            found.calls,
            gradients * wide * step.expert_parameters,
            weights * weight_bytes * step.expert_parameters,
            trunk * weight_bytes * step.trunk_parameters,
        )


def test_no_more_replicas_and_owners_than_hosts() -> None:
    many = replace(STEP, hosts=2, replicas=5, redundancy=7)
    assert many.bytes() == replace(many, replicas=2, redundancy=1).bytes()
