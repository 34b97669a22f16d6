"""What the chart renders is what Kubernetes, KubeRay, Ray Serve and Moesaic take."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from moesaic.cluster.spec.spec import parse_spec
from tests.helpers.rendered_chart import (
    CHART,
    Object,
    helm,
    need_helm,
    only,
    pod_groups,
    ray_cluster,
    values_of,
)
from tests.with_kubernetes.crd_schema import check

need_helm()
kubernetes_validate: Any = pytest.importorskip("kubernetes_validate")

RAY = {"RayService", "RayCluster"}
# Their schemas are in no package; those of Kubernetes' own kinds come with kubernetes-validate.
ELSEWHERE = RAY | {"ServiceMonitor", "PrometheusRule", "HTTPRoute"}
VERSIONS = ("1.29", "1.35")


def test_helm_finds_nothing_to_say(helm_binary: Path, variant: str) -> None:
    done = helm(helm_binary, "lint", "--strict", str(CHART), "-f", str(values_of(variant)))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_core_kinds_are_valid(objects: list[Object], version: str) -> None:
    core = [one for one in objects if one["kind"] not in ELSEWHERE]
    assert {"NetworkPolicy", "Service"} <= {one["kind"] for one in core}
    for one in core:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_pods_are_valid(objects: list[Object], version: str) -> None:
    for group in pod_groups(objects):
        pod = {"apiVersion": "v1", "kind": "Pod", **group.template}
        kubernetes_validate.validate(pod, version, strict=True)


def test_a_wrong_pod_is_found(objects: list[Object]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(pod_groups(objects)[0].template)}
    pod["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)


def test_ray_objects_are_valid(objects: list[Object], crd_schemas: dict[str, Any]) -> None:
    found = only(objects, *RAY)
    check(found, crd_schemas[found["kind"]])


def test_objects_for_other_operators_are_valid(
    rendered: Callable[..., list[Object]], other_crd_schemas: dict[str, Any]
) -> None:
    objects = rendered("-f", str(values_of("everything")))
    for kind, schema in other_crd_schemas.items():
        check(only(objects, kind), schema)
    wrong = copy.deepcopy(only(objects, "ServiceMonitor"))
    wrong["spec"]["endpoints"][0]["scrapeTimout"] = "10s"
    with pytest.raises(jsonschema.ValidationError):
        check(wrong, other_crd_schemas["ServiceMonitor"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("autoscalerOptions",), {"version": "v3"}),
        (("authOptions", "mode"), "maybe"),
        (("workerGroupSpecs", 0, "maxReplicas"), "two"),
        (("headGroupSpec", "headPort"), 1),
    ],
)
def test_a_wrong_ray_object_is_found(
    rendered: Callable[..., list[Object]],
    crd_schemas: dict[str, Any],
    path: tuple[Any, ...],
    value: object,
) -> None:
    service = copy.deepcopy(only(rendered(), "RayService"))
    part: Any = service["spec"]["rayClusterConfig"]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(service, crd_schemas["RayService"])


def test_serve_and_moesaic_take_the_configuration(objects: list[Object]) -> None:
    service = [one for one in objects if one["kind"] == "RayService"]
    if not service:
        spec = yaml.safe_load(only(objects, "ConfigMap")["data"]["spec.yaml"])
    else:
        config = yaml.safe_load(service[0]["spec"]["serveConfigV2"])
        deployed = ServeDeploySchema.model_validate(config)
        (application,) = deployed.applications
        spec = application.args
        assert application.import_path == "moesaic.serve:build"
        assert application.name == f"moesaic-{spec['name']}"
        assert application.route_prefix == "/"
        # The ingress stands beside the one proxy.
        assert deployed.proxy_location.value == "HeadOnly"
        assert deployed.http_options.port == spec["endpoint"]["port"]
    parsed = parse_spec(spec)
    assert parsed.ray.address == "auto"
    assert parsed.network.bind == "node"
    assert parsed.endpoint is not None
    assert parsed.endpoint.host == "0.0.0.0"


def test_large_numbers_stay_numbers(rendered: Callable[..., list[Object]]) -> None:
    objects = rendered("-f", str(values_of("everything")))
    config = yaml.safe_load(only(objects, "RayService")["spec"]["serveConfigV2"])
    priority = config["applications"][0]["args"]["endpoint"]["limits"]["max_priority"]
    assert (priority, type(priority)) == (1_000_000, int)


def test_kuberay_rules_that_no_schema_has(objects: list[Object]) -> None:
    """Of its validation: what it refuses when it looks at an object."""
    found, cluster = only(objects, *RAY), ray_cluster(objects)
    most = 47 if found["kind"] == "RayService" else 53
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found["metadata"]["name"])
    assert len(found["metadata"]["name"]) <= most
    assert cluster["authOptions"]["mode"] == "token"
    assert tuple(int(n) for n in cluster["rayVersion"].split(".")) >= (2, 52, 0)
    assert "name" not in cluster["headGroupSpec"].get("headService", {}).get("metadata", {})
    for group in pod_groups(objects):
        # With autoscaler v2 it has to be Never, and KubeRay sets that.
        assert "restartPolicy" not in group.template["spec"]
        names = {one["name"] for one in group.container.get("env", [])}
        assert not names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_gcs_storage"}
        mounts = {one["mountPath"] for one in group.container["volumeMounts"]}
        assert "/data/gcs" not in mounts
    storage = cluster.get("gcsFaultToleranceOptions", {})
    if storage.get("backend") == "rocksdb":
        assert not storage.keys() & {"redisAddress", "redisPassword", "redisUsername"}
    else:
        assert "storage" not in storage
    for params in (g["rayStartParams"] for g in cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in params.values())
        assert not params.keys() & {"labels", "redis-password"}


def test_only_the_head_answers_at_the_endpoint(objects: list[Object]) -> None:
    """A worker's pod is in the selector of KubeRay's service, too, but has no port of that name."""
    head, *workers = pod_groups(objects)
    named = {port["name"] for port in head.container["ports"]}
    assert {"serve", "monitoring", "dashboard", "gcs-server", "metrics"} <= named
    for group in workers:
        assert {port["name"] for port in group.container["ports"]} == {"metrics"}
    found = only(objects, *RAY)
    if found["kind"] == "RayService":
        (port,) = found["spec"]["serveService"]["spec"]["ports"]
    else:
        (service,) = (o for o in objects if o["metadata"]["name"].endswith("-endpoint"))
        assert service["spec"]["selector"]["ray.io/node-type"] == "head"
        (port,) = service["spec"]["ports"]
    assert port["targetPort"] == "serve"
