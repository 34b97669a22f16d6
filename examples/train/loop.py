"""Train a model in a loop of your own; its experts learn in the pool.

python examples/train/loop.py [NAME] [STEPS]
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap

import torch
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

import moesaic

SEQUENCE, BATCH, MICROBATCHES = 128, 2, 2


def main(name: str = "local", steps: str = "20") -> None:
    cluster = moesaic.connect(name)
    # An ordinary transformers model without its experts, in training mode.
    model = cluster.from_pretrained(cluster.status().models[0].name, train=True)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    text = "\n".join(inspect.getsource(module) for module in (inspect, json, textwrap))
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    blocks = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)

    # The pool keeps masters and moments; the hyperparameters are those of torch.optim.AdamW.
    with moesaic.PoolOptimizer(model, cluster, lr=1e-4, weight_decay=0.1) as optimizer:
        schedule = get_cosine_schedule_with_warmup(optimizer, 2, int(steps))
        for step in range(int(steps)):
            mean = 0.0
            for _ in range(MICROBATCHES):
                ids = blocks[torch.randint(len(blocks), (BATCH,))]
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss / MICROBATCHES
                loss.backward()
                mean += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            print(f"step {step + 1}: loss {mean:.3f}, gradient norm {norm:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
