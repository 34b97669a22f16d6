"""Two Ray nodes in network namespaces of their own: hosts on both, gRPC between them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.helpers.processes.apart import ray_environment, report_of_driver
from tests.integration.conftest import save_model

RAY = str(Path(sys.executable).parent / "ray")
START_S = 60.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


@pytest.fixture
def namespaces() -> Iterator[list[tuple[str, str]]]:
    """(namespace, address) of two nodes joined by a pair of virtual interfaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    tag = secrets.token_hex(3)
    nodes = [(f"moe-{tag}-{i}", f"10.231.7.{i + 1}") for i in range(2)]
    try:
        for name, _ in nodes:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
    try:
        links = [f"moe{tag}{i}" for i in range(2)]
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for (name, address), link in zip(nodes, links, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield nodes
    finally:
        for name, _ in nodes:
            ip("netns", "del", name)


def start_node(
    stack: ExitStack, namespace: str, words: list[str], environment: dict[str, str], log: Path
) -> None:
    """`ray start --block` in a process group of its own, ended with the stack."""
    with log.open("wb") as sink:
        node = subprocess.Popen(
            ["ip", "netns", "exec", namespace, RAY, "start", "--block", *words],
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    stack.callback(end_group, node)
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text():
        assert node.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def end_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def report_of(namespaces: list[tuple[str, str]], tmp_path: Path, *words: str) -> dict[str, Any]:
    """What `two_nodes.py` says, run on the first of two nodes."""
    folder = save_model(tmp_path / "model", "mixtral", num_experts_per_tok=4)
    environment = ray_environment(tmp_path)
    (head, head_ip), (worker, worker_ip) = namespaces
    common = ["--object-store-memory=100000000", "--disable-usage-stats"]
    with ExitStack() as stack:
        # Ray's sockets lie below it, and their names may have 107 characters.
        ray_dir = stack.enter_context(TemporaryDirectory(prefix="moe", dir="/tmp"))
        start_node(
            stack,
            head,
            [
                *("--head", f"--node-ip-address={head_ip}", "--port=6399"),
                *("--include-dashboard=false", f"--temp-dir={ray_dir}", "--num-cpus=8", *common),
            ],
            environment,
            tmp_path / "head.log",
        )
        start_node(
            stack,
            worker,
            # Room for a host and nothing else: trunk and endpoint are on the first node.
            [
                *(f"--address={head_ip}:6399", f"--node-ip-address={worker_ip}"),
                *("--num-cpus=1", *common),
            ],
            environment,
            tmp_path / "worker.log",
        )
        driver = [sys.executable, "-m", "tests.e2e.two_nodes", str(folder), *words]
        return report_of_driver(
            ["ip", "netns", "exec", head, *driver],
            environment | {"RAY_ADDRESS": f"{head_ip}:6399"},
        )


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_hosts_on_two_nodes(namespaces: list[tuple[str, str]], tmp_path: Path) -> None:
    report = report_of(namespaces, tmp_path)
    assert set(report["texts"]) == {report["expected"]}
    assert len(set(report["nodes"])) == 2
    assert all(calls > 0 for calls in report["calls"])


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_that_is_cut_off_changes_no_token(
    namespaces: list[tuple[str, str]], tmp_path: Path
) -> None:
    """Nothing says that it is gone: its packets go nowhere."""
    head, _ = namespaces[0]
    report = report_of(namespaces, tmp_path, head.replace("-", ""))
    assert set(report["texts"]) == {report["expected"]}
    assert sorted(state == "up" for state in report["states"]) == [False, True]
