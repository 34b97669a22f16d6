"""What tests give transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments


def trainer_arguments(folder: Path, steps: int, **more: Any) -> TrainingArguments:
    """Trainer's defaults, which clip, but for what is logged and saved and how long it goes on."""
    given: dict[str, Any] = {"save_strategy": "no"} | more
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        lr_scheduler_type="cosine",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **given,
    )
