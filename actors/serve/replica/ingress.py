"""The ingress as a deployment of Ray Serve: the HTTP app, with tokenizers and text."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastapi import FastAPI
from ray import serve

from ....cluster.service.progress import ModelProgress
from ....cluster.service.web_guard import WebGuard
from ....proto.errors import MoesaicError
from ...endpoint.http.bodies import Bodies, BodyLimits
from ...endpoint.http.gate import Gate
from ...endpoint.http.health import Health, ModelHealth
from ...endpoint.http.metrics import HttpMetrics
from ...endpoint.ingress import create_app
from ...endpoint.model_names import ModelNames
from ...engine.engine import RequestLimits
from ...engine.served_model import ServedModel
from ...engine.traced import traced_call
from ...runtime.log_settings import log_runtime_env
from ...runtime.ray_border import HEAD_NODE
from .controller_link import in_thread
from .ingress_plan import IngressPlan, ModelPlan
from .monitoring_address import Watched
from .names import INGRESS
from .starting import starting
from .trunk import MAX_ONGOING, ending_s, versioned
from .trunk_client import TrunkClient

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import StatelessLifespan

log = logging.getLogger(__name__)

# The ingress runs on the head node, where Serve's proxy is, so that monitoring can be reached from
# where the endpoint can. It reserves no core, since Ray may have none left there.
_BESIDE_THE_PROXY = {"num_cpus": 0, "resources": {HEAD_NODE: 0.001}}


# How long an ingress that can serve one model waits for the others before it serves.
OTHERS_S = 20.0


@dataclass(slots=True)
class _Part:
    """One model in the ingress."""

    client: TrunkClient
    health: ModelHealth
    coming: asyncio.Task[None] | None = None  # it is added when its trunk has started
    limits: RequestLimits | None = None  # its engine's; None: not known yet
    model: ServedModel | None = None


# With the surge its successor answers before it refuses requests; the monitoring's port is the
# successor's when it has ended.
@serve.deployment(
    name=INGRESS,
    max_ongoing_requests=2 * MAX_ONGOING,
    graceful_shutdown_wait_loop_s=0.2,
    max_constructor_retry_count=1,
    max_surge_percent=100,
    ray_actor_options=_BESIDE_THE_PROXY,
)
@serve.ingress()
class Ingress:
    """The HTTP app in a process of its own: it has tokenizers and text, trunks send it tokens."""

    def __init__(self, find_plan: Callable[[], IngressPlan]) -> None:
        """Serve what ``find_plan`` returns; it blocks, and `refresh` calls it again."""
        self._find_plan = find_plan
        self._gate = Gate(MAX_ONGOING)
        self._parts: dict[str, _Part] = {}
        self._names = ModelNames[ServedModel]()
        self._healths = ModelNames[ModelHealth]()
        self._clients: dict[str, TrunkClient] = {}
        self._forgotten: dict[str, ModelHealth] = {}
        self._changing = asyncio.Lock()
        self._owners: dict[str, str] = {}  # of aliases

    async def __serve_build_asgi_app__(self) -> FastAPI:
        with starting("ingress"):
            self._plan = plan = await in_thread(self._find_plan)
            bodies = self._bodies = Bodies(BodyLimits.of(plan.endpoint.limits))
            self._follow(plan)
            await self._first_models()
        endpoint, metrics = plan.endpoint, HttpMetrics()
        health = Health(self._healths, leaving=lambda: self._gate.ending)
        return create_app(
            models=self._names,
            bodies=bodies,
            cors_origins=endpoint.cors_origins,
            guard=WebGuard.of(
                endpoint.host,
                allowed_hosts=endpoint.allowed_hosts,
                origins=endpoint.cors_origins,
                own=plan.own_hosts,
            ),
            metrics=metrics,
            lifespan=self._lifespan(plan, metrics, health),
            health=health,
            gate=self._gate,
        )

    async def refresh(self) -> list[str]:
        """Follow the present plan: forget models, take over limits, and begin to add models.

        Requests of a forgotten model go on. Returns the models that are served by now; the others
        follow as soon as their trunks have started.
        """
        async with self._changing:
            self._plan = plan = await in_thread(self._find_plan)
            self._bodies.limits = BodyLimits.of(plan.endpoint.limits)
            self._follow(plan)
        return [name for name, part in self._parts.items() if part.model is not None]

    async def drain(self, drain_s: float) -> int:
        """Refuse new requests, give running ones ``drain_s`` seconds, and return how many run."""
        return self._gate.drain(drain_s)

    async def running(self) -> int:
        """Return how many requests are not over."""
        return self._gate.running

    async def leaving(self, model: str) -> int:
        """Return how many requests of a forgotten model are not over."""
        return self._forgotten[model].pending if model in self._forgotten else 0

    # ---- parts ----------------------------------------------------------------------------------

    def _follow(self, plan: IngressPlan) -> None:
        """Let what is served follow a plan; new models are served when their trunks answer."""
        for name in self._parts.keys() - plan.models.keys():
            part = self._parts.pop(name)
            if part.coming is not None:
                part.coming.cancel()
            del self._clients[name]
            self._forgotten[name] = part.health
        for name, wanted in plan.models.items():
            part = self._parts.get(name)
            if part is None:
                client = TrunkClient(wanted.trunk, plan.cold_start_s)
                progress = ModelProgress(wake_s=plan.cold_start_s or 0.0)
                part = self._parts[name] = _Part(client, ModelHealth(progress, client.hear))
                self._clients[name] = client
            part.client.cold_start_s = plan.cold_start_s
            if part.model is not None:
                part.model.limits = self._limits(part, wanted)
                part.coming = asyncio.create_task(self._renew(name, part))
                part.coming.add_done_callback(self._tell)
            elif part.coming is None or (part.coming.done() and not part.coming.cancelled()):
                part.coming = asyncio.create_task(self._add(name, part, wanted))
                part.coming.add_done_callback(self._tell)
        self._publish()

    async def _add(self, name: str, part: _Part, wanted: ModelPlan) -> None:
        """Serve a model as soon as its trunk has started."""
        tokenizer = await in_thread(wanted.tokenizer)
        part.limits = await part.client.limits()
        generate = part.health.watch(part.client.generate)
        embed = part.health.watch_embed(part.client.embed)
        # The plan may be another one by now.
        limits = self._limits(part, self._plan.models[name])
        part.model = ServedModel(name, tokenizer, limits, traced_call(generate, name), embed)
        self._publish()

    async def _renew(self, name: str, part: _Part) -> None:
        """Take over the limits of a model's trunk, which may be another one since the last plan."""
        if await part.client.is_awake():  # a trunk that sleeps stays asleep
            part.limits = await part.client.limits()
            if part.model is not None and name in self._plan.models:
                part.model.limits = self._limits(part, self._plan.models[name])

    async def _first_models(self) -> None:
        """Wait for all models, but not for long for one whose trunk does not start.

        Raises the error of one of them if none can be served.
        """
        coming = [part.coming for part in self._parts.values() if part.coming is not None]
        while coming and not any(part.model for part in self._parts.values()):
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            coming = [one for one in coming if one not in done]
            if not coming and not any(part.model for part in self._parts.values()):
                await done.pop()
        if coming:
            _, late = await asyncio.wait(coming, timeout=OTHERS_S)
            if late:
                log.warning("%d models follow when their trunks have started", len(late))

    def _tell(self, coming: asyncio.Task[None]) -> None:
        """Log why a model cannot be served, or what is new about it cannot be found out."""
        if not coming.cancelled() and (error := coming.exception()) is not None:
            known = None if isinstance(error, MoesaicError) else error
            log.error("a model is not served as it was asked for: %s", error, exc_info=known)

    def _limits(self, part: _Part, wanted: ModelPlan) -> RequestLimits:
        assert part.limits is not None
        limits = part.limits.within(self._plan.endpoint.limits)
        return limits if wanted.experts is None else replace(limits, experts=wanted.experts)

    def _publish(self) -> None:
        """Let requests find the models that are served, under all their names."""
        aliases = {name: list(one.aliases) for name, one in self._plan.models.items()}
        ready = {name: one for name, one in self._parts.items() if one.model is not None}
        # An alias moves when the model that gets it answers.
        for name in aliases.keys() - ready.keys():
            for alias in aliases[name]:
                if (before := self._owners.get(alias)) in ready and before is not None:
                    aliases[before].append(alias)
        self._owners = {alias: name for name in ready for alias in aliases[name]}
        self._names.set({name: one.model for name, one in ready.items() if one.model}, aliases)
        self._healths.set({name: one.health for name, one in ready.items()}, aliases)

    def _lifespan(
        self, plan: IngressPlan, metrics: HttpMetrics, health: Health
    ) -> StatelessLifespan[FastAPI] | None:
        """Return a lifespan that runs the monitoring server as long as the app, or None."""
        if plan.monitoring is None:
            return None
        watched = Watched(
            trunks=self._clients,
            cluster=plan.status,
            page=plan.page,
            pool=plan.pool,
            gate=self._gate,
        )
        return watched.lifespan(
            plan.monitoring,
            metrics,
            health,
            allowed_hosts=plan.endpoint.allowed_hosts,
            own_hosts=plan.own_hosts,
        )


def ingress(
    find_plan: Callable[[], IngressPlan],
    drain_s: float,
    version: str = "",
    logs: Mapping[str, str] | None = None,
) -> Application:
    """Return the ingress as an application for ``serve.run``.

    Serve lets an ingress of the same ``version`` run on; empty: it starts another one. ``logs``:
    the variables about logs (None: this process's).
    """
    deployment = Ingress.options(
        graceful_shutdown_timeout_s=ending_s(drain_s),
        ray_actor_options=_BESIDE_THE_PROXY | log_runtime_env(logs),
    )
    return versioned(deployment, version).bind(find_plan)
