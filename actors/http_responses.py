"""The OpenAI-compatible responses."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer

from ..cluster.missing import Dropped
from ..proto.errors import MoesaicError


class ErrorBody(BaseModel):
    """``code`` names the class in ``proto.errors``, so that a client can raise the same one."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    error: ErrorBody


def error_response(error: MoesaicError) -> ErrorResponse:
    kinds = {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}
    return ErrorResponse(
        error=ErrorBody(
            message=str(error),
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


class Moesaic(BaseModel):
    """What the answer went without: the largest part of a token's gate weights in one layer, and
    for how many tokens of a layer each anything was left out."""

    max_dropped: float
    times_dropped: int

    @classmethod
    def of(cls, dropped: Dropped | None) -> Moesaic | None:
        if dropped is None:
            return None
        return cls(max_dropped=round(dropped.largest, 6), times_dropped=dropped.times)


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["moesaic"] = "moesaic"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class _Choice(BaseModel):
    index: int
    logprobs: None = None
    finish_reason: str | None
    moesaic: Moesaic | None = None  # only where there is something to say

    @model_serializer(mode="wrap")
    def _plain(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = serialize(self)
        if self.moesaic is None:
            found.pop("moesaic", None)
        return found


class CompletionChoice(_Choice):
    text: str


class Completion(BaseModel):
    """A whole answer, or one chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatAnswer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Choice):
    message: ChatAnswer


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


class ChatChunkChoice(_Choice):
    delta: ChatDelta


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
