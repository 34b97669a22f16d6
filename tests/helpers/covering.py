"""Covering arrays: few cases in which each two values of different factors meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Pairs = set[tuple[tuple[str, Any], ...]]  # of (factor, value)

_TRIES = 40  # cases that are tried for each one that is taken


def pairs_of(case: Mapping[str, Any]) -> Pairs:
    """Return the pairs that a case covers."""
    return set(itertools.combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def possible_pairs(
    factors: Mapping[str, Sequence[Any]], excluded: Callable[[Case], bool] = lambda _: False
) -> Pairs:
    """Return the pairs of values that may meet."""
    return {
        pair
        for two in itertools.combinations(sorted(factors), 2)
        for values in itertools.product(*(factors[name] for name in two))
        if not excluded(dict(pair := tuple(zip(two, values, strict=True))))
    }


def covering_cases(
    factors: Mapping[str, Sequence[Any]],
    excluded: Callable[[Case], bool] = lambda _: False,
    *,
    seed: int = 0,
) -> list[Case]:
    """Return cases that cover each pair; greedy, so not the fewest.

    ``excluded`` tells of a case of any two factors whether these values cannot meet. Each case is
    the best of some that begin with a pair that is not covered yet, and take the other factors in
    random order, each with the value that covers most.
    """
    chance = random.Random(seed)
    possible = possible_pairs(factors, excluded)
    missing, cases = set(possible), []
    while missing:
        first = sorted(missing, key=repr)
        tried = [
            _grown(dict(chance.choice(first)), factors, possible, missing, chance)
            for _ in range(_TRIES)
        ]
        best = max(tried, key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        cases.append({name: best[name] for name in factors})
    return cases


def _grown(
    case: Case,
    factors: Mapping[str, Sequence[Any]],
    possible: Pairs,
    missing: Pairs,
    chance: random.Random,
) -> Case:
    """Give the other factors values that may meet those that are there."""
    others = [name for name in factors if name not in case]
    chance.shuffle(others)
    for name in others:
        values = [v for v in factors[name] if pairs_of(case | {name: v}) <= possible]
        chance.shuffle(values)
        case[name] = max(values, key=lambda v: len(pairs_of(case | {name: v}) & missing))
    return case
