"""How tokens are chosen, against the distributions and formulas that requests name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from moesaic.actors.engine.engine import Sampling
from moesaic.actors.engine.sampling import RequestSampler, choose, seed_at

LOGITS_V = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0, -8.0])
DRAWS = 20_000


def asked(**values: Any) -> Sampling:
    return Sampling(max_tokens=8, **{"temperature": 1.0, **values})


def drawn(sampling: Sampling, logits_V: torch.Tensor = LOGITS_V) -> np.ndarray:
    """How often each token was chosen."""
    samplers = [RequestSampler(sampling, ()) for _ in range(DRAWS)]
    generator = torch.Generator().manual_seed(0)
    tokens_R = choose(logits_V.expand(DRAWS, -1), samplers, generator)
    return np.bincount(tokens_R.numpy(), minlength=len(logits_V))


def expected(sampling: Sampling) -> np.ndarray:
    """By the words of the parameters, one after the other."""
    probs = np.exp(LOGITS_V.numpy().astype(float) / sampling.temperature)
    probs /= probs.sum()
    probs[probs < sampling.min_p * probs.max()] = 0
    order = np.argsort(-probs)
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= sampling.top_p]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_p": 0.7},
        {"top_k": 3},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.05, "top_k": 6, "top_p": 0.9},
        {"top_k": 1000},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_what_was_asked_for(values: dict[str, Any]) -> None:
    sampling = asked(**values)
    counts, probs = drawn(sampling), expected(sampling)
    assert not counts[probs == 0].any()
    there = probs * DRAWS >= 1
    assert (
        chisquare(counts[there], probs[there] / probs[there].sum() * counts[there].sum()).pvalue
        > 1e-4
    )


def texts(
    samplings: Sequence[Sampling], steps: int = 12, already: Sequence[int] = ()
) -> list[list[int]]:
    """Each request's tokens, all in one batch; the logits depend on the request's own tokens."""
    samplers = [RequestSampler(one, (), already) for one in samplings]
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))
    found = [list(already) for _ in samplers]
    for step in range(len(already), steps):
        rows = [torch.roll(LOGITS_V, step + sum(tokens)) for tokens in found]
        tokens_R = choose(torch.stack(rows), samplers, generator).tolist()
        for tokens, sampler, token in zip(found, samplers, tokens_R, strict=True):
            tokens.append(token)
            sampler.chose(token, LOGITS_V)
    return found


def test_a_seed_gives_the_same_text_alone_and_in_company() -> None:
    mine = asked(seed=7, temperature=1.3)
    (alone,) = texts([mine])
    others = [asked(), asked(seed=8), asked(temperature=0.0), asked(top_p=0.5, seed=9)]
    for place in range(len(others) + 1):
        company = [*others[:place], mine, *others[place:]]
        assert texts(company)[place] == alone
    assert texts([replace(mine, seed=8)])[0] != alone


def test_a_text_that_goes_on_elsewhere_is_the_same() -> None:
    for one in (
        asked(seed=7, temperature=1.3),
        asked(temperature=0.0, frequency_penalty=1.5),
        asked(seed=3, presence_penalty=1.0, repetition_penalty=1.5),
    ):
        (whole,) = texts([one], steps=24)
        assert texts([one], steps=24, already=whole[:10]) == [whole]


def test_the_random_numbers_of_a_seed_have_nothing_in_common_from_token_to_token() -> None:
    """Neither those of one seed at all places, nor those of all seeds at one."""
    for pairs in ([(5, n) for n in range(2000)], [(n, 5) for n in range(2000)]):
        drawn = []
        for seed, position in pairs:
            generator = torch.Generator().manual_seed(seed_at(seed, position))
            drawn.append(int(torch.randint(10, (), generator=generator)))
        assert chisquare(np.bincount(drawn, minlength=10)).pvalue > 1e-3
        both = np.bincount([10 * a + b for a, b in pairwise(drawn)], minlength=100)
        assert chisquare(both).pvalue > 1e-3
    assert all(0 <= seed_at(seed, 3) < 2**63 for seed in (-(2**63), -1, 0, 2**63 - 1))


def test_a_greedy_request_takes_the_largest_logit_whatever_else_is_asked_for() -> None:
    greedy = asked(temperature=0.0, top_p=0.1, top_k=4, min_p=0.5)
    assert texts([greedy, asked()])[0] == texts([asked(temperature=0.0)])[0]


def test_biases_ban_and_force_tokens() -> None:
    banned = asked(logit_bias=((0, -100.0), (1, -100.0)))
    assert not drawn(banned)[:2].any()
    forced = asked(logit_bias=((7, 100.0),))
    assert drawn(forced)[7] == DRAWS
    greedy = asked(temperature=0.0, logit_bias=((6, 10.0),))
    assert texts([greedy], steps=1) == [[6]]


def test_penalties_are_those_of_their_formulas() -> None:
    sampler = RequestSampler(
        asked(repetition_penalty=1.5, frequency_penalty=0.25, presence_penalty=0.5), [1, 5]
    )
    for token in (0, 0, 3):
        sampler.chose(token, LOGITS_V)
    want = LOGITS_V.clone()
    for token in (0, 1, 3, 5):
        want[token] = want[token] / 1.5 if want[token] > 0 else want[token] * 1.5
    want[0] -= 2 * 0.25 + 0.5
    want[3] -= 0.25 + 0.5
    torch.testing.assert_close(sampler.adjust(LOGITS_V), want)


def test_a_frequency_penalty_keeps_a_greedy_text_from_repeating_itself() -> None:
    sampler = RequestSampler(asked(temperature=0.0, frequency_penalty=2.0), ())
    generator = torch.Generator()
    found = []
    for _ in range(4):
        (token,) = choose(LOGITS_V[None], [sampler], generator).tolist()
        sampler.chose(token, LOGITS_V)
        found.append(token)
    assert found == [0, 1, 2, 3]


def test_log_probabilities_are_the_models_own() -> None:
    """Before bias, penalties and temperature; the chosen token need not be among the likeliest."""
    sampler = RequestSampler(asked(temperature=0.0, logprobs=2, logit_bias=((7, 100.0),)), ())
    (token,) = choose(LOGITS_V[None], [sampler], torch.Generator()).tolist()
    sampler.chose(token, LOGITS_V)
    (found,) = sampler.take_logprobs(5)
    want_V = torch.log_softmax(LOGITS_V, dim=0).tolist()
    assert found.token_id == 7
    assert found.logprob == pytest.approx(want_V[7])
    assert [id_ for id_, _ in found.top] == [0, 1]
    assert [value for _, value in found.top] == pytest.approx(want_V[:2])
    assert sampler.take_logprobs(5) == ()
