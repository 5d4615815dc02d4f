"""Which strategies find planted ranks, and where they stop: ``python experiments/planted_recovery/run.py``.

``--regimes encoder --data-dir DIR`` asks the same of a pretrained encoder. Every cell of the study (regime, ranks,
seed, method, learning rate, steps) is one row of ``results.csv``, written as soon as it is there. Cells that have a row
are not run again.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).parent
PROFILES = {"6": "[0,0,1,2,0,3]", "18": "[0,1,2,4,8,3]", "40": "[4,6,8,12,2,8]"}
"""By the total: true ranks of U0, V0, U1, V1, U2, V2."""

STEPS = 600
RATE = 3e-3


@dataclass(frozen=True)
class Regime:
    """What is not easy: overrides of the command line, the share of the true cost that methods are told, and steps."""

    overrides: tuple[str, ...] = ()
    share: float | None = 1.0
    steps: int = STEPS


DECAYING, NOISE, THIRD = "task.profile=decaying", "task.noise=1.0", STEPS // 3
REGIMES = {
    "easy": Regime(),
    "decaying": Regime((DECAYING,)),
    "noise": Regime((NOISE,)),
    "third": Regime(steps=THIRD),
    "all_three": Regime((DECAYING, NOISE), steps=THIRD),
    "total_too_small": Regime(share=2 / 3),
    "total_too_large": Regime(share=4 / 3),
    "no_total": Regime(share=None),
}

PEFT_ADALORA = "peft_adalora"
CEILING = "autolora_ceiling"
EVERYWHERE = {
    "autolora": ("strategy=autolora",),
    CEILING: ("strategy=autolora", "strategy.sparsity.spend_all=false"),
    PEFT_ADALORA: (),
    "adalora": ("strategy=adalora",),
    "sora": ("strategy=sora",),
    "svd_truncate": ("strategy=svd_truncate",),
}
EARLY = {
    "autolora_early": ("strategy=autolora", "strategy.phases.warmup=0.1", "strategy.phases.prune=0.3"),
    "autolora_early_warmup": ("strategy=autolora", "strategy.phases.warmup=0.1"),
}
"""Not in the tables of all methods: what judging earlier does (``early_pruning.csv``)."""

FINE = "strategy.growth_interval=10"  # 30 rounds of one or two components instead of 8 that open one in every module
ALL_ROWS = "strategy.heldout_rows=null"
ALONE = "strategy.against_random=false"  # random plans are in the table
OTHERS = {
    "autolora_bilevel": ("strategy=autolora_bilevel",),
    "dylora": ("strategy=dylora", "strategy.select=greedy"),
    "growth_gradient": ("strategy=dynamic_growth",),
    "growth_increlora": ("strategy=dynamic_growth", "strategy.importance=increlora"),
    "growth_gradient_fine": ("strategy=dynamic_growth", "strategy.min_rank=0", FINE),
    "growth_increlora_fine": ("strategy=dynamic_growth", "strategy.importance=increlora", FINE),
    "eva": ("strategy=eva",),
    "gradient": ("strategy=gradient",),
    "spectral": ("strategy=spectral",),
    "random": ("strategy=random",),
    "uniform": ("strategy=uniform",),
    "rl_search": ("strategy=rl_search", ALL_ROWS, ALONE),
    "evolution": ("strategy=evolution", ALL_ROWS, ALONE),
    "random_search": ("strategy=random_search", ALL_ROWS),
}
FOR_OTHERS = {"easy": tuple(PROFILES), "decaying": tuple(PROFILES), "all_three": ("18",)}
SEARCHES = ("rl_search", "evolution", "random_search")
FEW_SEEDS = 3
"""Of searches, where the problem is not one of easy and all_three at a total of 18."""

ENCODER, DRAWN = "encoder", "drawn"
ON_ENCODER = Regime(("task.text=cola", "data.batch_size=16", "data.max_heldout=256"), steps=500)
"""``task=planted_encoder``: a pretrained encoder on real sentences. The ranks are drawn for each seed."""

IN_ENCODER = ("autolora", "autolora_bilevel", PEFT_ADALORA, "adalora", "sora", "svd_truncate", *SEARCHES, "uniform")

WITHOUT_TOTAL = ("autolora", *EARLY, "sora", PEFT_ADALORA)
"""Methods that have an answer without a total; PEFT's AdaLoRA takes its default target, 8 for each module."""

RATES = {
    "autolora": 1e-2, CEILING: 1e-2, **dict.fromkeys(EARLY, 1e-2),
    "autolora_bilevel": 1e-2, PEFT_ADALORA: 0.1, "adalora": 0.1, "sora": 1e-2,
    "svd_truncate": 1e-2,
}  # fmt: skip
"""Learning rates that are not the task's: the best of four (AdaLoRA: of six) on a teacher outside the study
(``tuning.csv``), by misplaced components and then by the geometric mean of the excess error."""

ENCODER_RATES = {PEFT_ADALORA: 3e-2, "adalora": 1e-2}
"""The same on the encoder, the best of three by the excess error (``encoder_tuning.csv``)."""

COLUMNS = [
    "regime", "total", "seed", "method", "lr", "true_ranks", "found_ranks", "exact", "spurious", "missed",
    "excess_error", "params", "true_params", "told_params", "steps", "plans_measured", "seconds",
]  # fmt: skip

