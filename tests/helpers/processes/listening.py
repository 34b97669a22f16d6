"""Where the processes of a cluster listen, as `ss -ltnp` would say: who, and at which addresses."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
from collections.abc import Iterable

import psutil

from tests.helpers.documented import rows
from tests.helpers.paths import ROOT

# The first that fits its command line or title says what a process is.
KINDS = {
    "GCS": r"/gcs_server ",
    "raylet": r"/raylet/raylet ",
    "dashboard agent": r"DashboardAgent|dashboard/agent\.py",
    "runtime environment agent": r"RuntimeEnvAgent|runtime_env/agent/main\.py",
    "dashboard": r"dashboard/dashboard\.py|ray-dashboard-",
    "monitor": r"autoscaler/(v2|_private)/monitor\.py",
    "log monitor": r"log_monitor\.py",
    "Ray client server": r"ray\.util\.client\.server",
    "host": r"^ray::RayExpertHost",
    "controller": r"^ray::Controller",
    "router service": r"^ray::RayRouterService",
    "Serve's proxy": r"^ray::ProxyActor|^ray::SERVE_PROXY",
    "Serve's controller": r"^ray::ServeController|^ray::SERVE_CONTROLLER",
    "ingress": r"^ray::ServeReplica:.*:Ingress",
    "trunk": r"^ray::ServeReplica:.*:Trunk-",
    "idle worker": r"^ray::IDLE|default_worker\.py",
    "program that called `moesaic.up`, or asks the cluster": r"python",
}


def listening(processes: Iterable[psutil.Process]) -> set[tuple[str, str]]:
    """(what the process is, `loopback`, `node` or `every`) of each socket that listens."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for socket in process.net_connections("tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    found.add((kind_of(process), where(socket.laddr.ip)))
    # Ray starts some before anybody asks, and ends them.
    return {one for one in found if one[0] != "idle worker"}


def kind_of(process: psutil.Process) -> str:
    words = " ".join(process.cmdline()).strip() + " "
    return next((kind for kind, form in KINDS.items() if re.search(form, words)), words)


def where(address: str) -> str:
    found = ipaddress.ip_address(address)
    found = getattr(found, "ipv4_mapped", None) or found
    if found.is_unspecified:
        return "every"
    return "loopback" if found.is_loopback else "node"


def documented(column: str) -> set[tuple[str, str]]:
    """What docs/security.md says of one machine, or of several."""
    number = {"one machine": 1, "several machines": 2}[column]
    found = set()
    for row in rows(ROOT / "docs" / "security.md", "What listens"):
        found |= {
            (row[0], address) for address in re.findall("`(loopback|node|every)`", row[number])
        }
    return found


if __name__ == "__main__":
    # Of all processes of a machine, or of what is one in a namespace.
    print("LISTENING " + json.dumps(sorted(listening(psutil.process_iter()))))
