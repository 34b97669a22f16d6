"""Start the processes of a Ray on this machine, and leave them running.

A program, which `embedded_ray` starts: Ray's own `ray start` also opens a port for remote drivers,
and `ray.init` ends its processes with the process that called it. It prints one line of JSON with
the address and the folder of the Ray.
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


def main(options: dict[str, Any]) -> None:
    """Start a head node with these parameters of Ray."""
    maybe_enable_token_auth_if_token_available()
    ensure_token_if_auth_enabled(None, create_token_if_missing=False)
    parameters = RayParams(gcs_server_port=0, **options)
    node: Any = Node(parameters, head=True, shutdown_at_exit=False, spawn_reaper=False)
    print(json.dumps({"address": node.address, "folder": node.get_session_dir_path()}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
