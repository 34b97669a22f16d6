"""What docs/kubernetes.md promises of every install: ends, secrets, rights, names."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import ROOT
from tests.helpers.rendered_chart import (
    CHART,
    Object,
    helm,
    need_helm,
    only,
    pod_groups,
    ray_cluster,
    values_of,
    values_within,
)

need_helm()

# A key of a label may have dots.
LABEL = re.compile(r"(^|\.)(labels|matchLabels|selector)\.")
SECRET = re.compile(r"(?i)(token|password|secret|_key$)")


def only_named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = (o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name))
    return found


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize("drain_s", [0, 0.5, 30, 119.2, 86_400])
def test_all_times_follow_from_one_number(
    rendered: Callable[..., list[Object]], variant: str, drain_s: float
) -> None:
    objects = rendered(
        "-f", str(values_of(variant)), "--set-json", f"spec.endpoint.drain_s={drain_s}"
    )
    for group in pod_groups(objects):
        words = group.container["lifecycle"]["preStop"]["exec"]["command"]
        assert words[:2] == ["before-stop", "head" if group.head else "worker"]
        times = dict(word.removeprefix("--").split("=") for word in words[2:])
        settle_s, waited_s = int(times["settle-s"]), int(times["drain-s"])
        assert waited_s == math.ceil(drain_s)
        grace_s = group.template["spec"]["terminationGracePeriodSeconds"]
        # Half a minute for Ray's processes, once the hook is over.
        assert grace_s >= settle_s + drain_s + 30
        assert grace_s <= settle_s + drain_s + 31
        for one in objects:
            if one["kind"] == "RayService":
                assert one["spec"]["rayClusterDeletionDelaySeconds"] >= grace_s


def test_probes_ask_ray_and_leave_it_time(objects: list[Object]) -> None:
    for group in pod_groups(objects):
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = group.container[probe]
            assert asked["httpGet"] == {"path": "/api/healthz", "port": 52365}
            # One late answer is no failure.
            assert asked["failureThreshold"] >= 2
        start, life = group.container["startupProbe"], group.container["livenessProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= 300
        assert life["periodSeconds"] * life["failureThreshold"] >= 120


def test_pods_have_no_rights(objects: list[Object]) -> None:
    autoscales = ray_cluster(objects)["enableInTreeAutoscaling"]
    for group in pod_groups(objects):
        pod, container = group.template["spec"], group.container
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["automountServiceAccountToken"] is (group.head and autoscales)
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert all("hostPath" not in volume for volume in pod["volumes"])
        writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
        assert {"/tmp", "/home/moesaic", "/cache", "/dev/shm"} <= writable
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_object_store_fits_into_shared_memory(objects: list[Object]) -> None:
    cluster = ray_cluster(objects)
    params = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group, start in zip(pod_groups(objects), params, strict=True):
        (volume,) = (v for v in group.template["spec"]["volumes"] if v["name"] == "shared-mem")
        assert volume["emptyDir"]["medium"] == "Memory"
        size = int(volume["emptyDir"]["sizeLimit"].removesuffix("Mi")) << 20
        assert 0.8 * size < int(start["rayStartParams"]["object-store-memory"]) < size


def test_no_secret_is_in_a_config_map_or_an_argument(objects: list[Object]) -> None:
    made = [one for one in objects if one["kind"] == "Secret"]
    secrets = {base64.b64decode(v).decode() for one in made for v in one["data"].values()}
    assert all(len(secret) == 64 for secret in secrets)
    for one in objects:
        if one["kind"] != "Secret":
            text = yaml.safe_dump(one)
            assert not [s for s in secrets if s in text or encoded(s) in text]
    for group in pod_groups(objects):
        for variable in group.container.get("env", []):
            if SECRET.search(variable["name"]):
                assert variable.keys() == {"name", "valueFrom"}
                assert variable["valueFrom"].keys() == {"secretKeyRef"}
        said = [
            value
            for path, value in values_within(group.template)
            if re.search(r"\.(command|args)\[\d+\]$", path)
        ]
        assert said
        assert not [word for word in said if SECRET.search(str(word))]
    # KubeRay puts the token into Ray's environment, from this Secret.
    auth = ray_cluster(objects)["authOptions"]
    if made:
        assert [one["metadata"]["name"] for one in made] == [auth["secretName"]]
        assert made[0]["data"].keys() == {"auth_token"}
    for option in ("redisPassword", "redisUsername"):
        given = ray_cluster(objects).get("gcsFaultToleranceOptions", {}).get(option, {})
        assert given.keys() <= {"valueFrom"}


def test_a_secret_that_exists_is_not_made(rendered: Callable[..., list[Object]]) -> None:
    objects = rendered("-f", str(values_of("production")))
    assert "Secret" not in {one["kind"] for one in objects}
    assert ray_cluster(objects)["authOptions"]["secretName"] == "chat-ray-token"


@pytest.mark.parametrize("release", ["rel", "a" * 53, "x-" * 26 + "y"])
def test_names_and_labels_are_within_limits(
    rendered: Callable[..., list[Object]], variant: str, release: str
) -> None:
    objects = rendered("-f", str(values_of(variant)), release=release)
    seen = 0
    for one in objects:
        name = one["metadata"]["name"]
        if one["kind"] in ("RayService", "RayCluster"):
            # KubeRay makes a service of it, which has 63: NAME-xxxxx-head-svc.
            assert len(f"{name}-xxxxx-head-svc") <= 63
        elif one["kind"] != "PodDisruptionBudget":
            assert len(name) <= 63
        for path, value in values_within(one):
            if isinstance(value, str) and LABEL.search(path):
                assert re.fullmatch(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?", value), path
                assert len(value) <= 63, path
                seen += 1
    assert seen > 20


def test_whatever_selects_pods_finds_them(objects: list[Object]) -> None:
    # KubeRay adds these to the labels of a template.
    pods = {
        group.name: {
            **group.template["metadata"]["labels"],
            "ray.io/node-type": "head" if group.head else "worker",
            "ray.io/group": "headgroup" if group.head else group.name,
        }
        for group in pod_groups(objects)
    }

    def selected(labels: Object) -> set[str]:
        return {name for name, has in pods.items() if labels.items() <= has.items()}

    for one in objects:
        name = one["metadata"]["name"]
        if one["kind"] == "Service":
            whole = name.endswith("-metrics")
            assert selected(one["spec"]["selector"]) == (set(pods) if whole else {"head"})
        elif one["kind"] == "NetworkPolicy":
            found = selected(one["spec"]["podSelector"]["matchLabels"])
            assert found == ({"head"} if name.endswith("-head") else set(pods))
        elif one["kind"] == "PodDisruptionBudget":
            (group,) = selected(one["spec"]["selector"]["matchLabels"])
            assert name.endswith(f"-{group}")


def test_labels_of_pods_stay_in_upgrades(rendered: Callable[..., list[Object]]) -> None:
    """KubeRay replaces the whole cluster when a pod's template has changed."""
    for group in pod_groups(rendered()):
        assert group.template["metadata"]["labels"] == {"moesaic/install": "rel-moesaic"}


