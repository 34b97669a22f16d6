"""The OpenAI-compatible HTTP endpoint, as a FastAPI app that knows nothing of Ray.

The life of a request: read (bounded) -> parse -> encode -> generate -> text -> JSON or SSE.
Response headers are sent with the first piece of text, so that an error before it gets a status of
its own; a later error is an SSE event. When a client disconnects, its generator is closed, which
cancels the request in the engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import StatelessLifespan

from ...cluster.service.web_guard import WebGuard
from ...proto.errors import MoesaicError, RequestError, UnknownModel
from ..engine.engine import RequestLimits, Sampling
from ..engine.served_model import ServedModel, TextDelta
from ..text.thinking import Thinking
from ..text.tool_calls import Calls
from ..tracing.http import TraceMiddleware
from .embeddings import add_embeddings
from .http.bodies import Bodies, BodyLimits
from .http.edge import (
    EdgeMiddleware,
    ErrorMiddleware,
    allow_cors,
    began,
    error_answer,
    event_stream,
    json_response,
    log_request,
    request_id,
    unless_disconnected,
)
from .http.gate import Gate, GateMiddleware
from .http.health import Health, ModelHealth
from .http.metrics import HttpMetrics
from .http.probes import add_health, is_probe
from .openai.answers import (
    AnswerFormatter,
    ChatFormatter,
    CompletionFormatter,
    IndexedDeltas,
    chunks,
    collect,
    merge,
)
from .openai.openapi import document, errors, generation
from .openai.requests import ChatRequest, CompletionRequest, parse_request
from .openai.responses import ChatChunk, ChatCompletion, Completion, ModelCard, ModelList

# OpenAI's default for completions. A chat answer may fill the rest of the context by default.
COMPLETION_MAX_TOKENS = 16
CLIENT_CLOSED_REQUEST = 499  # nginx's status for it; only logs show it, the client has gone

GenerationRequest = CompletionRequest | ChatRequest


def create_app(
    *,
    models: Mapping[str, ServedModel],
    bodies: BodyLimits | Bodies,
    cors_origins: Sequence[str] = (),
    guard: WebGuard | None = None,
    metrics: HttpMetrics | None = None,
    lifespan: StatelessLifespan[FastAPI] | None = None,
    health: Health | None = None,
    gate: Gate | None = None,
) -> FastAPI:
    """Create the endpoint's app.

    ``models`` has each model under all of its names, and may change (`ModelNames`), like the limits
    of `Bodies`. ``cors_origins``: see `EndpointSpec`. Without ``guard`` every Host and Origin is
    allowed; without ``health`` all models count as ready. ``metrics`` collects counts and
    latencies. The caller can drain the app through ``gate``.
    """
    # No documentation pages: they would load their scripts from other sites.
    app = FastAPI(docs_url=None, redoc_url=None, lifespan=lifespan)
    document(app)
    metrics = metrics or HttpMetrics()
    gate = gate or Gate()
    # The middleware that is added last is the outermost.
    app.add_middleware(GateMiddleware, gate=gate)
    app.add_middleware(ErrorMiddleware)
    if cors_origins:
        allow_cors(app, cors_origins)
    app.add_middleware(TraceMiddleware, passes=is_probe)
    app.add_middleware(EdgeMiddleware, metrics=metrics, guard=guard or WebGuard(loopback=False))
    ready = {name: ModelHealth() for name in models}
    add_health(app, health or Health(ready, leaving=lambda: gate.ending))
    _add_models(app, models)
    held = bodies if isinstance(bodies, Bodies) else Bodies(bodies)
    _add_generation(app, models, metrics, held)
    add_embeddings(app, partial(_find, models), held)
    _add_errors(app)
    return app


def _add_models(app: FastAPI, models: Mapping[str, ServedModel]) -> None:
    @app.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[_card(name, model) for name, model in models.items()])

    # `:path`, since ids of models on a hub contain a slash.
    @app.get("/v1/models/{model_id:path}", openapi_extra={"responses": errors()})
    async def get_model(model_id: str) -> ModelCard:
        return _card(model_id, _find(models, model_id))


def _add_generation(
    app: FastAPI, models: Mapping[str, ServedModel], metrics: HttpMetrics, bodies: Bodies
) -> None:
    @app.post(
        "/v1/completions", openapi_extra=generation(CompletionRequest, Completion, Completion)
    )
    async def complete(request: Request) -> Response:
        asked = await bodies.parsed(request, partial(parse_request, CompletionRequest))
        model = _find(models, asked.model)
        prompts = [
            await model.encode(prompt) if isinstance(prompt, str) else prompt
            for prompt in asked.prompt
        ]
        sampling = asked.sampling(
            asked.max_tokens or min(COMPLETION_MAX_TOKENS, model.limits.max_answer_tokens),
            model.limits.experts,
        )
        for prompt_ids in prompts:
            model.limits.check(prompt_ids, sampling)
        identity = request_id(request)
        streams = _streams(model, identity, asked, prompts, sampling, continues_text=True)
        echoed = [
            prompt if isinstance(prompt, str) else model.decode(prompt)
            for prompt in (asked.prompt if asked.echo else ())
            for _ in range(asked.choices)
        ]
        tokens = sum(map(len, prompts))
        answers = CompletionFormatter(f"cmpl-{identity}", model.id, tokens, echoed)
        log_request(request, model.id, prompt_tokens=tokens, choices=len(streams))
        pieces = metrics.watch(model.id, tokens, began(request), merge(streams))
        return await _respond(request, asked, pieces, len(streams), answers)

    @app.post(
        "/v1/chat/completions", openapi_extra=generation(ChatRequest, ChatCompletion, ChatChunk)
    )
    async def chat(request: Request) -> Response:
        asked = await bodies.parsed(request, partial(parse_request, ChatRequest))
        model = _find(models, asked.model)
        messages = [message.for_template() for message in asked.messages]
        prompt = await model.encode_chat(messages, asked.offered_tools, asked.chat_template_kwargs)
        prompt_ids = prompt.token_ids
        budget = asked.token_budget or _rest(model.limits, len(prompt_ids))
        sampling = asked.sampling(budget, model.limits.experts)
        if sampling.form is not None:
            sampling = replace(sampling, form=replace(sampling.form, thinking=prompt.thinking))
        try:
            model.limits.check(prompt_ids, sampling)
        except RequestError as error:
            error.param = {"prompt": "messages"}.get(error.param or "", error.param)
            raise
        identity = request_id(request)
        streams = _streams(
            model,
            identity,
            asked,
            [prompt_ids],
            sampling,
            continues_text=False,
            calls=asked.calls,
            thinking=prompt.thinking,
        )
        answers = ChatFormatter(f"chatcmpl-{identity}", model.id, len(prompt_ids))
        log_request(request, model.id, prompt_tokens=len(prompt_ids), choices=len(streams))
        pieces = metrics.watch(model.id, len(prompt_ids), began(request), merge(streams))
        return await _respond(request, asked, pieces, len(streams), answers)


def _streams(
    model: ServedModel,
    identity: str,
    asked: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    continues_text: bool,
    calls: Calls = "none",
    thinking: Thinking | None = None,
) -> list[AsyncGenerator[TextDelta, None]]:
    """Return one stream of text per choice, those of the first prompt first."""
    return [
        model.stream(
            f"{identity}-{prompt * asked.choices + n}",
            prompt_ids,
            _nth(sampling, n),
            asked.stop or (),
            continues_text=continues_text,
            resumable=asked.moesaic.resumable,
            calls=calls,
            thinking=thinking,
        )
        for prompt, prompt_ids in enumerate(prompts)
        for n in range(asked.choices)
    ]


def _nth(sampling: Sampling, n: int) -> Sampling:
    """Give each choice its own seed: with the same seed all choices would be the same text."""
    if sampling.seed is None or not n:
        return sampling
    return replace(sampling, seed=(sampling.seed + n) % 2**63)


async def _respond(
    request: Request,
    asked: GenerationRequest,
    pieces: IndexedDeltas,
    choices: int,
    answers: AnswerFormatter,
) -> Response:
    if asked.stream:
        return await event_stream(
            request, chunks(pieces, choices, answers, include_usage=asked.include_usage)
        )
    return json_response(await unless_disconnected(request, collect(pieces, choices, answers)))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(MoesaicError)
    async def on_error(request: Request, error: MoesaicError) -> Response:
        return error_answer(error, request_id(request))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        refused = RequestError(f"{request.method} {request.url.path}: {error.detail}")
        return error_answer(refused, request_id(request), status_code=error.status_code)

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


def _find(models: Mapping[str, ServedModel], model_id: str) -> ServedModel:
    if model_id not in models:
        raise UnknownModel(
            f"the model {model_id!r} does not exist; use one of: {', '.join(models)}",
            param="model",
        )
    return models[model_id]


def _card(name: str, model: ServedModel) -> ModelCard:
    return ModelCard(
        id=name,
        created=model.created,
        root=model.id,
        max_model_len=model.limits.max_total_tokens,
    )


def _rest(limits: RequestLimits, prompt_tokens: int) -> int:
    """Return the tokens that the limits leave for an answer.

    At least 1, so that for a prompt that is too long the check blames the prompt.
    """
    return max(1, min(limits.max_total_tokens - prompt_tokens, limits.max_answer_tokens))
