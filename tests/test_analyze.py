"""The analysis as a command: what it writes, what it looks at, and what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_priced_runs import clock  # noqa: F401  fixture
from test_run import configure, directory_of, sst2, write_sst2  # noqa: F401  fixtures
from torch import Tensor

from autolora.adapters import AdapterSettings
from autolora.adapters.compress import Compression
from autolora.analyze import analyze as look
from autolora.analyze import main, read_command_line
from autolora.backbones import load_backbone
from autolora.errors import ConfigError, DataError
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


def update_of(directory: RunDirectory, name: str) -> Tensor:
    """The update of a module, by hand from the files of the adapter."""
    tensors = load_file(directory.adapter / "adapter_model.safetensors")
    config = json.loads((directory.adapter / "adapter_config.json").read_text())
    a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    rank, alpha = config["rank_pattern"].get(name, config["r"]), config["alpha_pattern"].get(name, config["lora_alpha"])
    return alpha / rank * b @ a


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
    update = update_of(trained, name)
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


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_updates_on_a_quantised_backbone_are_held_to_what_its_codes_stand_for(
    kind: Any,
    configure: Any,  # noqa: F811
    tiny_bert_dir: Path,
) -> None:
    typed = f"backbone.quantization={kind}"
    cfg = configure("strategy=uniform", "trainer.max_epochs=1", "trainer.max_steps=6", typed)
    directory = directory_of(cfg, run_one(cfg))
    data = found_by(f"run={directory.path}")
    bare = load_backbone(path=tiny_bert_dir, num_labels=2, compression=Compression(quantization=kind)).model
    assert len(data["modules"]) == 13
    for name, module in data["modules"].items():
        weight, update = bare.get_submodule(name).dequantized().double(), update_of(directory, name)  # type: ignore[operator, union-attr]
        found = module["update"]
        assert found["relative_size"] == pytest.approx(float(update.norm() / weight.norm()), rel=1e-4)
        left, _, right = torch.linalg.svd(update)
        own_left, values, own_right = torch.linalg.svd(weight)
        outputs, inputs = left[:, :2].T @ own_left[:, :2], right[:2] @ own_right[:2].T
        assert found["output_overlap"] == pytest.approx(float(outputs.square().sum() / 2), abs=1e-4)
        assert found["input_overlap"] == pytest.approx(float(inputs.square().sum() / 2), abs=1e-4)
        assert module["weight"]["singular_values"] == pytest.approx(values.tolist(), rel=6e-6, abs=1e-6)

    weights = {name: module["weight"] for name, module in data["modules"].items()}
    without_run = found_by(f"backbone.path={tiny_bert_dir}", typed)["modules"]
    assert {name: module["weight"] for name, module in without_run.items()} == weights
    with pytest.raises(DataError, match=f"with {typed}, and the one given has neither quantization nor sparsity"):
        found_by(f"run={directory.path}", f"backbone.path={tiny_bert_dir}")
    assert found_by(f"run={directory.path}", f"backbone.path={tiny_bert_dir}", typed) == data


@pytest.mark.parametrize(("cost", "unit"), [("latency", "ns"), ("flops", "FLOPs")])
def test_the_budget_beside_a_run_of_another_cost_is_the_parameters_of_its_adapter(
    cost: str,
    unit: str,
    configure: Any,  # noqa: F811
    clock: None,  # noqa: F811
) -> None:
    steps = ("trainer.max_epochs=1", "trainer.max_steps=2")
    cfg = configure("strategy=uniform", f"budget.cost={cost}", "budget.rank=1.5", "budget.rows=8", *steps)
    result = run_one(cfg)
    run = f"run={directory_of(cfg, result).path}"
    data = found_by(run)
    assert data["budget"] == result.params.adapter > 0
    assert all(0 < plan["params"] <= result.params.adapter for plan in data["plans"].values())
    note = data["notes"][0]
    assert note.startswith(f"the run's budget counts {unit}, and plans of an analysis parameters: theirs is the ")
    for typed, budget in (("budget.params=500", 500), ("budget=none", None)):
        given = found_by(run, typed)
        assert given["budget"] == budget
        assert note not in given["notes"]


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


def test_faults_are_said_together() -> None:
    def faults(*arguments: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            read_command_line(arguments)
        return str(caught.value).splitlines()

    run, key, strategy, cost = faults("run=a", "run=b", "strategy=uniform", "budget.cost=latency", "foo=1")
    assert run == "run=b: run is given twice"
    assert key.startswith("foo=1: unknown key foo; expected one of: out, run, seed, max_rank, ")
    theories = "expected one of the theories, to set its options: spectral, marchenko_pastur, information"
    assert strategy == f"strategy=uniform: {theories}"
    assert cost == "budget.cost=latency: plans of an analysis are counted in parameters: leave it out"
    assert faults("strategy.energy=0.5")[1:] == [f"strategy: {theories}"]
    assert faults("strategy=spectral", "ouut=x") == ["ouut=x: unknown key ouut; did you mean out?"]


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
