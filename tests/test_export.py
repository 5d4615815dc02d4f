"""The export command on real, small runs."""

from __future__ import annotations

import copy
import csv
import errno
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from onnxruntime import InferenceSession
from peft import PeftModel
from sklearn.metrics import accuracy_score, f1_score
from small_runs import dev_logits, ran
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertModel

from autolora.backbones import load_backbone
from autolora.export import main
from autolora.tasks.glue import GLUE
from autolora.tasks.mini import generate
from autolora.tasks.records import Split

SENTENCES = ["the cat and the street", "a great film , and a sad one", "no", "they were very happy with the old king"]


@pytest.fixture(scope="module")
def text_run(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "runs"
    return ran(folder, "task=mnli", "strategy=autolora", "budget.rank=2", f"backbone.path={tiny_bert_dir}")


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(tmp_path_factory.mktemp("planted") / "runs", "task=planted", "task.eval_size=64", "budget.rank=1")


@pytest.fixture
def copied(text_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_run, tmp_path / "run"))


def export(run: Path, out: Path, *arguments: str) -> int:
    try:
        main([f"run={run}", f"out={out}", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def bare(tiny_bert_dir: Path, head_seed: int = 99) -> nn.Module:
    return load_backbone(path=tiny_bert_dir, num_labels=3, head_seed=head_seed).model.eval()


@torch.no_grad()
def logits(model: nn.Module, folder: Path) -> Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    result: Tensor = model.eval()(**tokens).logits
    return result


def test_peft_and_merged_are_the_same_function(
    text_run: Path, tiny_bert_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert export(text_run, tmp_path / "peft") == 0
    assert export(text_run, tmp_path / "merged", "format=merged") == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "load it with peft.PeftModel.from_pretrained" in captured.out
    in_peft = PeftModel.from_pretrained(bare(tiny_bert_dir), str(tmp_path / "peft"))
    merged, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values())
    assert list(merged.state_dict()) == list(bare(tiny_bert_dir).state_dict())
    expected = logits(in_peft, tiny_bert_dir)
    torch.testing.assert_close(logits(merged, tmp_path / "merged"), expected, rtol=0, atol=1e-5)
    assert (logits(bare(tiny_bert_dir), tiny_bert_dir) - expected).abs().max() > 1e-2
    same = {file.name: file.read_bytes() for file in (text_run / "adapter").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "peft").iterdir()} == same


def test_a_merged_folder_holds_a_transformers_model_and_nothing_of_ours(text_run: Path, tmp_path: Path) -> None:
    export(text_run, tmp_path / "merged", "format=merged")
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert (config.num_labels, config.problem_type) == (3, "single_label_classification")
    assert config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    texts = [(tmp_path / "merged" / name).read_text() for name in ("config.json", "tokenizer_config.json")]
    assert not any(word in text.lower() for text in texts for word in ("lora", "peft", str(tmp_path).lower()))


def in_onnxruntime(folder: Path, pairs: Split, batch_size: int) -> Tensor:
    """Logits by onnxruntime and the tokenizer in the folder, without a model of transformers or ours."""
    session = InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = []
    for start in range(0, len(pairs), batch_size):
        rows = pairs.take(range(start, min(start + batch_size, len(pairs))))
        tokens = tokenizer(rows.text_a, rows.text_b, padding=True, truncation=True, max_length=128, return_tensors="np")
        parts.append(torch.from_numpy(session.run(["logits"], dict(tokens))[0]))
    return torch.cat(parts)


@torch.no_grad()
def in_torch(model: nn.Module, tokenizer_folder: Path, pairs: Split, batch_size: int) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    parts = []
    for start in range(0, len(pairs), batch_size):
        rows = pairs.take(range(start, min(start + batch_size, len(pairs))))
        tokens = tokenizer(rows.text_a, rows.text_b, padding=True, truncation=True, max_length=128, return_tensors="pt")
        parts.append(model.eval()(**tokens).logits)
    return torch.cat(parts)


@pytest.fixture(scope="module")
def onnx_export(varied_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "out"
    assert 0 in json.loads((varied_run / "ranks.json").read_text()).values()
    assert export(varied_run, out, "format=onnx") == 0
    return out


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 1), (7, 5), (67, 64)])
def test_onnx_is_the_function_of_the_run_for_batches_of_any_shape(
    rows: int, batch_size: int, onnx_export: Path, varied_run: Path
) -> None:
    found = in_onnxruntime(onnx_export, generate("mnli", "dev").take(range(rows)), batch_size)
    torch.testing.assert_close(found, dev_logits(varied_run)[:rows], rtol=0, atol=1e-5)


