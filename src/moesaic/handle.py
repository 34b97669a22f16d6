"""`Cluster`: a Python program's handle to a running cluster."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil

from .logs import Kind, LogLine, read_logs
from .operating import Operating, quiet
from .proto.errors import ClusterError
from .router_keys import take_key
from .session import Session, find_session, need_session, note_logs, remove_session, write_session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .actors.serve.launch import Launched, Progress
    from .actors.trunk.trunk import PoolTrunk
    from .cluster.spec.spec import Spec

log = logging.getLogger(__name__)

DOWN_TIMEOUT_S = 60.0


def _spec(spec: Spec | Mapping[str, Any] | str | Path) -> Spec:
    from .cluster.spec.spec import Spec, load_spec, parse_spec

    if isinstance(spec, Spec):
        return spec
    return parse_spec(dict(spec)) if isinstance(spec, Mapping) else load_spec(spec)


def up(
    spec: Spec | Mapping[str, Any] | str | Path,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] = log.warning,
) -> Cluster:
    """Start a cluster from a spec, its values, or a YAML file, and wait until it answers.

    Before anything starts, the spec is checked (`check_spec`): errors are raised, other findings go
    to ``warn``. The calling process owns the cluster, which ends with the process, with
    `Cluster.down`, or with the `with` block. Raises SpecError, CheckpointError, UnsupportedModel
    and ClusterError.
    """
    # First of all: every process that starts later would inherit the key.
    router_key = take_key()
    wanted = _spec(spec)
    if find_session(wanted.name) is not None:
        raise ClusterError(
            f"name: a cluster {wanted.name!r} is running; `moesaic down --name {wanted.name}` "
            "ends it"
        )
    if wanted.ray.address == "local":
        _stay_on_loopback()
    from .actors.runtime.cluster_secret import router_key_of
    from .actors.runtime.ray_border import log_folder, ray_address
    from .actors.serve.launch import launch

    launched = launch(
        wanted,
        progress or quiet,
        warn,
        lambda: note_logs(wanted.name, log_folder()),
        router_key,
    )
    try:
        session = write_session(
            name=wanted.name,
            ray_address=ray_address(),
            embedded=launched.owns_ray,
            url=launched.url,
            monitoring=launched.monitoring,
            ray_token=_ray_token() if launched.owns_ray else None,
            ray_insecure=wanted.ray.insecure,
            router=launched.router,
            router_key=None if launched.router is None else router_key_of(launched.namespace),
            logs=log_folder(),
            drain_s=wanted.drain_s,
        )
        return Cluster(session, launched)
    except BaseException:
        with ExitStack() as last_first:
            last_first.callback(remove_session, wanted.name)
            last_first.callback(launched.close)
        raise


def connect(name: str = "local") -> Cluster:
    """Return a handle to a cluster that another process of this user owns on this machine.

    Raises ClusterError.
    """
    session = need_session(name)
    if session.embedded:
        _stay_on_loopback()
    return Cluster(session, None)


def _stay_on_loopback() -> None:
    """Let an embedded Ray, and whoever joins it, listen on loopback only.

    Ray reads the variable when it is imported; the odd name is Ray's own.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@contextmanager
