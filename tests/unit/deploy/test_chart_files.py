"""The chart's files, without Helm: versions, the schema of its values, examples."""

from __future__ import annotations

import copy
import json
import re
import runpy
import tomllib
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from moesaic.actors.endpoint.http import proxy_middleware
from moesaic.actors.endpoint.http.monitoring_app import STATUS_TIMEOUT_S
from tests.helpers.paths import ROOT
from tests.helpers.rendered_chart import CHART, VARIANTS

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def errors(values: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(values)
    return [f"{'/'.join(str(part) for part in one.absolute_path)}: {one.message}" for one in found]


def merged(values: Any, more: Any) -> Any:
    """As Helm merges: mappings by key, all else whole."""
    if isinstance(values, dict) and isinstance(more, dict):
        return {**values, **{key: merged(values.get(key), one) for key, one in more.items()}}
    return more


def changed(path: str, value: object) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    part: Any = values
    *way, last = [int(word) if word.isdigit() else word for word in path.split(".")]
    for key in way:
        part = part[key]
    part[last] = value
    return values


def objects_within(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield path, schema
        for key, one in schema.items():
            yield from objects_within(one, f"{path}/{key}")


def test_versions_are_those_of_the_package_and_of_the_pins() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = (ROOT / "constraints.txt").read_text()
    assert (chart["apiVersion"], chart["name"]) == ("v2", "moesaic")
    assert chart["appVersion"] == project["version"]
    assert re.findall(r"^ray==(\S+)$", pins, re.MULTILINE) == [VALUES["rayVersion"]]


def test_the_schema_has_the_spec_of_today() -> None:
    made = runpy.run_path(str(ROOT / "deploy" / "values_schema.py"))
    written = (CHART / "values.schema.json").read_text()
    assert made["with_spec"](SCHEMA) == written, "run `make spec`"


def test_the_default_values_are_good() -> None:
    assert errors(VALUES) == []


@pytest.mark.parametrize("path", sorted(VARIANTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_good(path: Any) -> None:
    assert errors(merged(VALUES, yaml.safe_load(path.read_text()))) == []


def test_every_value_is_in_the_schema_and_no_other_is() -> None:
    def compare(values: Any, schema: dict[str, Any], path: str) -> None:
        known = schema.get("properties")
        if isinstance(values, dict) and known is not None and not path.startswith(".spec"):
            assert schema["additionalProperties"] is False, path
            assert values.keys() <= known.keys(), path
            for key, one in values.items():
                compare(one, known[key], f"{path}.{key}")

    compare(VALUES, SCHEMA, "")
    assert SCHEMA["properties"].keys() - VALUES.keys() == {"global"}


def test_objects_are_closed_or_kubernetes_own() -> None:
    """What is open is checked by Kubernetes: selectors, peers, tolerations and the like."""
    opened = {
        path
        for path, one in objects_within(SCHEMA["properties"])
        if "properties" in one and one.get("additionalProperties") is not False
    }
    # Beside the spec's own definitions, which are closed.
    assert {path.split("/")[1] for path in opened} <= {"spec"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("kind", "RayJob"),
        ("unknown", 1),
        ("image.tags", "x"),
        ("rayVersion", "latest"),
        ("fullnameOverride", "Moesaic"),
        ("fullnameOverride", "a" * 48),
        ("spec.model", []),
        ("spec.endpoint.drain_s", -1),
        ("spec.endpoint.port", 0),
        ("spec.endpoint", None),
        ("spec.monitoring.port", 0),
        ("spec.network.bind", "127.0.0.1"),
        ("spec.ray.address", "local"),
        ("spec.ray.insecure", True),
        ("spec.router", {"host": "127.0.0.1"}),
        ("spec.traces", {"endpoint": "http://localhost:4318"}),
        ("spec.hosts.0.count", 0),
        ("settleSeconds", -1),
        ("modelVolume.mountPath", "/tmp/models"),
        ("modelVolume.mountPath", "models"),
        ("modelVolume.size", "50 GB"),
        ("workers", []),
        ("workers.0.name", "headgroup"),
        ("workers.0.name", "CPU"),
        ("workers.0.replicas", -1),
        ("workers.0.gpus", 0.5),
        ("workers.0.resources.requests.memory", "much"),
        ("workers.0.hostPath", "/models"),
        ("gcsFaultTolerance.backend", "redis"),
        ("gcsFaultTolerance.backend", "etcd"),
        ("serviceMonitor.intervalSeconds", 9),
        ("httpRoute.enabled", True),
        ("httpRoute.requestTimeout", "never"),
        ("networkPolicy.httpsTo", ["everywhere"]),
        ("networkPolicy.operator.podLabels", {}),
        ("podLabels", {"a": "b" * 64}),
        ("env", [{"name": "HF_TOKEN", "value": "x"}]),
        ("env", [{"name": "OTEL_EXPORTER_OTLP_HEADERS", "value": "x-api-key=1"}]),
        ("env", [{"name": "A"}]),
    ],
)
def test_unknown_and_impossible_values_are_refused(path: str, value: object) -> None:
    assert errors(changed(path, value))


def test_a_secret_may_come_from_a_secret() -> None:
    source = {"valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    assert errors(changed("env", [{"name": "HF_TOKEN", **source}])) == []


def test_the_proxy_is_given_a_hook_that_exists() -> None:
    pods = (CHART / "templates" / "_pods.tpl").read_text()
    module, name = proxy_middleware.__name__, proxy_middleware.middlewares.__name__
    assert f"name: {proxy_middleware.HOOK}\n          value: {module}.{name}\n" in pods


def test_a_scrape_waits_longer_than_the_endpoint_does() -> None:
    monitor = (CHART / "templates" / "servicemonitor.yaml").read_text()
    times = {int(seconds) for seconds in re.findall(r"scrapeTimeout: (\d+)s", monitor)}
    assert min(times) > STATUS_TIMEOUT_S
    least = SCHEMA["properties"]["serviceMonitor"]["properties"]["intervalSeconds"]["minimum"]
    assert max(times) <= least


def test_every_value_has_its_page() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    assert not [key for key in VALUES if f"`{key}" not in page]
