"""Many adapters on one backbone, a router over them, and a cascade of ranks, on runs that are there: see README.md.

``python experiments/hot_swap/run.py [serve] [router] [cascade]`` reads the runs in ``runs/hot_swap`` and writes a JSON
file for each part beside this script.
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch import nn

from autolora.adapters.peft_format import load_peft
from autolora.backbones import load_backbone
from autolora.export import load
from autolora.multitask.bank import AdapterBank
from autolora.multitask.cascade import Cascade, trade
from autolora.multitask.router import Router, compare, train, weights_on
from autolora.parts import make_problem
from autolora.results import RunDirectory, hardware
from autolora.tasks.splits import subsample
from autolora.training.problem import Problem
from autolora.training.text import TextProblem
from autolora.validate import require

HERE, RUNS = Path(__file__).parent, Path("runs/hot_swap")
TASKS = ("sst2", "mrpc", "mnli")
ROWS, POSITIONS = 32, 32
GATE_STEPS, DEV_ROWS = 90, 200
RANKS = (1, 2, 4, 8)
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.1)


def run_of(task: str, strategy: str) -> RunDirectory:
    """The complete run of a task."""
    return RunDirectory(next(RUNS.glob(f"{task}-mini-minilm-{strategy}-*")))


def problem_of(run: RunDirectory) -> Problem:
    """The task of a run, with its data and batches; so many rows of its dev split, drawn once."""
    problem = make_problem(require(yaml.safe_load(run.config.read_text())))
    assert isinstance(problem, TextProblem)
    problem.splits["dev"] = subsample(problem.splits["dev"], DEV_ROWS, seed=0)
    problem.build()
    return problem


def new_bank() -> AdapterBank:
    return AdapterBank(load_backbone("minilm", num_labels=2).model, task_type="SEQ_CLS")


def bank_of(tasks: Sequence[str]) -> AdapterBank:
    bank = new_bank()
    for task in tasks:
        bank.add(task, run_of(task, "uniform").adapter)
    return bank


def least_seconds(*functions: Callable[[], object], rounds: int) -> list[float]:
    """Of one call of each, which take turns: processor time of the one thread that computes.

    That is the time on a quiet machine; the least, because what else a machine does only ever adds.
    """
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, found in zip(functions, times, strict=True):
            start = time.thread_time()
            function()
            found.append(time.thread_time() - start)
    return [min(found) for found in times]


# Serving -------------------------------------------------------------------------------------------------------------


def serve() -> dict[str, Any]:
    return {"machine": machine(), "switch": switch(), "memory": memory(), "mixed_batches": mixed_batches()}


def switch() -> dict[str, float]:
    """Seconds to go from one adapter to another, by what one could do."""
    bank = bank_of(TASKS[:2])
    folder = run_of("sst2", "uniform").adapter

    def choose() -> None:
        with bank.use("sst2"):
            pass

    def often() -> None:
        for _ in range(1000):
            choose()

    [choices] = least_seconds(often, rounds=50)
    model = load_backbone("minilm", num_labels=2).model
    [reload] = least_seconds(lambda: load_peft(model, folder).detach(), rounds=7)
    peft = PeftModel.from_pretrained(load_backbone("minilm", num_labels=2).model, str(folder), adapter_name="sst2")
    peft.load_adapter(str(run_of("mrpc", "uniform").adapter), adapter_name="mrpc")
    [both] = least_seconds(lambda: (peft.set_adapter("mrpc"), peft.set_adapter("sst2")), rounds=51)
    return {"bank_use": choices / 1000, "peft_set_adapter": both / 2, "load_and_detach": reload}


def memory() -> dict[str, Any]:
    """Bytes of tensors, and of Python's own objects, as adapters of one size come in."""
    folder, found = run_of("sst2", "uniform").adapter, {}
    with tempfile.TemporaryDirectory() as place:
        stock = shutil.copytree(folder, Path(place) / "stock")
        (stock / "autolora.json").unlink()  # without it the backbone is not hashed again for every adapter
        bank, seconds = new_bank(), []
        bank.add("0", folder)
        bank.remove("0")  # whatever is loaded once for all
        for count in range(101):
            if count:
                start = time.thread_time()
                bank.add(str(count), stock)
                seconds.append(time.thread_time() - start)
            if count in (0, 1, 10, 100):
                found[count] = tensor_bytes(bank.model)
        objects = python_bytes(lambda i: bank.add(f"more {i}", stock), times=5)
        [checked] = least_seconds(lambda: (bank.add("checked", folder), bank.remove("checked")), rounds=5)
    return {
        "tensor_bytes_by_adapters": found,
        "python_bytes_of_one": objects,
        "parameters_of_one": sum(p.numel() for p in bank.parameters_of("1")),
        "seconds_to_add": statistics.median(seconds),
        "seconds_to_add_with_fingerprint": checked,
    }


