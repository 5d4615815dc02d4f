"""The configuration: files, types, and what is said of faults."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from autolora.compose import check_command_line, compose
from autolora.config import GlueTaskConfig, PlantedConfig, RunConfig, StrategyConfig, TrainerConfig, WandbConfig
from autolora.errors import ConfigError
from autolora.paths import cache_root, config_root
from autolora.tasks.glue import GLUE
from autolora.validate import require, strategy_options, validate

CHOICES = [(path.parent.name, path.stem) for path in sorted(config_root().glob("*/*.yaml"))]
NEEDS = {
    ("backbone", "custom"): ["backbone.id=org/model"],
    ("backbone", "none"): ["task=planted"],
    ("backbone", "digits_vit"): ["task=digits"],
    ("backbone", "whisper_tiny"): ["task=speech_commands"],
    ("strategy", "manual"): ["strategy.path=ranks.json", "strategy.fingerprint=known"],
}


def faults_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_command_line(argv)
    return str(caught.value).splitlines()


# The files -----------------------------------------------------------------------------------------------------------


def test_groups_are_those_of_the_design() -> None:
    groups = "task data backbone adapter strategy budget optim trainer logger sweep experiment"
    assert {group for group, _ in CHOICES} == set(groups.split())


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_file_composes_and_validates(group: str, choice: str) -> None:
    check_command_line([f"{group}={choice}", *NEEDS.get((group, choice), [])])


@pytest.mark.parametrize("group", ["task", "strategy", "backbone", "logger"])
def test_named_choices_carry_their_name(group: str) -> None:
    for choice in (choice for g, choice in CHOICES if g == group):
        section = getattr(compose([f"{group}={choice}", *NEEDS.get((group, choice), [])]), group)
        assert section.name == choice.removesuffix("_5k")


def test_files_and_models_have_the_same_defaults() -> None:
    strategy = StrategyConfig(name="uniform", options=strategy_options("uniform")())
    assert compose(["strategy=uniform"]) == RunConfig(strategy=strategy)
    assert compose(["task=planted"]).task == PlantedConfig()
    assert compose(["logger=wandb"]).logger == WandbConfig()


@pytest.mark.parametrize("name", [choice for group, choice in CHOICES if group == "strategy"])
def test_strategy_files_show_every_option_at_its_default(name: str) -> None:
    text = (config_root() / "strategy" / f"{name}.yaml").read_text(encoding="utf-8")
    written = yaml.safe_load(text)
    if text.startswith("# @package _global_\n"):  # a strategy that sets other groups too
        written = written["strategy"]
    assert written == {"name": name, **strategy_options(name)().model_dump(mode="json")}


def test_all_glue_tasks_are_choices() -> None:
    assert {choice for group, choice in CHOICES if group == "task"} >= {*GLUE, "planted", "planted_encoder"}


def test_trainer_keys_are_arguments_of_lightnings_trainer() -> None:
    from lightning.pytorch import Trainer

    known = set(inspect.signature(Trainer.__init__).parameters)
    assert set(TrainerConfig().arguments()) <= known
    assert not {"checkpoint", "early_stopping_patience"} & known


def test_trainer_values_reach_lightning_unchanged() -> None:
    keys = ["max_steps=30", "fast_dev_run=true", "devices=[0,1]", "limit_train_batches=0.5", "limit_val_batches=4"]
    arguments = compose([f"trainer.{key}" for key in keys]).trainer.arguments()
    assert arguments["max_steps"] == 30
    assert arguments["fast_dev_run"] is True
    assert arguments["devices"] == [0, 1]
    assert (arguments["limit_train_batches"], arguments["limit_val_batches"]) == (0.5, 4)


# What composes -------------------------------------------------------------------------------------------------------


def test_planted_changes_other_groups_and_the_command_line_still_wins() -> None:
    planted = compose(["task=planted"])
    assert (planted.backbone.name, planted.data.batch_size, planted.trainer.max_steps) == ("none", 128, 3000)
    assert planted.optim.adapter.lr == 3e-3
    changed = compose(["data.batch_size=7", "task=planted", "task.ranks=[1,1,1,1,1,1]", "optim.adapter.lr=0.5"])
    assert (changed.data.batch_size, changed.optim.adapter.lr, changed.trainer.max_steps) == (7, 0.5, 3000)
    assert isinstance(changed.task, PlantedConfig)
    assert changed.task.ranks == (1,) * 6


@pytest.mark.parametrize("profile", [[2, 0, 0, 1, 3, 0], [0, 1, 2, 4, 8, 3], [8, 4, 6, 8, 10, 4]])
def test_planted_profiles_are_legal(profile: list[int]) -> None:
    task = compose(["task=planted", f"task.ranks={profile}"]).task
    assert isinstance(task, PlantedConfig)
    assert list(task.ranks) == profile


def test_budget_choices() -> None:
    assert compose(["budget=none"]).budget.enabled is False
    assert compose([]).budget.given() == {}
    assert compose(["budget.rank=0.5"]).budget.given() == {"rank": 0.5}
    assert compose(["budget.params=300000"]).budget.given() == {"params": 300000}
    assert compose(["budget.fraction=0.25"]).budget.given() == {"fraction": 0.25}


@pytest.mark.parametrize(
    ("overrides", "scale"),
    [
        ([], 2.0),
        (["adapter.scale=3"], 3.0),
        (["adapter.alpha=16", "adapter.reference_rank=8"], 2.0),
        (["adapter.alpha=16", "adapter.reference_rank=4", "adapter.rslora=true"], 8.0),
    ],
)
def test_scale(overrides: list[str], scale: float) -> None:
    assert compose(overrides).adapter.effective_scale() == scale


def test_an_id_makes_the_backbone_custom() -> None:
    backbone = compose(["backbone.id=prajjwal1/bert-tiny"]).backbone
    assert (backbone.name, backbone.label) == ("custom", "prajjwal1/bert-tiny")


def test_written_configuration_reads_back(tmp_path: Path) -> None:
    argv = ["strategy=autolora", "strategy.selector.tau=0.5", "adapter.targets=[query,value]", f"data.dir={tmp_path}"]
    config = compose([*argv, "adapter.layers_to_transform=[0,1]", "adapter.rank_pattern={query:8}", "run_root='~/r'"])
    assert require(yaml.safe_load(config.to_yaml())) == config
    assert config.run_root == Path.home() / "r"


def test_configuration_is_frozen() -> None:
    config = compose([])
    with pytest.raises(ValidationError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.optim.adapter.lr = 1.0  # type: ignore[misc]


def test_names_that_look_like_numbers_are_text() -> None:
    logger = compose(["logger.project=2024", "logger.tags=[1,a]"]).logger
    assert isinstance(logger, WandbConfig)
    assert (logger.project, logger.tags) == ("2024", ("1", "a"))


def test_cache_root_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "autolora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "autolora"


# One fault, one line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("strategy=autolara", "strategy=autolara: unknown strategy 'autolara'; did you mean 'autolora'? (available: "),
        (
            "task=mnlli",
            "task=mnlli: unknown task 'mnlli'; did you mean 'mnli'? (available: cola, digits, mixture, mnli, mnli_5k, ",
        ),
        ("backbone=gpt5", "backbone=gpt5: unknown backbone 'gpt5' (available: bert_base, custom, "),
        ("budget=null", "budget=null: unknown budget 'null' (available: default, none)"),
        ("task.name=x", "task.name=x: expected one of cola, sst2, "),
        ("strategy.name=x", "strategy.name=x: unknown strategy: there is no autolora.strategies.x"),
        ("strategy.name=base", "strategy.name=base: autolora.strategies.base is no strategy"),
        ("strategy.name=..os", "strategy.name: expected the name of a module in autolora/strategies, got '..os'"),
        ("budget.rnk=4", "budget.rnk=4: unknown key budget.rnk; did you mean budget.rank?"),
        ("stratgy=uniform", "stratgy=uniform: unknown key stratgy; did you mean strategy?"),
        ("optm.adapter.lr=1", "optm.adapter.lr=1: unknown key optm.adapter.lr; did you mean optim.adapter.lr?"),
        ("lr=1", "lr=1: unknown key lr; did you mean optim.adapter.lr or optim.gate.lr or optim.head.lr?"),
        ("source=mini", "source=mini: unknown key source; did you mean data.source?"),
        ("+zzz=1", "+zzz=1: unknown key zzz; expected one of: seed, max_rank, "),
        ("strategy.selector.forn=x", "strategy.selector.forn=x: unknown key strategy.selector.forn; did you mean "),
        ("strategy.selector.form=hard", "strategy.selector.form=hard: expected one of straight_through, "),
        ("strategy.phases.warmup=0.9", "strategy.phases: warmup + prune: expected at most 1, got 0.9 + 0.5"),
        ("optim.adapter.lr=fast", "optim.adapter.lr=fast: expected a number > 0, got 'fast'"),
        ("optim.adapter.lr=.inf", "optim.adapter.lr=.inf: expected a number > 0, got "),
        ("optim.adapter=3", "optim.adapter=3: expected a section with keys of its own, got 3"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: expected a list of 2 numbers >= 0 and < 1, got [0.9]"),
        ("budget.rank=-1", "budget.rank=-1: expected a number >= 0 or null, got -1"),
        ("budget.fraction=1.5", "budget.fraction=1.5: expected a number >= 0 and <= 1 or null, got 1.5"),
        ("seed=true", "seed=true: expected an integer >= 0 and < 4294967296, got true"),
        ("max_rank=0", "max_rank=0: expected an integer >= 1, got 0"),
        ("data.source=glue", "data.source=glue: expected one of auto, local, hub, mini, got 'glue'"),
        (
            "data.source=locl",
            "data.source=locl: expected one of auto, local, hub, mini, got 'locl'; did you mean local?",
        ),
        ("data.heldout=0.6", "data.heldout=0.6: expected a number > 0 and <= 0.5, got 0.6"),
        ("data.source=local", "data.source=local: expected the folder too: add data.dir=DIR"),
        ("data.dir=/no/such", "data.dir=/no/such: there is no such folder"),
        ("backbone.path=/no/such", "backbone.path=/no/such: there is no such folder"),
        ("backbone=custom", "backbone=custom: expected the model too: add backbone.id=ORG/NAME or backbone.path=DIR"),
        ("backbone=none", "backbone=none: task=mnli needs a model"),
        ("task=planted backbone=minilm", "backbone=minilm: task=planted brings its own model"),
        ("task=planted task.ranks=[1,2]", "task.ranks: expected two for each of the 3 widths, 6 in all, got 2"),
        ("task=planted task.ranks=[33,0,0,0,0,0]", "task.ranks: U0 can have rank 0 to 32 (min(in, out)), got 33"),
        (
            "task=planted task.ranks=[0,0,x,0,0,0]",
            "task.ranks=[0,0,x,0,0,0]: expected a list of integers >= 0, got 'x'",
        ),
        ("task=planted task.widths=[]", "task.widths=[]: expected a list of one or more integers >= 1, got []"),
        (
            "task=mixture task.tasks=[rte,mnil,7]",
            "task.tasks=[rte,mnil,7]: expected a list of names among cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, "
            "wnli, got 'mnil', 7; did you mean mnli?",
        ),
        ("adapter.alpha=16", "adapter.alpha: expected adapter.reference_rank=R too"),
        ("adapter.rslora=true", "adapter.rslora: only has a meaning beside adapter.alpha"),
        ("adapter.targets='('", "adapter.targets: expected names or regular expressions, got '('"),
        ("adapter.rank_pattern={query:-1}", "adapter.rank_pattern={query:-1}: expected a mapping of names to integers"),
        (
            "budget=none budget.rank=4",
            "budget.rank=4: there is no budget here (budget=none, or a strategy that has none, as published): leave "
            "budget.rank out",
        ),
        (
            "budget.params=9000 budget.cost=latency",
            "budget.params=9000: a number of parameters is no bound on latency: use budget.rank or budget.fraction",
        ),
        ("budget=none budget.cost=flops", "budget.cost=flops: there is no budget to count"),
        ("budget.cost=time", "budget.cost=time: expected one of parameters, flops, latency, got 'time'"),
        ("rank_multiple=8 max_rank=20", "rank_multiple=8: expected max_rank to be a multiple too, got 20"),
        ("rank_multiple=8 budget=none", "rank_multiple=8: expected a budget, which is spent in multiples"),
        (
            "rank_multiple=8 strategy.sparsity.spend_all=false",
            "strategy.sparsity.spend_all=false: a ceiling is not spent, so ranks keep to no multiples: leave out",
        ),
        ("budget.rank=4 budget.params=9", "budget.rank=4 and budget.params=9: expected at most one of rank, params"),
        ("trainer.max_epochs=-1", "trainer.max_epochs, max_steps: nothing says how long training is: set one"),
        ("trainer.max_epochs=-1 trainer.max_time=00:00:00:06", "trainer.max_epochs, max_steps: nothing says how long"),
        ("trainer.max_time=abc", "trainer.max_time=abc: expected days, hours, minutes and seconds as 00:12:00:00"),
        ("trainer.accelerator=foo", "trainer.accelerator=foo: expected one of auto, cpu, gpu, cuda, mps, got 'foo'"),
        ("trainer.strategy=foo", "trainer.strategy=foo: expected one of auto, ddp, fsdp, got 'foo'"),
        ("trainer.devices=0", "trainer.devices=0: expected at least one, or auto"),
        ("trainer.devices=foo", "trainer.devices=foo: expected an integer >= -1 or "),
        ("run_root=/dev/null", "run_root=/dev/null: expected a folder, got a file"),
        ("trainer.precision=bf16-mixd", "trainer.precision=bf16-mixd: expected one of auto, 32-true, "),
        ("trainer.limit_train_batches=-3", "trainer.limit_train_batches=-3: expected an integer >= 1 or a number >= 0"),
        ("trainer.logger=x", "trainer.logger=x: unknown key trainer.logger; the keys of trainer are: accelerator, "),
        ("task=rte task=mrpc", "task=mrpc: task is set already by task=rte: keep one"),
        ("seed=1,2", "seed=1,2: several values: add -m to sweep over them, or write seed=[...] for one list"),
        ("mnli", "mnli: expected key=value or group=choice"),
        (
            "data.dir=~/x",
            "data.dir=~/x: expected key=value or group=choice (token recognition error at: '~'); special ",
        ),
        ("hydra.nope=1", "Could not override 'hydra.nope'."),
        (
            "~budget",
            "~budget: every key has a value, and one that is taken away comes back with its default: write what you "
            "want, budget=none",
        ),
        (
            "~budget.rank",
            "~budget.rank: every key has a value, and one that is taken away comes back with its default: write what "
            "you want, budget.rank=...",
        ),
        ("trainer.max_steps=${nope}", "Interpolation key 'nope' not found"),
    ],
)
def test_a_fault_is_one_clear_line(overrides: str, line: str) -> None:
    (fault,) = faults_of(*overrides.split())
    assert fault.startswith(line)


def test_a_logger_that_is_not_installed_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (fault,) = faults_of("logger=wandb")
    assert fault == "logger=wandb: wandb is not installed: pip install wandb, or logger=csv"
    assert compose(["logger=csv"]).logger.name == "csv"


def test_all_faults_are_reported_together() -> None:
    faults = faults_of(
        "strategy=autolara", "task=planted", "task.ranks=[1]", "budget.rnk=4", "budget.rank=-1",
        "optim.adapter.lr=fast", "data.source=local", "adapter.alpha=3", "adapter.scale=2",
        "hydra.nope=1", "seed", "max_rank=0",
    )  # fmt: skip
    assert [fault.split(":")[0] for fault in faults] == [
        "strategy=autolara",
        "seed",
        "Could not override 'hydra.nope'. To append to your config use +hydra.nope=1",
        "max_rank=0",
        "budget.rank=-1",
        "budget.rnk=4",
        "optim.adapter.lr=fast",
        "task.ranks",
        "data.source=local",
        "adapter.scale and adapter.alpha both set the scale",
        "adapter.alpha",
    ]


def test_a_value_that_is_wrong_by_itself_makes_no_further_conflicts() -> None:
    assert [f.split(":")[0] for f in faults_of("adapter.alpha=x", "adapter.reference_rank=8")] == ["adapter.alpha=x"]
    assert [f.split(":")[0] for f in faults_of("task=planted", "backbone.name=x")] == ["backbone.name=x"]


def test_conflicts_are_refused_without_a_command_line_too() -> None:
    strategy = StrategyConfig(name="uniform", options=strategy_options("uniform")())
    with pytest.raises(ValidationError, match="backbone=minilm: task=planted brings its own model"):
        RunConfig(strategy=strategy, task=PlantedConfig())
    with pytest.raises(ValidationError, match=r"name"):
        GlueTaskConfig(name="planted")  # type: ignore[arg-type]


def test_an_empty_configuration_says_what_is_missing() -> None:
    config, faults = validate({})
    assert config is None
    assert faults == ["strategy.name=null: expected the name of a strategy, got null"]


# Sweeps --------------------------------------------------------------------------------------------------------------


def test_every_value_of_a_sweep_is_checked() -> None:
    faults = faults_of("-m", "task=mnli,mnlli", "strategy=uniform,autolora,x", "seed=0,-1,1,-2", "budget.rank=1,z")
    assert [fault.split(":")[0] for fault in faults] == [
        "task=mnlli", "strategy=x", "seed=-1", "seed=-2", "budget.rank=z",
    ]  # fmt: skip


def test_options_of_one_strategy_do_not_fit_another() -> None:
    (fault,) = faults_of("-m", "strategy=autolora,uniform", "strategy.selector.tau=2")
    assert fault.startswith(
        "strategy.selector.tau=2: unknown key strategy.selector.tau; the keys of strategy are: name"
    )


def test_ranges_and_globs_sweep() -> None:
    line = check_command_line(["-m", "seed=range(0,3)", "task=glob(m*)", "adapter.targets=[query],[query,value]"])
    argv = line.arguments
    assert argv == ["-m", "++seed=range(0,3)", "task=glob(m*)", "++adapter.targets=[query],[query,value]"]
    (fault,) = faults_of("-m", "seed=range(-1,3)")
    assert fault.startswith("seed=-1: expected an integer >= 0")


def test_a_launcher_that_is_not_installed_says_where_it_comes_from() -> None:
    (fault,) = faults_of("-m", "seed=0,1", "hydra/launcher=nowhere")
    assert "hydra/launcher/nowhere" in fault
    assert "pip install 'autolora[sweep]'" in fault


def test_what_a_sweep_file_names_is_checked(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    params = "{strategy: 'uniform,x', seed: '0,-1', nope: 1}"
    text = f"# @package _global_\nhydra: {{mode: MULTIRUN, sweeper: {{params: {params}}}}}\n"
    (tmp_path / "sweep" / "mine.yaml").write_text(text, encoding="utf-8")
    faults = faults_of("--config-dir", str(tmp_path), "sweep=mine")
    assert [fault.split(":")[0] for fault in faults] == ["strategy=x", "seed=-1", "nope=1"]


@pytest.mark.parametrize(("rank", "experiment"), [("0.5", "glue_uniform"), ("2", "glue_uniform_r2")])
def test_studies_share_their_uniform_cells(rank: str, experiment: str) -> None:
    curve = compose(["sweep=budget_curve", f"budget.rank={rank}", "task=sst2_5k"])
    assert curve == compose(["sweep=glue_strategies", f"experiment={experiment}", "task=sst2_5k"])
    assert compose(["sweep=data_size", f"budget.rank={rank}"]).optim == curve.optim


# A newcomer ----------------------------------------------------------------------------------------------------------


class _Pace(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    speed: int = 1


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    pace: _Pace = _Pace()


def test_a_new_strategy_is_one_module_and_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("autolora.strategies.newcomer")
    module.Options = _Options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "newcomer.yaml").write_text("name: newcomer\npace: {speed: 2}\n", encoding="utf-8")

    config = compose(["strategy=newcomer", "strategy.pace.speed=3"], config_dir=tmp_path)
    assert config.strategy.options == _Options(pace=_Pace(speed=3))
    assert config.model_dump(mode="json")["strategy"] == {"name": "newcomer", "pace": {"speed": 3}}
    (fault,) = faults_of("--config-dir", str(tmp_path), "strategy=newcomer", "strategy.pace.sped=3")
    assert fault == "strategy.pace.sped=3: unknown key strategy.pace.sped; did you mean strategy.pace.speed?"
    (fault,) = faults_of("strategy=newcomer")
    assert fault.startswith("strategy=newcomer: its module is there, its defaults are not: write conf/strategy/newcom")
    (fault,) = faults_of("strategy=base")
    assert fault.startswith("strategy=base: unknown strategy 'base'")
