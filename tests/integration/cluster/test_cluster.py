"""The whole pool on Ray: real hosts and a real controller, killed and frozen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from moesaic import Client, MoesaicError, RouterClient
from moesaic.cluster.reports.status import RouterServiceStatus
from moesaic.handle import Cluster
from tests.helpers.models.architectures import tiny_model
from tests.helpers.paths import ROOT
from tests.helpers.processes.frozen import freeze
from tests.helpers.processes.live import (
    ON_RAY,
    processes_of,
    text_in_background,
    text_of,
    wait_replaced,
    wait_until,
    wait_whole,
)
from tests.integration.conftest import PAGE

PROMPT = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(3))

pytestmark = ON_RAY


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_parity_through_actors(cluster: Cluster, model_folders: dict[str, Path], name: str) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(model_folders[name]).eval()
    trunk: Any = cluster.from_pretrained(name)
    with torch.no_grad():
        torch.testing.assert_close(trunk(PROMPT).logits, plain(PROMPT).logits, atol=1e-5, rtol=1e-5)
    wanted = plain.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assert torch.equal(trunk.generate(PROMPT, max_new_tokens=12, do_sample=False), wanted)


def test_a_model_in_memory_is_attached(cluster: Cluster) -> None:
    model = tiny_model("qwen3_moe", vocab_size=320)
    with torch.no_grad():
        expected = model(PROMPT).logits
        size = sum(p.numel() for p in model.parameters())
        attached = cluster.attach(model, name="memory", replicas=2)
        assert sum(p.numel() for p in attached.parameters()) < size / 2
        torch.testing.assert_close(attached(PROMPT).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_endpoint_answers_as_plain_transformers(
    cluster: Cluster, model_folders: dict[str, Path]
) -> None:
    from transformers import AutoTokenizer

    assert cluster.url is not None
    tokenizer = AutoTokenizer.from_pretrained(model_folders["mixtral"])
    plain: Any = AutoModelForCausalLM.from_pretrained(model_folders["mixtral"]).eval()
    ids = tokenizer("the quick fox", return_tensors="pt").input_ids
    wanted = plain.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    with Client(cluster.url) as client:
        answer = text_of(client, "mixtral", 24)
    assert answer == tokenizer.decode(wanted, skip_special_tokens=True)


def test_status_names_hosts_models_and_what_is_unprotected(cluster: Cluster) -> None:
    status = cluster.status()
    # Of 16 experts. Hosts may still hold some that have moved, and hot ones may have a replica.
    assert 0 < status.unprotected_experts <= 16
    assert [host.name for host in status.hosts] == ["host-0", "host-1", "host-2"]
    assert {model.name for model in status.models} >= {"mixtral", "org/once"}
    assert status.missing_experts == 0
    assert status.controller.error is None


def test_a_name_with_a_slash_an_alias_and_a_page_in_a_browser(cluster: Cluster) -> None:
    assert cluster.url is not None
    with Client(cluster.url) as client:
        cards = {model.id: model.alias_of for model in client.models()}
        assert cards["team/alias"] == "org/once"
        assert cards["org/once"] is None
        assert text_of(client, "team/alias", 20) == text_of(client, "org/once", 20)
    with Client(cluster.monitoring or "") as operator:
        assert operator.status().engines["org/once"].healthy
    for path in ("org/once", "org%2Fonce"):
        assert httpx.get(f"{cluster.url}/v1/models/{path}").json()["id"] == "org/once"
    assert cluster.from_pretrained("org/once").config.model_type == "mixtral"
    assert {row.model for row in cluster.experts("org/once")} == {"org/once"}
    assert {line.name for line in cluster.logs(["trunk"])} >= {"org/once", "mixtral"}
    # Through the HTTP proxy, too.
    headers = {"origin": PAGE, "access-control-request-method": "POST"}
    asked = httpx.options(f"{cluster.url}/v1/chat/completions", headers=headers)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, PAGE)
    wrong = httpx.post(f"{cluster.url}/v1/completions", headers={"origin": PAGE}, json={})
    assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (400, PAGE)


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda s: s.stem)
def test_an_example_runs(cluster: Cluster, script: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script), cluster.name],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_killed_hosts_change_no_token(cluster: Cluster) -> None:
    assert cluster.url is not None
    with Client(cluster.url) as client:
        expected = text_of(client, "mixtral", 200)
        for victim in ("host-0", "host-2"):
            wait_whole(cluster)
            pid = processes_of(cluster)[victim].pid
            with text_in_background(client, "mixtral", 200) as result:
                os.kill(pid, signal.SIGKILL)
                assert result() == expected
            wait_replaced(cluster, victim, pid)


def test_a_frozen_host_changes_no_token_and_comes_back(cluster: Cluster) -> None:
    assert cluster.url is not None
    wait_whole(cluster)
    with Client(cluster.url) as client:
        expected = text_of(client, "mixtral", 100)
        host = processes_of(cluster)["host-1"]
        with text_in_background(client, "mixtral", 100) as result:
            freeze(host.pid)
            try:
                assert result() == expected
            finally:
                os.kill(host.pid, signal.SIGCONT)
        wait_whole(cluster)
        before = processes_of(cluster)["host-1"].calls
        assert text_of(client, "mixtral", 100) == expected
        assert processes_of(cluster)["host-1"].pid == host.pid
        wait_until(lambda: processes_of(cluster)["host-1"].calls > before)


def test_with_one_replica_requests_wait_for_the_restart(cluster: Cluster) -> None:
    assert cluster.url is not None
    wait_whole(cluster)
    with Client(cluster.url) as client:
        expected = text_of(client, "org/once", 100)
        pid = processes_of(cluster)["host-1"].pid
        with text_in_background(client, "org/once", 100) as result:
            os.kill(pid, signal.SIGKILL)
            assert result() == expected
        wait_replaced(cluster, "host-1", pid)


def test_serving_goes_on_without_the_controller(cluster: Cluster) -> None:
    assert cluster.url is not None
    wait_whole(cluster)
    placement = cluster.status().placement
    assert placement is not None
    with Client(cluster.url) as client:
        expected = text_of(client, "mixtral", 50)
        controller = ray.get_actor("controller", namespace=f"moesaic-{cluster.name}")
        ray.kill(controller, no_restart=False)
        assert text_of(client, "mixtral", 50) == expected

    def back() -> bool:
        try:
            return cluster.status().placement is not None
        except MoesaicError:
            return False

    wait_until(back)
    # The one who is new is asked as the old one was.
    with Client(cluster.monitoring or "") as operator:
        told = operator.status().cluster
    for status in (told, cluster.status()):
        assert status is not None
        assert status.placement is not None
        assert status.placement.term > placement.term
    assert {model.name for model in cluster.status().models} >= {"mixtral", "memory"}


def test_the_router_service_answers_and_comes_back(
    cluster: Cluster, model_folders: dict[str, Path]
) -> None:
    """Its clients see nothing of a restart: they try again."""
    assert cluster.router is not None
    plain: Any = AutoModelForCausalLM.from_pretrained(model_folders["mixtral"]).eval()
    moe = plain.model.layers[1].mlp
    hidden = torch.randn(6, plain.config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, weights, ids = moe.gate(hidden)
        expected = moe(hidden[None])[0]

    def service() -> RouterServiceStatus:
        found = cluster.status().router_service
        assert found is not None
        return found

    def calls() -> int:
        process = service().process
        return 0 if process is None else process.calls

    with RouterClient(cluster.router, timeout_s=60.0, retries=30) as client:
        assert {model.name for model in client.models()} >= {"mixtral", "org/once"}
        experts = client.experts("mixtral", 1)
        torch.testing.assert_close(experts(hidden, ids, weights), expected, atol=1e-5, rtol=1e-5)
        # A client may have repeated its call.
        wait_until(lambda: service().state == "up" and calls() >= 1)
        process = service().process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        torch.testing.assert_close(experts(hidden, ids, weights), expected, atol=1e-5, rtol=1e-5)
        wait_until(lambda: service().state == "up")
