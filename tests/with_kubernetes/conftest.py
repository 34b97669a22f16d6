"""Helm from MOESAIC_HELM, KubeRay's custom resources from the folder MOESAIC_KUBERAY_CRDS."""

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
        "RayService": read_schema(Path(named), "rayservices"),
        "RayCluster": read_schema(Path(named), "rayclusters"),
    }