def test_an_onnx_folder_says_what_is_in_it(onnx_export: Path, varied_run: Path) -> None:
    files = {file.name for file in onnx_export.iterdir()}
    assert files == {"config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"}
    config = AutoConfig.from_pretrained(onnx_export)
    assert config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert config.architectures == ["BertForSequenceClassification"]
    model = onnx.load(onnx_export / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    free = {name: ["batch", "length"] for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert shapes == free | {"logits": ["batch", 3]}
    names = {weights.name for weights in model.graph.initializer}
    assert {"bert.embeddings.word_embeddings.weight", "classifier.bias"} <= names
    raw = (onnx_export / "model.onnx").read_bytes().lower()
    places = (str(Path(__file__).parents[1]), str(varied_run), "site-packages", "lora", "peft")
    assert not [place for place in places if place.lower().encode() in raw]


def dev_metrics_in_every_format(run: Path, out: Path, onnx_folder: Path, bare_model: nn.Module) -> None:
    """From exported files, by stock PEFT, by stock transformers and by onnxruntime: the metrics of ``result.json``."""
    for kind in ("peft", "merged"):
        assert export(run, out / kind, f"format={kind}") == 0
    result = json.loads((run / "result.json").read_text())
    dev, expected, names = generate(result["task"], "dev"), dev_logits(run), GLUE[result["task"]].metrics
    in_peft = PeftModel.from_pretrained(bare_model, str(out / "peft"))
    in_transformers = AutoModelForSequenceClassification.from_pretrained(out / "merged")
    logits = (
        in_torch(in_peft, out / "merged", dev, 50),
        in_torch(in_transformers, out / "merged", dev, 50),
        in_onnxruntime(onnx_folder, dev, 50),
    )
    scores = {"accuracy": accuracy_score, "f1": f1_score}
    for found in logits:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        metrics = {name: scores[name](dev.labels, found.argmax(1)) for name in names}
        assert metrics == pytest.approx({name: result["metrics"]["all"][name] for name in names}, abs=1e-9)


def test_all_three_formats_give_the_dev_metric_of_the_result(
    varied_run: Path, onnx_export: Path, tmp_path: Path
) -> None:
    assert len(set(dev_logits(varied_run).argmax(1).tolist())) == 3
    dev_metrics_in_every_format(varied_run, tmp_path, onnx_export, bare(varied_run.parents[1] / "bert"))


@pytest.mark.slow
def test_all_three_formats_give_the_dev_metrics_of_a_pretrained_model(tmp_path: Path) -> None:
    run = ran(tmp_path / "runs", "task=mrpc", "data.max_train=null", "trainer.max_steps=60", "optim.adapter.lr=1e-3")
    assert export(run, tmp_path / "onnx", "format=onnx") == 0
    dev_metrics_in_every_format(run, tmp_path, tmp_path / "onnx", load_backbone(num_labels=2).model)


def test_a_regression_keeps_its_kind(tiny_bert_dir: Path, tmp_path: Path) -> None:
    run = ran(tmp_path / "runs", "task=stsb", "strategy=uniform", "budget.rank=1", f"backbone.path={tiny_bert_dir}")
    assert export(run, tmp_path / "merged", "format=merged") == 0
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert (config.num_labels, config.problem_type) == (1, "regression")
    assert export(run, tmp_path / "onnx", "format=onnx") == 0
    assert AutoConfig.from_pretrained(tmp_path / "onnx").problem_type == "regression"
    found = in_onnxruntime(tmp_path / "onnx", generate("stsb", "dev").take(range(40)), 16)
    torch.testing.assert_close(found, dev_logits(run)[:40], rtol=0, atol=1e-4)


def test_onnx_wants_packages(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    assert export(text_run, tmp_path / "out", "format=onnx") == 1
    message = "error: format=onnx: onnxruntime is not installed: pip install 'autolora[onnx]'\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()


def test_a_graph_that_computes_something_else_is_not_kept(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = torch.onnx.export

    def wrong(model: Any, *args: Any, **options: Any) -> Any:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.classifier.bias[0] += 0.01
        return real(other, *args, **options)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    assert export(text_run, tmp_path / "out", "format=onnx") == 1
    error = capfd.readouterr().err
    assert error.startswith("error: format=onnx: onnxruntime computes something else than the model: on 1 rows of 1 ")
    assert "a logit differs by 1.00e-02, and at most 0.0001 * (1 + |logit|) is rounding" in error
    assert list(tmp_path.iterdir()) == []


def test_a_planted_run_has_an_adapter_and_no_model(
    planted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(planted_run, tmp_path / "a") == 0
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("planted", None)
    assert export(planted_run, tmp_path / "b", "format=merged") == 1
    assert "format=merged: task=planted has no classifier to merge into: use format=peft" in capsys.readouterr().err
    assert export(planted_run, tmp_path / "b", "format=onnx") == 1
    assert "format=onnx: task=planted has no classifier to merge into: use format=peft" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_planted_ranks_in_an_encoder_have_an_adapter_and_no_classifier(
    tiny_bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ran(tmp_path / "runs", "task=planted_encoder", "budget.rank=1", f"backbone.path={tiny_bert_dir}")
    assert export(run, tmp_path / "a") == 0
    assert export(run, tmp_path / "b", "format=merged") == 1
    assert "task=planted_encoder has no classifier to merge into: use format=peft" in capsys.readouterr().err


def test_a_run_whose_data_are_gone_and_whose_paths_were_relative(
    copied: Path, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    tree = yaml.safe_load((copied / "config.yaml").read_text())
    tree["data"]["dir"], tree["backbone"]["path"] = "/data/that/are/gone", "relative/then"
    (copied / "config.yaml").write_text(yaml.safe_dump(tree))
    assert export(copied, tmp_path / "out", "format=merged") == 0


@pytest.mark.parametrize(
    ("task", "strategy", "saved"),
    [("rte", "uniform", "[]"), ("stsb", "uniform", "[bert.pooler]"), ("rte", "ia3", "[]"), ("rte", "prompt", "[]")],
)
def test_a_head_that_is_not_trained_travels_along(
    task: str, strategy: str, saved: str, tmp_path: Path, tiny_bert_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It started at random, elsewhere at other values than here."""
    run = ran(
        tmp_path / "runs", f"task={task}", f"strategy={strategy}", f"adapter.modules_to_save={saved}",
        f"backbone.path={tiny_bert_dir}", *(["budget.rank=1"] if strategy == "uniform" else []),
    )  # fmt: skip
    assert export(run, tmp_path / "peft") == 0, capsys.readouterr().err
    row, dev = next(csv.DictReader((run / "predictions.csv").open())), generate(task, "dev")
    assert dev.text_b is not None
    labels = 1 if task == "stsb" else 2
    in_peft = PeftModel.from_pretrained(
        load_backbone(path=tiny_bert_dir, num_labels=labels, head_seed=99).model, str(tmp_path / "peft")
    ).eval()
    models = [in_peft]
    if strategy != "prompt":
        assert export(run, tmp_path / "merged", "format=merged") == 0, capsys.readouterr().err
        models.append(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"))
    tokens = AutoTokenizer.from_pretrained(tiny_bert_dir)(dev.text_a[0], dev.text_b[0], return_tensors="pt")
    for model in models:
        with torch.no_grad():
            found = model(**tokens).logits[0].tolist()
        expected = [float(row[column]) for column in row if column.startswith("logit_")] or [float(row["prediction"])]
        assert found == pytest.approx(expected, abs=1e-4)


def test_weights_that_the_backbone_lacks_travel_along(tmp_path: Path, tiny_bert_dir: Path) -> None:
    """A pooler that is not among the pretrained weights starts at random, elsewhere at other values than here."""
    poolerless = Path(shutil.copytree(tiny_bert_dir, tmp_path / "poolerless"))
    BertModel.from_pretrained(tiny_bert_dir, add_pooling_layer=False).save_pretrained(poolerless)
    run = ran(tmp_path / "runs", "task=rte", "strategy=uniform", "budget.rank=1", f"backbone.path={poolerless}")
    assert export(run, tmp_path / "merged", "format=merged") == 0
    base = AutoModelForSequenceClassification.from_pretrained(poolerless, num_labels=2)
    in_peft = PeftModel.from_pretrained(base, str(run / "adapter"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    expected = logits(in_peft, tiny_bert_dir)
    torch.testing.assert_close(logits(merged, tmp_path / "merged"), expected, rtol=0, atol=1e-5)
    row, dev = next(csv.DictReader((run / "predictions.csv").open())), generate("rte", "dev")
    assert dev.text_b is not None
    tokens = AutoTokenizer.from_pretrained(poolerless)(dev.text_a[0], dev.text_b[0], return_tensors="pt")
    with torch.no_grad():
        found = merged(**tokens).logits[0].tolist()
    assert found == pytest.approx([float(row["logit_0"]), float(row["logit_1"])], abs=1e-4)


def test_an_empty_folder_is_filled(text_run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert export(text_run, tmp_path / "out") == 0
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_another_backbone_is_refused(
    kind: str, copied: Path, tiny_bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(tiny_bert_dir, tmp_path / "other"))
    model = AutoModelForSequenceClassification.from_pretrained(other)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(1.1)
    model.save_pretrained(other)
    sidecar = json.loads((copied / "adapter" / "autolora.json").read_text())
    (copied / "adapter" / "autolora.json").write_text(json.dumps(sidecar | {"base_model": str(other)}))
    assert export(copied, tmp_path / "out", f"format={kind}") == 1
    assert "trained on another backbone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_backbone_that_has_moved(
    copied: Path, tiny_bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sidecar = json.loads((copied / "adapter" / "autolora.json").read_text())
    gone = str(tmp_path / "gone")
    (copied / "adapter" / "autolora.json").write_text(json.dumps(sidecar | {"base_model": gone}))
    assert export(copied, tmp_path / "out") == 1
    assert f"{gone}: there is no such folder" in (error := capsys.readouterr().err)
    assert "say with backbone.path=DIR where that is now" in error
    assert export(copied, tmp_path / "out", f"backbone.path={tiny_bert_dir}") == 0
    assert export(copied, tmp_path / "other", "backbone.path=/not/there") == 1
    assert f"/not/there: there is no such folder; the run was trained on {gone}" in capsys.readouterr().err


def test_the_result_of_a_run_stands_for_the_run(text_run: Path, tmp_path: Path) -> None:
    assert export(text_run / "result.json", tmp_path / "out") == 0
    assert (tmp_path / "out" / "autolora.json").is_file()


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_files_have_the_usual_permissions(kind: str, text_run: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    export(text_run, tmp_path / "out", f"format={kind}")
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "usual").stat().st_mode}


def test_a_full_disk(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    assert export(text_run, tmp_path / "out") == 1
    error = f"error: {tmp_path / 'out'}: could not be written (No space left on device), and what was there before"
    assert (found := capsys.readouterr().err).startswith(error)
    assert found.endswith("free space and repeat the command\n")
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_made(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "round").symlink_to("round")
    for out in (tmp_path / "file" / "out", tmp_path / "round" / "out", tmp_path / ("x" * 300)):
        assert export(text_run, out) == 1
        assert (found := capsys.readouterr().err).startswith(f"error: {out}: could not be written (")
        assert "name another place" in found
    assert {path.name for path in tmp_path.iterdir()} == {"file", "round"}


def spoil(run: Path, what: str) -> None:
    file = run / "result.json"
    match what:
        case "no result":
            file.unlink()
        case "interrupted":
            file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "interrupted"}))
        case "no adapter":
            shutil.rmtree(run / "adapter")
        case "truncated":
            weights = run / "adapter" / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-100])
        case "configuration":
            (run / "config.yaml").write_text("task: [")
        case "unknown key":
            (run / "config.yaml").write_text((run / "config.yaml").read_text() + "\nnonsense: 3\n")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no result", "there is no result; expected a run directory"),
        ("interrupted", "expected a complete run, this one is interrupted; give its command again"),
        ("no adapter", "expected the folder adapter/ with autolora.json; run again with force=true"),
        ("truncated", "damaged or cut short"),
        ("configuration", "config.yaml: cannot be used"),
        ("unknown key", "config.yaml: cannot be used: nonsense=3: unknown key nonsense"),
    ],
)
def test_what_is_not_a_whole_run_is_refused(
    what: str, message: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(copied, what)
    assert export(copied, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert export(text_run, tmp_path / "out") == 1
    assert export(text_run, tmp_path / "out" / "precious") == 1
    assert capsys.readouterr().err.count("expected a folder that is not there yet, or empty") == 2
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: run: expected a value, got none\nerror: out: expected a value, got none\n"),
        (["run=a", "out=b", "format=gguf"], "error: format=gguf: expected one of peft, merged, onnx, got 'gguf'\n"),
        (["run=a", "out=b", "frmat=peft"], "error: frmat=peft: unknown key frmat; did you mean format?\n"),
        (["run=a", "out=b", "merged"], "error: merged: expected key=value\n"),
    ],
)
def test_a_wrong_command_line_has_its_own_code(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == message


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert (
        "usage: python -m autolora.export run=DIR out=DIR [format=peft|merged|onnx] [backbone.path=DIR]"
        in capsys.readouterr().out
    )
