"""Expert hosts as processes of their own, without Ray, for benchmarks.

python -m benchmarks.hosts NAME THREADS DEVICE lends|keeps      (started by `host_processes`)
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from moesaic.actors.host.host import ExpertHost
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion, first_versions
from moesaic.cluster.placement import (
    HostEntry,
    ModelRef,
    ModelShape,
    Placement,
    PlacementId,
    experts_of,
    initial_placement,
)
from moesaic.cluster.training.orders import Answer, Order
from moesaic.proto.errors import MoesaicError
from moesaic.proto.keys import ClusterSecret, secret_of_process

NODE = "benchmark"
START_S = 300.0
# The hosts of a benchmark belong to its own process.
_SECRET = "SECRET_OF_A_BENCHMARK"


@dataclass(frozen=True, kw_only=True)
class HostProcess:
    entry: HostEntry
    process: subprocess.Popen[str]

    def tell(self, command: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "it is gone"}')
        if "error" in answer:
            raise RuntimeError(f"{self.entry.host}: {answer['error']}")
        return answer

    def train(self, order: Order) -> Answer | MoesaicError:
        """Let the host carry out an order of a training run; return its error if there is one."""
        return _unpacked(self.tell({"order": _packed(order)})["answer"])

    def release(self, gone: Sequence[ExpertVersion]) -> None:
        self.tell({"release": _packed(list(gone))})


@contextmanager
def host_processes(
    count: int, *, threads: int | None = None, device: str = "cpu", lends: bool = False
) -> Iterator[list[HostProcess]]:
    """``count`` hosts that share the machine's cores out evenly."""
    share = threads or max(1, (os.cpu_count() or 1) // count)
    environment = os.environ | {
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": str(share),
        _SECRET: secret_of_process().reveal().hex(),
    }
    with ExitStack() as stack:
        started = []
        command = [sys.executable, "-m", "benchmarks.hosts"]
        for index in range(count):
            process = subprocess.Popen(
                [*command, f"host-{index}", str(share), device, "lends" if lends else "keeps"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            stack.callback(_end, process)
            assert process.stdout is not None
            entry = HostEntry(**json.loads(process.stdout.readline()))
            started.append(HostProcess(entry=entry, process=process))
        yield started


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(20)


def place(
    hosts: Sequence[HostProcess], ref: ModelRef, experts: Mapping[int, int], *, load: bool = True
) -> Placement:
    """Spread a model over ``hosts``; without ``load`` its weights are put by the caller."""
    shape = ModelShape(model=ref.name, experts=dict(experts))
    layers = initial_placement([shape], [host.entry.host for host in hosts])
    for host in hosts:
        keys = [tuple(key) for key in experts_of(layers, host.entry.host)]
        described = dataclasses.asdict(ref) | {"config": dict(ref.config)}
        host.tell({"model": described, "experts": dict(experts), "load": keys if load else []})
    entries = {host.entry.host: host.entry for host in hosts}
    return Placement(id=PlacementId(1, 1), hosts=entries, layers=layers)


def main(name: str, threads: int, device: str, lending: str) -> None:
    host = ExpertHost(
        name,
        node=NODE,
        threads=threads,
        device=device,
        secret=ClusterSecret(bytes.fromhex(os.environ[_SECRET])),
        lends=lending == "lends",
        # A router on the same card may then ask for calls through its memory.
        transport="auto" if device == "cpu" else "device",
    )
    try:
        print(json.dumps(dataclasses.asdict(host.entry())), flush=True)
        for line in sys.stdin:
            try:
                answer = _carry_out(host, json.loads(line))
            except Exception as error:
                answer = {"error": repr(error)}
            print(json.dumps(answer), flush=True)
    finally:
        host.close()


def _carry_out(host: ExpertHost, command: Mapping[str, Any]) -> dict[str, Any]:
    if "order" in command:
        try:
            return {"answer": _packed(host.train(_unpacked(command["order"])))}
        except MoesaicError as error:
            return {"answer": _packed(error)}
    if "release" in command:
        host.release(_unpacked(command["release"]))
        return {}
    ref = ModelRef(**command["model"])
    experts = {int(layer): number for layer, number in command["experts"].items()}
    shape = ModelShape(model=ref.name, experts=experts)
    host.load([(ref, shape)], first_versions(ExpertKey(*key) for key in command["load"]))
    return {"weight_bytes": host.report().weight_bytes}


def _packed(value: object) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()


def _unpacked(text: str) -> Any:
    return pickle.loads(base64.b64decode(text))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
