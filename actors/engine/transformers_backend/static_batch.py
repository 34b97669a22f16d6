"""Requests that began together, as one padded batch through the parts of transformers' `generate`.

Any model that can generate works this way: with its own `prepare_inputs_for_generation`, its own
cache, and its encoder if it has one. All private names of transformers that this relies on are
here; ``tests/integration/engine/test_static_batching.py`` compares the texts with `generate`'s.

Shape suffixes: R = requests, T = tokens of the padded batch, V = vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from ..sampling import RequestSampler


@dataclass
class BatchedRequest:
    """One request in this batch."""

    key: str
    prompt_ids: Sequence[int]
    left: int  # tokens that it may still get
    sampler: RequestSampler
    generated: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.generated)

    @property
    def most_tokens(self) -> int:
        """The most tokens that the request can have in the cache."""
        return self.tokens + self.left


class StaticBatch:
    """A static batch from its first step to its last; requests leave it when they are done."""

    def __init__(self, model: PreTrainedModel, requests: Sequence[BatchedRequest]) -> None:
        self.requests = list(requests)
        self.rows_each = 0  # rows of each request in the batch in flight
        self._model: Any = model
        self._encodes = bool(model.config.is_encoder_decoder)
        self._named = set(inspect.signature(model.forward).parameters)
        self._kwargs: dict[str, Any] = {"use_cache": True}
        self._input_ids: Tensor | None = None  # None before the first step
        self._new = True

    @property
    def is_first_padded(self) -> bool:
        """Whether nothing was generated yet, and texts of several lengths share the batch."""
        lengths = {request.tokens for request in self.requests}
        return self._new and len(lengths) > 1

    def forward(self) -> Tensor:
        """Return (R, V) float32: logits of the next tokens."""
        first = self._input_ids is None
        if first:
            self._input_ids = self._begin()
        inputs = self._model.prepare_inputs_for_generation(
            self._input_ids,
            next_sequence_length=None if first else 1,
            is_first_iteration=first,
            **self._kwargs,
        )
        self.rows_each = inputs["decoder_input_ids" if self._encodes else "input_ids"].shape[1]
        outputs = self._model(**inputs, return_dict=True)
        self._kwargs = self._model._update_model_kwargs_for_generation(
            outputs, self._kwargs, is_encoder_decoder=self._encodes
        )
        return outputs.logits[:, -1].float()

    def take(self, tokens: Sequence[int]) -> None:
        """Append the next token of each request."""
        assert self._input_ids is not None
        self._new = False
        for request, token in zip(self.requests, tokens, strict=True):
            request.generated.append(token)
            request.left -= 1
        new = torch.tensor(tokens, device=self._input_ids.device)[:, None]
        self._input_ids = torch.cat([self._input_ids, new], dim=1)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the requests of ``rows``; the others are done."""
        if len(rows) == len(self.requests):
            return
        requests, self.requests = self.requests, [self.requests[row] for row in rows]
        if self._input_ids is None or not rows:
            return
        index = torch.tensor(rows, device=self._input_ids.device)
        self._input_ids = self._input_ids[index]
        self._kwargs = {
            name: _selected(value, index, len(requests)) for name, value in self._kwargs.items()
        }

    # ---- the first step -------------------------------------------------------------------------

    def _begin(self) -> Tensor:
        model, device = self._model, self._model.device
        if self._encodes:
            ids_RT, mask_RT = _padded([r.prompt_ids for r in self.requests], device, left=False)
            self.rows_each = ids_RT.shape[1]
            self._kwargs["attention_mask"] = mask_RT
            self._kwargs["encoder_outputs"] = model.get_encoder()(
                input_ids=ids_RT, attention_mask=mask_RT, return_dict=True
            )
            start = model.generation_config.decoder_start_token_id
            if start is None:
                start = model.config.decoder_start_token_id
            ids_RT = torch.tensor([[start, *r.generated] for r in self.requests], device=device)
        else:
            texts = [[*r.prompt_ids, *r.generated] for r in self.requests]
            ids_RT, mask_RT = _padded(texts, device, left=True)
            # A text's first token has position 0, whatever padding is to its left.
            if "position_ids" in self._named:
                self._kwargs["position_ids"] = (mask_RT.cumsum(-1) - 1).clamp(min=0)
            if "attention_mask" in self._named and not bool(mask_RT.all()):
                self._kwargs["attention_mask"] = mask_RT
            if "logits_to_keep" in self._named:
                self._kwargs["logits_to_keep"] = 1
        longest = max(request.most_tokens for request in self.requests)
        model._prepare_cache_for_generation(
            GenerationConfig(use_cache=True), self._kwargs, None, len(self.requests), longest
        )
        return ids_RT


def together(
    model: PreTrainedModel, requests: Sequence[BatchedRequest], most_tokens: int, *, pads: bool
) -> int:
    """Return how many of the first requests can share one padded batch; at least one.

    The batch has at most ``most_tokens`` tokens, padding included. Without ``pads`` all
    requests must have the same length.
    """
    longest = 0
    for count, request in enumerate(requests):
        longest = max(longest, request.tokens)
        # A decoder's texts are not padded if there is an encoder, so they must be equally long.
        # A request that was parked starts again with the tokens that it had.
        alike = not model.config.is_encoder_decoder or (
            len(request.generated) == len(requests[0].generated)
        )
        alike &= pads or request.tokens == requests[0].tokens
        if count and (not alike or longest * (count + 1) > most_tokens):
            return count
    return len(requests)


def _padded(
    texts: Sequence[Sequence[int]], device: torch.device, *, left: bool
) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (R, T), padded on the left or on the right."""
    longest = max(map(len, texts))
    ids_RT = torch.zeros(len(texts), longest, dtype=torch.long)
    mask_RT = torch.zeros_like(ids_RT)
    for row, text in enumerate(texts):
        where = slice(longest - len(text), None) if left else slice(0, len(text))
        ids_RT[row, where] = torch.tensor(text)
        mask_RT[row, where] = 1
    return ids_RT.to(device), mask_RT.to(device)


def _selected(value: Any, index: Tensor, rows: int) -> Any:
    if isinstance(value, Tensor):
        return value[index] if value.dim() and value.shape[0] == rows else value
    if isinstance(value, Cache):
        value.reorder_cache(index)  # pyright: ignore[reportArgumentType]
        return value
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _selected(one, index, rows) for name, one in value.items()})
    return value
