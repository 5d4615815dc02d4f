"""The prediction command on real, small runs: as a file, as a pipe, and on what people put into either."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import dev_logits, dev_rows, ran
from torch import Tensor

from autolora.adapters.layer import LoRALinear
from autolora.predict import Predictor, main
from autolora.tasks.glue import GLUE
from autolora.tasks.mini import generate


def predict(run: Path, *arguments: str) -> int:
    try:
        main([f"run={run}", "device=cpu", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def examples(task: str, rows: int | None = None) -> list[dict[str, str]]:
    dev, fields = generate(task, "dev"), GLUE[task].fields
    assert dev.text_b is not None
    return [dict(zip(fields, pair, strict=True)) for pair in zip(dev.text_a, dev.text_b, strict=True)][:rows]


def write_lines(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def probabilities_of(answers: Sequence[dict[str, Any]]) -> Tensor:
    return torch.tensor([list(answer["probabilities"].values()) for answer in answers])


@pytest.fixture(scope="module")
def answers(varied_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Those to all dev rows, in the usual batches."""
    folder = tmp_path_factory.mktemp("answers")
    file = write_lines(folder / "in.jsonl", examples("mnli"))
    assert predict(varied_run, f"input={file}", f"out={folder / 'out'}") == 0
    return read_lines(folder / "out")


