"""Elastic expert parallelism on Ray for Mixture-of-Experts models.

    import moesaic

    with moesaic.up("deploy/local.yaml") as cluster:
        client = moesaic.Client(cluster.url)
        print(client.chat("Hello!").text)

    with moesaic.connect("moesaic://127.0.0.1:8001") as router:  # if the spec has `router`
        y_TH = router.experts("demo", 0)(x_TH, ids_TK, weights_TK)

Heavy libraries are imported when they are first used: a program that only speaks HTTP loads neither
Ray nor torch, and one that only speaks to a router service needs only numpy and gRPC.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .about import check_spec, default_spec, inspect_model, versions
    from .bench import measure_load
    from .clients.http_client import AsyncClient, Client
    from .clients.router_client import RouterClient
    from .cluster.reports.activity import Activity, ExpertReport
    from .cluster.reports.applying import ApplyReport
    from .cluster.reports.placing import ChangeReport, DrainReport, PlanReport
    from .cluster.reports.scaling import ScalingReport
    from .cluster.reports.status import ClusterStatus, EndpointStatus
    from .cluster.reports.training import TrainReport
    from .cluster.reports.updates import WeightUpdateReport
    from .cluster.spec.spec import Spec, load_spec
    from .cluster.train_command.train_spec import TrainSpec
    from .connecting import connect
    from .handle import Cluster
    from .models.upcycling.upcycle import upcycle
    from .proto.errors import MoesaicError, StateLost, StepLost
    from .starting import up
    from .traces import read_trace, write_trace
    from .training import PoolOptimizer, train

# OpenMP reads it once, when torch is loaded. A trunk and its hosts take turns on the same cores,
# and threads that spin while they wait make both ten times slower (measured).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
__all__ = [
    "Activity",
    "ApplyReport",
    "AsyncClient",
    "ChangeReport",
    "Client",
    "Cluster",
    "ClusterStatus",
    "DrainReport",
    "EndpointStatus",
    "ExpertReport",
    "MoesaicError",
    "PlanReport",
    "PoolOptimizer",
    "RouterClient",
    "ScalingReport",
    "Spec",
    "StateLost",
    "StepLost",
    "TrainReport",
    "TrainSpec",
    "WeightUpdateReport",
    "check_spec",
    "connect",
    "default_spec",
    "inspect_model",
    "load_spec",
    "measure_load",
    "read_trace",
    "train",
    "up",
    "upcycle",
    "versions",
    "write_trace",
]

_HOMES = {
    "Activity": "cluster.reports.activity",
    "ApplyReport": "cluster.reports.applying",
    "AsyncClient": "clients.http_client",
    "ChangeReport": "cluster.reports.placing",
    "Client": "clients.http_client",
    "Cluster": "handle",
    "ClusterStatus": "cluster.reports.status",
    "DrainReport": "cluster.reports.placing",
    "EndpointStatus": "cluster.reports.status",
    "ExpertReport": "cluster.reports.activity",
    "MoesaicError": "proto.errors",
    "PlanReport": "cluster.reports.placing",
    "PoolOptimizer": "training",
    "RouterClient": "clients.router_client",
    "ScalingReport": "cluster.reports.scaling",
    "Spec": "cluster.spec.spec",
    "StateLost": "proto.errors",
    "StepLost": "proto.errors",
    "TrainReport": "cluster.reports.training",
    "TrainSpec": "cluster.train_command.train_spec",
    "WeightUpdateReport": "cluster.reports.updates",
    "check_spec": "about",
    "connect": "connecting",
    "default_spec": "about",
    "inspect_model": "about",
    "load_spec": "cluster.spec.spec",
    "measure_load": "bench",
    "read_trace": "traces",
    "train": "training",
    "up": "starting",
    "upcycle": "models.upcycling.upcycle",
    "versions": "about",
    "write_trace": "traces",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