def tensor_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def python_bytes(function: Callable[[int], object], times: int) -> float:
    """What one call leaves in Python's own memory, on average; tensors have theirs elsewhere."""
    gc.collect()
    tracemalloc.start()
    for i in range(times):
        function(i)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / times


@torch.no_grad()
def mixed_batches() -> list[dict[str, float]]:
    """Seconds of a batch whose rows have several adapters: at once, and one batch for each adapter."""
    bank, folder = new_bank(), run_of("sst2", "uniform").adapter
    for i in range(16):
        bank.add(str(i), folder)
    model, found = bank.model.eval(), []
    ids = torch.randint(1000, 2000, (ROWS, POSITIONS), generator=torch.Generator().manual_seed(0))

    def with_names(names: Any, rows: slice = slice(None)) -> None:
        with bank.use(names):
            model(input_ids=ids[rows], attention_mask=torch.ones_like(ids[rows]))

    for count in (1, 4, 16):
        names = [str(i % count) for i in range(ROWS)]
        each = ROWS // count
        bare, one, mixed, separate = least_seconds(
            lambda: with_names(None),
            lambda: with_names("0"),
            lambda names=names: with_names(names),
            lambda count=count, each=each: [with_names(str(i), slice(i * each, (i + 1) * each)) for i in range(count)],
            rounds=7,
        )
        found.append({"adapters": count, "bare": bare, "one_adapter": one, "mixed": mixed, "separate": separate})
    return found


# Router --------------------------------------------------------------------------------------------------------------


def router() -> dict[str, Any]:
    torch.manual_seed(0)
    bank = bank_of(TASKS)
    problems = {task: problem_of(run_of(task, "uniform")) for task in TASKS}
    gate = Router(bank, TASKS)
    start = time.thread_time()
    losses = train(gate, problems, GATE_STEPS)
    seconds = time.thread_time() - start
    scores = compare(gate, problems)
    weights = {task: weights_on(gate, problem, "dev") for task, problem in problems.items()}
    return {
        "machine": machine(),
        "gate_parameters": sum(p.numel() for p in gate.parameters()),
        "steps": GATE_STEPS,
        "processor_seconds": seconds,
        "loss_of_first_and_last_30_steps": [statistics.fmean(losses[:30]), statistics.fmean(losses[-30:])],
        "rows": {task: len(found) for task, found in weights.items()},
        "metric": {task: problem.primary for task, problem in problems.items()},
        "scores": {task: {way: found.value for way, found in ways.items()} for task, ways in scores.items()},
        "mean_weights": {
            task: dict(zip(TASKS, found.mean(0).tolist(), strict=True)) for task, found in weights.items()
        },
        "routed_to_own": {
            task: int((found.argmax(1) == k).sum()) / len(found) for k, (task, found) in enumerate(weights.items())
        },
    }


# Rank per input ------------------------------------------------------------------------------------------------------


def cascade() -> dict[str, Any]:
    run = run_of("mnli", "dylora")
    cfg = require(yaml.safe_load(run.config.read_text()))
    adapters, _ = load(cfg, "LORA", run.adapter)
    problem = problem_of(run)
    levels = Cascade(adapters, problem, RANKS)
    trade(levels, [0.0])  # warm
    return {
        "machine": machine(),
        "ranks_alone": {rank: _measured(Cascade(adapters, problem, [rank]), 0.0) for rank in RANKS},
        "cascade": {str(threshold): _measured(levels, threshold) for threshold in THRESHOLDS},
    }


def _measured(levels: Cascade, threshold: float) -> dict[str, Any]:
    start = time.thread_time()
    [found] = trade(levels, [threshold])
    processor = time.thread_time() - start
    return {
        "score": found.scores.value,
        "passes": found.passes,
        "adapter_mflops": found.adapter_flops / 1e6,
        "backbone_mflops": found.backbone_flops / 1e6,
        "processor_seconds": processor,
        "wall_seconds": found.seconds,
        "shares": found.shares,
    }


def machine() -> dict[str, Any]:
    return {"hardware": hardware(None), "torch": torch.__version__, "threads": torch.get_num_threads()}


PARTS = {"serve": serve, "router": router, "cascade": cascade}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        result = PARTS[part]()
        (HERE / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
