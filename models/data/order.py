"""Which sequences a step trains on."""

from __future__ import annotations

import hashlib

import torch

from ...proto.errors import BadInput


class Order:
    """An endless walk over ``sequences`` numbers, ``per_step`` in each step.

    Each epoch has all numbers in an order of its own, which depends on nothing but ``seed`` and the
    number of the epoch. A step may begin in one epoch and end in another. Raises BadInput if there
    are no sequences or none in a step.
    """

    def __init__(self, sequences: int, per_step: int, seed: int) -> None:
        for name, value in (("sequences", sequences), ("per_step", per_step)):
            if value < 1:
                raise BadInput(f"{name}: has to be at least 1, not {value}")
        self.sequences = sequences
        self.per_step = per_step
        self.seed = seed
        # Of two epochs at most, because a step may need both, and the next step again.
        self._permutations: dict[int, torch.Tensor] = {}

    def numbers(self, step: int) -> list[int]:
        """Return the numbers of the sequences of ``step``, which counts from 0."""
        if step < 0:
            raise BadInput(f"step: has to be at least 0, not {step}")
        place, left = step * self.per_step, self.per_step
        found: list[int] = []
        while left:
            epoch, begin = divmod(place, self.sequences)
            part = self._permutation(epoch)[begin : begin + left].tolist()
            found += part
            place, left = place + len(part), left - len(part)
        return found

    def epoch(self, step: int) -> float:
        """Return how many epochs are over when ``step`` begins."""
        return step * self.per_step / self.sequences

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._permutations:
            while len(self._permutations) > 1:
                del self._permutations[min(self._permutations)]
            digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            self._permutations[epoch] = torch.randperm(self.sequences, generator=generator)
        return self._permutations[epoch]
