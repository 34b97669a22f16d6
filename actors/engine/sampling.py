"""Choose tokens: apply what requests ask for to the model's logits.

The order is vLLM's, so that both engines give the same results: bias, penalties (repetition,
frequency, presence), temperature, `min_p`, `top_k`, `top_p`.

Shape suffixes: R = rows, S = rows of one call, V = vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ...proto.errors import InternalError, MoesaicError
from .engine import Sampling, TokenLogprob
from .grammar import Grammar

# Lower temperatures count as greedy: dividing logits by them would overflow fp32.
MIN_TEMPERATURE = 1e-5


def not_finite(what: str) -> InternalError:
    """Return the error of a request for which the model computed ``what`` with NaN or infinity."""
    return InternalError(
        f"the model computed {what} with NaN or infinite values; check the checkpoint, or set the "
        "model's dtype to bfloat16 or float32 if it is float16"
    )


class RequestSampler:
    """What one request's next token depends on besides the logits."""

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        already: Sequence[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        """Create a sampler.

        ``already`` has tokens that were generated before; ``grammar`` has already been
        advanced by them.
        """
        self.sampling = sampling
        self._grammar = grammar
        self.greedy = sampling.temperature < MIN_TEMPERATURE
        self.plain = not (
            grammar is not None
            or sampling.logit_bias
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.repetition_penalty != 1
        )
        self._logprobs: list[TokenLogprob] = []  # of tokens that are not sent yet
        self.prompt_ids = prompt_ids
        self._generated = Counter(() if self.plain else already)  # token -> how often
        self._position = len(already)
        self._generator: torch.Generator | None = None

    @property
    def trivial(self) -> bool:
        """Whether the request takes the token with the largest logit and needs nothing more."""
        return self.greedy and self.plain and self.sampling.logprobs is None

    @property
    def fault(self) -> MoesaicError | None:
        """Why no more tokens can be chosen for the request, or None."""
        return None if self._grammar is None else self._grammar.fault

    def chose(self, token: int, logits_V: Tensor) -> None:
        self._position += 1
        if self._grammar is not None:
            self._grammar.take(token)
        if not self.plain:
            self._generated[token] += 1
        if self.sampling.logprobs is not None:
            logprobs_V = torch.log_softmax(logits_V, dim=-1)
            values, ids = logprobs_V.topk(min(self.sampling.logprobs, logprobs_V.numel()))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
            self._logprobs.append(TokenLogprob(token, float(logprobs_V[token]), top))

    def take_logprobs(self, tokens: int) -> tuple[TokenLogprob, ...]:
        """Remove and return the log-probabilities of the next ``tokens`` tokens that are sent."""
        taken, self._logprobs = tuple(self._logprobs[:tokens]), self._logprobs[tokens:]
        return taken

    def adjust(self, logits_V: Tensor) -> Tensor:
        """Return the logits, (V,), with bias and penalties; -inf where the grammar forbids a token.

        OpenAI's frequency and presence penalties count the tokens generated so far; the
        repetition penalty (Keskar et al., "CTRL", 2019) also counts those of the prompt.
        """
        one = self.sampling
        adjusted_V = logits_V.clone()
        device = logits_V.device
        if one.logit_bias:
            ids, biases = zip(*one.logit_bias, strict=True)
            adjusted_V[torch.tensor(ids, device=device)] += torch.tensor(
                biases, dtype=logits_V.dtype, device=device
            )
        if one.repetition_penalty != 1:
            ids = sorted({*self.prompt_ids, *self._generated})
            seen = torch.tensor(ids, dtype=torch.long, device=device)
            score = adjusted_V[seen]
            adjusted_V[seen] = torch.where(
                score > 0, score / one.repetition_penalty, score * one.repetition_penalty
            )
        if self._generated and (one.frequency_penalty or one.presence_penalty):
            ids = torch.tensor(list(self._generated), device=device)
            counts = torch.tensor(
                list(self._generated.values()), dtype=logits_V.dtype, device=device
            )
            adjusted_V[ids] -= one.frequency_penalty * counts + one.presence_penalty
        if self._grammar is not None:
            allowed_V = torch.from_numpy(self._grammar.allowed()).to(device)
            adjusted_V.masked_fill_(~allowed_V, -torch.inf)
        return adjusted_V

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return the request's own generator of random numbers if it has a seed.

        So its text depends neither on the other requests of the batch nor on where it
        began: a request may continue in another trunk.
        """
        if self.sampling.seed is None:
            return None
        if self._generator is None:
            self._generator = torch.Generator(device)
        return self._generator.manual_seed(seed_at(self.sampling.seed, self._position))


def seed_at(seed: int, position: int) -> int:
    """Return the seed of the random numbers for one token of a request, 0 to 2^63 - 1.

    SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014), so
    that seeds of neighbouring positions are unrelated.
    """
    mask = 2**64 - 1
    mixed = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return (mixed ^ (mixed >> 31)) >> 1


def choose(
    logits_RV: Tensor, samplers: Sequence[RequestSampler], generator: torch.Generator
) -> Tensor:
    """Return one token for each row, ``(R,)``."""
    rows = [row for row, one in enumerate(samplers) if not one.plain]
    if rows:
        logits_RV = logits_RV.clone()
        for row in rows:
            logits_RV[row] = samplers[row].adjust(logits_RV[row])
    tokens_R = logits_RV.argmax(dim=-1)
    drawn = [row for row, one in enumerate(samplers) if not one.greedy]
    if drawn:
        rows_S = torch.tensor(drawn, device=logits_RV.device)
        chosen = [samplers[row] for row in drawn]
        tokens_R[rows_S] = _draw(logits_RV[rows_S], chosen, generator)
    return tokens_R


def _draw(
    logits_SV: Tensor, samplers: Sequence[RequestSampler], generator: torch.Generator
) -> Tensor:
    """Return a random token for each row, ``(S,)``."""
    kept_SV = _kept(logits_SV, [one.sampling for one in samplers])
    # argmax of p / e with e ~ Exp(1) is a draw from p: the Gumbel-max trick, since -log(e) is
    # Gumbel noise that is added to log(p). Each row has noise of its own, so that a row with a seed
    # draws the same token whichever other rows the batch has.
    noise_SV = torch.empty_like(kept_SV).exponential_(generator=generator)
    for row, one in enumerate(samplers):
        own = one.generator(kept_SV.device)
        if own is not None:
            noise_SV[row].exponential_(generator=own)
    return (kept_SV / noise_SV).argmax(dim=-1)


def _kept(logits_SV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return probabilities, (S, V), with 0 for tokens that min_p, top_k or top_p exclude."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_SV.device)[:, None]

    temperature_S1 = column([one.temperature for one in samplings])
    shifted_SV = logits_SV - logits_SV.amax(dim=-1, keepdim=True)
    probs_SV = torch.softmax(shifted_SV / temperature_S1, dim=-1)
    if any(one.min_p > 0 for one in samplings):
        least_S1 = column([one.min_p for one in samplings]) * probs_SV.amax(dim=-1, keepdim=True)
        probs_SV = probs_SV.masked_fill(probs_SV < least_S1, 0.0)
    if all(one.top_p >= 1 and not one.top_k for one in samplings):  # spares the sort
        return probs_SV
    sorted_SV, order_SV = probs_SV.sort(dim=-1, descending=True)
    vocabulary = probs_SV.shape[-1]
    place_V = torch.arange(vocabulary, device=logits_SV.device)
    sorted_SV = sorted_SV.masked_fill(
        place_V >= column([one.top_k or vocabulary for one in samplings]), 0.0
    )
    # top_p of what min_p and top_k left: a token stays if the likelier ones before it together
    # have less than top_p of the total.
    total_S1 = sorted_SV.sum(dim=-1, keepdim=True)
    before_SV = sorted_SV.cumsum(dim=-1) - sorted_SV
    out_SV = before_SV >= column([one.top_p for one in samplings]) * total_S1
    return torch.zeros_like(probs_SV).scatter(1, order_SV, sorted_SV.masked_fill(out_SV, 0.0))
