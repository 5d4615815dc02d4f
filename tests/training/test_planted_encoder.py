"""Planted ranks in a pretrained encoder: what the teacher is, and what can be learned of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import configure, sst2  # noqa: F401  fixtures

from autolora.errors import ConfigError
from autolora.parts import make_problem
from autolora.plan import RankPlan
from autolora.run import run_one
from autolora.training.planted_encoder import PlantedEncoder
from autolora.training.problem import evaluate


@pytest.fixture
def configured(configure: Any) -> Any:  # noqa: F811
    def make(*overrides: str) -> Any:
        fixed = ("task=planted_encoder", "task.text=sst2", "data.max_length=16", "task.highest_rank=3")
        return configure(*fixed, "trainer.max_epochs=-1", *overrides)

    return make


def built(cfg: Any) -> PlantedEncoder:
    problem = make_problem(cfg)
    assert isinstance(problem, PlantedEncoder)
    problem.build()
    return problem


@pytest.mark.parametrize("profile", ["equal", "decaying"])
def test_the_teacher_differs_by_updates_of_the_given_ranks_and_sizes(configured: Any, profile: str) -> None:
    problem = built(configured(f"task.profile={profile}", "task.singular_value=0.25", "trainer.max_steps=1"))
    assert problem.true_plan is not None
    assert len(problem.true_plan) == 12  # two layers of six Linears; no pooler, no head
    assert set(problem.true_plan.values()) <= {0, 1, 2, 3}
    assert len(set(problem.true_plan.values())) > 1
    assert problem.default_budget.params == problem.true_plan.params
    for name, rank in problem.true_plan.items():
        w, planted = (m.get_parameter(f"{name}.weight").detach() for m in (problem.model, problem.teacher))
        sigma = torch.linalg.svdvals((planted - w).double())
        largest = 0.25 * torch.linalg.svdvals(w.double())[0]
        wanted = [float(largest) / (k if profile == "decaying" else 1) for k in range(1, rank + 1)]
        torch.testing.assert_close(sigma[:rank], torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=0)
        assert bool((sigma[rank:] < 1e-5).all())


def test_the_excess_error_is_1_without_adapters_and_0_for_the_teacher(configured: Any) -> None:
    problem = built(configured("trainer.max_steps=1"))
    bare = problem.scores({"dev": evaluate(problem, problem.model, "dev")})
    perfect = problem.scores({"dev": evaluate(problem, problem.teacher, "dev")})
    assert bare.value == pytest.approx(1.0)
    assert perfect.value == pytest.approx(0.0, abs=1e-9)
    assert bare.utility() < perfect.utility()


def test_padding_counts_nowhere(configured: Any) -> None:
    """The error is the mean over real tokens, computed here one row at a time, without any padding."""
    problem = built(configured("trainer.max_steps=1"))
    outputs = evaluate(problem, problem.model, "dev")
    total, entries = 0.0, 0
    tokens = problem.datamodule.tokenizer(problem.splits["dev"].text_a)
    with torch.no_grad():
        for ids in tokens["input_ids"]:
            row = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            states = [m.eval()(**row).last_hidden_state for m in (problem.model, problem.teacher)]
            total += float((states[0] - states[1]).square().sum())
            entries += states[0].numel()
    assert problem.scores({"dev": outputs}).all["mse"] == pytest.approx(total / entries, rel=1e-4)


def test_noise_is_on_the_targets_of_training_alone(configured: Any) -> None:
    noisy, clean = built(configured("task.noise=0.5", "trainer.max_steps=1")), built(configured("trainer.max_steps=1"))
    batch = next(iter(clean.eval_batches("heldout")))
    torch.testing.assert_close(noisy.labels(batch), clean.labels(batch))
    extra = float(noisy.loss(noisy.teacher, batch).detach())
    assert float(noisy.loss(noisy.teacher, batch)) == extra  # whoever drew from the global stream in between
    targets = clean.labels(batch)
    assert extra == pytest.approx(0.25 * float(targets[targets != 0].var()), rel=0.1)
    assert float(clean.loss(clean.teacher, batch)) == 0


def test_a_run_learns_and_says_what_it_found(configured: Any) -> None:
    result = run_one(configured("strategy=uniform", "trainer.max_steps=80", "budget=default", "max_rank=8"))
    assert result.planted is not None
    assert result.params.budget == RankPlan({n: s for n, s in _sites(result).items()}, result.planted.true).params
    assert result.params.adapter <= result.params.budget
    assert result.params.head == 0
    assert result.metrics.value == result.planted.excess_error
    assert result.metrics.value is not None
    assert result.metrics.value < 0.7


def _sites(result: Any) -> dict[str, Any]:
    from autolora.plan import Site

    wide = {"intermediate.dense": Site(32, 64), "output.dense": Site(64, 32)}
    sites = {}
    for name in result.ranks:
        leaf = ".".join(name.split(".")[-2:])
        sites[name] = Site(32, 32) if "attention" in name else wide[leaf]
    return sites


def test_ranks_have_to_fit(configured: Any, tiny_bert_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.ranks: expected 12, one for each Linear of the encoder, got 2"):
        built(configured("task.ranks=[1,2]", "trainer.max_steps=1"))
