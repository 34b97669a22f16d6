"""Turn pieces of text into OpenAI's JSON: whole answers, and the chunks of streamed ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from pydantic import BaseModel

from ...engine.served_model import TextDelta, TokenChoice
from ...text.tool_calls import ToolCall
from .responses import (
    AnswerToolCall,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    ExpertsUsed,
    TextLogprobs,
    Usage,
)

IndexedDeltas = AsyncGenerator[tuple[int, TextDelta], None]  # (choice, piece)


class AnswerFormatter(Protocol):
    """How one endpoint formats its answers.

    Only fields that were set are sent in a chunk, so chunks set every field that must be there,
    also to None.
    """

    def chunks(self, index: int, piece: TextDelta, *, is_first: bool) -> Iterable[BaseModel]: ...

    def usage(self, tokens: int) -> BaseModel:
        """Return the extra last chunk of ``stream_options.include_usage``."""
        ...

    def whole(self, texts: Sequence[str], last: Sequence[TextDelta]) -> BaseModel: ...


class CompletionFormatter:
    """Answers of ``/v1/completions``: one choice for each prompt and each of ``n``."""

    def __init__(
        self, answer_id: str, model: str, prompt_tokens: int, echoed: Sequence[str] = ()
    ) -> None:
        """Create answers; ``echoed`` has each choice's prompt, which the text then begins with.

        ``echoed`` is empty where prompts are not echoed.
        """
        self._base: dict[str, Any] = {"id": answer_id, "created": int(time.time()), "model": model}
        self._prompt_tokens = prompt_tokens
        self._echoed = echoed

    def chunks(self, index: int, piece: TextDelta, *, is_first: bool) -> Iterable[BaseModel]:
        yield Completion(
            **self._base,
            object="text_completion",
            choices=[self._choice(index, self._echo(index, is_first) + piece.text, piece)],
        )

    def usage(self, tokens: int) -> BaseModel:
        return Completion(
            **self._base,
            object="text_completion",
            choices=[],
            usage=Usage.of(self._prompt_tokens, tokens),
        )

    def whole(self, texts: Sequence[str], last: Sequence[TextDelta]) -> BaseModel:
        return Completion(
            **self._base,
            choices=[
                self._choice(index, self._echo(index, True) + text, piece)
                for index, (text, piece) in enumerate(zip(texts, last, strict=True))
            ],
            usage=Usage.of(self._prompt_tokens, sum(piece.tokens for piece in last)),
        )

    def _choice(self, index: int, text: str, piece: TextDelta) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=TextLogprobs.of(piece.logprobs),
            finish_reason=piece.finish_reason,
            moesaic=ExpertsUsed.of(piece),
        )

    def _echo(self, index: int, is_first: bool) -> str:
        return self._echoed[index] if self._echoed and is_first else ""


class ChatFormatter:
    """Answers of ``/v1/chat/completions``: one choice for each of ``n``."""

    def __init__(self, answer_id: str, model: str, prompt_tokens: int) -> None:
        self._base: dict[str, Any] = {"id": answer_id, "created": int(time.time()), "model": model}
        self._prompt_tokens = prompt_tokens
        self._calls: dict[int, int] = {}  # choice -> tool calls sent so far

    def chunks(self, index: int, piece: TextDelta, *, is_first: bool) -> Iterable[BaseModel]:
        if is_first:
            yield self._chunk(index, ChatDelta(role="assistant", content=""))
        logprobs = ChatLogprobs.of(piece.logprobs)
        if piece.reasoning:
            yield self._chunk(index, ChatDelta(reasoning_content=piece.reasoning))
        if piece.text or logprobs is not None:
            yield self._chunk(index, ChatDelta(content=piece.text), logprobs=logprobs)
        if piece.calls:
            first = self._calls.get(index, 0)
            self._calls[index] = first + len(piece.calls)
            yield self._chunk(index, ChatDelta(tool_calls=AnswerToolCall.of(piece.calls, first)))
        if piece.finish_reason is not None:
            yield self._chunk(index, ChatDelta(), piece)

    def usage(self, tokens: int) -> BaseModel:
        return ChatChunk(
            **self._base,
            object="chat.completion.chunk",
            choices=[],
            usage=Usage.of(self._prompt_tokens, tokens),
        )

    def whole(self, texts: Sequence[str], last: Sequence[TextDelta]) -> BaseModel:
        choices = [
            ChatChoice(
                index=index,
                message=ChatAnswer(
                    content=text if text or not piece.calls else None,
                    reasoning_content=piece.reasoning or None,
                    tool_calls=AnswerToolCall.of(piece.calls),
                ),
                logprobs=ChatLogprobs.of(piece.logprobs),
                finish_reason=piece.finish_reason,
                moesaic=ExpertsUsed.of(piece),
            )
            for index, (text, piece) in enumerate(zip(texts, last, strict=True))
        ]
        usage = Usage.of(self._prompt_tokens, sum(piece.tokens for piece in last))
        return ChatCompletion(**self._base, choices=choices, usage=usage)

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        last: TextDelta | None = None,
        *,
        logprobs: ChatLogprobs | None = None,
    ) -> ChatChunk:
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=logprobs,
            finish_reason=last.finish_reason if last else None,
            moesaic=ExpertsUsed.of(last),
        )
        return ChatChunk(**self._base, object="chat.completion.chunk", choices=[choice])


async def merge(streams: Sequence[AsyncGenerator[TextDelta, None]]) -> IndexedDeltas:
    """Yield the pieces of all choices as they come; the first error ends all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, TextDelta | Exception]] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int, stream: AsyncGenerator[TextDelta, None]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    await queue.put((index, piece))
        except Exception as error:
            # Whatever it is, the reader of the queue raises it.
            await queue.put((index, error))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        unfinished = len(streams)
        while unfinished:
            index, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            unfinished -= piece.finish_reason is not None
            yield index, piece
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def collect(pieces: IndexedDeltas, choices: int, answers: AnswerFormatter) -> BaseModel:
    """Return the whole answer."""
    texts: list[list[str]] = [[] for _ in range(choices)]
    logprobs: list[list[TokenChoice]] = [[] for _ in range(choices)]
    calls: list[list[ToolCall]] = [[] for _ in range(choices)]
    reasoning: list[list[str]] = [[] for _ in range(choices)]
    last = [TextDelta("", 0)] * choices
    async with aclosing(pieces):
        async for index, piece in pieces:
            texts[index].append(piece.text)
            logprobs[index] += piece.logprobs
            calls[index] += piece.calls
            reasoning[index].append(piece.reasoning)
            last[index] = piece
    last = [
        replace(
            piece,
            logprobs=tuple(logprobs[index]),
            calls=tuple(calls[index]),
            reasoning="".join(reasoning[index]),
        )
        for index, piece in enumerate(last)
    ]
    return answers.whole(["".join(parts) for parts in texts], last)


async def chunks(
    pieces: IndexedDeltas, choices: int, answers: AnswerFormatter, *, include_usage: bool
) -> AsyncGenerator[BaseModel, None]:
    """Yield the answer in chunks."""
    tokens: list[int | None] = [None] * choices
    async with aclosing(pieces):
        async for index, piece in pieces:
            for chunk in answers.chunks(index, piece, is_first=tokens[index] is None):
                # As in OpenAI's API: if the last chunk has usage, the others have `"usage": null`.
                yield chunk.model_copy(update={"usage": None}) if include_usage else chunk
            tokens[index] = piece.tokens
    if include_usage:
        yield answers.usage(sum(count or 0 for count in tokens))
