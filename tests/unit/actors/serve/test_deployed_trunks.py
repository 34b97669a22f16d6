"""What a trunk's process is told; nothing is deployed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moesaic.actors.serve import deploy
from moesaic.cluster.card_memory import CardShare
from moesaic.cluster.placement import ModelRef
from moesaic.cluster.spec.spec import parse_spec
from moesaic.proto.errors import ClusterError


def test_a_trunk_is_told_what_it_may_take_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[deploy.EngineFactory] = []
    deployment = SimpleNamespace(options=lambda **_: SimpleNamespace(bind=made.append))

    def stop(_: object) -> None:
        raise ClusterError("nothing is deployed here")

    monkeypatch.setattr(deploy, "Trunk", deployment)
    monkeypatch.setattr(deploy, "find_address", stop)
    spec = parse_spec({"trunk": {"num_gpus": 0.5, "gpu_memory": "2GB", "cache_tokens": 100}})
    with pytest.raises(ClusterError, match="nothing is deployed"):
        deploy.deploy_endpoint(spec, {"m": ModelRef(name="m", dtype="float32", path="/m")}, {})
    (factory,) = made
    share = CardShare(key="trunk", num_gpus=0.5, gpu_memory=2 * 10**9)
    assert factory.config.share == share
    assert factory.config.cache_bytes(10) == 1280, "a cache has whole pages"
