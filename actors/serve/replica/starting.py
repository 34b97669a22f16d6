"""The start of a replica of Ray Serve: its label, its log, and the record of a failure."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ray import serve
from ray.serve.exceptions import RayServeException

from ...runtime.garbage import starting_without_collections
from ...runtime.process_log import begin_process
from ...runtime.ray_border import cluster_of
from ...store.start_failures import recording_failure
from ...tracing.start import trace_if_wanted
from .names import app_namespace, model_of
from .node_port import stay_on_node

log = logging.getLogger(__name__)


@contextmanager
def starting(kind: Literal["trunk", "ingress"]) -> Iterator[None]:
    """Begin a replica's log with its name while it starts, and record the error if it fails."""
    try:
        replica = serve.get_replica_context()
    except RayServeException:
        yield  # not in a replica: a test's own process
        return
    stay_on_node()
    name = model_of(replica.deployment) if kind == "trunk" else kind
    # A model may have several trunks.
    process = f"trunk-{name}-{replica.replica_id.unique_id}" if kind == "trunk" else kind
    namespace = app_namespace(replica.app_name)
    with recording_failure(namespace, kind, name):
        cluster = cluster_of(namespace)
        begin_process(kind, name, cluster, process)
        trace_if_wanted(namespace, kind, process, cluster)
        with starting_without_collections():
            yield
    log.info("%s is ready", process)
