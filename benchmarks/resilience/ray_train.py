"""The loop of `training_kills` under Ray Train, with a checkpoint after every step.

    PYTHON -m benchmarks.resilience.ray_train SETTING      (JSON; started by `training_kills`)

It needs torch, transformers and Ray Train, and nothing of Moesaic, so it may run in an environment
of its own. Each line that it reads is a round: some steps, and SIGKILL to one of the workers within
the next one; it answers with what the round took, as JSON. Between rounds the workers are paused.
The whole model is in each worker, and more than one share a step with DistributedDataParallel.

A step counts when the optimizer has made it, before its checkpoint is written.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from transformers import AutoModelForCausalLM

from benchmarks.training_load import LEARNING_RATE, MAX_NORM, TrainingLoad

STATE = "state.pt"
# Until the first step, and from a kill to the next one.
WAIT_S = 300.0
LOOK_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    folder: str  # of the model
    scratch: str  # an empty folder, for checkpoints and what workers tell
    load: dict[str, int]
    workers: int
    steps: int  # of a round, before its kill

    @property
    def pause(self) -> Path:
        """Workers wait while this file is there."""
        return Path(self.scratch) / "pause"

    @property
    def told(self) -> Path:
        """A line for each step that was made."""
        return Path(self.scratch) / "steps"

    def pid(self, rank: int) -> Path:
        """The process of a worker."""
        return Path(self.scratch) / f"pid-{rank}"


class Made(NamedTuple):
    """A step that was made."""

    step: int
    at: float  # the machine's monotonic clock


# ---- in each worker -----------------------------------------------------------------------------


def train_loop(given: dict[str, Any]) -> None:
    """Train from the last checkpoint on, without an end."""
    setting = Setting(**given)
    load = TrainingLoad(**setting.load)
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    setting.pid(rank).write_text(str(os.getpid()))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    plain = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32).train()
    model: Any = prepare_model(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as name:
            state = torch.load(Path(name) / STATE, weights_only=True)
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while True:
        while setting.pause.exists():
            time.sleep(LOOK_S)
        own = load.step(step)[rank::size]
        for ids in own:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss / len(own)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        with tempfile.TemporaryDirectory(dir=setting.scratch) as name:
            saved = None
            if rank == 0:
                with setting.told.open("a") as told:
                    told.write(json.dumps(Made(step, time.monotonic())) + "\n")
                state = {
                    "model": plain.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                }
                torch.save(state, Path(name) / STATE)
                saved = Checkpoint.from_directory(name)
            ray.train.report({"step": step}, checkpoint=saved)


# ---- in this process ----------------------------------------------------------------------------


class Run:
    """Watches what workers tell."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.failed: BaseException | None = None

    def made(self) -> list[Made]:
        lines = self._setting.told.read_text().splitlines() if self._setting.told.exists() else []
        return [Made(*json.loads(line)) for line in lines]

    def wait(self, enough: Callable[[list[Made]], bool]) -> list[Made]:
        """Wait until enough steps were made since the start; return all."""
        deadline = time.monotonic() + WAIT_S
        while not enough(found := self.made()):
            if self.failed is not None:
                raise RuntimeError(f"Ray Train has ended: {self.failed!r}") from self.failed
            if time.monotonic() > deadline:
                raise RuntimeError(f"no step was made in {WAIT_S:g} s")
            time.sleep(LOOK_S)
        return found

    def round(self, part: float) -> dict[str, float]:
        """Let some steps be made, and kill a worker when ``part`` of a step's time has passed."""
        setting, known = self._setting, len(self.made())
        setting.pause.unlink(missing_ok=True)
        # The first one may have begun before, or begin in a new process.
        found = self.wait(lambda made: len(made) > known + setting.steps)[known:]
        step_s = statistics.median(
            after.at - before.at for before, after in itertools.pairwise(found)
        )
        time.sleep(part * step_s)
        killed = time.monotonic()
        os.kill(int(setting.pid(setting.workers - 1).read_text()), signal.SIGKILL)
        made = self.wait(lambda made: made[-1].at > killed)
        setting.pause.touch()
        next_at = next(one.at for one in made if one.at > killed)
        return {"step_s": step_s, "kill_to_step_s": next_at - killed}


def main(setting: Setting) -> None:
    store = Path(setting.scratch) / "checkpoints"
    setting.pause.touch()
    ray.init(
        address="local",
        num_cpus=setting.workers + 1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 << 20,
    )
    run = Run(setting)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=asdict(setting),
        scaling_config=ScalingConfig(num_workers=setting.workers, use_gpu=False),
        run_config=RunConfig(
            name="kills",
            storage_path=str(store),
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # `wait` raises it
            run.failed = error

    threading.Thread(target=fit, daemon=True).start()
    try:
        for line in sys.stdin:
            print(json.dumps(run.round(float(line))), flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(Setting(**json.loads(sys.argv[1])))
