"""A client of the HTTP endpoint: needs httpx, and neither Ray nor torch.

Example:

    with Client("http://127.0.0.1:8000") as client:
        for chunk in client.stream_chat("What is a mosaic?"):
            print(chunk.text, end="")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack

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
Json = dict[str, Any]


class MoesaicOptions(TypedDict, total=False):
    """What is to happen when an expert is not to be had, or a trunk is lost."""

    resumable: bool  # the answer goes on in another trunk
    missing_expert: Literal["wait", "fail", "drop"]  # "wait" where nothing is said
    wait_s: float  # before it fails or goes on without
    max_dropped: float  # part of a token's gate weights that may be left out in a layer


class Options(TypedDict, total=False):
    """What a request may say beside its prompt; the endpoint's defaults are OpenAI's."""

    model: str  # may be left out where the endpoint serves one
    max_tokens: int
    temperature: float  # 0 to 2; 0: always the best token
    top_p: float
    stop: str | list[str]
    moesaic: MoesaicOptions


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
    max_dropped: float = 0.0  # largest part of a token's gate weights that a layer went without


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """New text; the last chunks of a stream have the finish reason and the usage."""

    text: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    max_dropped: float = 0.0  # with the finish reason: see Answer


class Client:
    """Talks to one endpoint; every call raises errors of ``proto.errors`` and has a timeout.

    Closing a stream's iterator before its end cancels the request.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = READ_TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._only_model: str | None = None
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

    def status(self) -> Json:
        return self._get("/status")

    def health(self) -> bool:
        """Whether the endpoint answers and says that it can serve."""
        try:
            return bool(self._get("/healthz", accept=(200, 503)).get("healthy"))
        except (ClusterError, Expired):
            return False

    def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        body = self._body(options, prompt=_plain(prompt))
        return self._answer("/v1/completions", body, lambda choice: choice["text"])

    def chat(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> Answer:
        """``messages``: a conversation, or the text of one user's message."""
        body = self._body(options, messages=_conversation(messages))
        return self._answer(
            "/v1/chat/completions", body, lambda choice: choice["message"]["content"]
        )

    def stream_complete(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Chunk]:
        body = self._body(options, prompt=_plain(prompt))
        return self._stream("/v1/completions", body, lambda choice: choice["text"])

    def stream_chat(
        self, messages: str | Sequence[Message], **options: Unpack[Options]
    ) -> Iterator[Chunk]:
        body = self._body(options, messages=_conversation(messages))
        return self._stream(
            "/v1/chat/completions", body, lambda choice: choice["delta"].get("content") or ""
        )

    def _body(self, options: Options, **content: Any) -> Json:
        return {"model": options.get("model") or self._default_model(), **content, **options}

    def _default_model(self) -> str:
        if self._only_model is None:
            names = [model.id for model in self.models()]
            if len(names) != 1:
                raise RequestError(f"name one of the models: {', '.join(names)}", param="model")
            self._only_model = names[0]
        return self._only_model

    def _get(self, path: str, *, accept: Sequence[int] = (200,)) -> Json:
        with _mapping_errors():
            return _checked(self._http.get(path), accept)

    def _answer(self, path: str, body: Json, text: Callable[[Json], str]) -> Answer:
        with _mapping_errors():
            found = _checked(self._http.post(path, json=body))
        choice = found["choices"][0]
        return Answer(
            text=text(choice),
            finish_reason=choice["finish_reason"],
            usage=_usage(found["usage"]),
            model=found["model"],
            id=found["id"],
            max_dropped=_max_dropped(choice),
        )

    def _stream(self, path: str, body: Json, text: Callable[[Json], str]) -> Iterator[Chunk]:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        with _mapping_errors(), self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                response.read()
            _raise_error(response, (200,))
            for event in _events(response):
                for choice in event["choices"]:
                    yield Chunk(
                        text=text(choice),
                        finish_reason=choice["finish_reason"],
                        max_dropped=_max_dropped(choice),
                    )
                if event.get("usage"):
                    yield Chunk(usage=_usage(event["usage"]))


def _max_dropped(choice: Json) -> float:
    return choice.get("moesaic", {}).get("max_dropped", 0.0)


@contextmanager
def _mapping_errors() -> Iterator[None]:
    """The one place where httpx's errors become ours."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ClusterError(f"the endpoint cannot be reached: {error}") from error
    except httpx.TimeoutException as error:
        raise Expired(f"the endpoint did not answer in time: {type(error).__name__}") from error
    except httpx.TransportError as error:
        raise EngineError(f"the connection was lost: {error}") from error


def _events(response: httpx.Response) -> Iterator[Json]:
    """The JSON of each event; EngineError when the stream ends without ``[DONE]``."""
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise _error(event["error"])
        yield event
    raise EngineError("the stream ended before its end")


def _checked(response: httpx.Response, accept: Sequence[int] = (200,)) -> Json:
    _raise_error(response, accept)
    return response.json()


def _raise_error(response: httpx.Response, accept: Sequence[int]) -> None:
    if response.status_code in accept:
        return
    try:
        raise _error(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        # Not from our endpoint: a proxy's page, say.
        raise InternalError(f"HTTP {response.status_code}: {response.text[:200]}") from None


def _error(body: Json) -> MoesaicError:
    error = from_wire(str(body["code"]), str(body["message"]))
    if isinstance(error, RequestError):
        error.param = body.get("param")
    return error


def _usage(body: Json) -> Usage:
    return Usage(prompt_tokens=body["prompt_tokens"], completion_tokens=body["completion_tokens"])


def _plain(prompt: Prompt) -> str | list[int]:
    return prompt if isinstance(prompt, str) else list(prompt)


def _conversation(messages: str | Sequence[Message]) -> list[Json]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [dict(message) for message in messages]