def _shown(token: str | None) -> Iterator[None]:
    """Show Ray its token in the environment for a moment; Ray keeps it.

    Nothing in the environment may say meanwhile that there is no token. Processes that this one
    starts later do not inherit the token.
    """
    if token is None:
        yield
        return
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ["RAY_AUTH_TOKEN"] = token
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _ray_token() -> str | None:
    """Return the token of this process's embedded Ray, which Ray itself generates."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    kept = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    try:
        return Path(kept).read_text().strip() or None
    except OSError:
        return None


class Cluster(Operating):
    """A running cluster; made by `up` and `connect`."""

    def __init__(self, session: Session, launched: Launched | None) -> None:
        self._session = session
        self._launched = launched
        self._trunks: list[PoolTrunk] = []

    @property
    def name(self) -> str:
        return self._session.name

    @property
    def url(self) -> str | None:
        """The endpoint's address, or None if the spec has none."""
        return self._session.url

    @property
    def monitoring(self) -> str | None:
        """The address of ``/status`` and ``/metrics``, or None if this machine can reach none."""
        return self._session.monitoring

    @property
    def router(self) -> str | None:
        """The router service's address for `moesaic.connect`, or None if the spec has none."""
        address = self._session.router
        return None if address is None else f"moesaic://{address}"

    @property
    def router_key(self) -> str | None:
        """The router service's key; `moesaic.connect` on this machine finds it by itself."""
        return self._session.router_key

    def status(self) -> dict[str, Any]:
        """Return hosts, models and the placement as plain values. Raises ClusterError."""
        from .actors.runtime.ray_border import ask, controller_of

        return ask(controller_of(self._join()).status.remote(), 10.0, "the controller's status")

    def logs(
        self,
        kinds: Collection[Kind] = (),
        *,
        host: str | None = None,
        tail: int = 100,
        follow: bool = False,
        stop: Event | None = None,
    ) -> Iterator[LogLine]:
        """Yield what the cluster's processes on this machine printed; see `logs.read_logs`."""
        return read_logs(
            self._session, kinds, host=host, tail=tail, follow=follow, stop=stop or Event()
        )

    # ---- models ---------------------------------------------------------------------------------

    def from_pretrained(self, model: str) -> PreTrainedModel:
        """Load the trunk of one of the cluster's models in this process, experts in the pool.

        It is an ordinary transformers model: call it, or use its `generate`. Raises ClusterError.
        """
        from .actors.runtime.ray_border import ask, controller_of
        from .actors.trunk.trunk import open_trunk

        namespace = self._join()
        served = ask(controller_of(namespace).models.remote(), 10.0, "the models")
        known = {ref.name: ref for ref, _ in served}
        if model not in known:
            raise ClusterError(f"model: {model!r} is none of {sorted(known)}")
        trunk = open_trunk(self._trunk_config(namespace, known[model]))
        self._trunks.append(trunk)
        return trunk.model

    def attach(
        self,
        model: PreTrainedModel,
        *,
        name: str | None = None,
        replicas: int = 1,
        exact: bool = False,
    ) -> PreTrainedModel:
        """Move the experts of a model in memory into the pool; ``model`` itself is changed.

        The experts' weights are sent to the hosts and freed in this process. Raises
        UnsupportedModel for an architecture without the experts interface, and ClusterError.
        """
        from .actors.trunk.attach import attach_model

        namespace = self._join()
        trunk = attach_model(
            model,
            namespace=namespace,
            name=name or f"attached-{secrets.token_hex(3)}",
            replicas=replicas,
            exact=exact,
            make_config=lambda ref: self._trunk_config(namespace, ref),
        )
        self._trunks.append(trunk)
        return trunk.model

    @property
    def drain_s(self) -> float:
        """Seconds for running answers when the cluster ends: `endpoint.drain_s`."""
        return self._session.drain_s

    def down(
        self, timeout_s: float | None = None, *, told: Callable[[str], None] = log.info
    ) -> None:
        """End the cluster; a process that does not own it asks its owner to, and waits.

        New requests are refused at once. Running ones have `drain_s` seconds; in the owner's
        process ``told`` gets lines about them. ``timeout_s`` is how long another process waits
        (default: `drain_s` and a minute). A step that fails or is interrupted does not keep the
        other steps from being taken.
        """
        launched, self._launched = self._launched, None
        with ExitStack() as last_first:
            if launched is not None:
                last_first.callback(remove_session, self.name)
                last_first.callback(launched.close, self.drain_s, told)
            for trunk in self._trunks:
                last_first.callback(trunk.close)
            self._trunks.clear()
        if launched is not None:
            return
        if timeout_s is None:
            timeout_s = self.drain_s + DOWN_TIMEOUT_S
        if self._session.alive and self._session.pid != os.getpid():
            self._session.end_owner()
            deadline = time.monotonic() + timeout_s
            while self._session.alive:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"process {self._session.pid} did not end cluster {self.name!r} within "
                        f"{timeout_s:g} s"
                    )
                _wait_for_exit(self._session.pid, 0.5)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    def _join(self) -> str:
        """Connect this process to the cluster's Ray, and return the namespace."""
        from .actors.runtime.ray_border import join_ray, namespace_of

        session = self._session
        with _shown(session.ray_token):
            join_ray(session.ray_address, self.name, insecure=session.ray_insecure)
        return namespace_of(self.name)

    def _trunk_config(self, namespace: str, ref: Any) -> Any:
        from .actors.router.pool_link import TrunkConfig
        from .cluster.spec.spec import Spec

        spec = self._launched.spec if self._launched is not None else Spec(name=self.name)
        return TrunkConfig(
            namespace=namespace,
            model=ref,
            name=f"sdk-{os.getpid()}-{secrets.token_hex(3)}",
            policy=spec.timeouts.policy,
            transport=spec.network.transport,
        )


def _wait_for_exit(pid: int, timeout_s: float) -> None:
    try:
        psutil.Process(pid).wait(timeout_s)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        return


__all__ = ["Cluster", "connect", "up"]
