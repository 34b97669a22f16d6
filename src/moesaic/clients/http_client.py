"""Clients of the HTTP endpoint, which need httpx, and neither Ray nor torch.

Example:

    with Client("http://127.0.0.1:8000") as client:
        for chunk in client.stream_chat("What is a mosaic?"):
            print(chunk.text, end="")

    async with AsyncClient("http://127.0.0.1:8000") as client:
        print((await client.chat("What is a mosaic?")).text)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

import httpx

from ..cluster.tracing.context import HEADER
from ..proto.errors import ClusterError, EngineError, Expired, MoesaicError
from .openai_wire import (
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    Answer,
    Chunk,
    Embeddings,
    GenerationCall,
    Json,
    Message,
    Model,
    Options,
    PoolingKind,
    Prompt,
    SseParser,
    Texts,
    Usage,
    WireCall,
    address,
    chat,
    checked,
    completion,
    embeddings,
    mapping_errors,
    models,
    only,
    raise_error,
)
from .retry import RETRIES, Retries

if TYPE_CHECKING:
    from ..cluster.reports.status import EndpointStatus

__all__ = ["Answer", "AsyncClient", "Chunk", "Client", "Embeddings", "Model", "Options", "Usage"]

T = TypeVar("T")

HEALTH_TIMEOUT_S = 10.0  # an endpoint that takes longer to report its health is not healthy


class Client:
    """A client of one endpoint; every call raises errors of ``proto.errors`` and has a timeout.

    Requests that may succeed on another try are retried up to ``retries`` times, after random
    pauses; a stream only before its first chunk. Closing a stream's iterator before its end cancels
    the request.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = READ_TIMEOUT_S,
        retries: int = RETRIES,
        traceparent: Callable[[], str | None] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Set the endpoint's address; nothing is sent yet.

        ``traceparent`` is called for each request, and returns the value of its header of that
        name, by which the request belongs to the caller's trace; None: it has no such header.
        """
        self._only_model: str | None = None
        self._retries = retries
        self._http = httpx.Client(
            base_url=address(base_url),
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            transport=transport,
            event_hooks={"request": [partial(_name_trace, traceparent)]},
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
        return models(self._get("/v1/models"))

    def status(self) -> EndpointStatus:
        """Return the cluster's status.

        Only the monitoring address (`Cluster.monitoring`) serves it, not the endpoint.
        """
        return _status(self._get("/status"))

    def health(self, model: str | None = None) -> bool:
        """Return whether the endpoint answers and requests make progress.

        Asks for ``model``, or for all models. Models that are idle or asleep are healthy.
        """
        try:
            with mapping_errors():
                asked = self._http.get("/readyz", params=_named(model), timeout=HEALTH_TIMEOUT_S)
                return asked.status_code == 200
        except (ClusterError, EngineError, Expired):
            return False

    def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        return self._answer(completion(prompt, options, self._model(options)))

    def chat(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> Answer:
        """Answer ``messages``: a conversation, or the text of one user message."""
        return self._answer(chat(messages, options, self._model(options)))

    def embeddings(
        self,
        texts: Texts,
        *,
        model: str | None = None,
        pooling: PoolingKind = "last",
        normalize: bool = True,
    ) -> Embeddings:
        """Return the last hidden state of a text, or of each text of a list, as a vector.

        It is that of the text's last token, or with ``pooling="mean"`` the mean over all tokens,
        and has length 1 unless ``normalize`` is false. A text may be token ids. Raises
        MoesaicError.
        """
        chosen = self._model({} if model is None else {"model": model})
        return self._answer(embeddings(texts, pooling, normalize, chosen))

    def stream_complete(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Chunk]:
        return self._stream(completion(prompt, options, self._model(options)))

    def stream_chat(
        self, messages: str | Sequence[Message], **options: Unpack[Options]
    ) -> Iterator[Chunk]:
        return self._stream(chat(messages, options, self._model(options)))

    def _model(self, options: Options) -> str:
        if "model" in options:
            return options["model"]
        if self._only_model is None:
            self._only_model = only(self.models())
        return self._only_model

    def _get(self, path: str, *, accept: Sequence[int] = (200,)) -> Json:
        with mapping_errors():
            return checked(self._http.get(path), accept)

    def _answer(self, call: WireCall[T]) -> T:
        tries = Retries(self._retries)
        while True:
            try:
                with mapping_errors():
                    return call.answer(checked(self._http.post(call.path, json=call.body)))
            except MoesaicError as error:
                time.sleep(tries.pause_s(error))

    def _stream(self, call: GenerationCall) -> Iterator[Chunk]:
        tries, begun = Retries(self._retries), False
        while True:
            try:
                for chunk in self._stream_once(call):
                    begun = True
                    yield chunk
                return
            except MoesaicError as error:
                if begun:
                    raise
                time.sleep(tries.pause_s(error))

    def _stream_once(self, call: GenerationCall) -> Iterator[Chunk]:
        events = SseParser()
        with (
            mapping_errors(),
            self._http.stream("POST", call.path, json=call.streamed()) as response,
        ):
            if response.status_code != 200:
                response.read()
            raise_error(response)
            for line in response.iter_lines():
                event = events.take(line)
                if event is not None:
                    yield from call.chunks(event)
            events.end()


class AsyncClient:
    """`Client` for asyncio."""

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = READ_TIMEOUT_S,
        retries: int = RETRIES,
        traceparent: Callable[[], str | None] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Set the endpoint's address; ``traceparent`` is that of `Client`."""

        async def name_trace(request: httpx.Request) -> None:
            _name_trace(traceparent, request)

        self._only_model: str | None = None
        self._retries = retries
        self._http = httpx.AsyncClient(
            base_url=address(base_url),
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            transport=transport,
            event_hooks={"request": [name_trace]},
            limits=httpx.Limits(max_connections=None),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[Model]:
        return models(await self._get("/v1/models"))

    async def status(self) -> EndpointStatus:
        """Return the cluster's status; see `Client.status`."""
        return _status(await self._get("/status"))

    async def health(self, model: str | None = None) -> bool:
        """Return whether requests make progress; see `Client.health`."""
        try:
            with mapping_errors():
                asked = await self._http.get(
                    "/readyz", params=_named(model), timeout=HEALTH_TIMEOUT_S
                )
                return asked.status_code == 200
        except (ClusterError, EngineError, Expired):
            return False

    async def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        return await self._answer(completion(prompt, options, await self._model(options)))

    async def chat(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> Answer:
        """Answer ``messages``; see `Client.chat`."""
        return await self._answer(chat(messages, options, await self._model(options)))

    async def embeddings(
        self,
        texts: Texts,
        *,
        model: str | None = None,
        pooling: PoolingKind = "last",
        normalize: bool = True,
    ) -> Embeddings:
        """Return texts as vectors; see `Client.embeddings`."""
        chosen = await self._model({} if model is None else {"model": model})
        return await self._answer(embeddings(texts, pooling, normalize, chosen))

    async def stream_complete(
        self, prompt: Prompt, **options: Unpack[Options]
    ) -> AsyncGenerator[Chunk, None]:
        call = completion(prompt, options, await self._model(options))
        async with aclosing(self._stream(call)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def stream_chat(
        self, messages: str | Sequence[Message], **options: Unpack[Options]
    ) -> AsyncGenerator[Chunk, None]:
        call = chat(messages, options, await self._model(options))
        async with aclosing(self._stream(call)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _model(self, options: Options) -> str:
        if "model" in options:
            return options["model"]
        if self._only_model is None:
            self._only_model = only(await self.models())
        return self._only_model

    async def _get(self, path: str, *, accept: Sequence[int] = (200,)) -> Json:
        with mapping_errors():
            return checked(await self._http.get(path), accept)

    async def _answer(self, call: WireCall[T]) -> T:
        tries = Retries(self._retries)
        while True:
            try:
                with mapping_errors():
                    found = await self._http.post(call.path, json=call.body)
                    return call.answer(checked(found))
            except MoesaicError as error:
                await asyncio.sleep(tries.pause_s(error))

    async def _stream(self, call: GenerationCall) -> AsyncGenerator[Chunk, None]:
        tries, begun = Retries(self._retries), False
        while True:
            try:
                async with aclosing(self._stream_once(call)) as chunks:
                    async for chunk in chunks:
                        begun = True
                        yield chunk
                return
            except MoesaicError as error:
                if begun:
                    raise
                await asyncio.sleep(tries.pause_s(error))

    async def _stream_once(self, call: GenerationCall) -> AsyncGenerator[Chunk, None]:
        events = SseParser()
        with mapping_errors():
            async with self._http.stream("POST", call.path, json=call.streamed()) as response:
                if response.status_code != 200:
                    await response.aread()
                raise_error(response)
                async for line in response.aiter_lines():
                    event = events.take(line)
                    if event is not None:
                        for chunk in call.chunks(event):
                            yield chunk
                events.end()


def _name_trace(traceparent: Callable[[], str | None] | None, request: httpx.Request) -> None:
    given = None if traceparent is None else traceparent()
    if given is not None:
        request.headers[HEADER] = given


def _named(model: str | None) -> dict[str, str]:
    return {} if model is None else {"model": model}


def _status(told: Json) -> EndpointStatus:
    from ..cluster.reports.status import EndpointStatus

    try:
        return EndpointStatus.model_validate(told)
    except ValueError as error:
        raise ClusterError(
            "/status: the answer is not the status of a cluster; give the client the monitoring "
            "address (`Cluster.monitoring`), not the endpoint's"
        ) from error
