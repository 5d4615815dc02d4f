r"""A learned gate that mixes the adapters of a bank for every input.

With a summary :math:`u_i` of input i, a vector that the frozen model has anyway,

.. math:: \pi_i = \mathrm{softmax}(U u_i + c), \qquad y_i = x_i W^T + b + \sum_k \pi_{ik} \, s_k \, x_i A_k^T B_k^T

in every adapted module, with the same :math:`\pi_i` in all of them. Only U and c are trained; backbone, adapters and
heads are frozen, as in Wu et al., "Mixture of LoRA experts", ICLR 2024 (arXiv 2404.13628), who have a gate in every
layer; one decision for the whole model is that of Feng et al., "Mixture-of-LoRAs", 2024 (arXiv 2403.03432), whose
router is trained on the names of the domains. Here no name of a task is a target: the gate learns from the tasks'
own losses. It starts at equal weights.

A row keeps the head of its task, since labels of different tasks are not comparable: what is learned is whose low-rank
updates its input shall have, not which question is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.errors import AdapterError, NonFiniteLossError
from autolora.multitask.bank import AdapterBank
from autolora.strategies.base import Batch
from autolora.training.problem import Problem, Scores, evaluate

How = Literal["soft", "hard", "uniform"]
HOWS: tuple[How, ...] = get_args(How)
Summary = Callable[..., Tensor]


class Router(nn.Module):
    """The gate over some adapters of a bank.

    Args:
        bank: the model and its adapters.
        names: of at least two adapters.
        summary: gives ``(rows, width)`` from what the model is called with; by default :class:`MeanEmbedding`.
        width: of the summary; by default that of the embeddings.

    Raises:
        AdapterError: if there are fewer than two names, or the bank has no adapter of a name.
    """

    def __init__(
        self, bank: AdapterBank, names: Sequence[str], *, summary: Summary | None = None, width: int | None = None
    ) -> None:
        super().__init__()
        if len(names) < 2:
            raise AdapterError(f"router: expected at least two adapters to choose among, got {', '.join(names) or 0}")
        for name in names:
            bank[name]
        self.bank, self.names = bank, list(names)
        self.summary = MeanEmbedding(bank.model) if summary is None else summary
        self.gate = nn.Linear(_embeddings(bank.model).shape[1] if width is None else width, len(names))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.gate.to(next(bank.model.parameters()).device)

    def forward(self, *args: Any, how: How = "soft", **inputs: Any) -> Tensor:
        """The weights of the adapters, shape ``(rows, names)``, from what the model is called with.

        Args:
            *args: of the model.
            **inputs: of the model.
            how: ``soft``: as the gate says; ``hard``: all for the adapter of the largest weight; ``uniform``: equal.
        """
        with torch.no_grad():
            u = self.summary(*args, **inputs).float()
        # Without a scale of its own, so that one rate of learning suits every backbone.
        pi = self.gate(F.layer_norm(u, u.shape[-1:])).softmax(1)
        if how == "uniform":
            return torch.full_like(pi, 1 / len(self.names))
        return F.one_hot(pi.argmax(1), len(self.names)).to(pi.dtype) if how == "hard" else pi

    def routing(
        self, *args: Any, head: str | Sequence[str | None] | None, how: How = "soft", **inputs: Any
    ) -> AbstractContextManager[None]:
        """A context in which the model computes this input with the mixture, and with the head of an adapter."""
        return self.bank.blend(self.names, self(*args, how=how, **inputs), head)


class Within(nn.Module):
    """A model that computes inside of a context.

    Args:
        model: the model.
        context: makes the context from what the model is called with.
    """

    def __init__(self, model: nn.Module, context: Callable[..., AbstractContextManager[None]]) -> None:
        super().__init__()
        self.model, self.context, self.training = model, context, model.training

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """What the model computes."""
        with self.context(*args, **inputs):
            return self.model(*args, **inputs)


def routed(router: Router, head: str, how: How = "soft") -> Within:
    """The model of a bank as one task sees it: with its own head, and adapters by a router."""
    return Within(router.bank.model, partial(router.routing, head=head, how=how))


def with_head(bank: AdapterBank, name: str, head: str) -> Within:
    """The model of a bank with the updates of one adapter and the head of another."""

    def context(*args: Any, **inputs: Any) -> AbstractContextManager[None]:
        first: Tensor = next(iter([*args, *inputs.values()]))
        return bank.blend([name], torch.ones(len(first), 1, device=first.device), head)

    return Within(bank.model, (lambda *_, **__: bank.use(name)) if name == head else context)


class MeanEmbedding:
    """The mean of a text's token embeddings over the positions that are not padding: what words there are.

    Args:
        model: with ``get_input_embeddings``, as all of transformers' models have it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.embeddings = _embeddings(model)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        """From ``(rows, positions)`` to ``(rows, width)``."""
        mask = attention_mask[..., None].to(self.embeddings.dtype)
        return (F.embedding(input_ids, self.embeddings) * mask).sum(1) / mask.sum(1).clamp(min=1)


