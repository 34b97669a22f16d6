"""Hold answers to a form (`AnswerForm`): which tokens may come next, by llguidance.

Shape suffixes: V = vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...proto.errors import RequestError
from ..text.answer_form import COMPACT, AnswerForm, lark
from .grammar_errors import check_size, explain, refusal

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

# llguidance's reasons for stopping at a complete text; any other reason is a fault.
_COMPLETE = ("NotStopped", "NoExtension", "NoExtensionBias", "EndOfSentence")


class Grammar:
    """The grammar of one answer, advanced by the tokens generated so far."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._end_V = np.zeros(vocabulary, dtype=bool)
        self._end_V[list(eos_token_ids)] = True

    def allowed(self) -> np.ndarray:
        """Return (V,) bool: the tokens that may come next.

        Once the answer is complete these are the tokens that end it.
        """
        if self._matcher.is_stopped():  # complete, or failed
            return self._end_V
        # One bit for each token, the least significant bit of each byte first.
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)

    def take(self, token: int) -> None:
        """Advance the grammar by a token that was chosen."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    @property
    def fault(self) -> RequestError | None:
        """Why the answer ended before it was complete, or None.

        llguidance stops when checking the schema takes too much time or memory.
        """
        reason = self._matcher.stop_reason()
        if reason in _COMPLETE:
            return None
        return RequestError(
            "response_format or tools: the schema cannot be enforced any further: "
            f"{explain(self._matcher.get_error() or reason)}",
            param="response_format",
        )


class Grammars:
    """The grammars of one model; the first use takes about a second."""

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
        self._loaded: tuple[LLTokenizer, dict[str, int]] | None = None

    def begin(self, form: AnswerForm, already: Sequence[int] = ()) -> Grammar:
        """Return the grammar of an answer of this form that already has the tokens ``already``.

        Raises RequestError that says what is wrong with the form.
        """
        from llguidance import LLMatcher

        text = self.text(form)
        matcher = LLMatcher(self._tokenizer()[0], text, log_level=0)
        if matcher.is_error():
            raise refusal(form, matcher.get_error(), self._check)
        matcher.compute_bitmask()  # the first mask takes longest, and may exceed the limits
        if matcher.is_error():
            raise refusal(form, matcher.get_error(), self._check)
        matcher.try_consume_tokens(list(already))
        return Grammar(matcher, self._vocabulary, self._eos_token_ids)

    def text(self, form: AnswerForm) -> str:
        """Return the grammar in llguidance's syntax. Raises RequestError."""
        if not self._eos_token_ids:
            raise _refused("this model has no token that ends a text")
        check_size(form)
        try:
            if form.schema_alone is not None:
                return _of_schema(form.schema_alone)
            return lark(form, self._special)
        except ValueError as error:
            raise refusal(form, str(error), self._check) from None

    def _check(self, schema: dict[str, Any]) -> str:
        """Return what is wrong with a schema; "" for nothing."""
        from llguidance import LLMatcher

        try:
            text = _of_schema(schema)
        except ValueError as error:
            return str(error)
        is_error, messages = LLMatcher.validate_grammar_with_warnings(text, self._tokenizer()[0])
        return messages[0] if is_error else ""

    def _special(self, mark: str) -> int | None:
        """Return the id of a mark if llguidance knows it as one special token."""
        tokenizer, ids = self._tokenizer()
        token = ids.get(mark)
        if token is None or token >= self._vocabulary or not tokenizer.is_special_token(token):
            return None
        return token

    def _tokenizer(self) -> tuple[LLTokenizer, dict[str, int]]:
        """Return llguidance's tokenizer, and the ids of all tokens."""
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._loaded is None:
                tokenizer = self._load()
                try:
                    found = from_tokenizer(
                        tokenizer,  # pyright: ignore[reportArgumentType]
                        n_vocab=self._vocabulary,
                        eos_token=self._eos_token_ids,
                    )
                except ValueError as error:
                    raise _refused(
                        f"llguidance does not support this model's tokenizer: {error}"
                    ) from None
                self._loaded = found, tokenizer.get_vocab()
            return self._loaded


def _of_schema(schema: str | dict[str, Any]) -> str:
    """Return the grammar of a JSON schema. Raises ValueError where it is not a JSON object."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT)  # pyright: ignore[reportArgumentType]


def _refused(why: str) -> RequestError:
    return RequestError(
        f"response_format, strict tools and forced calls are not available: {why}",
        param="response_format",
    )
