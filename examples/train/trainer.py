"""Train a model with transformers' Trainer; its experts learn in the pool.

python examples/train/trainer.py [NAME] [STEPS] [FOLDER]
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

import moesaic

SEQUENCE = 128


def main(name: str = "local", steps: str = "20", folder: str = "trained") -> None:
    cluster = moesaic.connect(name)
    model = cluster.from_pretrained(cluster.status().models[0].name, train=True)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    text = "\n".join(inspect.getsource(module) for module in (inspect, json, textwrap))
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    blocks = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    data = [{"input_ids": block, "labels": block} for block in blocks]

    # Trainer clips, accumulates and schedules as always; only the optimizer is the pool's.
    with moesaic.PoolOptimizer(model, cluster, lr=1e-4) as optimizer:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=int(steps),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
        trainer.save_model()  # the whole model, with its experts: from_pretrained reads it
        tokenizer.save_pretrained(folder)
    print(f"the trained model is in {folder}; `moesaic up` serves it")


if __name__ == "__main__":
    main(*sys.argv[1:])