def _embeddings(model: nn.Module) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return weight


def train(router: Router, problems: Mapping[str, Problem], steps: int, *, lr: float = 1e-2) -> list[float]:
    """Train the gate on the rows that the tasks fit, a batch of each in turn; nothing else has a gradient.

    The model computes in evaluation mode: there is no dropout, since none of it is trained.

    Args:
        router: the gate.
        problems: a task for each adapter, under its name; their own models are not used.
        steps: of AdamW.
        lr: its rate, which falls to 0 linearly.

    Returns:
        The loss at every step.

    Raises:
        NonFiniteLossError: if a loss is not finite.
    """
    router.bank.model.eval()
    parameters = list(router.gate.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for _, (name, batch) in zip(range(steps), _in_turn(problems), strict=False):
        loss = problems[name].loss(routed(router, name), batch)
        if not loss.isfinite():
            raise NonFiniteLossError(f"the loss of {name} is {loss.item()}: lower the rate of the router, lr={lr}")
        optimizer.zero_grad()
        loss.backward(inputs=parameters)  # factors and heads are left without a gradient
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def _in_turn(problems: Mapping[str, Problem]) -> Iterator[tuple[str, Batch]]:
    """Batches of the tasks in turn, each from the beginning again when it is at its end."""
    loaders = {name: problem.datamodule.train_dataloader() for name, problem in problems.items()}
    streams = {name: iter(loader) for name, loader in loaders.items()}
    while True:
        for name in problems:
            batch = next(streams[name], None)
            if batch is None:
                streams[name] = iter(loaders[name])
                batch = next(streams[name])
            yield name, batch


def compare(router: Router, problems: Mapping[str, Problem], split: str = "dev") -> dict[str, dict[str, Scores]]:
    """Every task with its own adapter, by the router in each way, and with the adapter of every other task.

    Returns:
        By task: the scores of ``own``, ``soft``, ``hard``, ``uniform``, and ``as NAME`` for the others' adapters. The
        head is the task's own in all of them.
    """
    found: dict[str, dict[str, Scores]] = {}
    for name, problem in problems.items():
        models = {"own": with_head(router.bank, name, name)}
        models |= {how: routed(router, name, how) for how in HOWS}
        models |= {f"as {other}": with_head(router.bank, other, name) for other in router.names if other != name}
        found[name] = {way: problem.scores({split: evaluate(problem, model, split)}) for way, model in models.items()}
    return found


def weights_on(router: Router, problem: Problem, split: str = "dev") -> Tensor:
    """The weights of the adapters for every row of a split, shape ``(rows, names)``, in the order of the rows."""
    return evaluate(problem, _Weights(router), split).logits


class _Weights(nn.Module):
    """In place of a model: its logits are the weights of a router."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """The weights, as a model of transformers gives logits."""
        return SimpleNamespace(logits=self.router(*args, **inputs))
