"""Actors get the variables about logs from the owner, also those that Ray Serve starts."""

from __future__ import annotations

from typing import Any

import pytest

from moesaic.actors.runtime.ray_border import actor_options
from moesaic.cluster.spec.spec import HostGroup
from tests.helpers.endpoint.serve_app import endpoint_app


def of_ingress() -> dict[str, Any]:
    app: Any = endpoint_app({}, {})
    return app._bound_deployment.ray_actor_options


def test_hosts_trunks_and_ingress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_LOG", "router=debug")
    monkeypatch.setenv("MOESAIC_LOG_FORMAT", "json")
    monkeypatch.setenv("MOESAIC_ROUTER_KEY", "a-key")
    both = {"MOESAIC_LOG": "router=debug", "MOESAIC_LOG_FORMAT": "json"}
    found = actor_options(HostGroup(), 2)["runtime_env"]["env_vars"]
    assert both.items() <= found.items()
    assert found["OMP_NUM_THREADS"] == "2"
    assert of_ingress()["runtime_env"] == {"env_vars": both}
    assert "a-key" not in str([found, of_ingress()])


def test_without_the_variables_the_ingress_may_use_any_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MOESAIC_LOG", "MOESAIC_LOG_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    assert not of_ingress().get("runtime_env")
    assert not {"MOESAIC_LOG", "MOESAIC_LOG_FORMAT"} & {
        *actor_options(HostGroup(), 1)["runtime_env"]["env_vars"]
    }
