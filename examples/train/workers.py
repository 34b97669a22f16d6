"""Train a model in several processes at once; each has a trunk, and computes a part of every step.

torchrun --nproc-per-node 2 examples/train/workers.py [NAME] [STEPS]
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap

import torch
from transformers import AutoTokenizer

import moesaic

SEQUENCE, BATCH, MICROBATCHES = 128, 2, 4


def main(name: str = "local", steps: str = "20") -> None:
    cluster = moesaic.connect(name)
    model = cluster.from_pretrained(cluster.status().models[0].name, train=True)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    text = "\n".join(inspect.getsource(module) for module in (inspect, json, textwrap))
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    blocks = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)

    # Every process makes the same optimizer; torchrun says how many they are, and which this is.
    with moesaic.PoolOptimizer(model, cluster, lr=1e-4, max_grad_norm=1.0) as optimizer:
        run = optimizer.run
        while run.step < int(steps):
            # A step's microbatches are the same for any number of processes.
            chance = torch.Generator().manual_seed(run.step)
            batch = torch.randint(len(blocks), (MICROBATCHES, BATCH), generator=chance)
            try:
                losses, targets = 0.0, 0
                for rows in batch[run.number :: run.workers]:
                    ids = blocks[rows]
                    count = ids.numel() - len(ids)  # the first token of a sequence is not predicted
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss * count
                    loss.backward()
                    losses, targets = losses + loss.item(), targets + count
                of_all = run.total("loss", (losses, targets))
                # Sums of losses over tokens, divided by the tokens of all processes: their mean.
                optimizer.step(weight=targets)
            except moesaic.StepLost as error:
                print(f"step {run.step + 1} is done again: {error}")
                optimizer.zero_grad()
                continue
            if run.number == 0:
                print(f"step {run.step}: loss {of_all[0] / of_all[1]:.3f}, {run.workers} processes")


if __name__ == "__main__":
    main(*sys.argv[1:])
