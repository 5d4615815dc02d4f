"""What has to hold whatever the strategy: each of ``conf/strategy`` on a tiny encoder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.tiny_models import inputs_for, labels_for, make, output
from safetensors.torch import load_file
from strategies.checks import assert_accumulation_of_2_is_one_double_batch, pair_of
from strategies.checks import run as run_small
from strategies.handloop import fit
from test_resume import Stopper, interrupted_run, outcome, stopper  # noqa: F401  fixture
from test_run import configure, directory_of, sst2  # noqa: F401  fixtures
from torch import Tensor, nn

from autolora.adapters import AdapterSettings, compact
from autolora.compose import compose
from autolora.errors import TargetError
from autolora.parts import adapter_settings, make_problem, make_strategy
from autolora.paths import config_root
from autolora.plan import Budget
from autolora.record import Clock, Run
from autolora.results import RunDirectory
from autolora.run import run_one, train
from autolora.signals import Signals
from autolora.strategies import make_strategy as strategy_of
from autolora.strategies.base import GroupRates, Rates
from autolora.training.problem import Problem, evaluate

NAMES = sorted(path.stem for path in (config_root() / "strategy").glob("*.yaml"))
OUTSIDE = {"head", "bitfit", "full", "prompt", "prefix", "ia3"}
"""Not LoRA: no ranks, no budget."""
NOT_IDENTITY = {"prompt", "prefix"}
"""What they put before the input changes the output from the start."""
TRAINS_THE_BASE = {"full"}
UNSPENT: dict[str, str] = {
    "autolora_paper": "has no budget",
    "dylora": "gives every module the same number of components",
    "rl_search": "may have measured that a smaller plan is worth more",
}
DRAWN = {"rl_search", "evolution", "random_search"}
"""Every batch trains under plans that are drawn for it, also where batches are accumulated."""
RANKED = sorted({*NAMES} - OUTSIDE - {"manual", "autolora_paper"})
"""``manual`` needs a plan, and ``autolora_paper`` query and value, which the small task has not."""
CHOOSES_LATE = {"adalora", "autolora", "autolora_bilevel", "dynamic_growth", "sora", "svd_truncate"}
"""Ranks settle while training goes on; those of the others before it, or (searches) after it."""
WITHOUT_BIASES = {("bitfit", "t5"), ("bitfit", "llama_lm")}
SMALLER: dict[str, tuple[str, ...]] = {
    "information": ("strategy.examples=64",),
    "rl_search": ("strategy.evaluations=6",),
    "evolution": ("strategy.evaluations=6",),
    "random_search": ("strategy.evaluations=6",),
}


@pytest.fixture
def configured(configure: Any, tmp_path: Path) -> Any:  # noqa: F811
    """A configuration of one strategy that is small enough to run in seconds."""

    def make(name: str, *overrides: str) -> Any:
        extra = list(SMALLER.get(name, ()))
        if name == "manual":
            ranks = tmp_path / "given.json"
            ranks.write_text(json.dumps({"bert.encoder.layer.0.attention.self.query": 3, "bert.pooler.dense": 2}))
            extra.append(f"strategy.path={ranks}")
        if name in OUTSIDE | {"autolora_paper"}:
            extra.append("budget=none")
        if name == "autolora_paper":
            extra.append("max_rank=8")
        return configure(f"strategy={name}", *extra, *overrides)

    return make


@pytest.mark.parametrize("budget", [Budget(), Budget(rank=1.5)], ids=str)
@pytest.mark.parametrize("name", sorted({*RANKED} - DRAWN))
def test_accumulation_of_2_is_one_double_batch(name: str, budget: Budget) -> None:
    """Held-out batches are whole here. Methods outside LoRA have no state that a batch could change."""
    options = compose([f"strategy={name}"]).strategy.options
    assert_accumulation_of_2_is_one_double_batch(lambda: strategy_of(name, options, budget=budget, max_rank=4))


@pytest.mark.parametrize("budget", [Budget(), Budget(rank=1.5), Budget(fraction=0.9)], ids=str)
@pytest.mark.parametrize("name", RANKED)
def test_a_module_may_be_left_out_and_another_held_low(name: str, budget: Budget) -> None:
    options = compose([f"strategy={name}", *SMALLER.get(name, ())]).strategy.options
    strategy = strategy_of(name, options, budget=budget, max_rank=4)
    plan = run_small(strategy, pair_of(), 24, settings=AdapterSettings(rank_pattern={"U0": 0, "V0": 1})).plan
    assert plan["U0"] == 0
    assert plan["V0"] <= 1
    assert strategy.allowance is None or plan.params <= strategy.allowance


@pytest.mark.parametrize("name", RANKED)
def test_once_settled_nothing_is_chosen_any_more_and_training_computes_what_is_evaluated(name: str) -> None:
    """Of the plan, checkpoints may be chosen from then on. dylora trains truncations: its training never settles."""
    strategy = strategy_of(
        name,
        compose([f"strategy={name}", *SMALLER.get(name, ())]).strategy.options,
        budget=Budget(rank=1.5),
        max_rank=4,
    )
    pair, plans = pair_of(), []
    inputs = torch.randn(8, 16)

    def look(step: int, optimizer: Any) -> None:
        if not strategy.settled:
            assert plans == []
            return
        plans.append(strategy.adapters.active_plan())
        if name != "dylora":
            model = strategy.adapters.model
            with torch.no_grad():
                torch.testing.assert_close(model.train()(inputs), model.eval()(inputs), rtol=0, atol=1e-6)
            model.train()

    found = run_small(strategy, pair, 40, every_step=look).plan
    assert all(plan == found for plan in plans)
    if name in CHOOSES_LATE:
        assert 0 < len(plans) < 40
    elif name in DRAWN:
        assert plans == []
    else:
        assert len(plans) == 40


@pytest.mark.parametrize("family", ["vit", "whisper", "t5", "gpt2_lm", "llama_lm"])
@pytest.mark.parametrize("name", [*RANKED, "bitfit", "full"])
def test_every_family_ends_within_the_budget_and_compact(name: str, family: str) -> None:
    few = ["strategy.evaluations=3"] if name in DRAWN else []
    options = compose([f"strategy={name}", *few]).strategy.options
    strategy = strategy_of(name, options, budget=Budget(rank=1.5) if name in RANKED else Budget(), max_rank=3)
    if (name, family) in WITHOUT_BIASES:
        with pytest.raises(TargetError, match="no biases"):
            strategy.attach(make(family), AdapterSettings())
        return
    inputs, labels = inputs_for(family), labels_for(family)
    batches = itertools.repeat({**inputs, "labels": labels})
    model = make(family)
    bare, before = of_the_base(model.state_dict(), set()), float(model(**next(batches)).loss.detach())
    fitted = fit(strategy, model, batches, batches, steps=8, lr=3e-2, loss_fn=lambda model, batch: model(**batch).loss)
    adapters, plan = fitted.adapters, fitted.plan
    assert float(model.eval()(**next(batches)).loss) < before
    own = {id(p) for p in [*adapters.also_trained, *adapters.head_parameters()]}
    trained = {bare_name(key) for key, p in model.named_parameters() if id(p) in own}
    now = of_the_base(model.state_dict(), trained)
    common = [key for key in bare if key in now and name not in TRAINS_THE_BASE]
    assert len(common) >= 10 or name in TRAINS_THE_BASE
    assert [key for key in common if not torch.equal(bare[key], now[key])] == []
    if name in RANKED:
        assert strategy.allowance is not None
        assert 0 < plan.params <= strategy.allowance
    assert adapters.active_plan() == plan
    with torch.no_grad():
        masked = output(model, inputs)
        compact(adapters)
        torch.testing.assert_close(output(model, inputs), masked, rtol=0, atol=1e-5)
    assert adapters.count()["adapter"] == plan.params


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("name", RANKED)
def test_every_parameter_is_in_one_group(name: str, ratio: float) -> None:
    """With LoRA+ those of B are in one whose rate is 16 times as high."""
    strategy = strategy_of(name, compose([f"strategy={name}"]).strategy.options, budget=Budget(rank=1.5), max_rank=4)
    adapters = strategy.attach(pair_of().student, AdapterSettings(modules_to_save=["V1"]))
    rates = Rates(GroupRates(1e-2), GroupRates(None), GroupRates(1e-3), loraplus_lr_ratio=ratio)
    groups = strategy.param_groups(rates, 40)
    grouped = [id(p) for group in groups for p in group["params"]]
    lone = {id(p) for p in adapters.gate_parameters()} if name == "autolora_bilevel" else set()  # another optimizer's
    assert len(grouped) == len(set(grouped))
    assert set(grouped) | lone == {id(p) for p in adapters.model.parameters() if p.requires_grad} | lone
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    for layer in adapters.layers.values():
        assert rate_of[id(layer.lora_A)] == 1e-2
        assert rate_of[id(layer.lora_B)] == pytest.approx(ratio * 1e-2)


def logits(problem: Problem, model: nn.Module) -> Tensor:
    return evaluate(problem, model, "dev").logits


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def of_the_base(state: Mapping[str, Tensor], trained: set[str]) -> dict[str, Tensor]:
    """Tensors that no adapter owns and no training may change, under their names in the bare model."""
    bare = {bare_name(key): value for key, value in state.items()}
    return {key: value.clone() for key, value in bare.items() if key not in trained}


def bare_name(key: str) -> str:
    """The name of a tensor in the model that nobody has wrapped."""
    return key.replace(".base_layer", "").removeprefix("base_model.").removeprefix("model.")


@pytest.mark.parametrize("name", NAMES)
def test_invariants(configured: Any, tmp_path: Path, name: str) -> None:
    cfg = configured(name)
    problem = make_problem(cfg)
    problem.build()
    bare = logits(problem, problem.model)
    before = {key: value.clone() for key, value in problem.model.state_dict().items()}

    # Identity: what is attached computes what was there.
    first = make_strategy(cfg, problem).attach(problem.model, adapter_settings(cfg))
    if name not in NOT_IDENTITY:
        torch.testing.assert_close(logits(problem, first.model), bare, rtol=0, atol=1e-6)

    problem.build()
    strategy = make_strategy(cfg, problem)
    with Signals(quiet=True) as signals:
        directory = RunDirectory(tmp_path / "run")
        directory.path.mkdir()
        run = Run(cfg, problem, directory, Clock(), signals)
        train(run, strategy, None, None)
    adapters = strategy.adapters

    def score(plan: Any) -> float:
        with adapters.masked(plan):
            return problem.scores({"heldout": evaluate(problem, problem.model, "heldout")}).utility()

    plan = strategy.finalize(score)

    # Frozen: nothing else than what is said to be trained has moved.
    own = {id(p) for p in adapters.also_trained} | {id(p) for p in adapters.head_parameters()}
    trained = {bare_name(key) for key, p in adapters.model.named_parameters() if id(p) in own}
    now = of_the_base(adapters.model.state_dict(), trained)
    common = [key for key in before if key in now]
    assert len(common) >= 20 or name in TRAINS_THE_BASE
    assert [key for key in common if not torch.equal(before[key], now[key])] == []

    # Training = evaluation, now that the gates are settled.
    assert strategy.settled
    model = without_dropout(problem.model)
    settled = logits(problem, model)
    batch = next(iter(problem.eval_batches("dev")))
    with torch.no_grad():
        torch.testing.assert_close(
            problem.forward(model.train(), batch), problem.forward(model.eval(), batch), rtol=0, atol=1e-6
        )

    # The plan is what is there, within the budget.
    assert adapters.active_plan() == plan
    if name in OUTSIDE:
        assert set(plan.values()) == {0}
    elif strategy.allowance is not None:
        assert plan.params <= strategy.allowance
        assert plan.params >= 0.98 * strategy.allowance or name in {*UNSPENT, "manual"}

    # Compact = masked, and no larger than the plan.
    compact(adapters)
    torch.testing.assert_close(logits(problem, model), settled, rtol=0, atol=1e-5)
    assert adapters.count()["adapter"] == plan.params


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_interrupted_ends_as_an_unbroken_one_and_peft_reads_what_it_leaves(
    configured: Any,
    stopper: Stopper,  # noqa: F811
    tmp_path: Path,
    tiny_bert_dir: Path,
    name: str,
) -> None:
    whole = configured(name, "trainer.max_epochs=1")
    result = run_one(whole)
    assert result.status == "complete"
    assert result.strategy == name
    broken = configured(name, "trainer.max_epochs=1", f"run_root={tmp_path / 'broken'}")
    assert interrupted_run(broken, stopper, 3) >= 2
    assert outcome(broken) == outcome(whole)

    if name == "full":
        return  # leaves a whole model
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=2)
    adapter = directory_of(whole, result).adapter
    stock = peft.PeftModel.from_pretrained(base, adapter).eval()
    problem = make_problem(whole)
    problem.build()
    ours = [line.split(",")[4:] for line in directory_of(whole, result).predictions.read_text().splitlines()[1:]]
    torch.testing.assert_close(
        logits(problem, stock), torch.tensor([[float(x) for x in row] for row in ours]), rtol=0, atol=1e-5
    )
    assert all(tensor.isfinite().all() for tensor in load_file(next(adapter.glob("*.safetensors"))).values())
