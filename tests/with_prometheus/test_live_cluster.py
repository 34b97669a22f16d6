"""A real Prometheus scrapes a live cluster that serves, trains, moves experts and loses a host:
every expression of every panel and rule gives data."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
import yaml

import moesaic
from moesaic import Client
from moesaic.actors.runtime.ports import free_port
from moesaic.cluster.metrics.table import METRICS
from moesaic.handle import Cluster
from moesaic.proto.errors import MoesaicError
from tests.helpers.cluster.metrics import Samples, samples
from tests.helpers.monitoring import (
    ALERTS,
    DASHBOARDS,
    alerts,
    concrete,
    dashboard_expressions,
    metrics_in,
    operands,
)
from tests.helpers.processes.live import (
    ON_RAY,
    processes_of,
    running,
    text_of,
    wait_replaced,
    wait_until,
)
from tests.integration.conftest import save_model

pytestmark = ON_RAY

HERE = "127.0.0.1"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
# What a pool of CPUs without memory in its spec and with a fixed number of hosts does not have.
ABSENT = {
    "moesaic_host_gpu_memory_used_bytes",
    "moesaic_host_gpu_memory_limit_bytes",
    "moesaic_host_memory_limit_bytes",
    "moesaic_scaling_busy_ratio",
    "moesaic_scaling_wait_ratio",
}


@dataclass
class Scraping:
    """A Prometheus that scrapes a cluster once a second."""

    url: str
    cluster: Cluster

    def ask(self, path: str, **asked: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=asked, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, expression: str) -> list[float]:
        found = self.ask("query", query=expression)["result"]
        return [float(one["value"][1]) for one in found]

    def scrape(self) -> Samples:
        """What the cluster answers now."""
        return samples(httpx.get(f"{self.cluster.monitoring}/metrics", timeout=30).text)


@contextmanager
def scraping(prometheus: Path, folder: Path, cluster: Cluster) -> Iterator[Scraping]:
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [
            {
                "job_name": "moesaic",
                "static_configs": [{"targets": [urlsplit(cluster.monitoring or "").netloc]}],
            }
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    url = f"http://{HERE}:{free_port(HERE)}"
    command = [
        str(prometheus),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={urlsplit(url).netloc}",
    ]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            found = Scraping(url, cluster)
            wait_until(lambda: _is_ready(url))
            yield found
        finally:
            process.terminate()
            process.wait(30)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def live(prometheus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraping]:
    folder = tmp_path_factory.mktemp("prometheus")
    model = save_model(tmp_path_factory.mktemp("model"), "mixtral")
    spec: dict[str, Any] = {
        "models": [{"name": "m", "path": str(model), "replicas": 1, "train": True}],
        "hosts": [{"count": 2}],
        "router": {"port": 0},
        # Requests that find no room are refused, and those that find no expert fail soon.
        "trunk": {"cache_tokens": 1024, "threads": 1, "max_requests": 1, "max_waiting": 0},
        "timeouts": {"expert_s": 1.0},
        "monitoring": {"port": 0, "hot_experts": 4},
    }
    with (
        running("prometheus", model, **spec) as cluster,
        scraping(prometheus, folder, cluster) as found,
    ):
        yield found


@contextmanager
def meanwhile(*works: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run each in a thread, until it sees that it is to stop. They must not fail."""
    stop, failed = threading.Event(), list[BaseException]()

    def guarded(work: Callable[[threading.Event], None]) -> None:
        try:
            work(stop)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failed


def talking(cluster: Cluster) -> Callable[[threading.Event], None]:
    def talk(stop: threading.Event) -> None:
        with Client(cluster.url or "", retries=0) as client:
            while not stop.is_set():
                try:
                    text_of(client, "m", 20)
                except MoesaicError:
                    stop.wait(0.2)  # refused, or failed: both are wanted here

    return talk


def training(cluster: Cluster) -> Callable[[threading.Event], None]:
    def train(stop: threading.Event) -> None:
        model = cluster.from_pretrained("m", train=True)
        with moesaic.PoolOptimizer(model, cluster, lr=1e-3) as optimizer:
            while not stop.wait(0.3):
                model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    return train


