"""The owner of a cluster whose secret is known beforehand, for `test_secrets.py`.

python -m tests.e2e.owner_of_secrets MODEL_FOLDER OUT
"""

from __future__ import annotations

import json
import logging
import os
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.util import state as ray_state

import moesaic
from moesaic.actors.runtime import embedded_ray
from moesaic.actors.runtime.ray_border import namespace_of, ray_address, ray_get
from moesaic.actors.store.cluster_secret import secret_of
from moesaic.proto.errors import MoesaicError
from moesaic.proto.keys import SECRET_BYTES, ClusterSecret, proof_hash
from moesaic.session import need_session
from tests.helpers.processes import head_with_dashboard

SECRET = b"the-secret-of-a-cluster-in-bytes"
assert len(SECRET) == SECRET_BYTES
ROUTER_KEY = "the-key-of-a-router-service"
NAME = "secrets"
# All that Ray's state API lists.
LISTS = (
    "list_actors",
    "list_jobs",
    "list_nodes",
    "list_placement_groups",
    "list_runtime_envs",
    "list_tasks",
    "list_workers",
    "list_objects",
)


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except MoesaicError as error:
        return f"{error!r} {error}"
    raise AssertionError("a stranger was let in")


def told(cluster: Any) -> dict[str, Any]:
    """What everybody may ask of the cluster and of Ray, by the name of the question."""
    status = cluster.status().model_dump(mode="json")
    found: dict[str, Any] = {"status": status, "session": repr(need_session(NAME))}
    for path in ("status", "metrics", "", "page/main.js"):
        found[f"/{path}"] = read(f"{cluster.monitoring}/{path}")
    for name in LISTS:
        # Of tasks and objects it tells no more than it has room for.
        listed = getattr(ray_state, name)(
            # Of this Ray: others may run on the machine.
            address=ray_address(),
            detail=True,
            limit=1000,
            raise_on_missing_output=False,
        )
        found[name] = [repr(one) for one in listed]
    found["named actors"] = ray.util.list_named_actors(all_namespaces=True)
    found["serve"] = repr(serve.status())
    with moesaic.RouterClient(cluster.router, key="another-key-of-the-tests") as client:
        found["another key"] = refused(client.models)
    found["proofs"] = {}
    namespace = namespace_of(NAME)
    secret = secret_of(namespace)
    for host in (one["name"] for one in status["hosts"]):
        actor: Any = ray.get_actor(host, namespace=namespace)
        entry = ray_get(actor.entry.remote(), 10.0, host)
        for plane in ("experts", "weights", "shm"):
            proof = secret.proof(plane, entry.target)
            found["proofs"][f"{host} {plane}"] = proof.hex()
            found["proofs"][f"{host} {plane}, as it is shown"] = proof_hash(proof).hex()
    return found


def main(folder: str, out: str) -> None:
    logging.basicConfig(level=logging.DEBUG)
    ClusterSecret.new = lambda: ClusterSecret(SECRET)
    # Ray's state API is the dashboard's.
    embedded_ray._HEAD = head_with_dashboard.__name__
    spec = {
        "name": NAME,
        "models": [{"name": "m", "path": folder, "replicas": 2}],
        "hosts": [{"count": 2, "threads": 1}],
        "trunk": {"cache_tokens": 1024, "threads": 1},
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
        "router": {"port": 0},
    }
    with moesaic.up(spec) as cluster:
        cluster.from_pretrained("m")
        with moesaic.connect(cluster.router or "") as client:
            assert client.models()
        with moesaic.Client(cluster.url or "") as client:
            assert client.complete("the fox", max_tokens=3).usage.completion_tokens
        found = told(cluster)
        found["logs"] = str(Path(need_session(NAME).logs or ""))
        found["environment"] = dict(os.environ)
        Path(out).write_text(json.dumps(found, default=repr))
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
