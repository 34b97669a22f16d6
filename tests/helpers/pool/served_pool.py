"""A pool, its trunk's engine and its HTTP endpoint in the test's own process, without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from transformers import PreTrainedModel

from moesaic.actors.endpoint.http.bodies import BodyLimits
from moesaic.actors.endpoint.ingress import create_app
from moesaic.actors.engine.engine import EngineConfig, ExpertBounds
from moesaic.actors.engine.served_model import ServedModel
from moesaic.actors.engine.traced import traced_call, traced_generate
from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from moesaic.actors.host.host import ExpertHost
from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.routing.policy import RouterPolicy
from tests.helpers.models.architectures import tiny_model
from tests.helpers.models.tiny import tiny_tokenizer
from tests.helpers.pool.pools import Pool, pool

MAX_BODY = 2**18
BODIES = BodyLimits(each_bytes=MAX_BODY, all_bytes=32 * MAX_BODY, arrive_s=30.0)
DEADLINE_S = 20.0
# A lost expert is given up soon, and a slow machine is not taken for a lost one.
POLICY = RouterPolicy(deadline_s=2.0, attempt_s=1.5)
PARK_S = 5.0


def tiny_served_model() -> PreTrainedModel:
    """A tiny Mixtral whose texts never end by themselves."""
    model = tiny_model("mixtral", vocab_size=320, max_position_embeddings=256)
    model.generation_config.eos_token_id = None
    return model


def save_served_model(folder: Path) -> Path:
    """The same with a tokenizer, as a user has it."""
    tiny_served_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class ServedPool:
    pool: Pool
    engine: TransformersEngine
    http: httpx.Client
    folder: Path

    @property
    def hosts(self) -> list[ExpertHost]:
        return self.pool.hosts

    def holder(self, key: ExpertKey) -> ExpertHost:
        """The host of an expert with one replica."""
        layer = self.pool.placement.layers[
            next(k for k in self.pool.placement.layers if k == key[:2])
        ]
        (name,) = layer.hosts(key.expert)
        return next(host for host in self.hosts if host.name == name)

    def complete(self, prompt: list[int], max_tokens: int = 6) -> httpx.Response:
        asked = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return self.http.post("/v1/completions", json=asked)

    def text(self, prompt: list[int], max_tokens: int = 6) -> str:
        response = self.complete(prompt, max_tokens)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]


@contextmanager
def _server(app: Any) -> Iterator[str]:
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + DEADLINE_S
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)  # uvicorn has no event for it
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


@contextmanager
def served_pool(
    folder: Path, *, hosts: int = 2, replicas: int = 1, experts: ExpertBounds | None = None
) -> Iterator[ServedPool]:
    with pool(folder, hosts=hosts, replicas=replicas, policy=POLICY) as base:
        engine = TransformersEngine(
            base.trunk,
            config=EngineConfig(page_size=8, num_blocks=64, max_requests=8, park_s=PARK_S),
        )
        engine.start()
        # As the engine of a trunk on Ray does.
        base.router.batch.owned_by(engine)
        limits = replace(engine.limits, experts=experts or ExpertBounds())
        # As trunk and ingress on Ray do.
        generate = traced_call(traced_generate(engine.generate), "m")
        served = ServedModel("m", tiny_tokenizer(), limits, generate, engine.embed)

        app = create_app(models={"m": served}, bodies=BODIES)
        try:
            with _server(app) as url, httpx.Client(base_url=url, timeout=DEADLINE_S) as http:
                yield ServedPool(pool=base, engine=engine, http=http, folder=folder)
        finally:
            engine.close()


@contextmanager
def held(host: ExpertHost) -> Iterator[Callable[[], None]]:
    """The host's loop stands still until the end, or until what this gives is called."""
    standing, go_on = threading.Event(), threading.Event()

    def stand() -> None:
        standing.set()
        assert go_on.wait(30)

    host._loop.post(stand)
    assert standing.wait(10)
    try:
        yield go_on.set
    finally:
        go_on.set()
