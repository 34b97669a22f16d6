"""deploy/ray/machines.yaml with the commands that docs/kubernetes.md prints, over SSH.

The packages are there already, so that the cluster's own setup commands need no registry.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.e2e.test_written_for_machines import ADDRESSES, Machine, machines
from tests.helpers.paths import ROOT

__all__ = ["machines"]  # the fixture

SSHD = "/usr/sbin/sshd"
# Ray's limit for a worker without GCS, and as much again.
END_S = 120.0


def commands() -> list[str]:
    """As they are printed, without `ray up` asking."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    block = re.findall(r"^```bash\n(.*?)^```$", page.partition("## `ray up`")[2], re.M | re.S)[0]
    return [re.sub(r"^(ray (up|down)) ", r"\1 -y ", line) for line in block.splitlines()]


def environment(machine: Machine) -> dict[str, str]:
    """What sessions get, as their user's profile would give it."""
    lines = (line.partition("=") for line in machine.run("env").splitlines())
    given = {name: value for name, _, value in lines}
    wanted = [n for n in given if n.startswith(("MOESAIC_", "RAY_USAGE"))]
    return {
        **{name: given[name] for name in wanted},
        "PYTHONPATH": given["PYTHONPATH"],
        "PATH": given["PATH"],
        # Two hosts and a trunk on a machine with few cores.
        "MOESAIC__HOSTS__0__NUM_CPUS": "0.5",
        "MOESAIC__TRUNK__NUM_CPUS": "0.5",
    }


def serve_ssh(machine: Machine, key: Path) -> None:
    """A daemon in the machine's namespaces, where root's home is the machine's own."""
    root, *others = Path("/etc/passwd").read_text().splitlines()
    *fields, _, shell = root.split(":")
    users = [":".join([*fields, str(machine.home), shell]), *others]
    (machine.home / "passwd").write_text("\n".join([*users, ""]))
    machine.run(f"mount --bind {machine.home}/passwd /etc/passwd && mkdir -p /run/sshd")
    machine.run(f"ssh-keygen -q -t ed25519 -N '' -f {machine.home}/host_key")
    settings = {
        "HostKey": f"{machine.home}/host_key",
        "AuthorizedKeysFile": f"{key}.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "SetEnv": " ".join(f'"{name}={value}"' for name, value in environment(machine).items()),
    }
    lines = [f"{name} {value}" for name, value in settings.items()]
    (machine.home / "sshd_config").write_text("\n".join([*lines, ""]))
    machine.run(f"{SSHD} -f {machine.home}/sshd_config")


def written_for_here(folder: Path, key: Path) -> dict[str, object]:
    config = yaml.safe_load((ROOT / "deploy" / "ray" / "machines.yaml").read_text())
    config["provider"].update(head_ip=ADDRESSES[0], worker_ips=ADDRESSES[1:])
    config["auth"].update(ssh_user="root", ssh_private_key=str(key))
    # The environment is this one; what follows its making stays.
    made = [f"ln -sfn {Path(sys.executable).parent.parent} ~/moesaic-env"]
    config["setup_commands"] = made + config["setup_commands"][2:]
    # A checkout of a few files is enough to see that it arrives.
    config["file_mounts"]["~/moesaic-source"] = str(folder)
    return config


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_up_makes_a_cluster_that_answers(machines: list[Machine], tmp_path: Path) -> None:
    if missing := [one for one in (SSHD, "ssh", "ssh-keygen", "rsync") if not shutil.which(one)]:
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    key = tmp_path / "key"
    made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
    subprocess.run(made, check=True, timeout=20)
    for machine in machines:
        serve_ssh(machine, key)
    first, second = machines
    checkout = tmp_path / "checkout"
    (checkout / "deploy" / "ray").mkdir(parents=True)
    shutil.copy(ROOT / "constraints.txt", checkout)
    shutil.copy(ROOT / ".gitignore", checkout)
    shutil.copy(ROOT / "deploy" / "ray" / "spec.yaml", checkout / "deploy" / "ray")
    config = yaml.safe_dump(written_for_here(checkout, key))
    (checkout / "deploy" / "ray" / "machines.yaml").write_text(config)
    first.run(f"cd {checkout}")
    *lines, end, down = commands()
    # SSH would read the lines that follow.
    said = {line: first.run(f"{line} < /dev/null") for line in lines}
    (up,) = (line for line in lines if "moesaic up" in line)
    assert f"http://{ADDRESSES[0]}:8000" in said[up]
    for machine in machines:
        assert (machine.home / "moesaic-source" / "constraints.txt").exists()
        assert (machine.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    asked = f"moesaic complete --url http://{ADDRESSES[0]}:8000 --max-tokens 3 hello --json"
    assert json.loads(second.run(f"{asked} 2> /dev/null"))["usage"]["completion_tokens"] == 3
    first.run(f"{end} < /dev/null")
    # It does not return: it waits for machines that stay.
    first.run(f"timeout 20 {down} < /dev/null || test $? = 124")
    deadline = time.monotonic() + END_S
    for machine in machines:
        while "raylet" in machine.run("ps -eo comm"):
            assert time.monotonic() < deadline
            time.sleep(0.5)
