"""The record of a cluster is read as it was written."""

from __future__ import annotations

import pytest

from moesaic.cluster.placement import ModelRef, ModelShape
from moesaic.cluster.spec.deployment import DeployedModel, Deployment, PlacedEndpoint
from moesaic.cluster.spec.monitoring import MonitoringSpec
from moesaic.cluster.spec.spec import HostGroup, load_spec
from moesaic.proto.errors import ClusterError
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("name", ["local.yaml", "training.yaml"])
def test_a_record_is_read_as_it_was_written(name: str) -> None:
    ref = ModelRef(name="m", dtype="bfloat16", path="/m", config={"layers": [1]}, learns=True)
    shape = ModelShape(model="m", experts={0: 8, 3: 16}, replicas=2, expert_bytes=1 << 20)
    written = Deployment(
        id="1f",
        spec=load_spec(ROOT / "deploy" / name),
        models=[DeployedModel(ref=ref, shape=shape, top_k=2)],
        groups={0: HostGroup(count=3), 4: HostGroup(lending="never")},
        order=[4],
        endpoint=PlacedEndpoint(
            host="0.0.0.0",
            url="http://10.0.0.1:8000",
            monitoring=MonitoringSpec(port=8002),
            monitoring_url="http://127.0.0.1:8002",
        ),
        router="127.0.0.1:8001",
    )
    assert Deployment.from_json(written.to_json()) == written


def test_another_versions_record_is_refused() -> None:
    with pytest.raises(ClusterError, match="stored state is not of this version"):
        Deployment.from_json('{"spec": {"hosts": "many"}}')
