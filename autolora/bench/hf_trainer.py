"""The reference for whole runs: PEFT's LoRA in the Hugging Face Trainer, as its users write it.

``python -m autolora.bench.hf_trainer FILE``, with a JSON file of settings (:class:`Job`); the metric is written to the
job's ``out``. It uses nothing of this project.

*Usual*: every row padded to 128 tokens when it is tokenised, float32. *Best*: rows padded to the longest of their
batch, batches of rows of similar length, larger batches for evaluation, and bf16 if the job says so. Otherwise both
leave the Trainer's arguments at their defaults, but for saving and reporting, which are off, and the learning rate.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypedDict


class Job(TypedDict):
    """What is to be trained.

    ``model`` is a folder, ``rows`` a JSON file with ``train`` and ``dev``, each a mapping of columns (``text_a``,
    ``text_b`` or null, ``labels``); ``targets`` are full names of the adapted modules.
    """

    model: str
    rows: str
    out: str
    targets: list[str]
    num_labels: int
    best: bool
    bf16: bool
    cpu: bool
    epochs: int
    max_steps: int
    batch_size: int
    eval_batch_size: int
    max_length: int
    rank: int
    learning_rate: float
    seed: int


def run(job: Job) -> dict[str, float]:
    """Train on train, and evaluate on dev at the end."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=job["num_labels"])
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=job["rank"],
        lora_alpha=2 * job["rank"],
        target_modules=job["targets"],
    )
    data = datasets_of(job, tokenizer)
    arguments = TrainingArguments(
        output_dir=str(Path(job["out"]).with_suffix(".trainer")),
        num_train_epochs=job["epochs"],
        max_steps=job["max_steps"],
        per_device_train_batch_size=job["batch_size"],
        per_device_eval_batch_size=job["eval_batch_size"] if job["best"] else job["batch_size"],
        learning_rate=job["learning_rate"],
        seed=job["seed"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=job["cpu"],
        bf16=job["bf16"],
        train_sampling_strategy="group_by_length" if job["best"] else "random",
    )
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["dev"],
        data_collator=DataCollatorWithPadding(tokenizer) if job["best"] else None,
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer.evaluate()


def datasets_of(job: Job, tokenizer: Any) -> dict[str, Any]:
    """Train and dev as tokenised Arrow data sets."""
    from datasets import Dataset

    def tokenize(rows: dict[str, list[str]]) -> Any:
        texts = (rows["text_a"], rows["text_b"]) if "text_b" in rows else (rows["text_a"],)
        return tokenizer(
            *texts, truncation=True, max_length=job["max_length"], padding=False if job["best"] else "max_length"
        )

    splits = {}
    for name, columns in json.loads(Path(job["rows"]).read_text(encoding="utf-8")).items():
        given = {column: values for column, values in columns.items() if values is not None}
        splits[name] = Dataset.from_dict(given).map(tokenize, batched=True)
    return splits


def accuracy(predictions: Any) -> dict[str, float]:
    """The share of rows that are right."""
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def main() -> None:
    """Do the job in the file that is named on the command line."""
    job: Job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(job["out"]).write_text(json.dumps(run(job)), encoding="utf-8")


if __name__ == "__main__":
    main()
