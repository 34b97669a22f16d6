"""The loop of `moesaic train` over hosts in this process, and the same steps of a plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moesaic.actors.training.command.loop import TrainingLoop
from moesaic.actors.training.command.run_folder import RunFolder
from moesaic.cluster.train_command.records import HeldOutRecord, StepRecord, history
from moesaic.cluster.train_command.train_spec import TrainSpec
from moesaic.models.data.dealt import Dealt
from moesaic.models.data.packing import Packed
from moesaic.models.data.sequences import sequence
from moesaic.models.data.token_file import TokenFile, write_token_file
from moesaic.models.trunk.experts_layers import expert_tensors, experts_layers
from tests.helpers.training.runs import LocalPool, Team, optimizing
from tests.helpers.training.trunks import assert_near, plain_model

PER_TOKEN = 2  # experts of a token, in the tiny mixtral
LENGTH = 8


def write_tokens(path: Path, sequences: int, vocabulary: int = 90) -> None:
    """Write documents of any length; of some tokens nothing is learned."""
    chance = np.random.default_rng(5)
    left, documents = sequences * LENGTH + 3, []
    while left > 0:
        size = int(min(left, chance.integers(1, 30)))
        tokens = chance.integers(0, vocabulary, size).astype(np.int32)
        documents.append(Packed(tokens, chance.random(size) < 0.8))
        left -= size
    write_token_file(path, documents, about={})


def train_spec(**changes: Any) -> TrainSpec:
    """A spec whose last microbatch of a step is smaller than the others."""
    values: dict[str, Any] = {
        "steps": 8,
        "data": {"path": "unused", "sequence_length": LENGTH, "held_out": 0.2, "seed": 3},
        "batch": {"sequences": 6, "microbatch": 2},
        "optimizer": {
            "settings": {"lr": 1e-2, "weight_decay": 0.1},
            "max_grad_norm": 0.5,
            "exact": True,
        },
        "schedule": {"kind": "cosine", "warmup_steps": 2, "last_part": 0.1},
        "evaluation": {"every_steps": 3, "sequences": 4},
        "checkpoints": {"every_steps": 2, "keep": 2},
    }
    return TrainSpec.model_validate(values | changes)


class Plain(NamedTuple):
    """What the same steps make of a plain model."""

    model: Any  # after all steps
    moments: dict[str, Any]  # AdamW's, by their names: each as the model's tensors
    steps: list[tuple[float, float]]  # loss and norm
    held_out: list[float]  # losses


def plain_run(folder: Path, spec: TrainSpec, run: RunFolder) -> Plain:
    plain = plain_model(folder, torch.float64)
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    curve, data = spec.curve, spec.data
    steps, held_out = [], []
    with TokenFile(run.tokens) as tokens:
        dealt = Dealt(
            tokens,
            length=LENGTH,
            per_step=spec.batch.sequences,
            held_out=data.held_out,
            seed=data.seed,
        )

        def forward(numbers: Any) -> tuple[torch.Tensor, int, Any]:
            rows = [sequence(tokens, number, LENGTH) for number in numbers]
            ids, labels = (torch.stack(column) for column in zip(*rows, strict=True))
            out = plain(input_ids=ids, use_cache=False, output_router_logits=True)
            logits, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss = cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            return loss, int((targets != -100).sum()), out.router_logits

        def forward_all(numbers: Any) -> tuple[torch.Tensor, int, Any]:
            """In the same microbatches: models round to float32 within, in each pass anew."""
            size = spec.batch.microbatch
            parts = [forward(numbers[k : k + size]) for k in range(0, len(numbers), size)]
            losses, counts, gates = zip(*parts, strict=True)
            return torch.stack(losses).sum(), sum(counts), gates

        def evaluate(step: int) -> None:
            given = spec.evaluation
            assert given is not None
            if step % given.every_steps == 0 or step == spec.steps:
                with torch.no_grad():
                    loss, count, _ = forward_all(dealt.held_out[: given.sequences])
                held_out.append(float(loss) / count)

        for step in range(spec.steps):
            evaluate(step)
            for group in adam.param_groups:
                group["lr"] = 1e-2 * curve.factor(step)
            loss, count, gates = forward_all(dealt.numbers(step))
            whole = loss
            if spec.balance_loss is not None:
                of_step = [torch.cat(layer) for layer in zip(*gates, strict=True)]
                gates_of_step: Any = tuple(of_step)
                found = load_balancing_loss_func(gates_of_step, of_step[0].shape[-1], PER_TOKEN)
                whole = whole + spec.balance_loss * count * found
            whole.backward()
            for parameter in plain.parameters():
                if parameter.grad is not None:
                    parameter.grad /= count
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            adam.step()
            adam.zero_grad()
            steps.append((float(loss.detach()) / count, float(norm)))
        evaluate(spec.steps)
    return Plain(
        plain,
        {kind: _moments(plain, adam, kind) for kind in ("exp_avg", "exp_avg_sq")},
        steps,
        held_out,
    )


def _moments(plain: Any, adam: torch.optim.Optimizer, kind: str) -> Any:
    model = deepcopy(plain)
    with torch.no_grad():
        for of_model, one in zip(model.parameters(), plain.parameters(), strict=True):
            of_model.copy_(adam.state[one][kind])
    return model


def assert_same_moments(run: RunFolder, expected: Plain, tolerance: float) -> None:
    """The newest checkpoint has the moments of the plain model's optimizer."""
    checkpoint = run.newest()
    assert checkpoint is not None
    of_trunk = dict(checkpoint.trunk_state())
    for kind, model in expected.moments.items():
        layers = experts_layers(model)
        in_pool = {id(one) for layer in layers for one in layer.module.parameters()}
        for name, wanted in model.named_parameters():
            if id(wanted) not in in_pool:
                assert_near(of_trunk[f"{name}.{kind}"], wanted.detach(), tolerance, name)
        for layer in layers:
            for expert in range(layer.num_experts):
                state = checkpoint.state(layer.layer, expert)
                for name, wanted in expert_tensors(layer, expert).items():
                    assert_near(state[f"{name}.{kind}"], wanted, tolerance, f"{expert} {name}")
                    assert float(state[f"{name}.step"]) == len(expected.steps)


