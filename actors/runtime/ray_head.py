"""Start the processes of a Ray on this machine, and leave them running.

A program, which `embedded_ray` starts: Ray's own `ray start` also opens a port for remote drivers,
and `ray.init` ends its processes with the process that called it. It writes one line of JSON with
the address and the folder of the Ray to a pipe, and waits for a line that says that they are noted.
If its starter ends before that, this program ends the Ray, because no session file names it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# Must be set before ray is imported: it turns usage reports off.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.node import Node
from ray._private.parameter import RayParams

KEPT = "kept\n"


def main(options: dict[str, Any], told: int) -> None:
    """Start a head node with these parameters of Ray; ``told`` is the pipe's descriptor."""
    maybe_enable_token_auth_if_token_available()
    ensure_token_if_auth_enabled(None, create_token_if_missing=False)
    # Its GCS keeps nothing on disk, whatever the environment says: nothing starts it anew.
    system = {"gcs_storage": "memory"}
    parameters = RayParams(gcs_server_port=0, _system_config=system, **options)
    node: Any = Node(parameters, head=True, shutdown_at_exit=False, spawn_reaper=False)
    kept = False
    try:
        found = {"address": node.address, "folder": node.get_session_dir_path()}
        os.write(told, json.dumps(found).encode() + b"\n")
        kept = sys.stdin.readline() == KEPT
    finally:
        if not kept:
            node.kill_all_processes(check_alive=False)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
