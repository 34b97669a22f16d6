"""A worker of `moesaic train`, as an actor of Ray: a trunk, an optimizer over it, and the loop."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import torch

from ....cluster.placement import ModelRef
from ....cluster.train_command.train_spec import TrainSpec
from ....models.trunk.config import torch_dtype
from ....models.trunk.describe import experts_per_token
from ....proto.errors import NoRun, describe_error
from ...runtime.devices import pick_device
from ...runtime.process_log import begin_process
from ...runtime.ray_border import cluster_of
from ...trunk.program_config import program_config
from ...trunk.trunk import PoolTrunk, open_trunk
from ..opening import open_run
from ..optimizer import RunOptimizer
from ..run import LearningTrunk
from ..run_options import ALONE, Crew, RunOptions
from .loop import TrainingLoop
from .run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all workers of a run are told; picklable."""

    namespace: str
    model: ModelRef
    spec: TrainSpec
    folder: Path


class RayTrainWorker:
    """The actor. `run` is called once; the other methods are for the time meanwhile."""

    def __init__(self, work: Work, number: int, *, again: bool) -> None:
        """``again``: in the place of a worker that is gone, whose run may live."""
        begin_process("worker", f"worker-{number}", cluster_of(work.namespace))
        self._work = work
        self._number = number
        self._again = again
        self._stop = Event()

    def pid(self) -> int:
        return os.getpid()

    def stop(self) -> None:
        """Let all workers of the run end after the step under way, and save it."""
        self._stop.set()

    def run(self) -> None:
        """Train to the end. Raises MoesaicError."""
        work, given = self._work, self._work.spec
        config = program_config(work.namespace, work.model)
        config = replace(config, name=f"train-{config.name}", threads=given.workers.threads)
        trunk = open_trunk(
            config,
            learns=True,
            dtype=_trunk_dtype(work.model.dtype, config.device, given.workers.dtype),
        )
        try:
            optimizer = self._optimizer(trunk)
            try:
                TrainingLoop(
                    trunk.model,
                    optimizer,
                    given,
                    RunFolder(work.folder),
                    experts_per_token=experts_per_token(trunk.model.config, trunk.layers[0]) or 1,
                    stop=self._stop,
                ).run()
            finally:
                optimizer.close()
        finally:
            trunk.close()

    def _optimizer(self, trunk: PoolTrunk) -> RunOptimizer:
        if self._again:
            try:
                return self._opened(trunk, succeed=True)
            except NoRun as error:
                log.warning("a new run begins: %s", describe_error(error))
        return self._opened(trunk, succeed=False)

    def _opened(self, trunk: PoolTrunk, *, succeed: bool) -> RunOptimizer:
        work, given, count = self._work, self._work.spec.optimizer, self._work.spec.workers.count
        learning = trunk.learning
        assert learning is not None
        options = RunOptions(
            redundancy=given.redundancy,
            exact=given.exact,
            succeed=succeed,
            crew=ALONE if count == 1 else Crew(count, f"worker-{self._number:04d}"),
        )
        return RunOptimizer(
            trunk.model,
            lambda trained, rule: open_run(
                work.namespace,
                work.model.name,
                LearningTrunk(model=trunk.model, learning=learning, name=trunk.config.name),
                trunk.layers,
                trained,
                rule,
                options,
            ),
            optimizer=given.name,
            max_grad_norm=given.max_grad_norm,
            **given.settings,
        )


def _trunk_dtype(of_model: str, device: str, wanted: str) -> torch.dtype:
    """Return the type that the spec wants; `auto` is float32 on CPUs for 16-bit models."""
    dtype = torch_dtype(of_model if wanted == "auto" else wanted)
    if wanted == "auto" and pick_device(device).type == "cpu":
        return torch.promote_types(dtype, torch.float32)
    return dtype