class Runner:
    """The workers of one run, each in a thread."""

    def __init__(self, pool: LocalPool, folder: Path, spec: TrainSpec, run: RunFolder) -> None:
        self.pool, self.folder, self.spec, self.run = pool, folder, spec, run
        self.stop = Event()
        self.models: list[Any] = []

    def work(
        self,
        team: Team | None,
        name: str,
        *,
        begun: Callable[[Any, TrainingLoop], None] = lambda *_: None,
        **options: Any,
    ) -> None:
        """Train to the end as one worker; ``begun`` is called before its loop begins."""
        given = self.spec.optimizer
        with optimizing(
            self.pool,
            self.folder,
            team=team,
            name=name,
            max_grad_norm=given.max_grad_norm,
            exact=bool(given.exact),
            **options,
        ) as (model, optimizer):
            self.models.append(model)
            loop = TrainingLoop(
                model,
                optimizer,
                self.spec,
                self.run,
                experts_per_token=PER_TOKEN,
                stop=self.stop,
            )
            begun(optimizer, loop)
            loop.run()

    def train(self, workers: int, **options: Any) -> None:
        """Train to the end with so many workers."""
        with self.begun(workers, **options) as futures:
            for one in futures:
                one.result(120)

    @contextmanager
    def begun(self, workers: int, **options: Any) -> Iterator[list[Future[None]]]:
        team = None if workers == 1 else Team(workers)
        with ThreadPoolExecutor(workers) as threads:
            yield [
                threads.submit(self.work, team, f"worker-{number}", **options)
                for number in range(workers)
            ]

    def told(self) -> tuple[list[StepRecord], list[HeldOutRecord]]:
        return history(self.run.records()[0])
