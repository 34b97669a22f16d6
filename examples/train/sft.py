"""Fine-tune a model on conversations with TRL's SFTTrainer; its experts learn in the pool.

python examples/train/sft.py [NAME] [STEPS] [FOLDER]      (needs `pip install trl`)
"""

from __future__ import annotations

import sys

from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

import moesaic

CAPITALS = {"Paris": "France", "Rome": "Italy", "Madrid": "Spain", "Lisbon": "Portugal"}


def conversations() -> Dataset:
    asked = [
        [
            {"role": "user", "content": f"What is the capital of {country}?"},
            {"role": "assistant", "content": f"The capital of {country} is {city}."},
        ]
        for city, country in CAPITALS.items()
    ]
    return Dataset.from_list([{"messages": messages} for messages in asked * 50])


def main(name: str = "local", steps: str = "20", folder: str = "tuned") -> None:
    cluster = moesaic.connect(name)
    model = cluster.from_pretrained(cluster.status().models[0].name, train=True)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    with moesaic.PoolOptimizer(model, cluster, lr=1e-5) as optimizer:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=int(steps),
            max_length=256,
            packing=True,
            per_device_train_batch_size=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer = SFTTrainer(
            model,
            args=arguments,
            train_dataset=conversations(),
            processing_class=tokenizer,
            optimizers=(optimizer, None),
        )
        trainer.train()
        trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
