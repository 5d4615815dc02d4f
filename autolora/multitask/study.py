"""Several tasks with one budget: probe, merge plans, train every arm, and say what sharing did. One seed or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from autolora.files import write_json_atomic, writing
from autolora.multitask.allocate import cheapest_left, merge, optimum, require_room, total_cost, total_value
from autolora.multitask.arms import Arm, Bench, Outcome
from autolora.multitask.interference import agreement, difference
from autolora.multitask.probe import Probe, initial_plans
from autolora.parts import say
from autolora.plan import RankPlan

Outcomes = dict[Arm, dict[str, list[Outcome]]]


def study(
    bench: Bench, seeds: Sequence[int], arms: Sequence[Arm], out: Path, *, probe_steps: int, probe_rank: int
) -> dict[str, Any]:
    """Carry out the arms and write ``multitask.json`` and the plans under ``out``.

    Runs that are complete are not run again, so that the same command goes on after an interruption.

    Returns:
        What ``multitask.json`` has.

    Raises:
        AutoLoRAError: for everything that a user can mend.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    bench.read_rows()
    sites = bench.sites()
    require_room(sites, bench.total_budget(sites), len(bench.tasks))
    outcomes: Outcomes = {arm: {task: [] for task in bench.tasks} for arm in arms}
    records = []
    for seed in seeds:
        of_seed = Bench(bench.tasks, [*bench.overrides, f"seed={seed}"], bench.budget, bench.orthogonality)
        record, found = _one_seed(of_seed, arms, out / f"seed{seed}", probe_steps, probe_rank)
        records.append({"seed": seed, **record})
        for arm, by_task in found.items():
            for task, outcome in by_task.items():
                outcomes[arm][task].append(outcome)
    summary = {"tasks": list(bench.tasks), "seeds": records, "arms": _arms(outcomes)}
    write_json_atomic(out / "multitask.json", summary)
    return summary


def _one_seed(
    bench: Bench, arms: Sequence[Arm], folder: Path, probe_steps: int, probe_rank: int
) -> tuple[dict[str, Any], dict[Arm, dict[str, Outcome]]]:
    probes: dict[str, Probe] = {}
    for task in bench.tasks:
        say(f"probing {task}")
        probes[task] = bench.probe(task, probe_steps, probe_rank)
    sites = probes[bench.tasks[0]].sites
    budget = bench.total_budget(sites)
    initial = initial_plans(probes, budget)
    values = {task: probe.values for task, probe in probes.items()}
    plans = merge(values, sites, budget, initial)
    folder.mkdir(parents=True, exist_ok=True)
    train = {
        "separate": lambda: bench.separate(budget),
        "isolated": lambda: bench.isolated(plans, folder),
        "merged": lambda: bench.merged(plans, folder),
    }
    found: dict[Arm, dict[str, Outcome]] = {}
    for arm in arms:
        say(f"arm {arm}")
        found[arm] = train[arm]()
    record = _allocation(probes, initial, plans, budget)
    if "merged" in found:
        record["gradient_cosines"] = agreement(bench, found["merged"])
    return record, found


def _allocation(
    probes: Mapping[str, Probe], initial: Mapping[str, RankPlan], plans: Mapping[str, RankPlan], budget: int
) -> dict[str, Any]:
    """What the budget was spent on, and how far that is from the best choice by the same values."""
    values = {task: probe.values for task, probe in probes.items()}
    best = optimum(values, next(iter(plans.values())).sites, budget)
    worth, most = total_value(plans, values), total_value(best, values)
    return {
        "budget": budget,
        "cost": total_cost(plans),
        "cheapest_left": cheapest_left(plans, values),
        "complexity": {task: probe.complexity for task, probe in probes.items()},
        "initial_params": {task: plan.params for task, plan in initial.items()},
        "params": {task: plan.params for task, plan in plans.items()},
        "value": worth,
        "optimal_value": most,
        "gap": 1 - worth / most if most else 0.0,
    }


def _arms(outcomes: Outcomes) -> dict[str, Any]:
    """Scores by arm and task, and differences to separate adapters, in the tasks' metrics."""
    reference = outcomes.get("separate")
    arms: dict[str, Any] = {}
    for arm, by_task in outcomes.items():
        arms[arm] = {}
        for task, found in by_task.items():
            known = [outcome.value for outcome in found if outcome.value is not None]
            entry: dict[str, Any] = {
                "metric": found[0].metric,
                "values": [outcome.value for outcome in found],
                "mean": fmean(known) if len(known) == len(found) else None,
                "adapter_params": [outcome.result.params.adapter for outcome in found],
                "runs": [str(outcome.run) for outcome in found],
            }
            apart = difference(found, reference[task]) if reference and arm != "separate" else None
            if apart is not None:
                entry["difference"] = {"mean": apart.mean, "low": apart.low, "high": apart.high, "over": apart.over}
            arms[arm][task] = entry
    return arms


def print_study(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a table of the arms, and what was spent on what."""
    console = console or Console()
    table = Table(title="dev, in points; in brackets the 95 % interval of the difference to separate adapters")
    table.add_column("arm")
    for task in summary["tasks"]:
        table.add_column(task, justify="right")
    for arm, by_task in summary["arms"].items():
        table.add_row(arm, *(_cell(by_task[task]) for task in summary["tasks"]))
    console.print(table)
    for seed in summary["seeds"]:
        shares = ", ".join(f"{task} {params:,}" for task, params in seed["params"].items())
        console.print(
            f"seed {seed['seed']}: {seed['cost']:,} of the budget of {seed['budget']:,} parameters ({shares}); "
            f"value {seed['gap']:.2%} below the optimum",
            highlight=False,
        )
        for pair, cosine in seed.get("gradient_cosines", {}).items():
            console.print(f"  gradients of {pair}: cosine {cosine:.2f}", highlight=False)


def _cell(entry: Mapping[str, Any]) -> str:
    value = "undefined" if entry["mean"] is None else f"{100 * entry['mean']:z.1f}"
    if (apart := entry.get("difference")) is None:
        return value
    return f"{value} \\[{100 * apart['low']:+z.1f}, {100 * apart['high']:+z.1f}]"
