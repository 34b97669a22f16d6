"""A client of the HTTP endpoint: needs httpx, and neither Ray nor torch.

    with Client("http://127.0.0.1:8000") as client:
        for chunk in client.stream_chat("What is a mosaic?"):
            print(chunk.text, end="")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from .proto.errors import (
    ClusterError,
    EngineError,
    Expired,
    InternalError,
    MoesaicError,
    RequestError,
    from_wire,
)

CONNECT_TIMEOUT_S = 5.0
# From one byte to the next: the first token may wait behind other requests.
READ_TIMEOUT_S = 300.0

Message = Mapping[str, str]  # {"role": ..., "content": ...}
Prompt = str | Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    id: str
    max_tokens: int  # prompt and answer together


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    text: str
    finish_reason: str  # "stop" or "length"
    usage: Usage
    model: str
    id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """New text; the last chunk of a stream has the finish reason and the usage."""

    text: str
    finish_reason: str | None = None
    usage: Usage | None = None


class Client:
    """Talks to one endpoint; every call raises errors of ``proto.errors``.

    ``model`` may be left out where the endpoint serves one model. A stream that is not read to its
    end is cancelled when its iterator is closed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        timeout_s: float = READ_TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._model = model
        self._http = httpx.Client(
            base_url=base_url,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[Model]:
        cards = self._get("/v1/models")["data"]
        return [Model(id=card["id"], max_tokens=card["max_model_len"]) for card in cards]

    def status(self) -> dict[str, Any]:
        return self._get("/status")

    def health(self) -> bool:
        """Whether the endpoint answers and says that it can serve."""
        try:
            return bool(self._get("/healthz", accept=(200, 503))["healthy"])
        except (ClusterError, Expired):
            return False

    def complete(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Answer:
        body = self._body(model, max_tokens, temperature, top_p, stop, prompt=_plain(prompt))
        return _answer(self._post("/v1/completions", body), _completion_text)

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Answer:
        body = self._body(
            model, max_tokens, temperature, top_p, stop, messages=_conversation(messages)
        )
        return _answer(self._post("/v1/chat/completions", body), _message_text)

    def stream_complete(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Iterator[Chunk]:
        body = self._body(model, max_tokens, temperature, top_p, stop, prompt=_plain(prompt))
        return self._stream("/v1/completions", body, _completion_text)

    def stream_chat(
        self,
        messages: str | Sequence[Message],
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Iterator[Chunk]:
        body = self._body(
            model, max_tokens, temperature, top_p, stop, messages=_conversation(messages)
        )
        return self._stream("/v1/chat/completions", body, _delta_text)

    def _body(
        self,
        model: str | None,
        max_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        stop: str | Sequence[str] | None,
        **content: Any,
    ) -> dict[str, Any]:
        options = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop": stop if stop is None or isinstance(stop, str) else list(stop),
        }
        asked = {key: value for key, value in options.items() if value is not None}
        return {"model": model or self._default_model(), **content, **asked}

    def _default_model(self) -> str:
        if self._model is None:
            names = [model.id for model in self.models()]
            if len(names) != 1:
                raise RequestError(f"name one of the models: {', '.join(names)}", param="model")
            self._model = names[0]
        return self._model

    def _get(self, path: str, *, accept: Sequence[int] = (200,)) -> dict[str, Any]:
        with _mapping_errors():
            return _json(self._http.get(path), accept)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with _mapping_errors():
            return _json(self._http.post(path, json=body), (200,))

    def _stream(self, path: str, body: dict[str, Any], text_of: TextOf) -> Iterator[Chunk]:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        with _mapping_errors(), self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _error(response)
            yield from _chunks(_events(response), text_of)


TextOf = Any  # Callable[[dict], str | None]: where a choice has its text


def _completion_text(choice: dict[str, Any]) -> str:
    return choice["text"]


def _message_text(choice: dict[str, Any]) -> str:
    return choice["message"]["content"]


def _delta_text(choice: dict[str, Any]) -> str:
    return choice["delta"].get("content") or ""


def _plain(prompt: Prompt) -> str | list[int]:
    return prompt if isinstance(prompt, str) else list(prompt)


def _conversation(messages: str | Sequence[Message]) -> list[dict[str, str]]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [dict(message) for message in messages]
