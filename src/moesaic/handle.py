"""`Cluster`: a Python program's handle to a running cluster."""

from __future__ import annotations

import atexit
import getpass
import logging
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .controller_client import ControllerClient
from .lifecycle import end_session
from .logs import LogKind, LogLine, read_logs
from .proto.errors import ClusterError
from .session import (
    ClusterSession,
    remove_session,
    show_token,
    stay_on_loopback,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .actors.serve.launch import Progress
    from .actors.training.run import PoolRun
    from .actors.training.run_options import RunOptions
    from .actors.trunk.trunk import PoolTrunk
    from .cluster.load.trace import Trace
    from .cluster.placement import ModelRef
    from .cluster.reports.activity import Activity, ExpertReport
    from .cluster.reports.applying import ApplyReport
    from .cluster.reports.placing import ChangeReport, DrainReport, PlanReport
    from .cluster.reports.scaling import ScalingReport
    from .cluster.reports.status import ClusterStatus
    from .cluster.reports.updates import WeightUpdateReport
    from .cluster.spec.spec import Spec
    from .kernels.training.update_rules import UpdateRule
    from .models.training.groups import TrainedTensors

log = logging.getLogger(__name__)

# For a question that the controller answers from what it knows.
ASK_S = 10.0


def quiet(step: str, done: int, total: int) -> None:
    """Show no progress."""


def connect(name: str = "local") -> Cluster:
    """Return a handle to a cluster of this user on this machine, or of the Ray that runs here.

    Raises ClusterError.
    """
    from .connecting import running_cluster

    return Cluster(running_cluster(name))


class Cluster:
    """A running cluster; made by `moesaic.up` and `connect`."""

    def __init__(self, session: ClusterSession, *, ends_with_program: bool = False) -> None:
        if session.embedded:
            stay_on_loopback()
        self._session = session
        self._ended = False
        self._pid = os.getpid()
        if ends_with_program:
            atexit.register(self._end_with_program)
        self._trunks: list[PoolTrunk] = []
        self._runs: list[PoolRun] = []
        self._controller = ControllerClient(self._join)

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

    def logs(
        self,
        kinds: Collection[LogKind] = (),
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

    # ---- watching -------------------------------------------------------------------------------

    def status(self) -> ClusterStatus:
        """Return hosts, models and the placement. Raises ClusterError."""
        return self._controller.ask("status", timeout_s=ASK_S)

    def top(self, experts: int = 10) -> Activity:
        """Return what happens now: hosts, the hottest ``experts``, balancedness, moves to come.

        Rates are means over the last seconds. Raises ClusterError.
        """
        return self._controller.ask("top", experts)

    def experts(
        self, model: str | None = None, layer: int | None = None, *, hot: int | None = None
    ) -> list[ExpertReport]:
        """Return every expert, or those of one model or layer, with replicas, load and constraints.

        With ``hot`` only so many, the hottest first. Raises ClusterError.
        """
        return self._controller.ask("experts", model, layer, hot)

    def record(
        self,
        seconds: float,
        window_s: float = 1.0,
        *,
        stop: Event | None = None,
        progress: Progress | None = None,
    ) -> Trace:
        """Record the load of the next ``seconds``, window by window; `write_trace` saves it.

        The recording ends early when ``stop`` is set. Raises RequestError and ClusterError.
        """
        from .traces import record

        return record(
            lambda: self._controller.ask("totals", timeout_s=ASK_S),
            seconds,
            window_s,
            stop=stop or Event(),
            progress=progress or quiet,
        )

    # ---- operating ------------------------------------------------------------------------------

    def plan(self, *, budget: int | str | None = None) -> PlanReport:
        """Return what `rebalance` would do now.

        ``budget`` is the most replicas to load for balance, or the most bytes ("4GB"; default: as
        in the spec). Raises ClusterError.
        """
        return self._controller.ask("plan", budget)

    def rebalance(self, *, budget: int | str | None = None) -> ChangeReport:
        """Start the best plan for the current load, and return the change.

        `change` shows its progress. Raises ClusterError.
        """
        return self._controller.ask("rebalance", budget, getpass.getuser())

    def change(self, number: int | None = None) -> ChangeReport:
        """Return one change of the placement, or the last one. Raises ClusterError."""
        return self._controller.ask("change", number)

    def history(self) -> list[ChangeReport]:
        """Return the last changes, the newest at the end. Raises ClusterError."""
        return self._controller.ask("history")

    def rollback(self, number: int | None = None) -> ChangeReport:
        """Return to the placement before a change (default: the last). Raises ClusterError."""
        return self._controller.ask("rollback", number)

    def replicate(self, model: str, layer: int, expert: int, count: int) -> ChangeReport:
        """Keep at least ``count`` replicas of an expert from now on; 1 cancels that.

        Returns the change, whose ``errors`` say what has no room. Raises ClusterError.
        """
        key = (model, layer, expert)
        return self._controller.ask("replicate", key, count, getpass.getuser())

    def pin(self, model: str, layer: int, expert: int, host: str) -> ChangeReport:
        """Keep a replica of an expert on ``host``; return the change. Raises ClusterError."""
        return self._controller.ask("pin", (model, layer, expert), host, getpass.getuser())

    def unpin(self, model: str, layer: int, expert: int, host: str) -> ChangeReport:
        """Cancel a `pin`; return the change. Raises ClusterError."""
        return self._controller.ask("unpin", (model, layer, expert), host, getpass.getuser())

    def drain(
        self,
        host: str,
        timeout_s: float = 0.0,
        *,
        watch: Callable[[DrainReport], None] | None = None,
    ) -> DrainReport:
        """Move all experts off ``host`` while requests go on; `undrain` undoes the drain.

        Returns the progress as soon as the host is empty or the other hosts have no room for the
        rest, or after ``timeout_s``; the cluster goes on with the drain. ``watch`` is called
        repeatedly with the progress as it is then. Raises ClusterError.
        """
        self._controller.ask("drain", host, getpass.getuser())
        return self._controller.drain(host, timeout_s, watch)

    def draining(self, host: str) -> DrainReport:
        """Return the progress of a drain. Raises ClusterError."""
        return self._controller.ask("draining", host)

    def undrain(self, host: str) -> ChangeReport:
        """Let a drained host hold experts again; return the change. Raises ClusterError."""
        return self._controller.ask("undrain", host, getpass.getuser())

    def wait_for(
        self,
        change: ChangeReport,
        timeout_s: float = 600.0,
        *,
        watch: Callable[[ChangeReport], None] | None = None,
    ) -> ChangeReport:
        """Wait until a change has ended, and return the change; its ``phase`` says how it ended.

        ``watch`` is called repeatedly with the change as it is then. Raises ClusterError, also if
        the change has not ended after ``timeout_s``; the cluster goes on with the
        change.
        """
        return self._controller.change(change.id, timeout_s, watch)

    def scale(
        self,
        count: int,
        group: int = 0,
        *,
        timeout_s: float = 600.0,
        watch: Callable[[ScalingReport], None] | None = None,
    ) -> ScalingReport:
        """Set the number of hosts of a group, and wait until the group has it; requests go on.

        ``watch`` is called repeatedly with the scaling as it is then. Returns how it ended; its
        ``phase`` is "no_room" if hosts wait for machines. The same call again continues the
        waiting. Raises ClusterError, also after ``timeout_s``; the cluster goes on with the
        scaling.
        """
        begun: ScalingReport = self._controller.ask("scale", count, group, getpass.getuser())
        return self._controller.scaling(begun.id, timeout_s, watch)

    def apply(
        self,
        spec: Spec | Mapping[str, Any] | str | Path,
        *,
        dry_run: bool = False,
        restarts: bool = False,
        progress: Progress | None = None,
        warn: Callable[[str], None] = log.warning,
    ) -> ApplyReport:
        """Let the cluster follow another spec, its values, or a YAML file; requests go on.

        With ``dry_run`` nothing changes. Returns what differs. Parts that have to start anew are
        named in the report, and start anew only with ``restarts``; without, that is a ClusterError.
        Raises SpecError for what a running cluster cannot follow, CheckpointError and
        UnsupportedModel; nothing has changed then.
        """
        from .lifecycle import apply_spec
        from .starting import spec_from

        report, self._session = apply_spec(
            self._session,
            self._join(),
            spec_from(spec),
            dry_run=dry_run,
            restarts=restarts,
            progress=progress or quiet,
            warn=warn,
        )
        return report

    # ---- weights of experts ---------------------------------------------------------------------

    def get_expert(self, model: str, layer: int, expert: int) -> dict[str, Tensor]:
        """Return the weights of an expert that are served, with the names of its checkpoint.

        If the checkpoint has one tensor for all experts of a layer, ``NAME[expert]`` is the
        expert's part. This process needs the model's folder. Raises CheckpointError,
        UnsupportedModel and ClusterError.
        """
        from .actors.trunk.update import named_tensors, read_expert
        from .cluster.expert_keys import ExpertKey

        ref, tensors = read_expert(self._join(), ExpertKey(model, layer, expert))
        return named_tensors(ref).on_disk(layer, expert, tensors)

    def update_expert(
        self, model: str, tensors: Mapping[str, Tensor], *, timeout_s: float = 600.0
    ) -> WeightUpdateReport:
        """Give experts of a model new weights, all of them at once, while requests go on.

        ``tensors`` has all tensors of one or several experts, with the names of the checkpoint, as
        `get_expert` returns them; whole tensors of all experts of a layer are taken, too. Running
        answers use the new weights from one token to the next. The update outlives the cluster if
        the spec gives the model an `updates` folder. This process needs the model's folder.

        Raises CheckpointError and CallError for tensors that do not fit or are not finite, and
        ClusterError; the weights are as before then.
        """
        from .actors.trunk.update import named_tensors, update_experts
        from .cluster.expert_keys import ExpertKey

        namespace = self._join()
        experts = named_tensors(self._model(model)).named(tensors)
        keyed = {ExpertKey(model, *place): given for place, given in experts.items()}
        return update_experts(namespace, keyed, timeout_s=timeout_s)

    def revert_expert(self, model: str, *, timeout_s: float = 600.0) -> WeightUpdateReport:
        """Take back the last update of a model that is still in effect. Raises ClusterError."""
        from .actors.trunk.update import revert_experts

        return revert_experts(self._join(), model, timeout_s=timeout_s)

    # ---- models ---------------------------------------------------------------------------------

    def from_pretrained(self, model: str, *, train: bool = False) -> PreTrainedModel:
        """Load the trunk of one of the cluster's models in this process, with experts in the pool.

        The trunk is an ordinary transformers model: call the trunk, or its `generate`. With
        ``train`` gradients go through the pool, and a `PoolOptimizer` applies them; the spec must
        have `train: true` for the model. Raises CheckpointError, UnsupportedModel and ClusterError.
        """
        from .actors.trunk.program_config import program_config
        from .actors.trunk.trunk import open_trunk

        namespace, ref = self._join(), self._model(model)
        if train and not ref.learns:
            raise ClusterError(
                f"model: {model!r} was opened to be served alone; set train: true for it in the "
                "spec (models), and start the cluster again"
            )
        trunk = open_trunk(program_config(namespace, ref), learns=train)
        self._trunks.append(trunk)
        return trunk.model

    def attach(
        self,
        model: PreTrainedModel,
        *,
        name: str | None = None,
        replicas: int = 1,
        exact: bool = False,
        train: bool = False,
    ) -> PreTrainedModel:
        """Move the experts of a model in memory into the pool; ``model`` itself is changed.

        The experts' weights are sent to the hosts and freed in this process. ``train`` is as in
        `from_pretrained`. Raises UnsupportedModel for an architecture without the experts
        interface, and ClusterError.
        """
        from .actors.trunk.attach import attach_model
        from .actors.trunk.program_config import program_config

        namespace = self._join()
        trunk = attach_model(
            model,
            namespace=namespace,
            name=name or f"attached-{secrets.token_hex(3)}",
            replicas=replicas,
            exact=exact,
            train=train,
            make_config=lambda ref: program_config(namespace, ref),
        )
        self._trunks.append(trunk)
        return trunk.model

    def _open_run(
        self,
        model: PreTrainedModel,
        trained: TrainedTensors,
        rule: UpdateRule,
        options: RunOptions,
    ) -> PoolRun:
        """Begin to train a model that this handle has opened. Raises BadInput and ClusterError."""
        from .actors.training.opening import open_run
        from .actors.training.run import LearningTrunk
        from .proto.errors import BadInput

        trunk = next((one for one in self._trunks if one.model is model), None)
        if trunk is None or trunk.learning is None:
            raise BadInput(
                f"model: {type(model).__name__} was not opened by cluster {self.name!r}; give the "
                "model and the cluster whose from_pretrained or attach has returned it"
            )
        run = open_run(
            self._join(),
            trunk.config.model.name,
            LearningTrunk(model=model, learning=trunk.learning, name=trunk.config.name),
            trunk.layers,
            trained,
            rule,
            options,
        )
        self._runs = [*(one for one in self._runs if not one.is_over), run]
        return run

    @property
    def drain_s(self) -> float:
        """Seconds for running answers when the cluster ends: `endpoint.drain_s`."""
        return self._session.drain_s

    def detach(self) -> None:
        """Let the cluster run on when this program ends; `moesaic down` ends it."""
        atexit.unregister(self._end_with_program)

    def down(self, drain_s: float | None = None, *, told: Callable[[str], None] = log.info) -> None:
        """End the cluster, from whatever process.

        New requests are refused at once. Running ones have ``drain_s`` seconds (default: `drain_s`
        of this handle); ``told`` gets lines about them. A step that fails or is interrupted does
        not keep the other steps from being taken; a second call finishes what is left.
        """
        self._close(self.drain_s if drain_s is None else drain_s, told)

    def _close(self, drain_s: float | None, told: Callable[[str], None]) -> None:
        with ExitStack() as last_first:
            last_first.callback(self._end, drain_s, told)
            for part in (*self._trunks, *self._runs):
                last_first.callback(part.close)
            self._trunks.clear()
            self._runs.clear()

    def _end(self, drain_s: float | None, told: Callable[[str], None]) -> None:
        """End the cluster; only then nobody needs to know of it any more."""
        if not self._ended:
            session = self._session
            end_session(session, self._join, drain_s if session.ready else None, told)
            self._ended = True
            remove_session(session)
        self.detach()

    def _end_with_program(self) -> None:
        if os.getpid() == self._pid:  # a forked process has the handle, too
            self._close(None, log.info)

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
        from .actors.runtime.ray_border import join_ray, namespace_of, ray_address

        session = self._session
        with show_token(session.ray_token):
            join_ray(session.ray_address, self.name, insecure=session.ray_insecure)
        if (here := ray_address()) != session.ray_address:
            raise ClusterError(
                f"cluster {self.name!r} is on the Ray at {session.ray_address}, and this program "
                f"is connected to the one at {here}; call ray.shutdown() first, or use another "
                "program"
            )
        return namespace_of(self.name)

    def _model(self, name: str | None) -> ModelRef:
        """Return one of the cluster's models; None: its only one. Raises ClusterError."""
        known = {ref.name: ref for ref, _ in self._controller.ask("models", timeout_s=ASK_S)}
        if name is None and len(known) == 1:
            return next(iter(known.values()))
        if name not in known:
            raise ClusterError(
                f"model: {name!r} is not one of the cluster's models: {', '.join(sorted(known))}"
            )
        return known[name]
