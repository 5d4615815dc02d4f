"""Kill a real run at random moments, resume it each time, and compare with an unbroken one: see README.md.

``python experiments/kill_and_resume/run.py [WORK_FOLDER]`` goes on where it stopped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TRIALS = 20
COMMAND = (
    "strategy=autolora", "backbone=minilm", "task=sst2", "data.source=mini", "data.max_train=384",
    "trainer.max_epochs=3", "trainer.precision=32-true", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=3", "trainer.val_check_interval=0.5", "trainer.checkpoint=best",
    "trainer.checkpoint_every_n_steps=4", "adapter.dropout=0.1", "logger=csv",
)  # fmt: skip
VARYING = ("seconds", "examples_per_second", "peak_memory_bytes", "git")
COLUMNS = ["trial", "kills", "killed_after_seconds", "history_rows_at_kill", "resumed_at_steps", "identical", "differs"]
RESULTS = Path(__file__).with_name("results.csv")


def attempt(root: Path, kill_after: float | None) -> tuple[bool, str]:
    """Start the command; whether it came to its end, and what it said."""
    log = root.with_suffix(".log")
    root.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "autolora.train", *COMMAND, f"run_root={root}"],
            stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    text = log.read_text(errors="replace")
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"the run failed with code {code}:\n{text[-3000:]}")
    return code == 0, text


def run_folder(root: Path) -> Path | None:
    """The run directory, if there is one yet."""
    return next((path for path in root.glob("*") if path.is_dir()), None)


def outcome(root: Path) -> dict[str, str]:
    """What has to be the same, by name: results without times, and the bytes of the rest."""
    folder = run_folder(root)
    assert folder is not None
    result = json.loads((folder / "result.json").read_text())
    rows = list(csv.DictReader((folder / "history.csv").open()))
    history = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    found = {
        "result.json": json.dumps({key: value for key, value in result.items() if key not in VARYING}),
        "history.csv": json.dumps(history),
    }
    files = [folder / "ranks.json", folder / "predictions.csv", *sorted(folder.rglob("*.safetensors"))]
    return found | {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows_of_history(root: Path) -> int:
    folder = run_folder(root)
    file = folder / "history.csv" if folder else None
    return max(0, len(file.read_text().splitlines()) - 1) if file and file.exists() else 0


def trial(number: int, root: Path, expected: float, reference: dict[str, str]) -> dict[str, object]:
    """Kill at a uniformly random moment; resume; kill again every other time; at last let it come to its end."""
    shutil.rmtree(root, ignore_errors=True)
    rng = random.Random(f"trial {number}")
    moments, rows, resumed = [], [], []
    while True:
        kill_after = rng.uniform(0, expected) if not moments or rng.random() < 0.5 else None
        done, text = attempt(root, kill_after)
        resumed += re.findall(r"resuming at step (\d+)", text)
        if done and moments:
            break
        if done:  # it was faster than the unbroken one, and came to its end unharmed
            shutil.rmtree(root)
            continue
        assert kill_after is not None
        moments.append(f"{kill_after:.1f}")
        rows.append(str(rows_of_history(root)))
    found = outcome(root)
    differs = sorted(name for name in reference | found if reference.get(name) != found.get(name))
    return {
        "trial": number,
        "kills": len(moments),
        "killed_after_seconds": " ".join(moments),
        "history_rows_at_kill": " ".join(rows),
        "resumed_at_steps": " ".join(resumed),
        "identical": "no" if differs else "yes",
        "differs": " ".join(differs),
    }


def main() -> None:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/kill_and_resume").resolve()
    started = time.perf_counter()
    done, _ = attempt(work / "unbroken", None)  # complete already where this script is run again
    assert done
    timing = work / "unbroken.seconds"
    if not timing.exists():
        timing.write_text(str(time.perf_counter() - started))
    expected, reference = float(timing.read_text()), outcome(work / "unbroken")
    print(f"unbroken: {expected:.1f} s; compared: {', '.join(reference)}", flush=True)
    rows = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    known = {int(row["trial"]) for row in rows}
    for number in range(1, TRIALS + 1):
        if number in known:
            continue
        row = trial(number, work / f"trial-{number:02d}", expected, reference)
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)
    rows = list(csv.DictReader(RESULTS.open()))
    same, kills = sum(row["identical"] == "yes" for row in rows), sum(int(row["kills"]) for row in rows)
    print(f"{same} of {len(rows)} runs, killed {kills} times in all, are identical to the unbroken one")


if __name__ == "__main__":
    main()