Cell = tuple[str, str, int, str, float, int]


def cells(seeds: range) -> Iterator[tuple[str, str, int, str]]:
    for seed in seeds:
        for regime in REGIMES:
            for total in PROFILES:
                for method in (*EVERYWHERE, *EARLY):
                    if method == CEILING and regime != "total_too_large":
                        continue  # elsewhere the budget binds, or there is none
                    if regime != "no_total" or method in WITHOUT_TOTAL:
                        yield regime, total, seed, method
                if total in FOR_OTHERS.get(regime, ()):
                    every = seed < FEW_SEEDS or (total == "18" and regime != "decaying")
                    yield from ((regime, total, seed, name) for name in OTHERS if every or name not in SEARCHES)
        yield from ((ENCODER, DRAWN, seed, method) for method in IN_ENCODER)


def run_cell(cell: Cell, data: Sequence[str] = ()) -> dict[str, object]:
    name, total, seed, method, lr, steps = cell
    regime = regime_of(name)
    from autolora.compose import compose
    from autolora.errors import NonFiniteLossError
    from autolora.parts import make_problem
    from autolora.plan import RankPlan
    from autolora.run import run_one

    start = time.perf_counter()
    planted = ["task=planted_encoder"] if name == ENCODER else ["task=planted", f"task.ranks={PROFILES[total]}"]
    folder = Path(tempfile.mkdtemp(prefix="planted_recovery_"))
    common = [
        *planted, f"seed={seed}", f"trainer.max_steps={steps}", "logger=csv", f"optim.adapter.lr={lr}",
        f"run_root={folder}", "trainer.enable_progress_bar=false", *regime.overrides, *data,
    ]  # fmt: skip
    problem = make_problem(compose(common))
    problem.build()
    true = problem.true_plan
    told = None if regime.share is None else round(regime.share * true.params)
    budget = "budget=none" if told is None else f"budget.params={told}"
    cfg = compose([*common, budget, *(EVERYWHERE | EARLY | OTHERS)[method]])
    plans = 0
    if method == PEFT_ADALORA:
        from peft_adalora import train

        found, error = train(cfg, 8 * len(true) if regime.share is None else round(regime.share * true.components))
    else:
        try:
            result = run_one(cfg)
        except NonFiniteLossError:  # nothing is found
            found, error = RankPlan.uniform(true.sites, 0), float("inf")
        else:
            assert result.planted is not None
            found, error = RankPlan(true.sites, result.planted.found), result.planted.excess_error
            plans = result.compute.plans_measured
    shutil.rmtree(folder)
    differences = [found[module] - true[module] for module in true]
    return {
        **dict(zip(COLUMNS, cell, strict=False)),
        "true_ranks": " ".join(map(str, true.values())),
        "found_ranks": " ".join(map(str, found.values())),
        "exact": sum(d == 0 for d in differences),
        "spurious": sum(max(0, d) for d in differences),
        "missed": sum(max(0, -d) for d in differences),
        "excess_error": "inf" if error is None else f"{error:.3g}",
        "params": found.params,
        "true_params": true.params,
        "told_params": told,
        "steps": steps,
        "plans_measured": plans,
        "seconds": round(time.perf_counter() - start, 1),
    }


def rows_of(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def cell_of(row: dict[str, str]) -> Cell:
    return row["regime"], row["total"], int(row["seed"]), row["method"], float(row["lr"]), int(row["steps"])


def regime_of(name: str) -> Regime:
    return REGIMES.get(name, ON_ENCODER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=[*EVERYWHERE, *OTHERS])
    parser.add_argument("--regimes", nargs="*", default=[*REGIMES])
    parser.add_argument("--totals", nargs="*", default=[*PROFILES, DRAWN])
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, help="GLUE's files, for the encoder")
    parser.add_argument("--steps", type=int, help="in place of those of the regime")
    parser.add_argument("--rates", nargs="*", type=float, help="learning rates to try, in place of the chosen ones")
    arguments = parser.parse_args()
    if ENCODER in arguments.regimes and arguments.data_dir is None:
        parser.error("the encoder reads CoLA's sentences: expected --data-dir with GLUE's files")
    data = [] if arguments.data_dir is None else ["data.source=local", f"data.dir={arguments.data_dir}"]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that work

    done = {cell_of(row) for row in rows_of(arguments.out)}
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    wanted = [
        (regime, total, seed, method, lr, arguments.steps or regime_of(regime).steps)
        for regime, total, seed, method in cells(seeds)
        if regime in arguments.regimes and total in arguments.totals and method in arguments.methods
        for lr in arguments.rates or [(ENCODER_RATES if regime == ENCODER else RATES).get(method, RATE)]
    ]
    left = [cell for cell in wanted if cell not in done]
    print(f"{len(done)} cells are there, {len(left)} are left", flush=True)
    with (
        ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool,
        arguments.out.open("a", newline="") as stream,
    ):
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if not done:
            writer.writeheader()
        jobs = {pool.submit(run_cell, cell, data): cell for cell in left}
        try:
            for number, job in enumerate(as_completed(jobs), 1):
                row = job.result()
                writer.writerow(row)
                stream.flush()
                print(number, *jobs[job], row["found_ranks"], row["excess_error"], f"{row['seconds']} s", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
