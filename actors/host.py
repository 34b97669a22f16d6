"""An expert host: memory for some replicas, one device, one dispatch endpoint.

`ExpertHost` is a plain class, so that tests and benchmarks can run one in their own process;
`actors/cluster.py` makes Ray actors of it. Ray calls it for control only: tokens come through the
transports.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from ..cluster.placement import ExpertKey, HostEntry, LayerKey
from ..cluster.residency import HostPolicy, LayerShape, Residency
from ..proto.errors import MoesaicError
from .host_loop import HostLoop, LoopStats
from .store import SHARED, ExpertStore, ModelRef
from .transport.base import Listener
from .transport.shm import ShmListener

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What a host says of itself to the controller and to `status`."""

    entry: HostEntry
    pid: int
    device: str
    holdings: Mapping[LayerKey, list[int]]
    loading: int  # experts still to be read
    load_error: str
    weight_bytes: int
    rss_bytes: int
    loop: LoopStats


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where this process may use it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


class ExpertHost:
    """One incarnation of a host."""

    def __init__(
        self,
        name: str,
        *,
        node: str,
        device: str = "auto",
        bind: str = "127.0.0.1",
        policy: HostPolicy | None = None,
        threads: int | None = None,
    ) -> None:
        """``bind`` is the address that gRPC listens on; ``threads`` those of one computation."""
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = name
        self.incarnation = time.time_ns()
        self._node = node
        self._store = ExpertStore(pick_device(device))
        self._residency = Residency(policy or HostPolicy(), incarnation=self.incarnation)
        self._loading = 0
        self._load_error = ""
        self._load_lock = threading.Lock()
        shm = ShmListener()
        from .transport.grpc_stream import GrpcListener

        grpc = GrpcListener(f"{bind}:0", weights=_Weights(self))
        self._entry = HostEntry(
            host=name,
            incarnation=self.incarnation,
            node=node,
            shm_address=shm.address,
            grpc_address=grpc.address,
        )
        listeners: list[Listener] = [shm, grpc]
        self._loop = HostLoop(name, self._store, self._residency, listeners)
        self._loop.start()

    def entry(self) -> HostEntry:
        return self._entry

    def load(self, models: Sequence[ModelRef], keys: Sequence[ExpertKey], version: int = 1) -> int:
        """Read experts from their checkpoints and begin to serve each as it is ready.

        Returns how many are held afterwards. Raises CheckpointError and UnsupportedModel; what was
        read before stays.
        """
        with self._load_lock:
            self._load_error = ""
            try:
                for ref in models:
                    self._store.add_model(ref)
                held = self._residency.holdings()
                wanted = [k for k in keys if k.expert not in held.get(LayerKey(k.model, k.layer), ())]
                self._loading = len(wanted)
                for key in wanted:
                    self._hold(key, self._store.load(key), version)
                    self._loading -= 1
            except MoesaicError as error:
                self._load_error = f"{error.code}: {error}"
                raise
            finally:
                self._loading = 0
        return sum(len(experts) for experts in self._residency.holdings().values())

    def add_models(self, models: Sequence[ModelRef]) -> None:
        """Get to know models whose weights will be put."""
        for ref in models:
            self._store.add_model(ref)

    def release(self, keys: Sequence[ExpertKey]) -> None:
        """Stop serving experts and free their memory; queued calls for them are refused."""
        self._loop.call(lambda: self._loop.release(keys))
        for key in keys:
            self._store.drop(key)

    def report(self) -> HostReport:
        return HostReport(
            entry=self._entry,
            pid=os.getpid(),
            device=str(self._store.device),
            holdings=self._residency.holdings(),
            loading=self._loading,
            load_error=self._load_error,
            weight_bytes=self._store.nbytes,
            rss_bytes=psutil.Process().memory_info().rss,
            loop=self._loop.stats(),
        )

    def check_health(self) -> None:
        """Ends the process if its loop has ended: Ray starts it anew."""
        if not self._loop.alive:
            log.critical("host %s: its loop is gone (%r); leaving", self.name, self._loop.failure)
            os._exit(1)

    def close(self) -> None:
        self._loop.close()

    def _hold(self, key: ExpertKey, shape: LayerShape, version: int) -> None:
        self._loop.call(lambda: self._residency.hold(key, shape, version=version))


class _Weights:
    """The weights channel's view of a host."""

    def __init__(self, host: ExpertHost) -> None:
        self._host = host

    def get(self, key: ExpertKey) -> dict[str, Tensor]:
        return self._host._store.get(key)

    def put(self, key: ExpertKey, tensors: Mapping[str, Tensor], version: int) -> None:
        shape = self._host._store.put(key, tensors)
        if key.expert != SHARED:
            self._host._hold(key, shape, version)


@contextlib.contextmanager
def local_hosts(count: int, *, node: str = "here", device: str = "cpu", **options: object):
    """Hosts as threads of this process, real transports included; closed at the end."""
    hosts: list[ExpertHost] = []
    try:
        for index in range(count):
            hosts.append(ExpertHost(f"host-{index}", node=node, device=device, **options))  # pyright: ignore[reportArgumentType]
        yield hosts
    finally:
        for host in hosts:
            host.close()
