"""Whole runs on a tiny encoder and tiny files: what is written, what is chosen on what, and what is not done twice."""

from __future__ import annotations

import copy
import csv
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from autolora.compose import compose
from autolora.config import RunConfig
from autolora.errors import ConfigError, NonFiniteLossError, PlanError
from autolora.parts import seed_for
from autolora.plan import RankPlan, Site
from autolora.record import budget_notes
from autolora.results import RunDirectory, RunResult, read_result
from autolora.run import run_one
from autolora.search.random_search import RandomSearch
from autolora.strategies.svd_truncate import SVDTruncate
from autolora.strategies.uniform import Uniform
from autolora.training.planted import PlantedRegression

GOOD, BAD = ["good", "great", "happy", "love"], ["bad", "sad", "slow", "small"]


def write_sst2(folder: Path, *, flip_dev: bool = False) -> Path:
    """Sentences whose label is said by one word."""
    rng = random.Random(0)
    (folder / "SST-2").mkdir(parents=True)
    for split, rows in (("train", 240), ("dev", 40)):
        lines = ["sentence\tlabel"]
        for i in range(rows):
            label = i % 2
            words = rng.choices(["the", "cat", "train", "street", "and", "very", "people"], k=rng.randint(2, 6))
            words.insert(rng.randrange(len(words)), rng.choice(GOOD if label else BAD))
            shown = 1 - label if flip_dev and split == "dev" else label
            lines.append(f"{' '.join(words)} {i}\t{shown}")
        (folder / "SST-2" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def sst2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sst2(tmp_path_factory.mktemp("glue"))


@pytest.fixture
def configure(tiny_bert_dir: Path, sst2: Path, tmp_path: Path) -> Any:
    def configured(*overrides: str, data: Path = sst2) -> RunConfig:
        fixed = {
            "task": "sst2",
            "data.source": "local",
            "data.dir": str(data),
            "data.cache_dir": str(tmp_path / "cache"),
            "backbone.path": str(tiny_bert_dir),
            "run_root": str(tmp_path / "runs"),
            "logger": "csv",
            "max_rank": "4",
            "budget.rank": "2",
            "trainer.accelerator": "cpu",
            "trainer.precision": "32-true",
            "trainer.enable_progress_bar": "false",
            "trainer.max_epochs": "2",
            "optim.adapter.lr": "5e-3",
        }
        given = {override.partition("=")[0]: override for override in overrides}
        kept = [f"{key}={value}" for key, value in fixed.items() if key not in given and not _clashes(key, given)]
        return compose([*kept, *overrides])

    return configured


def _clashes(key: str, given: dict[str, str]) -> bool:
    """A budget is given in one way."""
    return key == "budget.rank" and any(other.partition(".")[0] == "budget" for other in given)


def directory_of(cfg: RunConfig, result: RunResult) -> RunDirectory:
    return RunDirectory.of(cfg, result.data_source, result.data_fingerprint, result.backbone_fingerprint)


@pytest.mark.parametrize("strategy", ["uniform", "autolora"])
def test_a_run_leaves_a_complete_record(configure: Any, strategy: str) -> None:
    cfg = configure(f"strategy={strategy}")
    result = run_one(cfg)
    files = directory_of(cfg, result)
    assert {path.name for path in files.path.iterdir()} == {
        "config.yaml", "result.json", "ranks.json", "history.csv", "predictions.csv", "adapter", ".lock",
    }  # fmt: skip
    assert json.loads(files.result.read_text())["status"] == "complete"
    assert (result.task, result.data_source, result.strategy, result.metrics.primary) == (
        "sst2", "local", strategy, "accuracy",
    )  # fmt: skip
    assert json.loads(files.ranks.read_text()) == result.ranks
    assert len(result.ranks) == 13  # two layers of six Linears, and the pooler
    budget = result.params.budget
    assert budget is not None
    assert 0.98 * budget <= result.params.adapter <= budget
    assert result.adapter_bytes == 4 * result.params.adapter
    assert result.params.head == 32 * 2 + 2
    assert result.steps == 2 * -(-216 // 32)
    # autolora begins with rank 4, twice the budget, and a selector for each component
    most = 2 * budget + 4 * 13 if strategy == "autolora" else result.params.adapter
    assert result.params.peak_trainable == most + result.params.head
    assert yaml.safe_load(files.config.read_text())["strategy"]["name"] == strategy


def test_predictions_are_those_of_the_saved_adapter(configure: Any, tiny_bert_dir: Path, sst2: Path) -> None:
    """In stock PEFT, over a backbone with another head: same logits, row by row, and the metric that is reported."""
    from peft import PeftModel

    from autolora.backbones import load_backbone

    cfg = configure("strategy=autolora")
    result = run_one(cfg)
    files = directory_of(cfg, result)
    backbone = load_backbone(path=tiny_bert_dir, num_labels=2, head_seed=123)
    model = PeftModel.from_pretrained(backbone.model, str(files.adapter)).eval()
    sentences = [line.split("\t")[0] for line in (sst2 / "SST-2" / "dev.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():
        logits = model(**backbone.tokenizer(sentences, padding=True, return_tensors="pt")).logits
    rows = list(csv.DictReader(files.predictions.open()))
    assert [int(row["id"]) for row in rows] == list(range(40))
    saved = torch.tensor([[float(row["logit_0"]), float(row["logit_1"])] for row in rows])
    torch.testing.assert_close(logits, saved, rtol=1e-4, atol=1e-5)
    correct = sum(float(row["prediction"]) == float(row["label"]) for row in rows)
    assert result.metrics.value == pytest.approx(correct / 40)


def test_a_complete_configuration_is_not_run_again_unless_forced(
    configure: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = configure("trainer.max_steps=4")
    first = run_one(cfg)
    written = directory_of(cfg, first).result.stat().st_mtime_ns
    assert run_one(cfg) == first
    assert "complete already" in capsys.readouterr().out
    assert directory_of(cfg, first).result.stat().st_mtime_ns == written
    run_one(configure("trainer.max_steps=4", "force=true"))
    assert directory_of(cfg, first).result.stat().st_mtime_ns != written


def test_other_data_is_another_run(configure: Any, tmp_path: Path) -> None:
    other = write_sst2(tmp_path / "other", flip_dev=True)
    one, two = configure("trainer.max_steps=4"), configure("trainer.max_steps=4", data=other)
    assert directory_of(one, run_one(one)).path != directory_of(two, run_one(two)).path


def test_other_weights_in_the_same_folder_are_another_run(configure: Any, tiny_bert_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_bert_dir, model)
    first = run_one(configure(f"backbone.path={model}", "trainer.max_steps=4"))
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(model, moved)
    assert run_one(configure(f"backbone.path={moved}", "trainer.max_steps=4")) == first
    weights = load_file(model / "model.safetensors")
    weights["encoder.layer.0.attention.self.key.weight"] *= 2
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    second = run_one(configure(f"backbone.path={model}", "trainer.max_steps=4"))
    assert second.backbone_fingerprint != first.backbone_fingerprint
    assert second.config_hash != first.config_hash


def assert_failed(root: Path, error: str) -> None:
    """The one run there says so, with the traceback, and has no score."""
    (file,) = root.glob("*/result.json")
    result = read_result(file)
    assert (result.status, result.metrics.value) == ("failed", None)
    assert result.error is not None
    assert result.error.startswith("Traceback")
    assert error in result.error


def test_a_model_that_diverged_has_no_score(configure: Any) -> None:
    """Also where nothing but the evaluation sees it: after the last step."""
    cfg = configure("trainer.max_steps=1", "optim.adapter.lr=1e30", "strategy=uniform")
    with pytest.raises(NonFiniteLossError, match=r"training has diverged: the outputs of \d+ of \d+ heldout rows"):
        run_one(cfg)
    assert_failed(cfg.run_root, "NonFiniteLossError")


def test_biases_and_scales_are_counted_apart_from_the_budget(configure: Any) -> None:
    result = run_one(
        configure("strategy=uniform", "adapter.bias=all", "adapter.learn_scale=true", "trainer.max_steps=1")
    )
    plain = run_one(configure("strategy=uniform", "trainer.max_steps=1"))
    assert result.params.budget is not None
    assert result.params.adapter == plain.params.adapter <= result.params.budget
    biases = 2 * (4 * 32 + 64 + 32 + 2 * 32) + 32 + 32  # Linears and LayerNorms of two layers, embeddings, pooler
    assert result.params.extra == biases + len(result.ranks)
    assert result.params.backbone == plain.params.backbone
    assert plain.params.extra == 0


def test_a_run_that_time_cut_short_says_that_it_learned_no_ranks(configure: Any) -> None:
    result = run_one(configure("strategy=autolora", "trainer.max_epochs=500", "trainer.max_time=00:00:00:01"))
    assert result.steps < 500 * 7
    assert any(note.startswith("training ended in the ") for note in result.notes)


def test_nothing_that_is_reported_was_used_to_choose(configure: Any, tmp_path: Path) -> None:
    """With all dev labels flipped the run makes the same choices, and reports the complement."""
    flipped = write_sst2(tmp_path / "flipped", flip_dev=True)
    extra = ("strategy=autolora", "trainer.checkpoint=best", "trainer.early_stopping_patience=1")
    honest, other = run_one(configure(*extra)), run_one(configure(*extra, data=flipped))
    assert honest.ranks == other.ranks
    assert honest.selection_metrics == other.selection_metrics
    assert honest.steps == other.steps
    assert honest.metrics.value is not None
    assert other.metrics.value == pytest.approx(1 - honest.metrics.value)


def test_a_run_repeats_itself(configure: Any, tmp_path: Path) -> None:
    one = run_one(configure("strategy=autolora"))
    two = run_one(configure("strategy=autolora", f"run_root={tmp_path / 'again'}"))
    assert (one.ranks, one.metrics, one.selection_metrics) == (two.ranks, two.metrics, two.selection_metrics)


def test_a_budget_of_nothing_trains_the_head_alone(configure: Any) -> None:
    result = run_one(configure("strategy=autolora", "budget.params=0"))
    assert set(result.ranks.values()) == {0}
    assert (result.params.adapter, result.adapter_bytes, result.params.budget) == (0, 0, 0)
    assert result.metrics.value is not None


def test_without_a_budget(configure: Any) -> None:
    result = run_one(configure("strategy=uniform", "budget=none"))
    assert result.params.budget is None
    assert set(result.ranks.values()) == {4}


@pytest.mark.filterwarnings("error:the budget")
def test_a_budget_above_the_maximum_is_clamped_and_the_result_says_so(
    configure: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_one(configure("strategy=uniform", "budget.rank=100", "trainer.max_steps=1", "retrain=found"))
    assert set(result.ranks.values()) == {4}
    (said,) = [note for note in result.notes if "is clamped" in note]
    assert f"\nwarning: {said}\n" in capsys.readouterr().out


def test_a_warning_is_said_also_where_attaching_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: Uniform, *_: Any) -> Any:
        self.allowance = self.budget.resolve(RankPlan.uniform({"U0": Site(8, 8)}, 1))
        raise PlanError("nothing can be attached")

    monkeypatch.setattr(Uniform, "attach", fails)
    with pytest.raises(PlanError, match="nothing can be attached"):
        run_one(on_planted(tmp_path, "strategy=uniform", "budget.params=100"))
    said = capsys.readouterr().out
    assert said.startswith("warning: the budget of 100 parameters is above the 16 of the largest plan and is clamped")


def test_wandb_is_offline_and_finished(configure: Any) -> None:
    import wandb

    cfg = configure("logger=wandb", "trainer.max_steps=4")
    result = run_one(cfg)
    runs = list(directory_of(cfg, result).wandb.glob("offline-run-*"))
    assert len(runs) == 1
    assert list(runs[0].glob("*.wandb"))
    assert wandb.run is None


def test_wandb_is_finished_after_a_failure(configure: Any) -> None:
    import wandb

    cfg = configure("logger=wandb", "optim.adapter.lr=1e30", "trainer.gradient_clip_val=null")
    with pytest.raises(NonFiniteLossError, match="last_good"):
        run_one(cfg)
    assert wandb.run is None
    assert_failed(cfg.run_root, "NonFiniteLossError")


@pytest.mark.parametrize("strategy", ["uniform", "autolora"])
def test_two_processes_are_one_with_batches_twice_as_large(
    strategy: str, tiny_bert_dir: Path, sst2: Path, tmp_path: Path
) -> None:
    """The real command with ddp on two CPU processes: one speaks and writes, and the run is that of one process.

    Steps see the same rows, so ranks are equal, and scores to rounding; without dropout, which draws in each process.
    """
    model = tmp_path / "model"
    shutil.copytree(tiny_bert_dir, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable, "-m", "autolora.train", f"strategy={strategy}", "task=sst2", "data.source=local",
        f"data.dir={sst2}", f"data.cache_dir={tmp_path / 'cache'}", f"backbone.path={model}", "logger=csv",
        "max_rank=4", "budget.rank=2", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_steps=30",
        "optim.adapter.lr=2e-2", "optim.head.lr=2e-2",
    ]  # fmt: skip
    results = {}
    for name, how in {"one": ["data.batch_size=16"], "two": ["data.batch_size=8", "trainer.devices=2"]}.items():
        root = tmp_path / name
        done = subprocess.run(
            [*command, *how, f"run_root={root}"], capture_output=True, text=True, cwd=tmp_path, timeout=240
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("trainable parameters") == 1
        assert done.stdout.count("written to") == 1
        (run,) = root.iterdir()
        steps = [int(row["step"]) for row in csv.DictReader((run / "history.csv").open())]
        assert steps == sorted(set(steps))  # rows of one process
        results[name] = read_result(run), load_file(run / "adapter" / "adapter_model.safetensors")
    (one, weights), (two, others) = results["one"], results["two"]
    assert two.params.budget is not None
    assert 0 < two.params.adapter <= two.params.budget
    assert (one.steps, one.ranks, one.metrics.all.keys()) == (30, two.ranks, two.metrics.all.keys())
    assert two.metrics.all == pytest.approx(one.metrics.all, abs=1e-6)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert tensor.std() > 1e-2 or "classifier" in name
        torch.testing.assert_close(
            others[name], tensor, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_regression_head_starts_at_the_mean_score(configure: Any) -> None:
    from autolora.parts import make_problem

    problem = make_problem(configure("task=stsb", "data.source=mini", "data.dir=null", "data.max_train=200"))
    problem.build()
    scores = problem.splits["fit"].labels  # type: ignore[attr-defined]
    bias = problem.model.get_parameter("classifier.bias")
    assert bias.item() == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize("strategy", ["uniform", "autolora", "svd_truncate", "evolution"])
def test_a_budget_that_pays_for_nothing_is_refused(strategy: str, tmp_path: Path) -> None:
    cfg = compose([f"strategy={strategy}", "task=planted", "budget.params=10", f"run_root={tmp_path}", "logger=csv"])
    with pytest.raises(PlanError, match=r"budget of 10 parameters does not pay for a single component: .* costs 96;"):
        run_one(cfg)


def on_planted(folder: Path, *overrides: str, steps: int = 20) -> RunConfig:
    fixed = ("task=planted", f"run_root={folder}", "logger=csv", "trainer.enable_progress_bar=false")
    return compose([*fixed, f"trainer.max_steps={steps}", *overrides])


@pytest.mark.parametrize("strategy", [Uniform, SVDTruncate])
def test_a_strategy_is_held_to_the_budget(
    strategy: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before training if the plan is known by then, else when it is."""

    def everything(self: Any, *_: Any) -> RankPlan:
        return self.largest  # type: ignore[no-any-return]

    planned = strategy is Uniform
    monkeypatch.setattr(strategy, "plan" if planned else "finalize", everything)
    if not planned:
        monkeypatch.setattr(strategy, "after_step", lambda *_: None)
    name = "uniform" if planned else "svd_truncate"
    expected = rf"{strategy.__name__}: its plan costs 13,312 parameters and the budget is 2,976: it has to keep to"
    with pytest.raises(PlanError, match=expected):
        run_one(on_planted(tmp_path, f"strategy={name}"))
    assert ("trainable parameters" in capsys.readouterr().out) != planned
    assert_failed(tmp_path, "PlanError")


def test_a_plan_that_is_not_that_of_the_gates_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(self: Uniform, evaluate: Any) -> RankPlan:
        return RankPlan.uniform(self.largest.sites, 1)

    monkeypatch.setattr(Uniform, "finalize", lower)
    with pytest.raises(PlanError, match=r"at 6 modules: U0 has rank 1 in the plan, and 4 components are on"):
        run_one(on_planted(tmp_path, "strategy=uniform", "budget.rank=4"))


@pytest.mark.parametrize("given", [None, {"U0": 1}])
def test_what_is_no_plan_is_refused(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Uniform, "finalize", lambda self, evaluate: given)
    got = type(given).__name__
    with pytest.raises(PlanError, match=rf"Uniform: expected a RankPlan from finalize\(\), got {got}: return the plan"):
        run_one(on_planted(tmp_path, "strategy=uniform"))


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (("strategy=uniform",), 20),
        (("strategy=uniform", "retrain=found"), 40),
        (("strategy=random_search", "strategy.evaluations=2", "strategy.random_plans=3"), 5 * 20),
        # rounds at steps 1, 2, 4, 5, 6, 8, 9, 10; there is one held-out batch before the first
        (("strategy=dynamic_growth", "strategy.heldout_batches=2"), 20 + 1 + 7 * 2),
        (("strategy=gradient", "strategy.batches=3"), 3 + 20),
    ],
)
def test_every_batch_that_goes_through_the_model_counts(
    overrides: tuple[str, ...], passes: int, tmp_path: Path
) -> None:
    result = run_one(on_planted(tmp_path, *overrides))
    assert result.compute.passes == passes


@pytest.mark.parametrize(("option", "rows"), [("16", 16), ("null", 8192)])
def test_a_plan_is_measured_on_the_rows_that_the_search_asks_for(
    option: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward pass for each plan, on the same rows; the score of what was found is on every row."""
    seen: list[Any] = []
    forward = PlantedRegression.forward

    def watched(self: PlantedRegression, model: Any, batch: Any) -> Any:
        if "index" in batch:
            seen.append(batch["inputs"])
        return forward(self, model, batch)

    monkeypatch.setattr(PlantedRegression, "forward", watched)
    search = ("strategy=random_search", "strategy.evaluations=7", f"strategy.heldout_rows={option}")
    assert run_one(on_planted(tmp_path, *search)).compute.plans_measured == 7
    assert [len(inputs) for inputs in seen] == [rows] * 7 + [8192] * 2  # and dev
    assert all(torch.equal(inputs, seen[7][:: 8192 // rows]) for inputs in seen[:7])


def test_the_score_of_a_plan_is_that_of_its_first_components_on_held_out_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    forward, finalize = PlantedRegression.forward, RandomSearch.finalize

    def watched(self: PlantedRegression, model: Any, batch: Any) -> Any:
        seen.append(batch)
        return forward(self, model, batch)

    def checked(self: RandomSearch, evaluate: Any) -> RankPlan:
        found = []
        for rank in (0, 1, 2):
            reference = copy.deepcopy(self.model)
            score = evaluate(RankPlan.uniform(self.largest.sites, rank))
            with torch.no_grad():
                for name, full in self.largest.items():
                    layer = reference.get_submodule(name)
                    layer.gate.set_mask(torch.ones(full))
                    layer.lora_B[:, rank:] = 0
                error = (reference.eval()(seen[-1]["inputs"]) - seen[-1]["labels"]).square().mean()
            assert score == pytest.approx(-float(error), rel=1e-5)
            found.append(score)
        assert len(set(found)) == 3
        return finalize(self, evaluate)

    monkeypatch.setattr(PlantedRegression, "forward", watched)
    monkeypatch.setattr(RandomSearch, "finalize", checked)
    search = ("strategy=random_search", "strategy.evaluations=3", "strategy.heldout_rows=64")
    assert run_one(on_planted(tmp_path, *search)).compute.plans_measured == 6


@pytest.mark.parametrize("objective", ["loss", "metric"])
def test_a_search_ends_with_the_plan_that_measures_best(objective: str, tmp_path: Path) -> None:
    """Where one module wants everything: what is found beats uniform ranks by the score that is reported."""
    few = ("task.ranks=[0,4,0,0,0,0]", "budget.rank=1", "optim.adapter.lr=1e-2")
    found, uniform = (
        run_one(on_planted(tmp_path, *few, f"strategy={name}", *options, steps=200)).metrics.value
        for name, options in (
            ("evolution", ("strategy.evaluations=60", f"strategy.objective={objective}", "retrain=found")),
            ("uniform", ()),
        )
    )
    assert found is not None
    assert uniform is not None
    assert found < 0.5 * uniform


def test_plans_of_the_comparison_are_counted_by_themselves(tmp_path: Path) -> None:
    search = ("strategy=evolution", "strategy.evaluations=7", "retrain=found", "strategy.heldout_rows=16")
    with_it, without = (
        run_one(on_planted(tmp_path, *search, f"strategy.against_random={yes}")) for yes in ("true", "false")
    )
    assert with_it.compute.plans_measured == without.compute.plans_measured == 7
    assert (with_it.compute.plans_compared, without.compute.plans_compared) == (6, 0)  # uniform ranks are known
    assert with_it.seconds.compare > without.seconds.compare
    assert with_it.ranks == without.ranks


def test_the_loss_that_is_reported_has_no_penalty_in_it(tmp_path: Path) -> None:
    first = []
    for weight in ("0", "1000"):
        folder = tmp_path / weight
        options = ("strategy=adalora", f"strategy.orthogonality={weight}", "trainer.log_every_n_steps=1")
        result = run_one(on_planted(folder, *options))
        with next(folder.glob("*/history.csv")).open() as stream:
            losses = [float(row["loss"]) for row in csv.DictReader(stream)]
        first.append(losses[0])
        assert len(losses) == result.steps
    assert first[0] == first[1]


def test_nothing_to_train_is_said(tmp_path: Path) -> None:
    (tmp_path / "ranks.json").write_text('{"U0": 0}')
    manual = ("strategy=manual", f"strategy.path={tmp_path / 'ranks.json'}", "budget=none")
    with pytest.raises(ConfigError, match="there is nothing to train: every rank is 0"):
        run_one(compose(["task=planted", f"run_root={tmp_path}", "logger=csv", *manual]))


def test_streams_of_a_seed_are_separate() -> None:
    seeds = {seed_for(seed, stream) for seed in range(50) for stream in ("data", "head", "adapters", "training")}
    assert len(seeds) == 200


def test_unspent_budget_is_said() -> None:
    plan = RankPlan({"a": Site(10, 20)}, {"a": 1})
    assert budget_notes(plan, 30) == []
    assert budget_notes(plan, 50) == ["20 of the budget of 50 are unspent; the cheapest component costs 30"]
    assert budget_notes(plan, None) == []
