"""The model and the steps of benchmarks of training; it needs torch and transformers alone.

A step's number decides its microbatches, so all ways to compute it have the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_model import save_random_model

LEARNING_RATE = 1e-4
MAX_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLoad:
    """The sizes of a Mixtral with random weights, and of a step; each is an option."""

    layers: int = 3
    experts: int = 8
    top_k: int = 2
    hidden: int = 512
    intermediate: int = 1024
    vocabulary: int = 2048
    heads: int = 8
    microbatches: int = 4  # of a step
    sequences: int = 1  # of a microbatch
    length: int = 512

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.microbatches * self.sequences * self.length

    def save(self, folder: Path) -> None:
        """Save the model, with the same weights every time."""
        save_random_model(
            folder,
            layers=self.layers,
            experts=self.experts,
            top_k=self.top_k,
            hidden=self.hidden,
            intermediate=self.intermediate,
            vocabulary=self.vocabulary,
            heads=self.heads,
            seed=0,
        )

    def step(self, number: int) -> list[Tensor]:
        """Return the microbatches of a step, each (sequences, length)."""
        chance = torch.Generator().manual_seed(number)
        shape = self.microbatches, self.sequences, self.length
        return list(torch.randint(self.vocabulary, shape, generator=chance))


def add_options(parser: argparse.ArgumentParser, defaults: TrainingLoad) -> None:
    for field in fields(TrainingLoad):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=int, default=getattr(defaults, field.name))


def load_of(given: argparse.Namespace) -> TrainingLoad:
    return TrainingLoad(
        **{field.name: getattr(given, field.name) for field in fields(TrainingLoad)}
    )


def backward(model: Any, microbatches: Iterable[Tensor]) -> tuple[float, int]:
    """Add up gradients; return the sum of the losses over tokens, and how many these are."""
    losses, targets = 0.0, 0
    for ids in microbatches:
        count = ids.numel() - len(ids)  # the first token of a sequence is not predicted
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss * count
        loss.backward()
        losses, targets = losses + loss.item(), targets + count
    return losses, targets
