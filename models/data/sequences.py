"""Sequences of equal length: windows of a token file that do not overlap."""

from __future__ import annotations

from torch import Tensor

from ...proto.errors import BadInput
from .token_file import TokenFile

NOT_LEARNED = -100  # the label that transformers' losses leave out


def count_sequences(tokens: TokenFile, length: int) -> int:
    """Return how many sequences of ``length`` tokens the file has.

    The tokens after the last one that is full are left out. Raises BadInput if there is none, or if
    ``length`` is below 2: a sequence's first token is no target.
    """
    if length < 2:
        raise BadInput(f"sequence_length: has to be at least 2, not {length}")
    if len(tokens) < length:
        raise BadInput(
            f"{tokens.path}: has {len(tokens)} tokens, fewer than one sequence of {length}; give "
            "more documents or a shorter sequence_length"
        )
    return len(tokens) // length


def sequence(tokens: TokenFile, number: int, length: int) -> tuple[Tensor, Tensor]:
    """Return the ids and the labels of a sequence, both int64 (length,).

    A label is the token at its own place, as models of transformers want it: they predict
    ``labels[1:]`` from ``ids[:-1]``. It is -100 where the token is not learned. Raises BadInput if
    the file has no such sequence.
    """
    ids, learned = tokens.read(number * length, length)
    return ids, ids.masked_fill(~learned, NOT_LEARNED)


def count_targets(labels: Tensor) -> int:
    """Return how many tokens of a sequence count for its loss; its first one never does."""
    return int((labels[1:] != NOT_LEARNED).sum())
