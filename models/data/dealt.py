"""Which sequences of a file of tokens are learned from, in which order, and which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from ...proto.errors import BadInput
from .order import Order
from .sequences import count_sequences
from .token_file import TokenFile

# Sequences whose flags are read at once.
_AT_ONCE = 4096


class Dealt:
    """The sequences of ``length`` tokens that a file has, dealt to steps and evaluations.

    Sequences without a target are left out. ``held_out`` of the others, chosen by ``seed``, are for
    evaluation. Raises BadInput if none are left to learn from.
    """

    def __init__(
        self, tokens: TokenFile, *, length: int, per_step: int, held_out: float, seed: int
    ) -> None:
        usable, self.largest_token = _with_targets(tokens, length)
        if not usable:
            raise BadInput(
                f"no sequence of {length} tokens has something to learn; give more documents, or "
                "shorter sequences"
            )
        count = round(held_out * len(usable))
        # The part that was asked for may be less than one.
        count = max(count, 1) if held_out and len(usable) > 1 else count
        if count >= len(usable):
            raise BadInput(
                f"{len(usable)} sequences of {length} tokens have something to learn, and all of "
                "them are held out; give more documents, or a smaller held_out"
            )
        digest = hashlib.sha256(f"held out {seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        chosen = torch.randperm(len(usable), generator=generator)[:count].tolist()
        self.held_out: Sequence[int] = [usable[place] for place in chosen]
        out = set(self.held_out)
        self._learned = [number for number in usable if number not in out]
        self._order = Order(len(self._learned), per_step, seed)

    def __len__(self) -> int:
        """How many sequences are learned from in an epoch."""
        return len(self._learned)

    def numbers(self, step: int) -> list[int]:
        """Return the numbers of the sequences of a step, which counts from 0."""
        return [self._learned[place] for place in self._order.numbers(step)]

    def epoch(self, step: int) -> float:
        """Return how many epochs are over when a step begins."""
        return self._order.epoch(step)


def _with_targets(tokens: TokenFile, length: int) -> tuple[list[int], int]:
    """Return the sequences that have some, and the largest token of all."""
    found: list[int] = []
    largest = 0
    count = count_sequences(tokens, length)
    for begin in range(0, count, _AT_ONCE):
        many = min(_AT_ONCE, count - begin)
        ids, learned = tokens.read(begin * length, many * length)
        largest = max(largest, int(ids.max()))
        # A sequence's first token is no target.
        has_some = learned.view(many, length)[:, 1:].any(dim=1)
        found += (has_some.nonzero().flatten() + begin).tolist()
    return found, largest
