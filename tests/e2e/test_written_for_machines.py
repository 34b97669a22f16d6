"""What docs/running.md prints for several machines, line by line as it is printed, on two of them.

A machine is a shell in namespaces of its own (network, processes, mounts) with a home of its own.
`scp` copies between the two homes here, as there is no SSH.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.test_two_nodes import ip
from tests.helpers.documented import section
from tests.helpers.paths import ROOT
from tests.helpers.processes.apart import need_namespaces, ray_environment
from tests.helpers.processes.listening import documented
from tests.integration.conftest import save_model

ADDRESSES = ["10.0.0.1", "10.0.0.2"]
LINE_S = 240.0
SCP = '#!/bin/sh\nexec cp "$FIRST_HOME/${1#10.0.0.1:}" "$2"\n'
# `ray start` there sees no Ray of this machine, nor does its `ray stop`.
APART = ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]


class Machine:
    """A shell that takes one line after the other."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        home.mkdir()
        self.home = home
        self._said = home / "said"
        with self._said.open("wb") as sink:
            self.process = subprocess.Popen(
                [*APART, "bash"],
                cwd=home,
                env=environment | {"HOME": str(home)},
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, line: str) -> str:
        """What it printed. Fails when it fails."""
        mark = secrets.token_hex(8)
        before = len(self._said.read_text())
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\necho {mark} $?\n".encode())
        self.process.stdin.flush()
        deadline = time.monotonic() + LINE_S
        while mark not in (said := self._said.read_text()[before:]):
            assert self.process.poll() is None, said
            assert time.monotonic() < deadline, f"{line}: {said}"
            time.sleep(0.1)
        said, _, code = said.partition(mark)
        assert code.strip() == "0", f"{line}: {said}"
        return said

    def end(self) -> None:
        """The shell ends with its input, and with it, the first of its namespace, all else."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    need_namespaces()
    scp = tmp_path / "bin" / "scp"
    scp.parent.mkdir()
    scp.write_text(SCP)
    scp.chmod(0o755)
    # Nothing of Ray's is set but what the page says.
    environment = {
        **{k: v for k, v in ray_environment(tmp_path).items() if not k.startswith("RAY_AUTH")},
        "PATH": f"{Path(sys.executable).parent}:{scp.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "FIRST_HOME": str(tmp_path / "0"),
        # A model without a download, and for a small machine.
        "MOESAIC__MODELS__0__PATH": str(save_model(tmp_path / "model", "mixtral")),
        "MOESAIC__TRUNK__CACHE_TOKENS": "1024",
        "MOESAIC__TRUNK__THREADS": "1",
        "MOESAIC__ROUTER__PORT": "8001",
    }
    tag = secrets.token_hex(3)
    links = [f"moe{tag}{i}" for i in range(2)]
    with ExitStack() as stack:
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        found = []
        for number, address in enumerate(ADDRESSES):
            machine = Machine(tmp_path / str(number), environment)
            stack.callback(machine.end)
            machine.run("mkdir -p /tmp/ray && mount -t tmpfs ray /tmp/ray")
            ip("link", "set", links[number], "netns", str(machine.process.pid))
            machine.run(f"ip addr add {address}/24 dev {links[number]}")
            machine.run(f"ip link set lo up && ip link set {links[number]} up")
            machine.run(f"ip route add default dev {links[number]}")
            found.append(machine)
        yield found


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_run_as_they_are_printed(machines: list[Machine]) -> None:
    first, second = machines
    printed = section("Several machines")
    (on_first, on_others, then), (spec,) = printed["bash"], printed["yaml"]
    (first.home / "cluster.yaml").write_text(spec)
    for line in on_first.splitlines():
        first.run(line)
    for line in on_others.splitlines():
        second.run(line)
    *lines, last = then.splitlines()
    said = {line: first.run(line) for line in lines}
    assert "http://10.0.0.1:8000" in said["moesaic up -d cluster.yaml"]
    status = json.loads(first.run("moesaic status --name pair --json 2> /dev/null"))
    assert status["healthy"]
    assert len({host["process"]["node"] for host in status["cluster"]["hosts"]}) == 2
    # The other machine reaches the endpoint by the address that was printed.
    asked = "moesaic complete --url http://10.0.0.1:8000 --max-tokens 3 hello --json"
    assert json.loads(second.run(f"{asked} 2> /dev/null"))["usage"]["completion_tokens"] == 3
    found = set()
    for machine in machines:
        told = machine.run("python -m tests.helpers.processes.listening")
        lines = [line for line in told.splitlines() if line.startswith("LISTENING ")]
        found |= {tuple(one) for one in json.loads(lines[0].removeprefix("LISTENING "))}
        assert oct((machine.home / ".ray" / "auth_token").stat().st_mode)[-3:] == "600"
    assert found == documented("several machines")
    first.run(last)
    for machine in machines:
        machine.run("ray stop")
