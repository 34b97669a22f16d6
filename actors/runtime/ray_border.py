"""The border to Ray: starting and joining it, and the translation of its errors.

Handles are Any, because Ray types neither an actor's methods nor their results.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Must be set before ray is imported: it turns usage reports off.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from ...cluster.card_memory import mig_names
from ...cluster.spec.parts import Resources
from ...cluster.spec.spec import Spec
from ...proto.errors import ClusterError, MoesaicError, describe_error
from .embedded_ray import EmbeddedRay, connected_own_ray, end_embedded, start_embedded
from .joining import join
from .log_settings import log_environment
from .ray_token import need_token

log = logging.getLogger(__name__)

# Ray warns that it uses a token by default.
logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)

CONTROLLER = "controller"
# The resource that only the node of Ray's GCS has.
HEAD_NODE = "node:__internal_head__"
EMBEDDED_STORE_BYTES = 128 << 20


def start_ray(spec: Spec, said: Callable[[str], None] = log.warning) -> EmbeddedRay | None:
    """Connect to Ray; start one where the spec asks for it, and return it.

    None: the Ray is not Moesaic's own. A second cluster of this process is on the same Ray as the
    first. ``said`` is called with a message if a start failed and is tried once more. Raises
    ClusterError, also if this process is connected to a Ray that asks for no token.
    """
    if spec.ray.address != "local" and not ray.is_initialized():
        join_ray(spec.ray.address, spec.name, insecure=spec.ray.insecure)
        return None
    if ray.is_initialized():
        _need_token(spec)
        return connected_own_ray() if spec.ray.address == "local" else None
    wanted = sum(group.num_cpus * group.most for group in spec.hosts)
    trunks = spec.trunk.num_cpus * spec.trunk.max_replicas
    wanted += (trunks + 1) * max(1, len(spec.models))
    instances = mig_names(os.environ.get("CUDA_VISIBLE_DEVICES"))
    started = start_embedded(
        said,
        # Processes share the cores in turns, so the spec fits on a machine with fewer cores.
        num_cpus=math.ceil(wanted) + 4,
        # Ray would count the GPU that they are parts of, once.
        num_gpus=len(instances) or None,
        object_store_memory=EMBEDDED_STORE_BYTES,
    )
    try:
        join_ray(started.address, spec.name, insecure=spec.ray.insecure)
    except BaseException:
        end_embedded(started.folder)
        raise
    return started


def _need_token(spec: Spec) -> None:
    try:
        need_token(ray_address(), insecure=spec.ray.insecure)
    except ClusterError as error:
        raise ClusterError(f"ray.address: {spec.ray.address}: {error}") from error.__cause__


def others_on_ray(namespace: str) -> list[str]:
    """Return the names of the other clusters on the Ray that this process is connected to."""
    known: Any = ray.util.list_named_actors(all_namespaces=True)
    controllers = {actor["namespace"] for actor in known if actor["name"] == CONTROLLER}
    return sorted(cluster_of(one) for one in controllers - {namespace} if cluster_of(one) != one)


def named_actors(namespace: str) -> list[str]:
    """Return the names of all actors of a namespace that have not ended."""
    known: Any = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in known if actor["namespace"] == namespace]


def kill_named(namespace: str, prefix: str = "") -> None:
    """End all actors of a namespace with this prefix; a failure does not spare the others."""
    with contextlib.ExitStack() as each:
        for name in named_actors(namespace):
            if name.startswith(prefix):
                each.callback(_kill_one, name, namespace)


def _kill_one(name: str, namespace: str) -> None:
    try:
        actor = ray.get_actor(name, namespace=namespace)
    except ValueError:
        return  # it has ended meanwhile
    ray.kill(actor, no_restart=True)


def ray_get(ref: Any, timeout_s: float, what: str) -> Any:
    """Call `ray.get`, and translate Ray's errors; raise the other side's MoesaicError itself."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise ClusterError(f"{what}: no answer has arrived within {timeout_s:g} s") from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MoesaicError):
            raise cause from None
        raise ClusterError(f"{what}: {describe_error(cause)}") from error
    except RayError as error:
        raise ClusterError(f"{what}: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """Return an error's last line, as Ray's messages say there what happened, after a trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def controller_of(namespace: str) -> Any:
    """Return the handle of the cluster's controller. Raises ClusterError if there is none."""
    try:
        return ray.get_actor(CONTROLLER, namespace=namespace)
    except ValueError as error:
        raise ClusterError(
            f"cluster {cluster_of(namespace)!r} has no controller, so it has ended or does not run "
            f"on this Ray: {error}"
        ) from error


def join_ray(address: str, name: str, *, insecure: bool = False) -> None:
    """Connect this process to a running Ray. Raises ClusterError.

    A Ray that asks for no token is an error too, unless ``insecure``.
    """
    if ray.is_initialized():
        return
    join(
        address,
        insecure=insecure,
        namespace=namespace_of(name),
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def ray_address() -> str:
    return ray.get_runtime_context().gcs_address


def log_folder() -> str:
    """Return the folder with the output of Ray's processes on this node."""
    # Ray is initialised already; this call is the only public way to its context.
    context: Any = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
    return str(Path(context.address_info["session_dir"], "logs"))


def namespace_of(name: str) -> str:
    return f"moesaic-{name}"


def cluster_of(namespace: str) -> str:
    """Return the cluster's name, the inverse of `namespace_of`."""
    return namespace.removeprefix("moesaic-")


def actor_options(
    wanted: Resources, threads: int, logs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return Ray's options; ``logs`` are the variables about logs (None: this process's)."""
    logs = log_environment() if logs is None else logs
    return {
        "num_cpus": wanted.num_cpus,
        "num_gpus": wanted.num_gpus,
        "resources": dict(wanted.resources),
        "label_selector": dict(wanted.labels),
        "runtime_env": {"env_vars": thread_environment(threads) | dict(logs)},
    }


def thread_environment(threads: int) -> dict[str, str]:
    """Return environment variables, for before torch's import, that let processes share cores."""
    return {
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
