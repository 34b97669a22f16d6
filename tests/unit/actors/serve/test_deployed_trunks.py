"""What a trunk's process is told, and when there has to be another one; nothing is deployed."""

from __future__ import annotations

from typing import Any

import pytest
from ray import serve

from moesaic.actors.serve import trunk_apps
from moesaic.actors.serve.trunk_apps import deploy_trunks, trunk_version
from moesaic.cluster.card_memory import CardShare
from moesaic.cluster.placement import ModelRef, ModelShape
from moesaic.cluster.spec.deployment import DeployedModel, Deployment
from moesaic.cluster.spec.spec import parse_spec

REF = ModelRef(name="m", dtype="float32", path="/m")


def deployment(**values: Any) -> Deployment:
    model = DeployedModel(ref=REF, shape=ModelShape(model="m", experts={0: 4}), top_k=2)
    spec = parse_spec(values)
    return Deployment(
        id="1", spec=spec, models=[model], groups=dict(enumerate(spec.hosts)), order=[0]
    )


def test_a_trunk_is_told_what_it_may_take_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed: list[Any] = []
    monkeypatch.setattr(serve, "run_many", lambda targets, **_: deployed.extend(targets))
    wanted = deployment(trunk={"num_gpus": 0.5, "gpu_memory": "2GB", "cache_tokens": 100})
    deploy_trunks(wanted, ["another"])
    assert not deployed
    deploy_trunks(wanted, ["m"])
    (target,) = deployed
    assert target.name == "moesaic-local:m"
    (factory,) = target.target._bound_deployment.init_args
    assert isinstance(factory, trunk_apps.EngineFactory)
    share = CardShare(key="trunk", num_gpus=0.5, gpu_memory=2 * 10**9)
    assert factory.config.share == share
    assert factory.config.cache_bytes(10) == 1280, "a cache has whole pages"


@pytest.mark.parametrize(
    "values",
    [
        {"trunk": {"max_requests": 5}},
        {"trunk": {"num_cpus": 2}},
        {"timeouts": {"attempt_s": 3.0}},
        {"hosts": [{"lending": "never"}]},
    ],
)
def test_another_trunk_is_needed(values: dict[str, Any]) -> None:
    assert trunk_version(deployment(**values), REF) != trunk_version(deployment(), REF)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"trunk": {"max_replicas": 3, "min_replicas": 0}},
        {"timeouts": {"start_s": 60.0}},
        {"endpoint": {"limits": {"answer_tokens": 5}, "drain_s": 1.0}},
        {"balance": {"auto": False}, "hosts": [{"count": 3}]},
    ],
)
def test_the_trunk_goes_on(values: dict[str, Any]) -> None:
    assert trunk_version(deployment(**values), REF) == trunk_version(deployment(), REF)
