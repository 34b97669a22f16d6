"""Answers of a given JSON form (`response_format`): which tokens may come next, by llguidance.

Shape suffixes: V = vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..proto.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

# One form of whitespace: a model that is not sure would fill its answer with it.
_OPTIONS = {"whitespace_flexible": False}


class Grammar:
    """One answer's, as far as it is generated."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._end_V = np.zeros(vocabulary, dtype=bool)
        self._end_V[list(eos_token_ids)] = True

    def allowed(self) -> np.ndarray:
        """(V,) bool: tokens that may come next; where the answer is complete those that end it."""
        if self._matcher.is_stopped():  # also if it has failed
            return self._end_V
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)

    def take(self, token: int) -> None:
        """A token was chosen."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Grammars:
    """Of one model; the first use takes about a second."""

    def __init__(
        self,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
        vocabulary: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._load = tokenizer
        self._vocabulary = vocabulary
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()

    def begin(self, schema: str, already: Sequence[int] = ()) -> Grammar:
        """For an answer of a JSON schema. Raises RequestError that says what is wrong with it."""
        from llguidance import LLMatcher

        if not self._eos_token_ids:
            raise _refused("this model has no token that ends a text")
        with self._lock:
            tokenizer = self._tokenizer
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise _refused(str(error)) from None
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        matcher.try_consume_tokens(list(already))
        return Grammar(matcher, self._vocabulary, self._eos_token_ids)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(
                self._load(),  # pyright: ignore[reportArgumentType]
                n_vocab=self._vocabulary,
                eos_token=self._eos_token_ids,
            )
        except ValueError as error:
            raise _refused(f"not with this model's tokenizer: {error}") from None


def _refused(why: str) -> RequestError:
    return RequestError(f"response_format: {why.splitlines()[0]}", param="response_format")
