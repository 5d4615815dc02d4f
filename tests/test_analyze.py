"""The analysis as a command: what it writes, what it looks at, and what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import configure, sst2, write_sst2  # noqa: F401  fixtures

from autolora.adapters import AdapterSettings
from autolora.analyze import analyze as look
from autolora.analyze import main, read_command_line
from autolora.backbones import load_backbone
from autolora.files import dump_json
from autolora.parts import adapter_settings, make_problem, make_strategy
from autolora.plan import Budget
from autolora.reporting.theory import print_analysis
from autolora.results import RunDirectory
from autolora.run import run_one
from autolora.strategies.manual import Manual
from autolora.theory.subspaces import principal_angles

FEW = ["strategy=information", "strategy.examples=64"]  # the time grows with the third power
THEORIES = ("spectral", "marchenko_pastur", "information")


def analyze(*arguments: str) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def read(out: Path) -> Any:
    return json.loads((out / "analysis.json").read_text())


def found_by(*arguments: str) -> Any:
    """What ``analysis.json`` would be, without figures."""
    return json.loads(dump_json(look(read_command_line(["out=nowhere", *arguments])).to_json()))


@pytest.fixture(scope="module")
def rows(sst2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:  # noqa: F811
    cache = tmp_path_factory.mktemp("cache")
    return [*FEW, "task=sst2", "data.source=local", f"data.dir={sst2}", f"data.cache_dir={cache}"]


@pytest.fixture(scope="module")
def analysed(tiny_bert_dir: Path, rows: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("analysis") / "out"
    assert analyze(f"out={out}", f"backbone.path={tiny_bert_dir}", *rows, "budget.rank=2", "max_rank=4") == 0
    return out


def test_the_files_and_what_is_in_them(analysed: Path, tiny_bert_dir: Path) -> None:
    assert {path.name for path in (analysed / "plans").iterdir()} == {f"{name}.json" for name in THEORIES}
    figures = {path.name for path in (analysed / "figures").iterdir()}
    names = ("weights", "over_depth", "bulk", "bits", "plans")
    assert figures == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert all((analysed / "figures" / name).stat().st_size > 1000 for name in figures)
    data = read(analysed)
    assert (data["task"], data["data_source"], data["run"]) == ("sst2", "local", None)
    module = data["modules"]["bert.encoder.layer.1.output.dense"]
    assert (module["role"], module["depth"], module["update"]) == ("mlp_down", 1, None)
    weight = load_backbone(path=tiny_bert_dir, num_labels=2).model.get_submodule("bert.encoder.layer.1.output.dense")
    values = torch.linalg.svdvals(weight.weight.detach().double())  # type: ignore[operator, union-attr]
    assert module["weight"]["shape"] == [32, 64]
    assert module["weight"]["stable_rank"] == pytest.approx(float(values.square().sum() / values[0] ** 2))
    assert module["weight"]["singular_values"] == pytest.approx(values.tolist(), rel=6e-6)
    assert data["beta"] is not None
    assert module["information"]["optimum"] >= 0


def test_plans_are_those_of_the_strategies_and_can_be_trained(
    analysed: Path,
    configure: Any,  # noqa: F811
) -> None:
    data = read(analysed)
    for name in THEORIES:
        cfg = configure(f"strategy={name}", *(["strategy.examples=64"] if name == "information" else []))
        problem = make_problem(cfg)
        problem.build()
        strategy = make_strategy(cfg, problem)
        adapters = strategy.attach(problem.model, adapter_settings(cfg))
        strategy.prepare(problem.datamodule.train_dataloader(), problem.loss)
        assert data["plans"][name] == {"params": adapters.active_plan().params, "ranks": dict(adapters.active_plan())}
        assert data["budget"] == strategy.allowance
        assert adapters.active_plan().params <= data["budget"]
        adapters.detach()
        path = analysed / "plans" / f"{name}.json"
        manual = Manual(Manual.Options(path=path), budget=Budget(rank=2), max_rank=4)
        assert manual.attach(problem.model, AdapterSettings()).attached_plan() == data["plans"][name]["ranks"]


@pytest.mark.parametrize(
    ("typed", "place"),
    [
        ((), "analysis/minilm"),
        (("backbone.id=org/name", "task=rte"), "analysis/org_name-rte"),
        (("run=runs/one",), "analysis/one"),
        (("run=runs/one", "task=rte"), "analysis/one-rte"),
        (("task=rte", "out=here"), "here"),
    ],
)
def test_an_analysis_has_a_place_of_its_own(typed: tuple[str, ...], place: str) -> None:
    assert read_command_line(list(typed)).out == Path(place)


def test_without_a_task_only_weights_are_looked_at(
    tiny_bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ("strategy=marchenko_pastur", "strategy.threshold=edge", "adapter.targets=[query,value]", "budget=none")
    assert analyze(f"out={tmp_path}", f"backbone.path={tiny_bert_dir}", *typed) == 0
    data = read(tmp_path)
    assert (data["task"], data["budget"], data["beta"]) == (None, None, None)
    assert data["options"] == {"spectral": {"energy": 0.9}, "marchenko_pastur": {"threshold": "edge"}}
    assert set(data["plans"]) == {"spectral", "marchenko_pastur"}
    assert len(data["modules"]) == 4
    printed = capsys.readouterr()
    assert "data:" not in printed.out
    assert "strategy=marchenko_pastur" in printed.out
    assert "hard threshold." in printed.out
    assert "IB" not in printed.out
    assert printed.err == ""


def test_labels_of_which_nothing_is_known_have_no_optimum(
    tiny_bert_dir: Path, rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bottleneck has no rank to name then, though the plan is uniform."""
    folder, rng = write_sst2(tmp_path / "glue"), random.Random(0)
    file = folder / "SST-2" / "train.tsv"
    header, *lines = file.read_text().splitlines()
    file.write_text("\n".join([header, *(line[:-1] + rng.choice("01") for line in lines)]) + "\n")
    typed = [text for text in rows if not text.startswith("data.dir")] + [f"data.dir={folder}", "budget.rank=2"]
    found = look(read_command_line([f"backbone.path={tiny_bert_dir}", *typed]))
    data = found.to_json()
    assert data["beta"] is None
    assert {module["information"]["optimum"] for module in data["modules"].values()} == {None}
    assert set(data["plans"]["information"]["ranks"].values()) == {2}
    print_analysis(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "note: information: what modules read says no more about the labels than about permutations" in printed
    assert "IB" not in printed


def test_dev_is_never_looked_at(analysed: Path, tiny_bert_dir: Path, rows: list[str], tmp_path: Path) -> None:
    flipped = write_sst2(tmp_path / "flipped", flip_dev=True)
    others = [text for text in rows if not text.startswith("data.dir")] + [f"data.dir={flipped}"]
    assert found_by(f"backbone.path={tiny_bert_dir}", *others, "budget.rank=2", "max_rank=4") == read(analysed)


def test_planted_ranks(tmp_path: Path) -> None:
    assert (
        analyze(f"out={tmp_path}", "task=planted", "task.widths=[8,16]", "task.ranks=[0,1,2,0]", "task.dim=16", *FEW)
        == 0
    )
    data = read(tmp_path)
    assert list(data["modules"]) == ["U0", "V0", "U1", "V1"]
    assert set(data["plans"]) == set(THEORIES)
    assert not (tmp_path / "figures" / "over_depth.svg").exists()  # there are no layers


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(configure: Any) -> RunDirectory:  # noqa: F811
    cfg = configure("strategy=uniform", "trainer.max_epochs=1")
    result = run_one(cfg)
    return RunDirectory.of(cfg, result.data_source, result.data_fingerprint, result.backbone_fingerprint)


def test_a_run_s_updates(trained: RunDirectory, tiny_bert_dir: Path, rows: list[str], tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    assert analyze(f"run={trained.path}", f"out={out}") == 0
    data, result = read(out), trained.read_result()
    assert data["run"] == "uniform on sst2"
    assert data["budget"] == result.params.budget
    assert {name: one["update"]["rank"] for name, one in data["modules"].items()} == result.ranks
    assert {path.stem for path in (out / "figures").iterdir()} >= {"updates", "update_spectra"}

    name = "bert.encoder.layer.0.attention.self.value"
    from safetensors.torch import load_file

    tensors = load_file(trained.adapter / "adapter_model.safetensors")
    config = json.loads((trained.adapter / "adapter_config.json").read_text())
    a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    ranks = config["rank_pattern"].get(name, config["r"]), config["alpha_pattern"].get(name, config["lora_alpha"])
    update = ranks[1] / ranks[0] * b @ a
    weight = load_backbone(path=tiny_bert_dir, num_labels=2).model.get_submodule(name).weight.detach().double()  # type: ignore[operator, union-attr]
    left, values, right = torch.linalg.svd(update)
    own_left, _, own_right = torch.linalg.svd(weight)
    found = data["modules"][name]["update"]
    assert found["singular_values"] == pytest.approx(values[:2].tolist(), rel=1e-4)
    outputs, inputs = (
        principal_angles(x[:, :2], y[:, :2]).rad2deg() for x, y in ((left, own_left), (right.T, own_right.T))
    )
    assert found["output_angles"] == pytest.approx(outputs.tolist(), abs=1e-2)
    assert found["input_angles"] == pytest.approx(inputs.tolist(), abs=1e-2)

    with_rows = found_by(f"run={trained.path}", *rows)
    assert set(with_rows["plans"]) == set(THEORIES)
    assert {name: one["update"] for name, one in with_rows["modules"].items()} == {
        name: one["update"] for name, one in data["modules"].items()
    }


def test_a_run_that_cannot_be_used(
    trained: RunDirectory,
    configure: Any,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(run: Path, *more: str) -> str:
        assert analyze(f"run={run}", f"out={tmp_path / 'out'}", *more) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "there is no result; expected a run directory" in refused(tmp_path / "nowhere")
    assert "it was trained on the backbone" in refused(trained.path, "task=planted")
    head = configure("strategy=head", "budget=none", "trainer.max_epochs=1", "trainer.max_steps=1")
    result = run_one(head)
    path = RunDirectory.of(head, result.data_source, result.data_fingerprint, result.backbone_fingerprint).path
    assert "no LoRA adapters" in refused(path)
    data = json.loads(trained.result.read_text())
    trained.result.write_text(json.dumps(data | {"status": "interrupted"}))
    assert "expected a complete run, this one is interrupted" in refused(trained.path)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["out=OUT", "backbone=minilmm"], 2, "unknown backbone 'minilmm'; did you mean 'minilm'?"),
        (["out=OUT", "task=rte", "data.source=local"], 2, "expected the folder too: add data.dir=DIR"),
        (["out=OUT", "strategy=uniform"], 2, "strategy=uniform: expected one of the theories"),
        (["out=OUT", "budget.rnk=4", "ouut=x"], 2, "unknown key budget.rnk"),
        (["out=OUT", "budget.cost=latency"], 2, "plans of an analysis are counted in parameters"),
        (["out=OUT", "backbone.path=TINY", "budget.params=3"], 1, "does not pay for a single component"),
        (["out=OUT", "backbone.path=TINY", "task=rte", "data.source=local", "data.dir=EMPTY"], 1, "RTE"),
        (["out=FILE/out", "backbone.path=TINY"], 1, "could not be written"),
        (["out=FULL", "backbone.path=TINY"], 1, "expected a folder that is not there yet, or empty"),
        (["out=FILE", "backbone.path=TINY"], 1, "expected a folder that is not there yet, or empty"),
    ],
)
def test_what_is_refused_is_said_and_leaves_nothing(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    tiny_bert_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    places = {"OUT": "out", "FULL": "full", "FILE": "full/file", "EMPTY": "empty"}
    typed = [text.replace("TINY", str(tiny_bert_dir)) for text in arguments]
    for word, place in places.items():
        typed = [text.replace(f"={word}", f"={tmp_path / place}") for text in typed]
    assert analyze(*typed) == code
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze("--help") == 0
    assert "plans/NAME.json" in capsys.readouterr().out
