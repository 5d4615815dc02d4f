"""Contenders do the same work on the same modules, and the limit does exactly what it says."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from autolora.bench import evaluation, settings
from autolora.bench.contenders import CONTENDERS, AdaLora, Limit, Ours, Peft
from autolora.bench.memory import peak_bytes, peak_within
from autolora.bench.model import Subject, first_adapted, loss_of
from autolora.strategies.base import Batch

QKV = ["bert.encoder.layer.0.attention.self." + name for name in ("query", "key", "value")]


@pytest.fixture
def batch(subject: Subject) -> Batch:
    return subject.batch((4, 8), torch.Generator().manual_seed(1))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_the_names_on_the_command_line_are_those_that_can_be_measured() -> None:
    assert tuple(CONTENDERS) == get_args(settings.Training)
    assert tuple(evaluation.MODELS) == get_args(settings.Forward)
    assert tuple(evaluation.ONCE) == get_args(settings.Once)


def test_targets_are_all_linears_but_the_head(subject: Subject) -> None:
    assert len(subject.targets) == 2 * 6 + 1
    assert subject.targets[-1] == "bert.pooler.dense"
    assert subject.heads == ("classifier",)


# The limit -----------------------------------------------------------------------------------------------------------


def test_the_first_adapted_modules_are_those_that_depend_on_no_other(subject: Subject, batch: Batch) -> None:
    model = subject.copy().requires_grad_(False)
    assert first_adapted(model, subject.targets, batch) == QKV
    later = [name for name in subject.targets if ".self." not in name or "layer.1" in name]
    assert first_adapted(model, later, batch) == ["bert.encoder.layer.0.attention.output.dense"]
    assert not loss_of(model, batch).requires_grad  # no hook is left behind


def test_backward_of_the_limit_reaches_the_outputs_of_the_first_adapted_modules_and_no_parameter(
    subject: Subject, batch: Batch
) -> None:
    limit = Limit(subject, "float32")
    limit.model.eval()
    seen: dict[str, Tensor] = {}
    for name in [*QKV, "bert.embeddings"]:
        limit.model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output})
        )
    limit.step(batch)
    assert all(p.grad is None and not p.requires_grad for p in limit.model.parameters())
    assert not seen["bert.embeddings"].requires_grad
    # Independently: a model whose every weight is trained, asked for the gradients of the same tensors.
    reference = subject.copy().eval()
    outputs: dict[str, Tensor] = {}
    for name in QKV:
        reference.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output})
        )
    expected = torch.autograd.grad(loss_of(reference, batch), [outputs[name] for name in QKV])
    for name, gradient in zip(QKV, expected, strict=True):
        assert seen[name].is_leaf
        torch.testing.assert_close(seen[name].grad, gradient)


# Ours and PEFT -------------------------------------------------------------------------------------------------------


def ours_adapted(contender: Ours) -> list[str]:
    return list(contender.adapters.layers)


def peft_adapted(contender: Peft) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    prefix = "base_model.model."
    return [
        name.removeprefix(prefix)
        for name, module in contender.model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


@pytest.mark.parametrize("rank", [8, 16])
def test_peft_and_ours_train_the_same(subject: Subject, batch: Batch, rank: int) -> None:
    ours, peft = CONTENDERS[f"uniform{rank}"](subject, "float32"), CONTENDERS[f"peft{rank}"](subject, "float32")
    assert isinstance(ours, Ours)
    assert isinstance(peft, Peft)
    assert ours_adapted(ours) == peft_adapted(peft) == list(subject.targets)
    assert sum(p.numel() for p in trainable(ours.model).values()) == sum(
        p.numel() for p in trainable(peft.model).values()
    )
    with torch.no_grad():
        for name, layer in ours.adapters.layers.items():
            peft.model.get_parameter(f"base_model.model.{name}.lora_A.default.weight").copy_(layer.lora_A)
    losses: list[list[Tensor]] = []
    for contender in (ours, peft):
        torch.manual_seed(0)  # the backbone's own dropout
        losses.append([contender.step(batch) for _ in range(3)])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert len(set(map(float, losses[0]))) == 3
    assert options(ours) == options(peft)


def options(contender: Any) -> list[tuple[Any, ...]]:
    keys = ("lr", "betas", "eps", "weight_decay")
    return [tuple(group[key] for key in keys) for group in contender.optimizer.param_groups if group["params"]]


def test_adalora_adapts_the_same_modules_and_allocates(subject: Subject, batch: Batch) -> None:
    contender = CONTENDERS["adalora16"](subject, "float32")
    assert isinstance(contender, AdaLora)
    assert peft_adapted(contender) == list(subject.targets)
    with torch.no_grad():
        torch.manual_seed(0)
        plain = loss_of(subject.copy(), batch)
    torch.manual_seed(0)
    first = contender.step(batch)
    assert first > plain  # E starts at 0: what is more is the regularisation
    for _ in range(2):
        contender.step(batch)
    ranks = contender.model.peft_config["default"].rank_pattern
    assert len(ranks) == len(subject.targets)


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != "limit"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_steps_change_what_is_trained(subject: Subject, batch: Batch, name: str, precision: Any) -> None:
    contender = CONTENDERS[name](subject, precision)
    before = {key: p.detach().clone() for key, p in trainable(contender.model).items()}
    for _ in range(2):  # in the first step B is 0, and with it the gradient of A
        loss = contender.step(batch)
    assert loss.isfinite()
    after = trainable(contender.model)
    still = {key for key in before if key in after and torch.equal(before[key], after[key])}
    if isinstance(contender, Ours) and name == "autolora16-settle":
        closed = [key for key, rank in contender.adapters.active_plan().items() if rank == 0]
        still = {key for key in still if ".gate." not in key and not any(key.startswith(c + ".") for c in closed)}
    assert still == set()


def test_autolora_is_measured_in_the_phase_that_it_is_named_for(subject: Subject, batch: Batch) -> None:
    for phase in ("prune", "settle"):
        contender = CONTENDERS[f"autolora16-{phase}"](subject, "float32")
        assert isinstance(contender, Ours)
        for _ in range(3):
            contender.step(batch)
        assert contender.strategy.phase == phase  # type: ignore[attr-defined]
    assert contender.adapters.active_plan().params <= contender.strategy.allowance  # type: ignore[operator]


# Forward passes ------------------------------------------------------------------------------------------------------


def test_evaluation_compares_the_same_function(subject: Subject, batch: Batch) -> None:
    adapters, peft = evaluation.compacted(subject), evaluation.MODELS["peft-pattern"](subject).eval()
    assert dict(adapters.active_plan()) == dict(evaluation.mixed_plan(subject))
    for name, layer in adapters.layers.items():
        theirs: Any = peft.get_submodule(f"base_model.model.{name}")
        theirs.lora_A["default"].weight.data.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.data.copy_(layer.lora_B)
    compact, merged = adapters.model.eval(), evaluation.MODELS["merged"](subject).eval()
    with torch.no_grad():
        logits = [model(**batch).logits for model in (compact, peft, merged, subject.copy().eval())]
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[3], atol=1e-3)


# Memory --------------------------------------------------------------------------------------------------------------


class Event:
    """An event of the profiler: at a time, an allocation (or a release), or a span."""

    def __init__(self, name: str, start: int, nbytes: int = 0, duration: int = 0) -> None:
        self._values = {"name": name, "start_ns": start, "nbytes": nbytes, "duration_ns": duration}

    def __getattr__(self, key: str) -> Any:
        return lambda: self._values[key]


def test_the_peak_is_the_largest_running_sum_within_the_step() -> None:
    memory = [(1, 500), (2, -400), (12, 30), (14, 50), (15, -60), (16, 20), (30, 900)]
    events = [Event("step", 10, duration=10), *(Event("[memory]", at, size) for at, size in reversed(memory))]
    assert peak_within(events, "step") == 180


def test_peak_memory_counts_what_stays_and_what_comes_and_goes(subject: Subject, batch: Batch) -> None:
    class Doubles(Limit):
        """Keeps 1 MB, and takes 2 MB within a step."""

        def __init__(self) -> None:
            self.kept = torch.ones(250_000)

        def step(self, batch: Batch) -> Tensor:
            return (self.kept.repeat(2) * 1.0).sum()

    assert 5_000_000 <= peak_bytes(Doubles, batch) <= 5_100_000


def test_peak_memory_repeats_exactly(subject: Subject, batch: Batch) -> None:
    def build() -> Any:
        return CONTENDERS["uniform8"](subject, "float32")

    first = peak_bytes(build, batch)
    assert first > sum(p.numel() * 4 for p in subject.backbone.model.parameters())
    assert peak_bytes(build, batch) == first
