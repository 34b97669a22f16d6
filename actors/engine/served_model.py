"""One served model: turns prompts into token ids, and an engine's token ids back into text.

It stands between HTTP (``ingress.py``) and an engine, wherever that runs, and knows neither of
them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ...cluster.routing.expert_fallback import DroppedExperts
from ...proto.errors import Expired, RequestError
from ..text.answer_parser import AnswerParser
from ..text.chat_template import ChatPrompt, ChatTemplate
from ..text.detokenizer import Detokenizer, StopSearch
from ..text.marked_text import MarkedText
from ..text.thinking import Thinking
from ..text.tool_calls import Calls, ToolCall
from ..text.vocabulary import Vocabulary
from ..tracing.request_span import stage
from .engine import Delta, FinishReason, Generate, Pooling, RequestLimits, Sampling, TokenLogprob
from .resuming import resuming

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    Embed = Callable[[Sequence[Sequence[int]], Pooling, str], Awaitable[np.ndarray]]

_MOST_CALLS: dict[Calls, int | None] = {"none": 0, "one": 1, "many": None, "named": 1}


class TokenText(NamedTuple):
    """The text of a token (see `detokenizer.Written`) and its log-probability."""

    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """One generated token, with the likeliest alternatives."""

    chosen: TokenText
    top: tuple[TokenText, ...]
    start: int  # characters before it in the whole text
    offset: int  # characters before it in the text without special tokens


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that may be sent now, and the number of tokens generated so far."""

    text: str
    tokens: int
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    dropped: DroppedExperts | None = None  # gate weights left out because experts were missing
    experts_per_token: int | None = None  # where it was not the model's own number
    logprobs: tuple[TokenChoice, ...] = ()  # of the tokens since the last piece
    calls: tuple[ToolCall, ...] = ()  # completed since the last piece
    reasoning: str = ""  # text of the model's thinking that may be sent now


