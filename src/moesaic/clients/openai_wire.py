"""The wire format of both clients of the endpoint: bodies, answers, events and errors.

Nothing in this module opens a socket.
"""

from __future__ import annotations

import base64
import json
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict, TypeVar

import httpx

from ..proto.errors import (
    ClusterError,
    EngineError,
    Expired,
    InternalError,
    MoesaicError,
    RequestError,
    describe_error,
    from_wire,
)

CONNECT_TIMEOUT_S = 5.0
# Between two bytes. It is long because the first token may wait for other requests.
READ_TIMEOUT_S = 300.0

AnswerT = TypeVar("AnswerT", covariant=True)
Message = Mapping[str, Any]  # {"role": ..., "content": ...}
Prompt = str | Sequence[int]
Texts = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
PoolingKind = Literal["last", "mean"]
Json = dict[str, Any]


class MoesaicOptions(TypedDict, total=False):
    """Options of Moesaic's own: experts per token, missing experts, and lost trunks."""

    experts_per_token: int  # fewer than the model's own number, if the cluster's spec allows it

    resumable: bool  # if its trunk is lost, the answer goes on in another one
    missing_expert: Literal["wait", "fail", "drop"]  # default: "wait"
    wait_s: float  # seconds until the request fails, or goes on without the expert
    max_dropped: float  # part of a token's gate weights that may be left out in a layer


class Options(TypedDict, total=False):
    """The options of a request besides its prompt; the endpoint's defaults are OpenAI's."""

    model: str  # may be left out if the endpoint serves one model
    max_tokens: int
    temperature: float  # 0 to 2; 0: always the best token
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: dict[str, float]  # token id -> what is added
    seed: int
    stop: str | list[str]
    priority: int  # among waiting requests the smallest number goes first
    response_format: Json  # of chats: {"type": "json_object"}, or a schema
    moesaic: MoesaicOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model that the endpoint serves."""

    id: str
    max_tokens: int  # prompt and answer together
    alias_of: str | None = None  # the model's own name, if ``id`` is an alias


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A whole answer."""

    text: str
    finish_reason: str  # "stop" or "length"
    usage: Usage
    model: str
    id: str
    max_dropped: float = 0.0  # largest part of a token's gate weights that a layer left out
    experts_per_token: int | None = None  # None: the model's own number


@dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """Texts as vectors."""

    vectors: list[list[float]]  # one for each text
    prompt_tokens: int  # of all texts
    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """New text of a stream; its last chunks have the finish reason and the usage."""

    text: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    # Set together with the finish reason; see Answer.
    max_dropped: float = 0.0
    experts_per_token: int | None = None


class WireCall(Protocol[AnswerT]):
    """One request with one answer."""

    @property
    def path(self) -> str: ...
    @property
    def body(self) -> Json: ...
    def answer(self, found: Json) -> AnswerT: ...


@dataclass(frozen=True, slots=True)
class GenerationCall:
    """One request for text."""

    path: str
    body: Json
    whole: Callable[[Json], str]  # gives the text of a choice
    piece: Callable[[Json], str]  # gives the text of a choice in a stream's event

    def streamed(self) -> Json:
        return {**self.body, "stream": True, "stream_options": {"include_usage": True}}

    def answer(self, found: Json) -> Answer:
        choice = found["choices"][0]
        return Answer(
            text=self.whole(choice),
            finish_reason=choice["finish_reason"],
            usage=_usage(found["usage"]),
            model=found["model"],
            id=found["id"],
            **_experts(choice),
        )

    def chunks(self, event: Json) -> Iterator[Chunk]:
        for choice in event["choices"]:
            yield Chunk(
                text=self.piece(choice),
                finish_reason=choice["finish_reason"],
                **_experts(choice),
            )
        if event.get("usage"):
            yield Chunk(usage=_usage(event["usage"]))


@dataclass(frozen=True, slots=True)
class EmbeddingCall:
    """One request for vectors."""

    body: Json
    path: str = "/v1/embeddings"

    def answer(self, found: Json) -> Embeddings:
        vectors = [_floats(one["embedding"]) for one in found["data"]]
        tokens = found["usage"]["prompt_tokens"]
        return Embeddings(vectors=vectors, prompt_tokens=tokens, model=found["model"])


def embeddings(texts: Texts, pooling: PoolingKind, normalize: bool, model: str) -> EmbeddingCall:
    plain = texts if isinstance(texts, str) else list(texts)
    options = {"pooling": pooling, "normalize": normalize}
    # base64 takes a third of the bytes of numbers in JSON, and does not round.
    body = {"model": model, "input": plain, "encoding_format": "base64", "moesaic": options}
    return EmbeddingCall(body)


