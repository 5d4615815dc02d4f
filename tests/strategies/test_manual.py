"""Plans from files: ranks.json, patterns and configurations as PEFT reads them, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from adapters.tiny_models import make
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError

from autolora.adapters import AdapterSettings, attach, find_sites
from autolora.adapters.peft_format import save_peft
from autolora.compose import compose
from autolora.errors import ConfigError, DataError, PlanError
from autolora.plan import Budget, RankPlan
from autolora.results import config_hash
from autolora.run import run_one
from autolora.strategies.manual import Manual
from autolora.validate import require

QUERY = "bert.encoder.layer.{}.attention.self.query"
EXACT = {QUERY.format(0): 3, QUERY.format(1): 0, "bert.pooler.dense": 1}


def write(folder: Path, data: Any, name: str = "ranks.json") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def plan_of(path: Path, budget: Budget | None = None, max_rank: int = 2) -> RankPlan:
    """Of a tiny BERT; ``max_rank`` is below the ranks in the files."""
    strategy = Manual(Manual.Options(path=path), budget=budget or Budget(), max_rank=max_rank)
    adapters = strategy.attach(make("bert"), AdapterSettings())
    plan = strategy.finalize(lambda plan: 0.0)
    assert adapters.attached_plan() == plan
    return plan


def nonzero(plan: RankPlan) -> dict[str, int]:
    return {name: rank for name, rank in plan.items() if rank}


# Files ----------------------------------------------------------------------------------------------------------------


def test_ranks_are_those_of_the_file_and_zero_elsewhere(tmp_path: Path) -> None:
    assert nonzero(plan_of(write(tmp_path, EXACT))) == {QUERY.format(0): 3, "bert.pooler.dense": 1}


@pytest.mark.parametrize("name", ["ranks.json", "adapter_config.json"])
def test_a_run_or_an_adapter_stands_for_the_file_in_it(tmp_path: Path, name: str) -> None:
    content = EXACT if name == "ranks.json" else {"peft_type": "LORA", "r": 1, "target_modules": ["pooler.dense"]}
    write(tmp_path, content, name)
    assert plan_of(tmp_path) == plan_of(tmp_path / name)


def test_an_exact_name_goes_before_a_pattern(tmp_path: Path) -> None:
    plan = plan_of(write(tmp_path, {"query": 4, QUERY.format(1): 2}))
    assert nonzero(plan) == {QUERY.format(0): 4, QUERY.format(1): 2}


@pytest.mark.parametrize(
    "config",
    [
        {"r": 5, "target_modules": ["query", "pooler.dense"]},
        {"r": 5, "target_modules": ["query", "key"], "rank_pattern": {"layer.1.attention.self.key": 2, "query": 7}},
        {"r": 3, "target_modules": r".*layer\.\d\.(intermediate|output)\.dense", "rank_pattern": {r"^bert.*1.*": 1}},
        {"r": 2, "target_modules": ["dense"], "rank_pattern": {"output.dense": 4, "attention.output.dense": 6}},
    ],
)
def test_a_configuration_gives_the_ranks_that_peft_gives(tmp_path: Path, config: dict[str, Any]) -> None:
    """The file is the one that PEFT writes, with the keys in another order, and what it reads in it again."""
    LoraConfig(**config).save_pretrained(str(tmp_path))
    model = get_peft_model(make("bert"), LoraConfig.from_pretrained(str(tmp_path)))
    layers = {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, LoraLayer)
    }
    plan = plan_of(tmp_path / "adapter_config.json")
    assert nonzero(plan) == {name: layer.r["default"] for name, layer in layers.items()}


def test_all_linear_is_every_module_that_is_adapted(tmp_path: Path) -> None:
    path = write(tmp_path, {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"})
    assert set(plan_of(path).values()) == {2}


def test_an_adapter_of_ours_gives_its_own_ranks(tmp_path: Path) -> None:
    model = make("bert")
    sites = find_sites(model, AdapterSettings())
    plan = RankPlan(sites, {name: 1 + i % 4 for i, name in enumerate(sites)})
    save_peft(attach(model, AdapterSettings(), plan), tmp_path / "adapter", base_model="tiny", task_type="SEQ_CLS")
    assert plan_of(tmp_path / "adapter" / "adapter_config.json") == plan
    assert PeftModel.from_pretrained(make("bert"), str(tmp_path / "adapter")) is not None


def test_a_run_can_be_given_the_ranks_of_another(tmp_path: Path) -> None:
    small = (
        "task=planted", "task.dim=12", "task.widths=[8]", "task.ranks=[2,1]", "task.eval_size=64", "logger=csv",
        "trainer.max_steps=5", "trainer.enable_progress_bar=false", "max_rank=4", f"run_root={tmp_path / 'runs'}",
    )  # fmt: skip
    first = run_one(compose([*small, "strategy=uniform", "budget.rank=2"]))
    (ranks,) = tmp_path.glob("runs/*/ranks.json")
    second = run_one(compose([*small, "strategy=manual", f"strategy.path={ranks}", "budget=none"]))
    assert second.ranks == first.ranks
    assert second.params.adapter == first.params.adapter


# The content is part of a run's identity ------------------------------------------------------------------------------


def configured(path: Path, *more: str) -> Any:
    return compose(["task=planted", "strategy=manual", f"strategy.path={path}", *more])


def test_another_content_is_another_run(tmp_path: Path) -> None:
    first = configured(write(tmp_path, {"U0": 1}))
    assert configured(write(tmp_path, {"U0": 1})) == first
    second = configured(write(tmp_path, {"U0": 2}))
    assert first.strategy.options.fingerprint != second.strategy.options.fingerprint


def test_where_the_file_lies_does_not_matter(tmp_path: Path) -> None:
    path, other = write(tmp_path, {"U0": 1}), tmp_path / "copy.json"
    other.write_bytes(path.read_bytes())
    one, same = (config_hash(configured(file), "generated", "f", "w") for file in (path, other))
    assert one == same
    other.write_text('{"U0": 2}')
    assert config_hash(configured(other), "generated", "f", "w") != one


def test_a_written_configuration_is_read_without_the_file_and_refuses_another(tmp_path: Path) -> None:
    path = write(tmp_path, {"query": 1})
    tree = configured(path).model_dump(mode="json")
    path.unlink()
    options = require(tree).strategy.options
    assert options == Manual.Options(path=path, fingerprint=tree["strategy"]["fingerprint"])
    write(tmp_path, {"query": 2})
    with pytest.raises(DataError, match=r"ranks\.json: the file has changed since it was chosen"):
        Manual(options, budget=Budget(), max_rank=4).attach(make("bert"), AdapterSettings())


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"ranks\.json: there is no such file; expected ranks\.json or adapter_config\.json"),
        ("{", r"ranks\.json: expected JSON, could not read it"),
        ([1], r'ranks\.json: expected \{"module": rank, \.\.\.\} or a PEFT configuration'),
        ({}, r"ranks\.json: expected .* got something else"),
        ({"U0": -1}, r"rank of U0: expected a whole number >= 0, got -1"),
        ({"U0": 1.5}, r"rank of U0: expected a whole number >= 0, got 1\.5"),
        ({"U0": True}, r"rank of U0: expected a whole number >= 0, got True"),
        ({"U0": "4"}, r"rank of U0: expected a whole number >= 0, got '4'"),
        ({"peft_type": "IA3"}, r"expected an adapter of peft_type LORA, got IA3"),
        ({"peft_type": "LORA", "target_modules": None}, r"expected target_modules to name modules, got None"),
        (
            {"peft_type": "LORA", "target_modules": ["U0"], "exclude_modules": ["V0"]},
            r"exclude_modules cannot be read: name the modules in target_modules instead",
        ),
        ({"target_modules": ["U0"], "r": 4, "rank_pattern": {"U0": 0.5}}, r"rank of U0: expected a whole number"),
    ],
)
def test_files_that_cannot_be_used_are_configuration_errors(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "ranks.json" if content is None else write(tmp_path, content)
    with pytest.raises(ValidationError, match=message):
        Manual.Options(path=path)


def test_a_wrong_file_is_a_fault_like_others_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(tmp_path / "ranks.json", "seed=-1")
    told = f"strategy: {tmp_path}/ranks.json: there is no such file; expected ranks.json or adapter_config.json"
    assert told in str(caught.value).splitlines()
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_has_to_be_given() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.path: expected the file of a plan: add strategy\.path=FILE"):
        compose(["task=planted", "strategy=manual"])
    with pytest.raises(ValidationError):
        Manual.Options(path=None)
    with pytest.raises(PlanError, match=r"strategy\.path: expected the file of a plan"):
        Manual(Manual.Options(), budget=Budget(), max_rank=1).attach(make("bert"), AdapterSettings())


@pytest.mark.parametrize(
    "content",
    [
        {"query": 1, "model.layers.0.q_proj": 2, "model.layers.1.q_proj": 2},
        {"peft_type": "LORA", "target_modules": ["query", "model.layers.0.q_proj", "model.layers.1.q_proj"]},
        {
            "target_modules": ["query"],
            "rank_pattern": {"model.layers.0.q_proj": 1, "model.layers.1.q_proj": 2, "query": 3},
        },
    ],
)
def test_a_plan_for_another_model_lists_the_names_it_does_not_have(tmp_path: Path, content: Any) -> None:
    names = r"model\.layers\.0\.q_proj, model\.layers\.1\.q_proj; expected names among: bert\.encoder\.layer\.0\."
    with pytest.raises(PlanError, match=r"a plan for another model\? It names 2 modules .*: " + names):
        plan_of(write(tmp_path, content))


def test_a_rank_that_a_module_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"rank of bert\.pooler\.dense: expected a whole number 0 to 16 .*, got 17"):
        plan_of(write(tmp_path, {"bert.pooler.dense": 17}))


def test_a_plan_above_the_budget_says_both_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, {"bert.pooler.dense": 4})
    assert plan_of(path, Budget(params=128)).params == 128
    with pytest.raises(
        PlanError, match=r"the plan costs 128 parameters and the budget is 127: use budget=none, budget\.p"
    ):
        plan_of(path, Budget(params=127))


@pytest.mark.filterwarnings("ignore:the budget of")
def test_a_plan_above_the_largest_one_says_to_raise_max_rank(tmp_path: Path) -> None:
    names = list(plan_of(write(tmp_path, {"bert.pooler.dense": 4})))
    path = write(tmp_path, dict.fromkeys(names, 8))
    with pytest.raises(PlanError, match=r"use budget=none, max_rank=8, or smaller ranks"):
        plan_of(path, Budget(params=10**6))


def test_a_pattern_that_is_none(tmp_path: Path) -> None:
    from autolora.errors import AutoLoRAError

    with pytest.raises(AutoLoRAError, match=r"'qu\(ery' is not a regular expression"):
        plan_of(write(tmp_path, {"qu(ery": 1}))
