"""The callback in the Trainer is the loop of ``strategies/base.py``: same plan, same weights; and what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters.tiny_models import LLAMA, enlarged
from peft import PeftModel
from strategies.handloop import fit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments
from transformers import TrainerCallback as Callback

from autolora.adapters import AdapterSettings
from autolora.compose import compose
from autolora.errors import CheckpointError, ConfigError, DataError
from autolora.integrations.hf_trainer import AutoLoRACallback, _require_plain
from autolora.paths import config_root
from autolora.plan import Budget
from autolora.strategies import make_strategy
from autolora.strategies.uniform import Uniform

STEPS, SIZE, LENGTH, LR = 16, 8, 10, 1e-2
NAMES = sorted(path.stem for path in (config_root() / "strategy").glob("*.yaml"))
BY_PEFT = {"prompt", "prefix", "ia3"}
WITHOUT_BUDGET = {"head", "bitfit", "full", "autolora_paper"}
SEARCHES = {"rl_search", "evolution", "random_search"}
CONFIG = LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "num_labels"}, attention_bias=True)


def progressions(rows: int, seed: int) -> list[dict[str, Tensor]]:
    """Tokens that go up by 1 to 3 from anywhere."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 60, (rows, 1), generator=generator)
    by = torch.randint(1, 4, (rows, 1), generator=generator)
    ids = (starts + by * torch.arange(LENGTH)) % 60 + 1
    return [{"input_ids": row, "labels": row} for row in ids]


TRAIN, HELDOUT, DEV = progressions(64, 1), progressions(SIZE, 2), progressions(24, 3)


def test_what_the_trainer_needs_is_named() -> None:
    code = "import sys; sys.modules['accelerate'] = None; import autolora.integrations.hf_trainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith("needs accelerate: pip install 'autolora[trainer]'\n")