def _floats(text: str) -> list[float]:
    """Decode base64 of little-endian float32."""
    found = array("f", base64.b64decode(text))
    if sys.byteorder == "big":
        found.byteswap()
    return found.tolist()


def completion(prompt: Prompt, options: Options, model: str) -> GenerationCall:
    text: Callable[[Json], str] = lambda choice: choice["text"]  # noqa: E731
    plain = prompt if isinstance(prompt, str) else list(prompt)
    return GenerationCall(
        "/v1/completions", {**options, "model": model, "prompt": plain}, text, text
    )


def chat(messages: str | Sequence[Message], options: Options, model: str) -> GenerationCall:
    """Make a chat request of a conversation, or of the text of one user message."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return GenerationCall(
        "/v1/chat/completions",
        {**options, "model": model, "messages": [dict(message) for message in messages]},
        lambda choice: choice["message"]["content"] or "",
        lambda choice: choice["delta"].get("content") or "",
    )


def models(found: Json) -> list[Model]:
    return [
        Model(
            id=card["id"],
            max_tokens=card["max_model_len"],
            alias_of=None if card.get("root", card["id"]) == card["id"] else card["root"],
        )
        for card in found["data"]
    ]


def only(found: Sequence[Model]) -> str:
    """Return the name of the only model. Raises RequestError if there are more, or none."""
    names = [model.id for model in found if model.alias_of is None]
    if len(names) != 1:
        several = f"the endpoint serves several models; name one of {', '.join(names)}"
        why = several if names else "the endpoint serves no model"
        raise RequestError(f"model: {why}", param="model")
    return names[0]


def address(text: str) -> httpx.URL:
    """Parse an endpoint's URL. Raises RequestError if it cannot be one."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise RequestError(
            f"{text!r} is not an endpoint's address, like http://127.0.0.1:8000", param="base_url"
        )
    return url


class SseParser:
    """A parser of the lines of a stream of server-sent events."""

    def __init__(self) -> None:
        self.done = False

    def take(self, line: str) -> Json | None:
        """Return a line's JSON, or None if it has none. Raises the error that an event carries."""
        if not line.startswith("data:"):
            return None
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self.done = True
            return None
        event = json.loads(data)
        if "error" in event:
            raise error_of(event["error"])
        return event

    def end(self) -> None:
        if not self.done:
            raise EngineError(
                "the endpoint's stream of the answer ended too early, without `[DONE]`; send the "
                "request again"
            )


@contextmanager
def mapping_errors() -> Iterator[None]:
    """Map errors of httpx to ours; the only place that does."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ClusterError(
            f"the endpoint cannot be reached: {describe_error(error)}; check its address, and with "
            "`moesaic status` that the cluster runs"
        ) from error
    except httpx.TimeoutException as error:
        raise Expired(
            f"the endpoint did not answer within the client's time limit: {type(error).__name__}; "
            "give the client a larger timeout_s, or ask for fewer tokens"
        ) from error
    except httpx.TransportError as error:
        raise EngineError(
            f"the connection to the endpoint was lost: {describe_error(error)}; send the request "
            "again"
        ) from error


def checked(response: httpx.Response, accept: Sequence[int] = (200,)) -> Json:
    raise_error(response, accept)
    return response.json()


def raise_error(response: httpx.Response, accept: Sequence[int] = (200,)) -> None:
    """Raise the error that the endpoint's answer carries, if any. The body must have been read."""
    if response.status_code in accept:
        return
    try:
        raise error_of(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        # The body is not from our endpoint, but for example a proxy's page.
        raise InternalError(
            "the answer does not come from an endpoint of Moesaic; check the address: HTTP "
            f"{response.status_code}: {response.text[:200]}"
        ) from None


def error_of(body: Json) -> MoesaicError:
    error = from_wire(str(body["code"]), str(body["message"]))
    if isinstance(error, RequestError):
        error.param = body.get("param")
    return error


def _experts(choice: Json) -> Json:
    """Return the fields of an answer about its experts."""
    said = choice.get("moesaic", {})
    return {
        "max_dropped": said.get("max_dropped", 0.0),
        "experts_per_token": said.get("experts_per_token"),
    }


def _usage(body: Json) -> Usage:
    return Usage(prompt_tokens=body["prompt_tokens"], completion_tokens=body["completion_tokens"])
