"""The OpenAI-compatible responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field

from ....proto.errors import MoesaicError, client_message
from ...engine.served_model import TextDelta, TokenChoice, TokenText
from ...text.tool_calls import ToolCall

_Value = TypeVar("_Value")
# A field that is left out where it is None. Other fields are then null, as in OpenAI's API.
_IfAny = Annotated[_Value | None, Field(exclude_if=lambda value: value is None)]


class ErrorBody(BaseModel):
    """An error in OpenAI's format.

    ``code`` names the class in ``proto.errors``, so that a client can raise the same one.
    """

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    error: ErrorBody


def error_response(
    error: MoesaicError, request_id: str = "", *, words: str | None = None
) -> ErrorResponse:
    """Return the JSON body for ``error``.

    ``words`` replace the text that any client may see (`client_message`).
    """
    words = client_message(error, request_id) if words is None else words
    kinds = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "invalid_request_error",
        429: "rate_limit_error",
    }
    return ErrorResponse(
        error=ErrorBody(
            message=words,
            type=kinds.get(error.http_status, "server_error"),
            param=getattr(error, "param", None),
            code=error.code,
        )
    )


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        return cls(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
        )


class ExpertsUsed(BaseModel):
    """How the answer differs from what the model with all its experts would have written.

    ``experts_per_token`` is set where a request asked for another number than the model's own.
    ``max_dropped`` is the largest part of a token's gate weights in one layer that was left out
    because experts were missing. ``times_dropped`` counts the tokens of a layer for which any
    part was.
    """

    experts_per_token: _IfAny[int] = None
    max_dropped: _IfAny[float] = None
    times_dropped: _IfAny[int] = None

    @classmethod
    def of(cls, piece: TextDelta | None) -> ExpertsUsed | None:
        if piece is None or (piece.dropped is None and piece.experts_per_token is None):
            return None
        dropped = piece.dropped
        return cls(
            experts_per_token=piece.experts_per_token,
            max_dropped=None if dropped is None else round(dropped.largest, 6),
            times_dropped=None if dropped is None else dropped.times,
        )


class ModelCard(BaseModel):
    """One model or alias; ``root`` is the model's own name where ``id`` is an alias."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["moesaic"] = "moesaic"
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


# The log-probability that stands for a probability of zero, as in OpenAI's API: JSON has no -inf.
_NEVER = -9999.0


def _number(logprob: float) -> float:
    return max(logprob, _NEVER)


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, one: TokenText) -> TokenLogprob:
        return cls(token=one.text, logprob=_number(one.logprob), bytes=list(one.bytes))


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, choices: Sequence[TokenChoice]) -> ChatLogprobs | None:
        if not choices:
            return None
        return cls(
            content=[
                ChosenLogprob(
                    **TokenLogprob.of(one.chosen).model_dump(),
                    top_logprobs=[TokenLogprob.of(other) for other in one.top],
                )
                for one in choices
            ]
        )


class TextLogprobs(BaseModel):
    """Log-probabilities of a completion.

    Offsets count characters from the start of the generated text.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]

    @classmethod
    def of(cls, choices: Sequence[TokenChoice]) -> TextLogprobs | None:
        if not choices:
            return None
        return cls(
            tokens=[one.chosen.text for one in choices],
            token_logprobs=[_number(one.chosen.logprob) for one in choices],
            top_logprobs=[_by_text(one) for one in choices],
            text_offset=[one.offset for one in choices],
        )


def _by_text(choice: TokenChoice) -> dict[str, float]:
    """Map the text of the likeliest tokens and the chosen one to log-probabilities.

    Of two tokens with the same text the likelier counts.
    """
    found: dict[str, float] = {}
    for one in (*choice.top, choice.chosen):
        found[one.text] = max(_number(one.logprob), found.get(one.text, _NEVER))
    return found


class _Choice(BaseModel):
    index: int
    finish_reason: str | None
    moesaic: _IfAny[ExpertsUsed] = None


class CompletionChoice(_Choice):
    text: str
    logprobs: TextLogprobs | None = None


class Completion(BaseModel):
    """A whole answer, or one chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AnswerFunction(BaseModel):
    name: str
    arguments: str


class AnswerToolCall(BaseModel):
    """A call of a tool; ``index`` is only set in streams."""

    index: _IfAny[int] = None
    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction

    @classmethod
    def of(cls, calls: Sequence[ToolCall], first: int | None = None) -> list[AnswerToolCall] | None:
        """Return the calls in OpenAI's format, or None if there are none.

        ``first`` is the index of the first of them in a stream.
        """
        return [
            cls(
                index=None if first is None else first + n,
                id=call.id,
                # Set although it is the default: chunks leave out unset fields; clients need this.
                type="function",
                function=AnswerFunction(name=call.name, arguments=call.arguments),
            )
            for n, call in enumerate(calls)
        ] or None


class ChatAnswer(BaseModel):
    """The message of a chat answer.

    ``reasoning_content`` is what a thinking model wrote before its answer; DeepSeek's API and
    vLLM use the same name.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: _IfAny[str] = None
    refusal: None = None
    tool_calls: _IfAny[list[AnswerToolCall]] = None


class ChatChoice(_Choice):
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[AnswerToolCall] | None = None


class ChatChunkChoice(_Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
