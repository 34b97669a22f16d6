"""The endpoint on a real socket, with a tiny engine and a scripted one in the same process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from transformers import PreTrainedTokenizerFast

from moesaic.actors.endpoint.http.bodies import BodyLimits
from moesaic.actors.endpoint.http.health import Health, ModelHealth
from moesaic.actors.endpoint.http.metrics import HttpMetrics
from moesaic.actors.endpoint.http.monitoring_app import monitoring_app
from moesaic.actors.endpoint.http.monitoring_server import monitoring
from moesaic.actors.endpoint.ingress import create_app
from moesaic.actors.engine.engine import (
    Delta,
    EngineConfig,
    FinishReason,
    RequestLimits,
    Sampling,
    TokenLogprob,
)
from moesaic.actors.engine.served_model import ServedModel
from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from moesaic.actors.runtime.ports import free_port
from moesaic.cluster.reports.status import EndpointStatus, EngineStatus
from moesaic.cluster.service.web_guard import WebGuard
from moesaic.cluster.spec.parts import LimitSpec
from moesaic.proto.errors import Busy, EngineError, ExpertUnavailable
from tests.helpers.models.tiny import tiny_mixtral, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
TEXT = "the quick brown fox jumps over the lazy dog. Größe 🙂 日本語 and Paris."
MAX_BODY = 2**20
BODIES = BodyLimits(each_bytes=MAX_BODY, all_bytes=8 * MAX_BODY, arrive_s=30.0)


CALLING = (
    'Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>\n'
    '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
)


def chat_ids() -> list[int]:
    text = TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    return TOKENIZER(str(text)).input_ids


def tool_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    template = tokenizer.chat_template
    assert isinstance(template, str)
    told = "{% if tools %}tools: {{ tools | tojson }}{% endif %}{{ style or '' }}"
    calls = "{{ m.tool_calls | tojson if m.tool_calls else '' }}"
    tokenizer.chat_template = told + template.replace("{{ m.content }}", "{{ m.content }}" + calls)
    return tokenizer


class Script:
    """A model that answers a fixed text; its prompt can ask for trouble."""

    def __init__(self, text: str = TEXT) -> None:
        self.text = text
        self.prompt = ""
        self.cancelled = 0
        self.sampling: Sampling | None = None

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        self.sampling = sampling
        asked = self.prompt = str(TOKENIZER.decode(list(prompt_ids)))
        if "busy" in asked:
            raise Busy("too many requests")
        if "broken" in asked:
            raise KeyError("a defect")

        def delta(token_id: int, finish: FinishReason | None = None) -> Delta:
            one = TokenLogprob(token_id, -0.5, ((token_id, -0.5),))
            return Delta((token_id,), finish, logprobs=() if sampling.logprobs is None else (one,))

        try:
            for n, token_id in enumerate(TOKENIZER(self.text).input_ids):
                if "wait" in asked:
                    await asyncio.sleep(60)
                if "lost" in asked and n == 10:
                    raise ExpertUnavailable("expert tiny/1/2 has no replica")
                if "bug" in asked and n == 10:
                    raise KeyError("a defect")
                if n + 1 == sampling.max_tokens:
                    yield delta(token_id, "length")
                    return
                yield delta(token_id)
            yield Delta((), "stop")
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise


def scripted_models(*names: str, script: Script | None = None) -> dict[str, ServedModel]:
    """Models that answer a fixed text; without names one, ``script``."""
    limits = RequestLimits(
        max_prompt_tokens=2000, max_total_tokens=4000, max_requests=8, vocab_size=320
    )
    generate = (script or Script()).generate
    return {name: ServedModel(name, TOKENIZER, limits, generate) for name in names or ["script"]}


@dataclass
class Service:
    url: str
    monitoring: str
    engine: TransformersEngine
    script: Script
    model: Any
    healthy: bool = True
    engine_reports: dict[str, EngineStatus] = field(default_factory=dict)
    tools: Script = field(default_factory=lambda: Script(CALLING))

    async def status(self) -> EndpointStatus:
        return EndpointStatus(healthy=True, engines=await self.engines(), cluster=None)

    async def engines(self) -> dict[str, EngineStatus]:
        if not self.healthy:
            raise EngineError("the trunk is gone")
        return self.engine_reports


LIMITS = LimitSpec(prompt_tokens=20, answer_tokens=10, request_s=0.5)


@contextmanager
def running_service() -> Iterator[Service]:
    model = tiny_mixtral(max_positions=4096)
    engine = TransformersEngine(model, config=EngineConfig(num_blocks=256))
    engine.start()
    script = Script()
    limits = RequestLimits(
        max_prompt_tokens=2000, max_total_tokens=4000, max_requests=8, vocab_size=320
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url, port = f"http://127.0.0.1:{listener.getsockname()[1]}", free_port("127.0.0.1")
        service = Service(url, f"http://127.0.0.1:{port}", engine, script, model)
        served = [
            ServedModel("tiny", TOKENIZER, engine.limits, engine.generate, engine.embed),
            ServedModel("org/script", TOKENIZER, limits, script.generate),
            ServedModel("plain", tiny_tokenizer(chat=False), limits, script.generate),
            ServedModel("tools", tool_tokenizer(), limits, service.tools.generate),
            ServedModel("limited", TOKENIZER, limits.within(LIMITS), script.generate),
        ]
        metrics, guard = HttpMetrics(), WebGuard.of("127.0.0.1")
        health = Health({one.id: ModelHealth() for one in served})
        watched = monitoring_app(
            status=service.status,
            engines=service.engines,
            metrics=metrics,
            guard=guard,
            health=health,
        )
        app = create_app(
            models={one.id: one for one in served},
            bodies=BODIES,
            guard=guard,
            metrics=metrics,
            health=health,
            lifespan=lambda _: monitoring(watched, "127.0.0.1", port),
        )
        config = uvicorn.Config(app, log_level="warning", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)  # uvicorn has no event for it
        yield service
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
    engine.close()