def llama() -> nn.Module:
    """The same at every call, with weights so large that adapters have something to work with."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return enlarged(LlamaForCausalLM(CONFIG))


def options_of(name: str) -> dict[str, Any]:
    return {"evaluations": 6} if name in SEARCHES else {}


def trainer_of(
    callback: AutoLoRACallback | None, folder: Path, model: nn.Module | None = None, **given: Any
) -> Trainer:
    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": SIZE,
        "per_device_eval_batch_size": 64,
        "learning_rate": LR,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    more = {key: given.pop(key) for key in ("train_dataset", "callbacks", "model_init", "optimizers") if key in given}
    more = {"train_dataset": TRAIN, "callbacks": [callback]} | more
    if "model_init" not in more:
        more["model"] = model or llama()
    return Trainer(args=TrainingArguments(str(folder), **(arguments | given)), eval_dataset=DEV, **more)


def train(name: str, folder: Path, budget: float | None = 1.5, **given: Any) -> tuple[AutoLoRACallback, Trainer]:
    callback = AutoLoRACallback(name, options=options_of(name), budget=budget, max_rank=4, heldout=HELDOUT)
    trainer = trainer_of(callback, folder, **given)
    trainer.train()
    return callback, trainer


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def in_order(rows: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    starts = range(0, len(rows), SIZE)
    return cycle([{key: torch.stack([row[key] for row in rows[i : i + SIZE]]) for key in rows[0]} for i in starts])


def state_of(callback: AutoLoRACallback) -> dict[str, Tensor]:
    return callback.adapters.trainable_state()


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], rtol=0, atol=atol)


# The same as by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["autolora", "autolora_bilevel", "adalora", "dylora", "dynamic_growth", "evolution"])
def test_the_callback_is_the_loop_written_by_hand(name: str, tmp_path: Path) -> None:
    callback, trainer = train(name, tmp_path, logging_steps=1)
    options = compose([f"strategy={name}", *(f"strategy.{k}={v}" for k, v in options_of(name).items())])
    strategy = make_strategy(name, options.strategy.options, budget=Budget(rank=1.5), max_rank=4)
    fitted = fit(
        strategy,
        llama(),
        in_order(TRAIN),
        in_order(HELDOUT),
        steps=STEPS,
        lr=LR,
        loss_fn=loss_of,
        settings=AdapterSettings(seed=42),  # the Trainer's own default
        warmup=0.0,
    )
    assert callback.plan == fitted.plan
    assert fitted.plan.components > 0
    if name != "evolution":  # what the Trainer reports of the plans of a search is their mean, as by hand
        assert callback.plan.params <= callback.strategy.allowance
    reported = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(torch.tensor(reported), torch.tensor(fitted.losses), rtol=0, atol=1e-5)
    from autolora.adapters import compact

    compact(fitted.adapters)
    assert_close(state_of(callback), fitted.adapters.trainable_state(), atol=1e-5)


@pytest.mark.parametrize(("name", "summed"), [("autolora", True), ("adalora", True), ("adalora", False)])
def test_accumulation_of_2_is_one_double_batch(name: str, summed: bool, tmp_path: Path) -> None:
    """Whether the model divides by the tokens of all batches of a step, or the Trainer by their number."""
    found = []
    for parts in (1, 2):
        model = llama()
        model.accepts_loss_kwargs = summed
        callback, trainer = train(
            name,
            tmp_path,
            model=model,
            per_device_train_batch_size=SIZE // parts,
            gradient_accumulation_steps=parts,
            logging_steps=1,
        )
        found.append((callback, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    (one, losses), (two, others) = found
    assert one.plan == two.plan
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(others), rtol=0, atol=1e-5)
    assert_close(state_of(one), state_of(two), atol=1e-4)


def test_a_penalty_is_in_the_gradient_and_not_in_what_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, without = train("uniform", tmp_path, logging_steps=1)

    def penalty(self: Uniform, loss: Tensor) -> Tensor:
        return 100 + 0 * loss

    monkeypatch.setattr(Uniform, "penalty", penalty)
    _, constant = train("uniform", tmp_path, logging_steps=1)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (without, constant)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=2e-5)

    def decay(self: Uniform, loss: Tensor) -> Tensor:
        return 10 * sum(layer.lora_A.square().sum() for layer in self.adapters.layers.values())

    monkeypatch.setattr(Uniform, "penalty", decay)
    decayed, _ = train("uniform", tmp_path)
    norms = [sum(float(x.lora_A.detach().norm()) for x in c.adapters.layers.values()) for c in (free, decayed)]
    assert norms[1] < 0.8 * norms[0]


# Every strategy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*NAMES} - BY_PEFT))
def test_every_strategy_runs_within_its_budget(name: str, tmp_path: Path) -> None:
    model, rows = llama(), TRAIN
    if name == "head":  # a model that predicts tokens has none
        model = LlamaForSequenceClassification(LlamaConfig(**LLAMA))
        rows = [row | {"labels": torch.tensor(i % 3)} for i, row in enumerate(TRAIN)]
    options = options_of(name)
    if name == "manual":
        path = tmp_path / "ranks.json"
        path.write_text(json.dumps({"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.down_proj": 3}))
        options["path"] = str(path)
    callback = AutoLoRACallback(
        name, options=options, budget=None if name in WITHOUT_BUDGET else 1.5, max_rank=4, heldout=0.25
    )
    base = {key: value.clone() for key, value in model.state_dict().items() if "lm_head" in key or "embed" in key}
    trainer = trainer_of(callback, tmp_path, model, train_dataset=rows)
    assert len(callback.heldout) == 16
    trainer.train()
    assert callback.plan is not None
    assert callback.plan == callback.adapters.active_plan() == callback.adapters.attached_plan()
    if name not in WITHOUT_BUDGET:
        assert 0 < callback.plan.params <= callback.strategy.allowance
        assert callback.adapters.count()["adapter"] == callback.plan.params
    if name != "full":
        now = model.state_dict()
        assert all(torch.equal(now[key], value) for key, value in base.items())


@pytest.mark.parametrize("name", sorted(BY_PEFT))
def test_what_peft_implements_is_left_to_peft(name: str) -> None:
    with pytest.raises(ConfigError, match="get_peft_model"):
        AutoLoRACallback(name)


# What it leaves ------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_a_stock_adapter_and_what_is_evaluated_is_compact(tmp_path: Path) -> None:
    """``output_dir`` is the folder of the checkpoints too, which stay."""
    callback, trainer = train("autolora", tmp_path, save_strategy="steps", save_steps=STEPS)
    trainer.save_model()
    assert (tmp_path / f"checkpoint-{STEPS}" / "autolora_state.pt").exists()
    assert not (tmp_path / "autolora_state.pt").exists()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    stock = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    batch = {key: torch.stack([row[key] for row in DEV]) for key in DEV[0]}
    with torch.no_grad():
        theirs, ours = stock(**batch), trainer.model.eval()(**batch)
        bare = llama().eval()(**batch)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    assert float(bare.loss) - float(theirs.loss) > 0.05
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(theirs.loss), abs=1e-5)
    own = sum(p.numel() for name, p in stock.named_parameters() if "lora_" in name)
    assert own == callback.plan.params == callback.adapters.count()["adapter"]
    callback.save(tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "autolora.json",
    }


def test_what_is_trained_in_full_is_saved_as_a_model(tmp_path: Path) -> None:
    _, trainer = train("full", tmp_path, budget=None)
    trainer.save_model()
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["autolora", "autolora_bilevel", "dylora", "dynamic_growth", "gradient", "evolution"])
def test_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch and of what the strategy does, with dropout and shuffled rows."""

    def callback() -> AutoLoRACallback:
        settings = AdapterSettings(dropout=0.1)
        return AutoLoRACallback(name, options=options_of(name), budget=1.5, max_rank=4, heldout=0.3, settings=settings)

    how = {"train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 7}
    whole, resumed = callback(), callback()
    trainer_of(whole, tmp_path, **how).train()
    trainer_of(resumed, tmp_path, **how).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert resumed.plan == whole.plan
    assert_close(state_of(whole), state_of(resumed), atol=0)


def test_constant_rates_are_constant_under_any_schedule(tmp_path: Path) -> None:
    seen: dict[str, list[float]] = {}

    class Look(Callback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for group in kwargs["optimizer"].param_groups:
                seen.setdefault(group["name"], []).append(group["lr"])

    callback = AutoLoRACallback("autolora", max_rank=4, heldout=HELDOUT)
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 3}
    trainer_of(callback, tmp_path, callbacks=[callback, Look()], **schedule).train()
    assert len(set(seen["adapter"])) > 10
    assert max(seen["adapter"]) == LR
    assert len(set(seen["gate"])) == 1


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}, "load_best_model"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"model_init": llama}, "model_init"),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)], lr=1.0), None)}, "optimizers"),
        ({"train_dataset": None}, "train_dataset"),
    ],
)
def test_arguments_that_do_not_go_together_with_ranks_are_refused(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer_of(AutoLoRACallback(heldout=HELDOUT), tmp_path, **given)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"world_size": 2}, "several processes"),
        ({"n_gpu": 2}, "several"),
        ({"fp16": True}, "fp16"),
        ({"bf16": True}, ""),
    ],
)
def test_what_this_machine_cannot_do_is_refused_too(args: dict[str, Any], said: str) -> None:
    """Beside bf16 only the second order."""
    usual = {
        "world_size": 1,
        "n_gpu": 1,
        "fp16": False,
        "bf16": False,
        "load_best_model_at_end": False,
        "auto_find_batch_size": False,
    }
    trainer = SimpleNamespace(
        args=SimpleNamespace(**usual | args), is_fsdp_enabled=False, is_deepspeed_enabled=False, model_init=None,
        optimizer=None, model=None, train_dataset=TRAIN,
    )  # fmt: skip
    first, second = (
        AutoLoRACallback("autolora_bilevel", options={"order": order, "selector": {"form": "sigmoid"}}).strategy
        for order in ("first", "second")
    )
    with pytest.raises(ConfigError, match=said or "order=second"):
        _require_plain(trainer, second)
    if said:
        with pytest.raises(ConfigError, match=said):
            _require_plain(trainer, first)
    else:
        _require_plain(trainer, first)


