"""Helm from MOESAIC_HELM; custom resources of KubeRay from the folder MOESAIC_KUBERAY_CRDS, and of
Prometheus Operator and Gateway API from the folder MOESAIC_OTHER_CRDS."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.rendered_chart import VARIANTS, Object, render, values_of
from tests.with_kubernetes.crd_schema import read_schema

NAMES = sorted(path.stem for path in VARIANTS.glob("*.yaml"))


@pytest.fixture(scope="session")
def helm_binary() -> Path:
    return Path(os.environ["MOESAIC_HELM"]).resolve()


@pytest.fixture(scope="session")
def rendered(helm_binary: Path) -> Callable[..., list[Object]]:
    def of(*words: str, release: str = "rel") -> list[Object]:
        return render(helm_binary, *words, release=release)

    return of


@pytest.fixture(params=NAMES)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def objects(rendered: Callable[..., list[Object]], variant: str) -> list[Object]:
    return rendered("-f", str(values_of(variant)))


@pytest.fixture(scope="session")
def crd_schemas() -> dict[str, dict[str, Any]]:
    if not (named := os.environ.get("MOESAIC_KUBERAY_CRDS")):
        pytest.skip("MOESAIC_KUBERAY_CRDS names no folder with KubeRay's custom resources")
    return {
        "RayService": read_schema(Path(named), "ray.io_rayservices"),
        "RayCluster": read_schema(Path(named), "ray.io_rayclusters"),
    }


@pytest.fixture(scope="session")
def other_crd_schemas() -> dict[str, dict[str, Any]]:
    if not (named := os.environ.get("MOESAIC_OTHER_CRDS")):
        pytest.skip("MOESAIC_OTHER_CRDS names no folder with custom resources")
    return {
        "ServiceMonitor": read_schema(Path(named), "monitoring.coreos.com_servicemonitors"),
        "PrometheusRule": read_schema(Path(named), "monitoring.coreos.com_prometheusrules"),
        "HTTPRoute": read_schema(Path(named), "gateway.networking.k8s.io_httproutes"),
    }