def changed(before: Samples, after: Samples) -> list[tuple[str, dict[str, str]]]:
    """Series that came or went; those of experts apart, which may be other experts."""
    series = ((name, dict(labels)) for name, labels in before.keys() ^ after.keys())
    return [(name, labels) for name, labels in series if "expert" not in labels]


def series_of_experts(found: Samples) -> int:
    return sum(name == "moesaic_expert_replicas" for name, _ in found)


@pytest.mark.timeout(600)
def test_all_expressions_give_data(live: Scraping) -> None:
    cluster = live.cluster
    with meanwhile(talking(cluster), talking(cluster), talking(cluster)):
        wait_until(lambda: has(live, "moesaic_http_responses_total", status="429"))
        victim = processes_of(cluster)["host-1"].pid
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: has(live, "moesaic_http_responses_total", status="503"))
        wait_replaced(cluster, "host-1", victim)
        with meanwhile(training(cluster)):
            cluster.wait_for(cluster.replicate("m", 0, 0, 2))
            wait_until(lambda: has(live, "moesaic_training_steps_total", model="m"))
            found = {name for name, _ in live.scrape()}
            assert METRICS.keys() - {re.sub("_(bucket|sum|count)$", "", n) for n in found} <= ABSENT
            expressions = [
                concrete(expression, cluster=cluster.name, interval="2m")
                for file in DASHBOARDS.glob("*.json")
                for expression in dashboard_expressions(file.stem)
            ]
            expressions += [one for alert in alerts() for one in operands(alert.expr)]
            # Prometheus has to see what grows twice.
            empty = {one for one in expressions if not metrics_in(one) & ABSENT}
            assert len(empty) > 100

            def all_give_data() -> bool:
                empty.difference_update({one for one in empty if live.values(one)})
                return not empty

            try:
                wait_until(all_give_data)
            except AssertionError:
                raise AssertionError(f"no data: {sorted(empty)}") from None


def has(live: Scraping, name: str, **labels: str) -> bool:
    return any(name == found and labels.items() <= dict(of).items() for found, of in live.scrape())


def test_rules_are_evaluated_without_an_error(live: Scraping) -> None:
    def evaluated() -> list[Any]:
        groups = live.ask("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in evaluated()))
    rules = evaluated()
    assert {rule["name"] for rule in rules} == {alert.name for alert in alerts()}
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []


def test_requests_make_no_series(live: Scraping) -> None:
    body = {"model": "m", "prompt": "the quick", "max_tokens": 1, "temperature": 0}
    found = []
    with httpx.Client(base_url=live.cluster.url or "") as http:
        for n in range(200):
            asked = {"x-request-id": f"request-{n}", "user-agent": f"client-{n}"}
            assert http.post("/v1/completions", json=body, headers=asked).status_code == 200
            if n == 0:
                # What routers count is there when they have reported it.
                wait_until(lambda: has(live, "moesaic_transport_sends_total"))
                wait_until(lambda: has(live, "moesaic_balancedness_mean_ratio"))
            if n in (0, 199):
                found.append(live.scrape())
    first, last = found
    assert changed(first, last) == []
    assert series_of_experts(last) == 4


def test_a_series_goes_with_its_host(live: Scraping) -> None:
    (away,) = (one.expr for one in alerts() if one.name == "MoesaicHostsLost")
    calls = 'moesaic_host_calls_total{host="host-0"}'
    restarts = 'changes(moesaic_host_start_time_seconds{host="host-0"}[5m])'
    wait_until(lambda: live.values(away) == [] and len(live.values(calls)) == 1)
    os.kill(processes_of(live.cluster)["host-0"].pid, signal.SIGKILL)
    wait_until(lambda: bool(live.values(away)) and live.values(calls) == [])
    # What was trained is lost with it, as each expert had one replica.
    wait_until(lambda: live.values(away) == [] and live.values(restarts) == [1.0])
    assert len(live.values(calls)) == 1