def test_wrong_options_and_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"phases\.warmup.*expected a number >= 0 and <= 1"):
        AutoLoRACallback("autolora", options={"phases": {"warmup": 2}})
    with pytest.raises(ConfigError, match="unknown strategy"):
        AutoLoRACallback("autolara")
    with pytest.raises(ConfigError, match="objective"):
        AutoLoRACallback("evolution", options={"objective": "metric"})
    with pytest.raises(ConfigError, match="heldout: expected"):
        AutoLoRACallback(heldout=0.9)
    with pytest.raises(DataError, match="is none"):
        trainer_of(AutoLoRACallback(heldout=0.001), tmp_path)
    with pytest.raises(DataError, match="counted"):
        trainer_of(AutoLoRACallback(heldout=0.1), tmp_path, train_dataset=iter(TRAIN))


def test_it_serves_one_training_and_has_to_be_there_from_the_beginning(tmp_path: Path) -> None:
    callback, trainer = train("uniform", tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(ConfigError, match="one call of train"):
        trainer.train()
    with pytest.raises(ConfigError, match="new one for each Trainer"):
        trainer_of(callback, tmp_path)
    late = trainer_of(None, tmp_path, callbacks=[])
    late.add_callback(AutoLoRACallback())
    with pytest.raises(ConfigError, match="add_callback is too late"):
        late.train()
    other = AutoLoRACallback("uniform", budget=1, max_rank=4, heldout=HELDOUT)
    longer = trainer_of(other, tmp_path, max_steps=3)
    with pytest.raises(CheckpointError, match="of 2 steps"):
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    different = trainer_of(AutoLoRACallback("adalora", heldout=HELDOUT), tmp_path)
    with pytest.raises(CheckpointError, match="give the options of then"):
        different.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(CheckpointError, match="autolora_state"):
        trainer_of(AutoLoRACallback(heldout=HELDOUT), tmp_path).train(resume_from_checkpoint=str(tmp_path))
