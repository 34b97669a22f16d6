"""`/v1/embeddings`: OpenAI's format, and options for the pooling under ``moesaic``."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, PlainValidator
from pydantic_core import PydanticCustomError

from ...proto.errors import RequestError
from ..engine.engine import Pooling, Sampling
from ..engine.served_model import ServedModel
from .http.bodies import Bodies
from .http.edge import json_response, log_request, request_id, unless_disconnected
from .openai.requests import is_ids, parse_request
from .openai.sampling import Strict

MAX_INPUTS = 2048  # OpenAI's limit
_NO_ANSWER = Sampling(max_tokens=1)


def _check_input(value: Any) -> list[str] | list[list[int]]:
    """Return any form of an input as a list: of texts, or of lists of token ids."""
    many = [value] if isinstance(value, str) or is_ids(value) else value
    if isinstance(many, list) and many:
        if len(many) > MAX_INPUTS:
            raise PydanticCustomError(
                "input",
                "has {count} texts; at most {most} are allowed",
                {"count": len(many), "most": MAX_INPUTS},
            )
        if all(isinstance(one, str) and one for one in many) or all(map(is_ids, many)):
            return many
    raise PydanticCustomError(
        "input",
        "must be a string, a list of token ids, or a list of strings or of lists of token ids "
        "(none of them empty)",
    )


class PoolingOptions(Strict):
    """``moesaic``: how the hidden states of a text become one vector."""

    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True


class EmbeddingRequest(Strict):
    model: str
    input: Annotated[list[str] | list[list[int]], PlainValidator(_check_input)]
    encoding_format: Literal["float", "base64"] | None = None
    moesaic: PoolingOptions = PoolingOptions()

    @property
    def pooling(self) -> Pooling:
        return Pooling(kind=self.moesaic.pooling, normalize=self.moesaic.normalize)


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str  # base64: of little-endian float32


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def add_embeddings(app: FastAPI, find: Callable[[str], ServedModel], bodies: Bodies) -> None:
    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        asked = await bodies.parsed(request, partial(parse_request, EmbeddingRequest))
        model = find(asked.model)
        try:
            prompts = [
                await model.encode(text) if isinstance(text, str) else text for text in asked.input
            ]
            for prompt_ids in prompts:
                model.limits.check(prompt_ids, _NO_ANSWER)
            tokens = sum(map(len, prompts))
            log_request(request, model.id, prompt_tokens=tokens, choices=len(prompts))
            vectors_NH = await unless_disconnected(
                request, model.embed(prompts, asked.pooling, request_id(request))
            )
        except RequestError as error:
            error.param = {"prompt": "input"}.get(error.param or "", error.param)
            raise
        return await asyncio.to_thread(_answer, asked, model.id, vectors_NH, tokens)


def _answer(asked: EmbeddingRequest, model: str, vectors_NH: np.ndarray, tokens: int) -> Response:
    write = _base64 if asked.encoding_format == "base64" else np.ndarray.tolist
    data = [Embedding(index=n, embedding=write(one)) for n, one in enumerate(vectors_NH)]
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return json_response(EmbeddingList(data=data, model=model, usage=usage))


def _base64(vector_H: np.ndarray) -> str:
    return base64.b64encode(vector_H.astype("<f4").tobytes()).decode()
