"""The Helm chart as Kubernetes gets it: rendered, and seen as objects and as pods."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.helpers.paths import ROOT

CHART = ROOT / "deploy" / "chart"
VARIANTS = ROOT / "tests" / "with_kubernetes" / "values"

Object = dict[str, Any]


class PodGroup(NamedTuple):
    name: str
    head: bool
    template: Object

    @property
    def container(self) -> Object:
        (container,) = self.template["spec"]["containers"]
        return container


def need_helm() -> None:
    """Skips the module that is being imported where there is no Helm."""
    if not os.environ.get("MOESAIC_HELM"):
        reason = "MOESAIC_HELM names no helm; `make test-kubernetes` brings one"
        pytest.skip(reason, allow_module_level=True)


def helm(binary: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(binary), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def render(binary: Path, *words: str, release: str = "rel") -> list[Object]:
    """What `helm template` writes. Raises AssertionError with what Helm says if it refuses."""
    done = helm(binary, "template", release, str(CHART), "--namespace", "moesaic", *words)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one is not None]


def values_of(variant: str) -> Path:
    return VARIANTS / f"{variant}.yaml"


def only(objects: list[Object], *kinds: str) -> Object:
    (found,) = (one for one in objects if one["kind"] in kinds)
    return found


def ray_cluster(objects: list[Object]) -> Object:
    """The spec of the RayCluster, of either kind."""
    found = only(objects, "RayService", "RayCluster")
    return found["spec"]["rayClusterConfig"] if found["kind"] == "RayService" else found["spec"]


def pod_groups(objects: list[Object]) -> list[PodGroup]:
    cluster = ray_cluster(objects)
    workers = [PodGroup(g["groupName"], False, g["template"]) for g in cluster["workerGroupSpecs"]]
    return [PodGroup("head", True, cluster["headGroupSpec"]["template"]), *workers]


def values_within(value: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf with its path, such as spec.containers[0].image."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from values_within(one, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for n, one in enumerate(value):
            yield from values_within(one, f"{path}[{n}]")
    else:
        yield path, value