def test_predictions_are_those_of_the_run(varied_run: Path, answers: list[dict[str, Any]]) -> None:
    labels = ("entailment", "neutral", "contradiction")
    expected = [labels[int(float(row["prediction"]))] for row in dev_rows(varied_run)]
    assert [answer["label"] for answer in answers] == expected
    assert set(expected) == set(labels)
    assert [answer["line"] for answer in answers] == list(range(1, len(expected) + 1))
    assert all(tuple(answer["probabilities"]) == labels for answer in answers)
    torch.testing.assert_close(probabilities_of(answers), dev_logits(varied_run).softmax(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_other_batch_sizes_give_the_same_answers(
    batch_size: int, varied_run: Path, answers: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "in", examples("mnli", 150))
    assert predict(varied_run, f"input={file}", f"out={tmp_path / 'out'}", f"batch_size={batch_size}") == 0
    found = read_lines(tmp_path / "out")
    assert [(row["line"], row["label"]) for row in found] == [(row["line"], row["label"]) for row in answers[:150]]
    torch.testing.assert_close(probabilities_of(found), probabilities_of(answers[:150]), rtol=0, atol=1e-5)


def test_an_adapter_that_would_merge_with_a_loss_stays_beside_its_weights(
    varied_run: Path, answers: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge(layer: LoRALinear) -> None:
        raise AssertionError("merged")

    monkeypatch.setattr(LoRALinear, "merge", merge)
    file = write_lines(tmp_path / "in", examples("mnli", 20))
    with pytest.raises(AssertionError, match="merged"):
        predict(varied_run, f"input={file}", f"out={tmp_path / 'out'}")
    monkeypatch.setattr(LoRALinear, "merges_precisely", False)
    assert predict(varied_run, f"input={file}", f"out={tmp_path / 'out'}") == 0
    found = probabilities_of(read_lines(tmp_path / "out"))
    torch.testing.assert_close(found, probabilities_of(answers[:20]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", ["full", "prompt", "prefix", "ia3"])
def test_runs_outside_lora_predict_too(
    strategy: str, tiny_bert_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = ran(tmp_path / "runs", "task=mrpc", f"strategy={strategy}", f"backbone.path={tiny_bert_dir}")
    file = write_lines(tmp_path / "in", examples("mrpc", 60))
    capfd.readouterr()
    assert predict(run, f"input={file}") == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    found = [json.loads(line) for line in captured.out.splitlines()]
    torch.testing.assert_close(probabilities_of(found), dev_logits(run)[:60].softmax(1), rtol=0, atol=1e-5)


def test_a_regression_has_scores_of_rows_cut_as_in_training(tiny_bert_dir: Path, tmp_path: Path) -> None:
    cut = ("task=stsb", "budget.rank=1", "strategy=uniform", "data.max_length=8")
    run = ran(tmp_path / "runs", *cut, f"backbone.path={tiny_bert_dir}")
    file = write_lines(tmp_path / "in", examples("stsb", 60))
    assert predict(run / "result.json", f"input={file}", f"out={tmp_path / 'out'}") == 0
    found = read_lines(tmp_path / "out")
    assert all(set(row) == {"line", "score"} for row in found)
    expected = [float(row["prediction"]) for row in dev_rows(run)[:60]]
    assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("name", "separator"), [("a.tsv", "\t"), ("a.csv", ",")])
def test_tables(name: str, separator: str, varied_run: Path, answers: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [row for row in examples("mnli", 30) if separator not in "".join(row.values())]
    assert rows
    lines = [separator.join(("sentence2", "label", "sentence1"))]
    lines += [separator.join((row["hypothesis"], "?", row["premise"])) for row in rows]
    (tmp_path / name).write_text("\r\n".join([*lines, "too short"]))
    assert predict(varied_run, f"input={tmp_path / name}", f"out={tmp_path / 'out'}") == 3
    found = read_lines(tmp_path / "out")
    assert [row["line"] for row in found] == list(range(2, len(rows) + 3))
    expected = [answer["label"] for row, answer in zip(examples("mnli"), answers, strict=True) if row in rows]
    assert [row["label"] for row in found[:-1]] == expected
    assert found[-1] == {"line": len(rows) + 2, "error": found[-1]["error"]}


def test_malformed_rows_are_reported_and_the_rest_goes_on(
    varied_run: Path, answers: list[dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = [json.dumps(row).encode() for row in examples("mnli", 4)]
    bad = [b"{", b'{"premise": "a"}', b'{"premise": 1, "hypothesis": "b"}', b"\xff", b""]
    lines = [bad[0], good[0], bad[1], bad[2], good[1], good[2], bad[3], bad[4], good[3]]
    (tmp_path / "in").write_bytes(b"\n".join(lines) + b"\n")
    assert predict(varied_run, f"input={tmp_path / 'in'}", "batch_size=3") == 3
    captured = capfd.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["line"] for row in found] == list(range(1, 10))
    assert [row["label"] for row in found if "label" in row] == [answer["label"] for answer in answers[:4]]
    errors = {row["line"]: row["error"] for row in found if "error" in row}
    assert set(errors) == {1, 3, 4, 7, 8}
    assert all(set(row) == {"line", "error"} for row in found if "error" in row)
    said = [f"line {line}: {error}" for line, error in errors.items()]
    assert captured.err.splitlines() == [*said, "5 of 9 rows have an error in place of a prediction"]


def test_standard_input_and_an_empty_one(
    varied_run: Path,
    answers: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    text = "".join(json.dumps(row) + "\n" for row in examples("mnli", 3))
    for arguments, given, expected in ((["input=-", "out=-"], text.rstrip(), 3), ([], "", 0)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        assert predict(varied_run, *arguments) == 0
        captured = capfd.readouterr()
        assert captured.err == ""
        found = [json.loads(line)["label"] for line in captured.out.splitlines()]
        assert found == [answer["label"] for answer in answers[:expected]]
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "out").write_text("of yesterday")
    assert predict(varied_run, f"input={tmp_path / 'empty.tsv'}", f"out={tmp_path / 'out'}") == 1
    assert "empty.tsv, line 1: expected a header with 'premise' or 'sentence1' and" in capfd.readouterr().err
    assert (tmp_path / "out").read_text() == "of yesterday"


def test_a_pipe_gets_its_answers_before_the_input_ends_and_may_stop_reading(
    varied_run: Path, answers: list[dict[str, Any]]
) -> None:
    command = [sys.executable, "-m", "autolora.predict", f"run={varied_run}", "device=cpu"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        for row, expected in zip(examples("mnli", 3), answers, strict=False):
            process.stdin.write(json.dumps(row).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["label"] == expected["label"]
        process.stdout.close()  # as head does
        process.stdin.write(b"".join(json.dumps(row).encode() + b"\n" for row in examples("mnli", 200)))
        process.stdin.close()
        assert process.wait() == 128 + signal.SIGPIPE
        assert process.stderr is not None
        assert process.stderr.read() == b""
    finally:
        watchdog.cancel()
        process.kill()


def test_a_named_pipe_stays_one(varied_run: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    file = write_lines(tmp_path / "in", examples("mnli", 2))
    assert predict(varied_run, f"input={file}", f"out={tmp_path / 'pipe'}") == 0
    reader.join(60)
    assert len(read[0].splitlines()) == 2
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk(
    varied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(tmp_path / "in", examples("mnli", 2))
    assert predict(varied_run, f"input={file}", "out=/dev/full") == 1
    assert "error: /dev/full: could not be written (No space left on device)" in capsys.readouterr().err
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert predict(varied_run, f"input={file}") == 1
        monkeypatch.undo()
    assert "error: standard output: no space left; free some and repeat the command\n" in capsys.readouterr().err


def test_outputs_that_are_not_finite_are_no_prediction(
    varied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, float("nan"), 0.0]])
    monkeypatch.setattr(Predictor, "logits", lambda self, texts: logits)
    file = write_lines(tmp_path / "in", examples("mnli", 2))
    assert predict(varied_run, f"input={file}") == 3
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["label"] == "neutral"
    assert first["probabilities"]["neutral"] == pytest.approx(torch.e / (torch.e + 2))
    assert second == {"line": 2, "error": "the model's outputs are not finite"}


def test_ctrl_c(varied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "answers", interrupted)
    file = write_lines(tmp_path / "in", examples("mnli", 2))
    assert predict(varied_run, f"input={file}", f"out={tmp_path / 'out'}") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_has_no_examples_or_is_not_there(
    varied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = ran(tmp_path / "runs", "task=planted", "task.eval_size=64", "budget.rank=1")
    file = write_lines(tmp_path / "in", examples("mnli", 1))
    capsys.readouterr()
    for run, argument, code, message in (
        (planted, f"input={file}", 1, "task=planted: expected a run of a task on text"),
        (tmp_path, f"input={file}", 1, f"{tmp_path / 'result.json'}: there is no result; expected a run directory"),
        (varied_run, "input=/not/there", 1, "input=/not/there: expected a file, it cannot be read (No such file"),
        (varied_run, f"input={tmp_path}", 1, "expected a file, it cannot be read (Is a directory)"),
        (varied_run, "backbone.path=/not/there", 1, "/not/there: there is no such folder; the run was trained on"),
        (varied_run, f"out={file}/out", 1, f"{file}/out: could not be written (Not a directory)"),
    ):
        assert predict(run, argument) == code
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.startswith("error: ")
        assert captured.out == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main([f"run={varied_run}", f"input={file}", "device=cuda"])
    assert stop.value.code == 2
    assert "device=cuda: expected a device that is there, which are: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: run: expected a value, got none\n"),
        (["run=a", "batch_size=0"], "error: batch_size=0: expected an integer >= 1, got 0\n"),
        (["run=a", "device=gpu"], "error: device=gpu: expected one of auto, cpu, cuda, mps, got 'gpu'"),
        (["run=a", "inptu=b"], "error: inptu=b: unknown key inptu; did you mean input?\n"),
    ],
)
def test_a_wrong_command_line_has_its_own_code(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(message)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m autolora.predict run=DIR [input=FILE|-] [out=FILE|-] ")
    assert all(f"  {name:<6} {', '.join(task.fields)}\n" in text for name, task in GLUE.items())
    assert '{"line": 2, "score": 3.2}' in text