def test_budgets_count_pods(objects: list[Object]) -> None:
    groups = {g["groupName"]: g for g in ray_cluster(objects)["workerGroupSpecs"]}
    for one in objects:
        if one["kind"] == "PodDisruptionBudget":
            assert isinstance(one["spec"]["minAvailable"], int)
            group = one["spec"]["selector"]["matchLabels"].get("ray.io/group")
            if group is not None:
                assert 0 < one["spec"]["minAvailable"] < groups[group]["minReplicas"]


def test_groups_with_gpus_ask_for_them(rendered: Callable[..., list[Object]]) -> None:
    _, gpu, cpu = pod_groups(rendered("-f", str(values_of("gpu"))))
    for kind in ("requests", "limits"):
        assert gpu.container["resources"][kind]["nvidia.com/gpu"] == "4"
        assert "nvidia.com/gpu" not in cpu.container["resources"][kind]
    assert gpu.template["spec"]["runtimeClassName"] == "nvidia"
    assert [t["key"] for t in gpu.template["spec"]["tolerations"]] == ["nvidia.com/gpu"]
    assert gpu.container["image"] == "registry.example.com/moesaic:cuda"
    assert cpu.container["image"] == "registry.example.com/moesaic:cpu"


def test_what_is_turned_on_is_there(rendered: Callable[..., list[Object]]) -> None:
    objects = rendered("-f", str(values_of("everything")))
    cluster = ray_cluster(objects)
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    route = only(objects, "HTTPRoute")["spec"]["rules"][0]
    assert route["backendRefs"] == [{"name": "rel-experts-serve-svc", "port": 8000}]
    monitor = only(objects, "ServiceMonitor")["spec"]
    (service,) = (o for o in objects if o["metadata"]["name"].endswith("-metrics"))
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ports = {port["name"] for port in service["spec"]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["endpoints"]} == ports


