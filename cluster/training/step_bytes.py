"""How many bytes of tensors a training step moves between processes: the formula of the docs.

Headers of messages and files are not counted; they are below 1 % for a hidden size of 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

_IDS, _GATES = 4, 4  # bytes of an id, and of a gate's weight (float32)
# How fast tensors go from host to host, for plans: 100 MB through shared memory, and over gRPC as
# between machines, in `benchmarks/speed/bulk.py` on an AMD EPYC with 2 cores.
SHARED_BYTES_PER_S, GRPC_BYTES_PER_S = 4e9, 0.4e9


class StepBytes(NamedTuple):
    """Bytes of one step, over all hosts, by kind."""

    calls: float  # forward and backward calls, both ways
    expert_gradients: float  # to owners that lack them
    expert_weights: float  # the next version, to replicas whose hosts do not own it
    trunk: float  # its gradients to owners, and its new weights back

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep:
    """What the bytes of a step depend on. Every replica of an expert has gradients."""

    tokens: int
    layers: int  # with experts
    hidden: int
    top_k: int
    hosts: int
    weight_bytes: int  # of one weight: 4 in float32, 2 in bfloat16
    expert_parameters: int  # of all experts
    trunk_parameters: int
    replicas: int = 1
    redundancy: int = 0
    lent: bool = False  # the trunk's process computes all calls

    def bytes(self) -> StepBytes:
        wide = wide_bytes(self.weight_bytes)
        replicas, owners = min(self.replicas, self.hosts), min(1 + self.redundancy, self.hosts)
        both = min(replicas, owners)  # hosts that serve an expert and own it
        sources = owners if self.lent else owners * replicas - both
        rows = self.tokens * self.layers * hosts_of_token(self.hosts, self.top_k)
        return StepBytes(
            calls=0 if self.lent else call_bytes(rows, self.hidden, self.weight_bytes),
            expert_gradients=wide * self.expert_parameters * sources,
            expert_weights=self.weight_bytes * self.expert_parameters * (replicas - both),
            trunk=self.weight_bytes * self.trunk_parameters * (owners + 1),
        )

    @property
    def all_to_all(self) -> float:
        """Bytes of the calls in expert parallelism, with one copy of a token for each host."""
        rows = self.tokens * self.layers * hosts_of_token(self.hosts, self.top_k)
        return all_to_all_bytes(rows, self.hidden)


def replica_bytes(*, gradient: int, weights: int, redundancy: int) -> tuple[int, int]:
    """Return the bytes that one more replica of an expert adds to a step.

    That is on a host that does not own the expert, and on one that does. ``gradient`` and
    ``weights`` are the bytes of its gradient and its weights. Each owner fetches the gradient of
    each replica, and each replica the new weights; an owner has its own.
    """
    return gradient * (1 + redundancy) + weights, gradient * redundancy


def wide_bytes(weight_bytes: int) -> int:
    """Return the size of a number in sums, gradients and masters."""
    return max(4, weight_bytes)


def hosts_of_token(hosts: int, top_k: int) -> float:
    """Return on how many hosts a token's experts are, if each of them is on any one alike."""
    return hosts * (1 - (1 - 1 / hosts) ** top_k)


def call_bytes(rows: float, hidden: int, weight_bytes: int, columns: float = 0) -> float:
    """Return the bytes of a forward and a backward call with so many rows, both ways.

    A row is what one host gets of a token: x, and the gradient of the sum. Its answers are the sum
    and the gradient of x. ``columns`` is the number of assignments in a row, with ids and gate
    weights in both calls, and the gradients of these weights in the answer.
    """
    wide = wide_bytes(weight_bytes)
    assignment = 2 * _IDS + 3 * max(_GATES, wide)
    return rows * (hidden * (2 * weight_bytes + 3 * wide) + columns * assignment)


def all_to_all_bytes(copies: float, hidden: int) -> float:
    """Return the bytes of an all-to-all in bfloat16: x, the result, and the gradients of both.

    ``copies`` is how many copies of a token's row travel in each of them, over all layers.
    """
    return 4 * 2 * copies * hidden
