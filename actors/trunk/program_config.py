"""What a program that uses the SDK needs to open trunks of its own."""

from __future__ import annotations

import os
import secrets

from ...cluster.placement import ModelRef
from ...proto.errors import ClusterError
from ..engine.trunk_config import TrunkConfig
from ..store.durable_state import stored_deployment


def program_config(namespace: str, ref: ModelRef) -> TrunkConfig:
    """Return the configuration of this program's trunk of a model. Raises ClusterError."""
    deployment = stored_deployment(namespace)
    if deployment is None:
        raise ClusterError(f"{namespace}: the cluster has ended")
    spec = deployment.spec
    return TrunkConfig(
        namespace=namespace,
        model=ref,
        name=f"sdk-{os.getpid()}-{secrets.token_hex(3)}",
        policy=spec.router_policy,
        transport=spec.network.transport,
        lending=spec.lends,
    )
