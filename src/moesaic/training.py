"""Training a model whose experts are in a cluster: `PoolOptimizer`, and `train`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

from .actors.training.optimizer import RunOptimizer
from .actors.training.run_options import RunOptions, crew_of
from .cluster.train_command.train_spec import TrainSpec, load_train_spec
from .cluster.training.runs import RUN_LEASE_S
from .proto.errors import ClusterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .actors.training.command.command import Watcher
    from .cluster.reports.training import TrainReport
    from .handle import Cluster

# How long after its lease the controller may take to say that a run has ended.
_LEASE_MARGIN_S = 10.0


class PoolOptimizer(RunOptimizer):
    """An optimizer of `torch.optim` over a model that a cluster has opened for training.

    Use it like any other: in a loop of your own, or as ``optimizers=(PoolOptimizer(...), None)`` of
    transformers' Trainer and what is built on it. Masters and state are on the cluster's hosts, and
    each `step` is applied by all of them or by none. It ends with `close`, or as a context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cluster: Cluster,
        *,
        optimizer: str = "AdamW",
        params: Iterable[Any] | None = None,
        max_grad_norm: float | None = None,
        not_finite: Literal["stop", "skip"] = "stop",
        redundancy: int | None = None,
        exact: bool | None = None,
        succeed: bool = False,
        workers: int | None = None,
        **hyperparameters: object,
    ) -> None:
        """Begin to train ``model``, which `from_pretrained` or `attach` of ``cluster`` opened.

        ``optimizer`` is a class of `torch.optim`, with its ``hyperparameters``. ``params`` are
        parameters or groups of the model's (None: all that require gradients); the experts' tensors
        are among them, each as a stand-in of one element. ``max_grad_norm`` clips in `step`, where
        the trainer does not. Gradients that are not finite raise BadExpert, or with
        ``not_finite="skip"`` the step is skipped with a warning. ``redundancy`` is how many hosts
        may be lost with what they own (None: `balance.redundancy`); with 0 a run whose host dies
        has to go back to a checkpoint. With ``exact`` (None: as the model's in the spec) the steps
        have the same bits whoever computes what, which is slower. ``succeed`` goes on with the run
        that trains the model, in the place of a process that is gone: after its last step, with its
        optimizer's state; ``run.step`` is the number of steps that are done. Whatever the other
        process still sends is refused.

        ``workers`` processes train together, each with a trunk of its own and a part of every step
        (None: WORLD_SIZE of the environment, as torchrun and Ray Train set it, or one). All of them
        make an optimizer with the same arguments, and call `step` together; ``run.number`` says
        which of ``run.workers`` this one is. ``succeed`` takes the place of one that is gone.

        Raises BadInput for what cannot be trained, and ClusterError.
        """
        options = RunOptions(redundancy, exact, succeed, crew_of(workers))
        super().__init__(
            model,
            lambda trained, rule: cluster._open_run(model, trained, rule, options),
            optimizer=optimizer,
            params=params,
            max_grad_norm=max_grad_norm,
            not_finite=not_finite,
            **hyperparameters,
        )


def train(
    spec: TrainSpec | str | Path,
    *,
    resume: bool = False,
    check: bool = False,
    stop: Event | None = None,
    watcher: Watcher | None = None,
) -> TrainReport:
    """Train a model of a running cluster as a spec says, and return when that is done.

    ``spec`` is one, or the path of its file; `moesaic train` does the same. Workers are started on
    the cluster's Ray, and others in their places if they die. ``resume`` goes on with the run in
    `checkpoints.folder`. With ``check`` all is checked and packed, and nothing is started.
    ``stop`` ends the run after the step under way, with a checkpoint. ``watcher`` is told how it
    goes. Raises SpecError and BadInput before anything starts, ClusterError, BadExpert for
    gradients that are not finite, and StateLost if state is lost before the first checkpoint.
    """
    from .actors.training.command.command import Watcher as Quiet
    from .actors.training.command.command import run_command
    from .connecting import connect

    given = spec if isinstance(spec, TrainSpec) else load_train_spec(Path(spec))
    cluster = connect(given.cluster)
    watcher = watcher or Quiet()
    return run_command(
        cluster._join(),
        cluster._model(given.model),
        given,
        resume=resume,
        only_check=check,
        stop=stop or Event(),
        watcher=replace(watcher, ready=lambda: _await_end(cluster, watcher.said)),
    )


def _await_end(cluster: Cluster, said: Callable[[str], None]) -> None:
    """Wait for the end of a run whose processes are gone, as its lease is not over at once."""
    until, told = time.monotonic() + RUN_LEASE_S + _LEASE_MARGIN_S, False
    while (run := cluster.status().training) is not None:
        if not told:
            said(f"run {run.run} trains {run.model}; waiting for its end")
            told = True
        if time.monotonic() >= until:
            raise ClusterError(
                f"run {run.run} of {run.initiator} trains {run.model}, and goes on; one run trains "
                "at a time"
            )
        time.sleep(1.0)
