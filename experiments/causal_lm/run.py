"""A small causal language model, pretrained on one kind of embedded sentences and adapted to another in the Trainer of
transformers: ``python experiments/causal_lm/run.py`` makes curves.csv, results.csv and the figure beside it."""

from __future__ import annotations

import copy
import csv
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import torch
from peft import PeftModel
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments, set_seed

from autolora.integrations.hf_trainer import AutoLoRACallback
from autolora.tasks.mini import generate

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
PRETRAINING, ADAPTATION = ("mnli", "qnli", "qqp"), ("sst2",)
BLOCK, DEV_SHARE = 32, 0.15
STRATEGIES, SEEDS = ("uniform", "autolora"), (0, 1, 2)
BUDGET, MAX_RANK, LEARNING_RATE = 0.5, 8, 5e-3
STEPS = {"pretraining": 800, "adaptation": 320}

Rows = list[dict[str, torch.Tensor]]


def main() -> None:
    torch.set_num_threads(1)
    texts = {name: sentences(tasks) for name, tasks in (("general", PRETRAINING), ("reviews", ADAPTATION))}
    words = {
        word: i for i, word in enumerate(["<end>", *sorted({w for text in texts.values() for s in text for w in s})])
    }
    general, reviews = (blocks(text, words) for text in texts.values())
    cut = round(DEV_SHARE * len(reviews))
    dev, rows = reviews[:cut], reviews[cut:]
    print(f"{len(words)} words; {len(general)} blocks of {BLOCK} to pretrain on, {len(rows)} to adapt to, {cut} of dev")
    base = pretrained(len(words), general)
    before = trainer_of(base, dev, dev, "adaptation", 0).evaluate()["eval_loss"]
    curves, results = [], []
    for seed in SEEDS:
        for strategy in STRATEGIES:
            result, curve = adapt(base, rows, dev, strategy, seed)
            results.append(result | {"base_loss": round(before, 4)})
            curves += [{"strategy": strategy, "seed": seed} | point for point in curve]
            print(results[-1], flush=True)
    write(HERE / "results.csv", results)
    write(HERE / "curves.csv", curves)
    draw(curves, before)


def sentences(tasks: Iterable[str]) -> list[list[str]]:
    """The sentences of these tasks as words, each once."""
    found: dict[tuple[str, ...], None] = {}
    for task in tasks:
        split = generate(task, "train")
        for text in (*split.text_a, *(split.text_b or ())):
            found[tuple(re.findall(r"[\w']+|[^\w\s]", text.lower()))] = None
    return [list(sentence) for sentence in found]


def blocks(text: list[list[str]], words: dict[str, int]) -> Rows:
    """The sentences one after the other, in a fixed random order, cut into rows of equal length."""
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor([i for k in order for i in (*(words[word] for word in text[k]), words["<end>"])])
    whole = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    return [{"input_ids": row, "labels": row} for row in whole]


def trainer_of(model: nn.Module, rows: Rows, dev: Rows, phase: str, seed: int, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=STEPS[phase],
        learning_rate=3e-3 if phase == "pretraining" else LEARNING_RATE,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=20 if phase == "adaptation" else STEPS[phase],
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=seed,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=dev, **more)


def pretrained(vocabulary: int, rows: Rows) -> nn.Module:
    set_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    trainer = trainer_of(model, rows[256:], rows[:256], "pretraining", 0)
    trainer.train()
    print(f"pretrained: loss {trainer.evaluate()['eval_loss']:.3f} on general sentences it has not seen", flush=True)
    return model


def adapt(base: nn.Module, rows: Rows, dev: Rows, strategy: str, seed: int) -> tuple[dict[str, Any], list[dict]]:
    model, began = copy.deepcopy(base), time.monotonic()
    callback = AutoLoRACallback(strategy, budget=BUDGET, max_rank=MAX_RANK)
    trainer = trainer_of(model, rows, dev, "adaptation", seed, callbacks=[callback])
    trainer.train()
    seconds = time.monotonic() - began
    loss = trainer.evaluate()["eval_loss"]
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_model(folder)
        stock = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        in_peft = trainer_of(stock, dev, dev, "adaptation", seed).evaluate()["eval_loss"]
    assert callback.plan is not None
    result = {
        "strategy": strategy,
        "seed": seed,
        "budget": callback.strategy.allowance,
        "adapter_params": callback.plan.params,
        "modules": sum(rank > 0 for rank in callback.plan.values()),
        "dev_loss": round(loss, 4),
        "dev_loss_in_peft": round(in_peft, 4),
        "seconds": round(seconds, 1),
        "ranks": " ".join(str(rank) for rank in callback.plan.values()),
    }
    return result, list(points(trainer.state.log_history))


def points(history: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Training loss, dev loss and active adapter parameters by step."""
    by_step: dict[int, dict[str, Any]] = defaultdict(lambda: {"loss": "", "adapter_params": "", "dev_loss": ""})
    for entry in history:
        if "loss" in entry:
            by_step[entry["step"]] |= {"loss": round(entry["loss"], 4), "adapter_params": entry["adapter_parameters"]}
        if "eval_loss" in entry:
            by_step[entry["step"]]["dev_loss"] = round(entry["eval_loss"], 4)
    yield from ({"step": step} | point for step, point in sorted(by_step.items()))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(curves: list[dict[str, Any]], before: float) -> None:
    mpl.rcParams["svg.hashsalt"] = "causal_lm"  # the same rows give the same file
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    shown = (
        ("loss", "training loss"),
        ("dev_loss", "dev loss"),
        ("adapter_params", "adapter parameters at evaluation"),
    )
    for axis, (column, label) in zip(axes, shown, strict=True):
        for strategy, colour in zip(STRATEGIES, ("#0072b2", "#d55e00"), strict=True):
            values: dict[int, list[float]] = defaultdict(list)
            for row in curves:
                if row["strategy"] == strategy and row[column] != "":
                    values[row["step"]].append(float(row[column]))
            steps = sorted(values)
            axis.plot(steps, [mean(values[step]) for step in steps], color=colour, label=strategy)
            lowest, highest = ([end(values[step]) for step in steps] for end in (min, max))
            axis.fill_between(steps, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(color="#88888844")
    axes[1].axhline(before, color="#777777", linestyle="--", linewidth=1, label="no adapter")
    axes[1].legend(frameon=False)
    for kind in ("png", "svg"):
        figure.savefig(HERE / f"curves.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)


if __name__ == "__main__":
    main()