class ServedModel:
    """A model's name, tokenizer and limits, and the functions that call its engine."""

    def __init__(
        self,
        model_id: str,
        tokenizer: PreTrainedTokenizerBase,
        limits: RequestLimits,
        generate: Generate,
        embed: Embed | None = None,
    ) -> None:
        self.id = model_id
        self.limits = limits
        self.created = int(time.time())  # Unix time, as the API requires
        self._tokenizer = tokenizer
        self._template = ChatTemplate(model_id, tokenizer)
        self._generate = generate
        self._embed = embed
        self._vocabulary = Vocabulary(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # Switched off once here: otherwise each encoding switches them off, and two threads
            # that do so at the same time get "Already borrowed" from the Rust library.
            backend.no_truncation()
            backend.no_padding()

    async def encode(self, prompt: str) -> list[int]:
        """Return the prompt's token ids.

        Raises RequestError, before encoding, for a prompt whose length shows that it is too
        long.
        """
        self._check_length(len(prompt), "prompt")
        with stage("tokenize"):
            return await asyncio.to_thread(self._vocabulary.encode, prompt)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """Return messages (role, content, ...) as a prompt, made by the model's chat template.

        ``tools`` and ``options`` are passed to the template. Raises RequestError.
        """
        said = sum(len(message.get("content") or "") for message in messages)
        self._check_length(said, "messages")
        with stage("tokenize"):
            return await asyncio.to_thread(self._encode_chat, messages, tools, options)

    async def stream(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        stops: Sequence[str],
        *,
        continues_text: bool,
        resumable: bool = False,
        calls: Calls = "none",
        thinking: Thinking | None = None,
    ) -> AsyncGenerator[TextDelta, None]:
        """Yield text as it is generated; the last piece has a finish reason.

        ``continues_text``: the text continues the prompt (a completion), so a space between
        the two belongs to it; otherwise it stands for itself (a chat answer).

        ``resumable``: the request continues in another trunk if its own is lost.

        ``calls``: how many tool calls are looked for in the text. ``thinking``: the marks
        of thinking in the chat template.

        Stop strings and calls are searched for in the whole text; the client gets the text
        without special tokens. Log-probabilities are sent with the text of their tokens;
        those of tokens after a stop string, or after the last call that is wanted, are not
        sent.
        """
        detokenizer = Detokenizer(self._vocabulary, context=prompt_ids if continues_text else ())
        search, called = StopSearch(stops), False
        parser = AnswerParser(thinking, most_calls=_MOST_CALLS[calls])
        tokens, passed, logprobs = 0, 0, list[TokenChoice]()
        generated = (
            resuming(self._generate, request_id, prompt_ids, sampling)
            if resumable
            else self._generate(request_id, prompt_ids, sampling)
        )
        if self.limits.request_s is not None:
            generated = within(generated, self.limits.request_s)
        async with aclosing(generated) as deltas:
            async for delta in deltas:
                tokens += len(delta.token_ids)
                if delta.logprobs:
                    text = MarkedText()
                    for one in delta.logprobs:
                        logprobs.append(_choice(detokenizer, one, sampling.logprobs or 0))
                        text += detokenizer.push([one.token_id])
                else:
                    text = detokenizer.push(delta.token_ids)
                if delta.finish_reason is not None:
                    text += detokenizer.flush()
                text, stopped = search.push(text)
                reason = "stop" if stopped else delta.finish_reason
                if reason is not None and not stopped:
                    text += search.flush()
                passed += len(text)
                parsed = [parser.push(text)]
                cut = stopped or parser.full
                if parser.full:
                    reason = "stop"
                    passed -= parser.unread
                elif reason is not None:
                    parsed.append(parser.flush())
                # Log-probabilities of tokens that begin in the text that has passed the search. At
                # an ordinary end all the rest, also those of tokens without text.
                begun = logprobs
                if cut or reason is None:
                    begun = [one for one in logprobs if one.start < passed]
                visible = "".join(one.content.visible for one in parsed)
                thought = "".join(one.reasoning.visible for one in parsed)
                found = tuple(call for one in parsed for call in one.calls)
                called = called or bool(found)
                if visible or thought or found or reason is not None:
                    ends_in_calls = called and reason == "stop" and calls != "named"
                    last = reason is not None
                    yield TextDelta(
                        visible,
                        tokens,
                        "tool_calls" if ends_in_calls else reason,
                        dropped=delta.dropped if last else None,
                        experts_per_token=sampling.experts_per_token if last else None,
                        logprobs=tuple(begun),
                        calls=found,
                        reasoning=thought,
                    )
                    logprobs = logprobs[len(begun) :]
                if reason is not None:
                    return

    async def embed(
        self, prompts: Sequence[Sequence[int]], pooling: Pooling, request_id: str = ""
    ) -> np.ndarray:
        """Return one vector per prompt; see `EmbeddingEngine.embed`.

        Raises Expired after `limits.request_s`.
        """
        if self._embed is None:
            raise RequestError(
                f"the model {self.id!r} gives no embeddings; use another model", param="model"
            )
        try:
            with stage("embed"):
                async with asyncio.timeout(self.limits.request_s):
                    return await self._embed(prompts, pooling, request_id)
        except TimeoutError:
            raise _too_long(self.limits.request_s) from None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        known = [token_id for token_id in token_ids if token_id <= self._vocabulary.last]
        return self._vocabulary.decode(known, visible=True)

    def _check_length(self, characters: int, param: str) -> None:
        possible = self.limits.max_prompt_tokens * self._vocabulary.longest_token
        if characters > possible:
            raise RequestError(
                f"{param} has {characters} characters; {self.limits.max_prompt_tokens} tokens "
                f"cannot hold more than {possible}",
                param=param,
            )

    def _encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any] | None,
    ) -> ChatPrompt:
        rendered = self._template.render(messages, tools, options)
        # Checked before encoding, since a template may write far more than it was given.
        self._check_length(len(rendered.text), "messages")
        encoded = self._tokenizer(
            rendered.text, add_special_tokens=False, truncation=False, verbose=False
        )
        return ChatPrompt(list(encoded.input_ids), rendered.thinking)


def _choice(detokenizer: Detokenizer, one: TokenLogprob, most: int) -> TokenChoice:
    """Return the token that the detokenizer gets next, with its text and alternatives."""

    def told(token_id: int, logprob: float) -> TokenText:
        written = detokenizer.look(token_id)
        return TokenText(written.text, written.bytes, logprob)

    written = detokenizer.look(one.token_id)
    return TokenChoice(
        TokenText(written.text, written.bytes, one.logprob),
        tuple(told(*other) for other in one.top[:most]),
        written.start,
        written.offset,
    )


async def within(
    deltas: AsyncGenerator[Delta, None], seconds: float
) -> AsyncGenerator[Delta, None]:
    """Yield ``deltas`` if the last comes within ``seconds`` in all, else raise Expired."""
    until = asyncio.get_running_loop().time() + seconds
    async with aclosing(deltas):
        while True:
            try:
                async with asyncio.timeout_at(until):
                    delta = await anext(deltas)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise _too_long(seconds) from None
            yield delta


def _too_long(seconds: float | None) -> Expired:
    return Expired(
        f"the request took longer than {seconds or 0:g} s (endpoint.limits.request_s); ask for "
        "fewer tokens, or send it again later"
    )