def test_scrapes_have_the_job_and_the_time_that_alerts_need(
    rendered: Callable[..., list[Object]],
) -> None:
    objects = rendered("-f", str(values_of("everything")))
    own, _ = only(objects, "ServiceMonitor")["spec"]["endpoints"]
    assert (own["path"], own["interval"], own["scrapeTimeout"]) == ("/metrics", "30s", "10s")
    assert own["relabelings"] == [{"targetLabel": "job", "replacement": "moesaic"}]
    groups = only(objects, "PrometheusRule")["spec"]["groups"]
    jobs = {
        job for g in groups for r in g["rules"] for job in re.findall(r'job="(.*?)"', r["expr"])
    }
    assert jobs == {"moesaic"}


def test_rules_and_dashboards_are_those_of_the_repository(
    rendered: Callable[..., list[Object]],
) -> None:
    objects = rendered("-f", str(values_of("everything")))
    monitoring = ROOT / "deploy" / "monitoring"
    rules = only(objects, "PrometheusRule")
    assert rules["metadata"]["labels"]["release"] == "prometheus"
    assert rules["spec"] == yaml.safe_load((monitoring / "alerts.yaml").read_text())
    (found,) = (o for o in objects if o["metadata"]["name"].endswith("-dashboards"))
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    files = {f"moesaic-{path.name}": path for path in (monitoring / "dashboards").glob("*.json")}
    assert found["data"].keys() == files.keys()
    for name, path in files.items():
        assert json.loads(found["data"][name]) == json.loads(path.read_text())
    # The API server takes no more.
    assert sum(map(len, found["data"].values())) < 1 << 20


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://collector.tracing:4318", 4318),
        ("https://otlp.example.com/api", 443),
        ("http://[fd00::1]", 80),
        ("http://[fd00::1]:4317", 4317),
    ],
)
def test_pods_reach_the_collector(
    rendered: Callable[..., list[Object]], endpoint: str, port: int
) -> None:
    def egress(*words: str) -> list[Object]:
        return only_named(rendered(*words), "NetworkPolicy", "rel-moesaic")["spec"]["egress"]

    peer = {"namespaceSelector": {"matchLabels": {"team": "tracing"}}}
    named = ("--set-json", f'spec.traces.endpoint="{endpoint}"')
    asked = {"ports": [{"port": port, "protocol": "TCP"}]}
    assert [rule for rule in egress(*named) if rule not in egress()] == [asked]
    placed = egress(*named, "--set-json", f"networkPolicy.tracesTo=[{json.dumps(peer)}]")
    assert [rule for rule in placed if rule not in egress()] == [{**asked, "to": [peer]}]


def test_what_is_turned_off_is_not(rendered: Callable[..., list[Object]]) -> None:
    off = [f"{part}.enabled=false" for part in ("networkPolicy", "podDisruptionBudget")]
    kinds = {one["kind"] for one in rendered("--set", ",".join(off))}
    assert kinds == {"Secret", "Service", "RayService", "Pod"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("foo=1", "'foo' not allowed"),
        ("head.foo=1", "'foo' not allowed"),
        ("spec.hosts[0].cout=1", "'cout' not allowed"),
        ("spec.endpoint.drain_s=-1", "drain_s"),
        ("spec.ray.address=local", "must be 'auto'"),
        ("spec.endpoint.host=127.0.0.1", "must be '0.0.0.0'"),
        ("spec.traces.endpoint=http://127.0.0.1:4318", "spec/traces/endpoint"),
        ("serviceMonitor.intervalSeconds=5", "intervalSeconds"),
        ("spec.endpoint.port=8002", "endpoint.port and monitoring.port are both 8002"),
        ("workers[0].replicas=9", "minReplicas <= replicas <= maxReplicas"),
        ("kind=RayJob", "must be one of"),
        ("gcsFaultTolerance.backend=redis", "redis/address"),
        ("httpRoute.enabled=true", "parentRefs"),
        ("modelVolume.mountPath=/tmp/models", "mountPath"),
        ("env[0].name=HF_TOKEN,env[0].value=hf_abc", "valueFrom"),
        ("fullnameOverride=" + "a" * 48, "fullnameOverride"),
        ("head.shmMi=64", "shmMi"),
        ("settleSeconds=soon", "settleSeconds"),
    ],
)
def test_impossible_values_are_refused(helm_binary: Path, words: str, said: str) -> None:
    # --set replaces an entry of a list as a whole.
    entry = "workers[0].name=cpu,workers[0].minReplicas=2,workers[0].maxReplicas=4"
    whole = [f"{entry},workers[0].resources.requests.cpu=1"] if "workers" in words else []
    settings = [w for word in [*whole, words] for w in ("--set", word)]
    done = helm(helm_binary, "template", "rel", str(CHART), *settings)
    assert done.returncode != 0
    assert said in done.stderr, done.stderr
