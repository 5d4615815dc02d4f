"""What a training step costs on quantised weights: ``python experiments/quantised/steps.py`` writes ``steps.csv``.

MiniLM with uniform rank 4, 32 rows of 32 tokens, forward, backward and AdamW. Seconds are processor time of one thread,
the kinds take turns in shuffled rounds, and ratios to the float backbone are of one round each. Peaks are of torch's
own allocations in one step (``autolora.bench.memory``), weights included.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which measures memory, notes its start and stop
import torch

from autolora.adapters import AdapterSettings, attach, find_sites
from autolora.adapters.compress import Compression
from autolora.backbones import load_backbone
from autolora.bench.measure import ratio, take_turns
from autolora.bench.memory import peak_bytes
from autolora.plan import RankPlan

KINDS = ("none", "int8", "nf4")
ROWS, TOKENS, ROUNDS = 32, 32, 9
COLUMNS = ("precision", "quantization", "cpu_ms", "ratio", "low", "high", "peak_mb", "weights_mb")


class Learner:
    """A backbone with adapters, and its optimizer."""

    def __init__(self, quantization: Any, precision: str) -> None:
        backbone = load_backbone("minilm", num_labels=3, compression=Compression(quantization=quantization))
        self.weights, self.model, self.precision = backbone.stored_bytes, backbone.model.train(), precision
        settings = AdapterSettings()
        attach(self.model, settings, RankPlan.uniform(find_sites(self.model, settings), 4))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()


def main() -> None:
    torch.set_num_threads(1)
    tokens = torch.randint(2000, 20000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 3}
    rows = []
    for precision in ("32-true", "bf16-mixed"):
        learners = {kind: Learner(kind, precision) for kind in KINDS}
        turns: dict[str, Callable[[], object]] = {kind: partial(one.step, batch) for kind, one in learners.items()}
        times = take_turns(turns, ROUNDS, warmup=2, clock=time.process_time)
        for kind in KINDS:
            against = ratio(times[kind], times["none"])
            peak = peak_bytes(partial(Learner, kind, precision), batch)  # type: ignore[arg-type]
            said = [1000 * median(times[kind]), against.median, against.low, against.high, peak / 1e6]
            rows.append([precision, kind, *(f"{x:.3g}" for x in (*said, learners[kind].weights / 1e6))])
            print(*rows[-1])
    with (Path(__file__).parent / "steps.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
