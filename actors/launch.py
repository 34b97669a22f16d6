"""Starting and ending a cluster on Ray: hosts, controller, trunks, ingress.

The one place that turns a spec into Ray actors. The process that calls `launch` owns them: they
end with it, whatever happens to it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before ray is imported: no usage reports.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util import get_node_ip_address, placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..cluster.placement import ModelShape
from ..cluster.residency import HostPolicy
from ..cluster.spec import HostGroup, ModelSpec, Resources, Spec
from ..models.source import resolve_model
from ..models.trunk import experts_layers, meta_model, read_config
from ..proto.errors import ClusterError, MoesaicError
from .controller import Controller
from .engine import EngineConfig
from .host import ExpertHost
from .serve_app import Trunk, build
from .store import ModelRef
from .trunk import CONTROLLER, TrunkConfig, engine_factory

log = logging.getLogger(__name__)
# Serve tells the driver of every step it takes.
logging.getLogger("ray.serve").setLevel(logging.WARNING)
# That Ray has a token by default is no warning.
logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)

# Ray types neither an actor's methods nor what they give: handles are Any.

# (what is being done, done, of how many)
Progress = Callable[[str, int, int], None]
EMBEDDED_STORE_BYTES = 128 << 20


class RayExpertHost(ExpertHost):
    """An expert host as a Ray actor: knows its node from Ray."""

    def __init__(
        self, name: str, *, bind: str, device: str, policy: HostPolicy, threads: int
    ) -> None:
        super().__init__(
            name,
            node=ray.get_runtime_context().get_node_id(),
            bind=get_node_ip_address() if bind == "node" else bind,
            device=device,
            policy=policy,
            threads=threads,
        )


@dataclass(slots=True)
class Launched:
    """What `launch` started; `close` ends all of it."""

    spec: Spec
    namespace: str
    controller: Any
    models: dict[str, ModelRef]
    hosts: dict[str, Any]
    groups: list[PlacementGroup] = field(default_factory=list)
    url: str | None = None
    owns_ray: bool = False

    def status(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """Plain values. Raises ClusterError when the controller does not answer."""
        return ask(self.controller.status.remote(), timeout_s, "the controller's status")

    def close(self) -> None:
        if self.url is not None:
            # Of an embedded Ray the rest of Serve ends with it.
            serve.delete(_app_name(self.spec))
        for actor in [self.controller, *self.hosts.values()]:
            ray.kill(actor, no_restart=True)
        for group in self.groups:
            remove_placement_group(group)
        if self.owns_ray:
            ray.shutdown()


def ask(ref: Any, timeout_s: float, what: str) -> Any:
    """`ray.get` with Ray's errors as ours; a MoesaicError of the other side comes as itself."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise ClusterError(f"{what}: no answer within {timeout_s:g} s") from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MoesaicError):
            raise cause from None
        raise ClusterError(f"{what}: {cause!r}") from error
    except RayError as error:
        raise ClusterError(f"{what}: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    """Ray's messages end with what happened, behind a trace of the other process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def controller_of(namespace: str) -> Any:
    """Raises ClusterError when the cluster's controller is not there."""
    try:
        return ray.get_actor(CONTROLLER, namespace=namespace)
    except ValueError as error:
        raise ClusterError(f"{namespace}: its controller is not there: {error}") from error


def join_ray(address: str, name: str) -> None:
    """Connect this process to a Ray that is running. Raises ClusterError."""
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, namespace=namespace_of(name), log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(f"ray.address: {address}: {error}") from error


def ray_address() -> str:
    return ray.get_runtime_context().gcs_address


def namespace_of(name: str) -> str:
    return f"moesaic-{name}"


def _app_name(spec: Spec) -> str:
    return f"moesaic-{spec.name}"


def launch(spec: Spec, progress: Progress) -> Launched:
    """Start everything in ``spec`` and wait until it answers.

    Raises CheckpointError, UnsupportedModel and ClusterError; whatever had started is ended first.
    """
    if spec.endpoint is not None:
        _check_port(spec.endpoint.host, spec.endpoint.port)
    refs, shapes = {}, {}
    for model in spec.models:
        refs[model.name], shapes[model.name] = describe(model, progress)
    progress("starting Ray", 0, 1)
    owns_ray = start_ray(spec)
    progress("starting Ray", 1, 1)
    launched: Launched | None = None
    try:
        launched = _start_actors(spec, refs, shapes, owns_ray)
        _wait_loaded(launched, progress)
        if spec.endpoint is not None and refs:
            _start_endpoint(launched, progress)
    except BaseException:
        if launched is not None:
            launched.close()
        elif owns_ray:
            ray.shutdown()
        raise
    return launched


def describe(model: ModelSpec, progress: Progress) -> tuple[ModelRef, ModelShape]:
    """Find a model's folder and what placing it needs. Raises CheckpointError, UnsupportedModel."""
    path = resolve_model(model.path, progress=progress)
    layers = experts_layers(meta_model(read_config(path)))
    ref = ModelRef(name=model.name, dtype=model.dtype, path=str(path))
    return ref, ModelShape(
        model=model.name,
        experts={layer.layer: layer.num_experts for layer in layers},
        replicas=model.replicas,
        exact=model.exact,
    )


def start_ray(spec: Spec) -> bool:
    """Connect to Ray, or start one in this process. True if it was started here."""
    if ray.is_initialized():
        return False
    try:
        if spec.ray.address != "local":
            ray.init(
                address=spec.ray.address, namespace=namespace_of(spec.name), log_to_driver=False
            )
            return False
        wanted = sum(group.num_cpus * group.count for group in spec.hosts)
        wanted += (spec.trunk.num_cpus + 1) * max(1, len(spec.models))
        ray.init(
            address="local",
            namespace=namespace_of(spec.name),
            # Cores are shared by turns, not owned: what the spec asks for fits on any machine.
            num_cpus=math.ceil(wanted) + 4,
            include_dashboard=False,
            object_store_memory=EMBEDDED_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(f"ray.address: {spec.ray.address}: {error}") from error
    return True


def _start_actors(
    spec: Spec, refs: Mapping[str, ModelRef], shapes: Mapping[str, ModelShape], owns_ray: bool
) -> Launched:
    namespace = namespace_of(spec.name)
    with contextlib.suppress(ValueError):
        ray.get_actor(CONTROLLER, namespace=namespace)
        raise ClusterError(f"name: a cluster {spec.name!r} is running; `moesaic down` ends it")
    groups: list[PlacementGroup] = []
    hosts: dict[str, Any] = {}
    threads = host_threads(spec)
    names = iter(spec.host_names())
    for group in spec.hosts:
        strategies = _strategies(group, groups, spec.timeouts.start_s)
        for index in range(group.count):
            name, _ = next(names)
            cpu_threads = threads if group.threads == "auto" else group.threads
            hosts[name] = (
                ray.remote(RayExpertHost)
                .options(
                    name=name,
                    namespace=namespace,
                    max_restarts=-1,
                    max_concurrency=4,
                    scheduling_strategy=strategies[index],
                    **_options(group, cpu_threads),
                )
                .remote(
                    name,
                    bind=spec.network.bind,
                    device=group.device,
                    policy=group.policy,
                    threads=cpu_threads,
                )
            )
    controller = (
        ray.remote(Controller)
        .options(name=CONTROLLER, namespace=namespace, max_restarts=-1, num_cpus=0)
        .remote(namespace, list(hosts), [(refs[name], shapes[name]) for name in refs])
    )
    return Launched(
        spec=spec,
        namespace=namespace,
        controller=controller,
        models=dict(refs),
        hosts=hosts,
        groups=groups,
        owns_ray=owns_ray,
    )


def _strategies(group: HostGroup, groups: list[PlacementGroup], start_s: float) -> list[Any]:
    """The scheduling strategy of each host of a group; a new placement group joins ``groups``."""
    if group.spread == "none":
        return ["SPREAD"] * group.count
    bundle = {"CPU": group.num_cpus, "GPU": group.num_gpus, **group.resources}
    bundle = {name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": 0.001}
    made = placement_group([dict(bundle) for _ in range(group.count)], strategy=group.spread)
    groups.append(made)
    try:
        ray.get(made.ready(), timeout=start_s)
    except GetTimeoutError:
        raise ClusterError(
            f"hosts: Ray could not reserve {group.count} x {bundle} ({group.spread}) within "
            f"{start_s:g} s; the cluster has {ray.cluster_resources()}"
        ) from None
    return [PlacementGroupSchedulingStrategy(made, index) for index in range(group.count)]


def _options(wanted: Resources, threads: int) -> dict[str, Any]:
    return {
        "num_cpus": wanted.num_cpus,
        "num_gpus": wanted.num_gpus,
        "resources": dict(wanted.resources),
        "label_selector": dict(wanted.labels),
        "runtime_env": {"env_vars": thread_environment(threads)},
    }


def thread_environment(threads: int) -> dict[str, str]:
    """Set before torch is imported: processes take turns on the cores, none spins on them."""
    return {
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def host_threads(spec: Spec) -> int:
    """An even share of a node's cores for each of the hosts on it."""
    nodes = max(1, sum(1 for node in ray.nodes() if node["Alive"]))
    per_node = math.ceil(spec.num_hosts / nodes)
    return max(1, (os.cpu_count() or 1) // per_node)


def _wait_loaded(launched: Launched, progress: Progress) -> None:
    deadline = time.monotonic() + launched.spec.timeouts.start_s
    names = list(launched.hosts)
    for index, (name, host) in enumerate(launched.hosts.items()):
        progress("starting hosts", index, len(names))
        ask(host.entry.remote(), max(0.1, deadline - time.monotonic()), f"{name}: start")
    progress("starting hosts", len(names), len(names))
    while launched.models:
        held, wanted, error = ask(launched.controller.progress.remote(), 10.0, "the controller")
        progress("loading experts", held, wanted)
        if error:
            raise ClusterError(f"loading experts: {error}")
        if held >= wanted > 0:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"timeouts.start_s: after {launched.spec.timeouts.start_s:g} s {held} of {wanted} "
                "replicas were loaded"
            )
        time.sleep(0.1)


def _start_endpoint(launched: Launched, progress: Progress) -> None:
    spec, endpoint = launched.spec, launched.spec.endpoint
    assert endpoint is not None
    progress("starting the endpoint", 0, 1)
    port = endpoint.port or free_port(endpoint.host)
    threads = (os.cpu_count() or 1) if spec.trunk.threads == "auto" else spec.trunk.threads
    trunks = {}
    for name, ref in launched.models.items():
        config = TrunkConfig(
            namespace=launched.namespace,
            model=ref,
            name=f"trunk-{name}-{secrets.token_hex(3)}",
            device=spec.trunk.device,
            threads=threads,
            policy=spec.timeouts.policy,
            transport=spec.network.transport,
            engine=_engine_config(spec),
            start_s=spec.timeouts.start_s,
        )
        deployment = Trunk.options(
            name=f"Trunk-{name}", ray_actor_options=_options(spec.trunk, threads)
        )
        trunks[name] = deployment.bind(engine_factory(config))
    tokenizers = {name: _tokenizer(Path(ref.path or "")) for name, ref in launched.models.items()}
    try:
        serve.start(
            proxy_location="HeadOnly", http_options={"host": endpoint.host, "port": port}
        )
        app = build(trunks, tokenizers, status=_status_source(launched.namespace))
        serve.run(app, name=_app_name(spec), route_prefix="/", blocking=False)
    except (RayError, RuntimeError, ValueError) as error:
        raise ClusterError(f"endpoint: {error}") from error
    launched.url = f"http://{endpoint.host}:{port}"
    progress("starting the endpoint", 1, 1)


def _engine_config(spec: Spec) -> EngineConfig:
    page = 32
    return EngineConfig(
        page_size=page,
        num_blocks=math.ceil(spec.trunk.cache_tokens / page),
        max_batch_tokens=spec.trunk.max_batch_tokens,
        max_requests=spec.trunk.max_requests,
        max_waiting=spec.trunk.max_waiting,
        # A step may wait for an expert in one layer after the other.
        stall_timeout_s=2 * spec.timeouts.expert_s + 60.0,
    )


def _tokenizer(path: Path) -> Callable[[], Any]:
    def load() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path)

    return load


def _status_source(namespace: str) -> Callable[[], Any]:
    async def status() -> dict[str, Any]:
        controller: Any = ray.get_actor(CONTROLLER, namespace=namespace)
        return {"cluster": await controller.status.remote()}

    return status


def _check_port(host: str, port: int) -> None:
    if port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ClusterError(
                f"endpoint.port: {host}:{port} is not free ({error.strerror}); "
                "choose another one, or 0 for any"
            ) from error


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
