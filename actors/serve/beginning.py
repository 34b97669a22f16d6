"""The beginning of a cluster: its checks, and what it is to be, which its controller reads.

A program that starts a cluster on its own (`launch`) and Ray Serve (`build`) share it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray

from ...cluster.placement import ModelRef
from ...cluster.spec.deployment import DeployedModel, Deployment, PlacedEndpoint
from ...cluster.spec.spec import Spec
from ...models.source import resolve_model
from ...proto.errors import ClusterError, describe_error
from ..controller.controller import Controller
from ..preflight.check_updates import update_path
from ..preflight.findings import raise_errors
from ..preflight.preflight import Preflight, preflight, shape_of
from ..runtime.log_settings import log_environment, log_runtime_env
from ..runtime.placement_groups import reserve
from ..runtime.ray_border import CONTROLLER, HEAD_NODE, namespace_of
from ..store.cluster_secret import make_secret
from ..store.durable_state import claim, forget_last, store_deployment
from ..tracing.start import store_traces
from .end_at_once import begins
from .ending import end_leftovers

log = logging.getLogger(__name__)

# (step, how many are done, of how many)
Progress = Callable[[str, int, int], None]


def prepare(
    spec: Spec, progress: Progress, warn: Callable[[str], None], *, local: bool, runs: bool = False
) -> list[DeployedModel]:
    """Check everything before something starts, and return the spec's models.

    ``local``: the cluster's processes will be on this machine. With ``runs`` the cluster is there,
    and has its ports and its part of the machine. ``warn`` receives findings that are odd but
    harmless. Raises SpecError, CheckpointError, UnsupportedModel and ClusterError.
    """
    checked = _check(spec, progress, warn, local=local, runs=runs)
    found = []
    for model in spec.models:
        described = checked.described[model.name]
        ref = ModelRef(
            name=model.name,
            dtype=model.dtype,
            path=str(checked.folders[model.name]),
            updates=None if model.updates is None else str(update_path(model.updates)),
            learns=model.train,
        )
        shape = shape_of(model, described)
        found.append(DeployedModel(ref=ref, shape=shape, top_k=described.top_k))
    return found


def first_deployment(
    cluster_id: str,
    spec: Spec,
    models: list[DeployedModel],
    endpoint: PlacedEndpoint | None,
    router: str | None,
) -> Deployment:
    """Return what a cluster is to be that begins."""
    return Deployment(
        id=cluster_id,
        spec=spec,
        models=models,
        groups=dict(enumerate(spec.hosts)),
        order=tuple(range(len(spec.hosts))),
        trunk_threads=threads_of_trunks(spec),
        log_environment=log_environment(),
        endpoint=endpoint,
        router=router,
    ).as_stored


def threads_of_trunks(spec: Spec) -> int:
    """Return how many threads each trunk has."""
    return (os.cpu_count() or 1) if spec.trunk.threads == "auto" else spec.trunk.threads


def begin(
    deployment: Deployment, router_key: str | None = None, begun: Callable[[], None] = lambda: None
) -> Any:
    """Begin a cluster on the Ray that this process is connected to; return its controller.

    ``begun`` is called when the cluster's namespace is this one's, and before anything starts
    there. Raises ClusterError.
    """
    spec = deployment.spec
    namespace = namespace_of(spec.name)
    make_update_folders(deployment.models)
    claim(namespace, spec.timeouts.start_s)
    begins(namespace)
    begun()
    end_leftovers(namespace)
    forget_last(namespace)
    make_secret(namespace, router_key)
    store_traces(namespace, spec.traces.settings)
    for number, group in deployment.groups.items():
        reserve(namespace, number, group, spec.timeouts.start_s)
    store_deployment(namespace, deployment)
    return (
        ray.remote(Controller)
        .options(
            name=CONTROLLER,
            namespace=namespace,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            # Losing a node of hosts does not end the controller, nor does it start there again.
            resources={HEAD_NODE: 0.001},
            **log_runtime_env(deployment.log_environment),
        )
        .remote(namespace)
    )


def check_name(spec: Spec) -> None:
    """Raise ClusterError if a cluster of the same name runs on this Ray."""
    if runs(spec):
        raise ClusterError(
            f"name: a cluster {spec.name!r} is running; `moesaic down --name {spec.name}` ends it, "
            "and `moesaic apply` changes it"
        )


def runs(spec: Spec) -> bool:
    """Return whether the cluster of this name runs on this Ray."""
    with contextlib.suppress(ValueError):
        ray.get_actor(CONTROLLER, namespace=namespace_of(spec.name))
        return True
    return False


def _check(
    spec: Spec, progress: Progress, warn: Callable[[str], None], *, local: bool, runs: bool
) -> Preflight:
    """Check the spec before anything is downloaded, and again when all models are local.

    Raises one error that lists every problem that keeps the cluster from starting.
    """
    checked = preflight(spec, local=local, runs=runs)
    raise_errors(checked.findings)
    absent = [model for model in spec.models if model.name not in checked.folders]
    for model in absent:
        resolve_model(model.path, progress=progress)
    if absent:
        checked = preflight(spec, local=local, runs=runs)
        raise_errors(checked.findings)
    for finding in checked.findings:
        warn(f"{finding.severity}: {finding}")
    for card in checked.cards:
        log.info("%s", card)
    return checked


def make_update_folders(models: Iterable[DeployedModel]) -> None:
    """Make the folders of models' updates that are not there. Raises ClusterError."""
    for folder in [Path(one.ref.updates) for one in models if one.ref.updates is not None]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = describe_error(error)
            raise ClusterError(f"updates: {folder} cannot be made: {why}") from error
