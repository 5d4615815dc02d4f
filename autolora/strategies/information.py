r"""Ranks from the information bottleneck: as many directions of a module's inputs as are worth their bits.

Before training, the inputs X of every module on a few hundred examples are pooled to one row for each example: their
mean over tokens without padding, which is what the module reads of an example as a whole. A code :math:`Z_r` of rank r
is the row's coordinates along its first r principal directions (:func:`autolora.theory.information.codes_of` says why
these). With Y the examples' labels, and the matrix-based estimates of mutual information of
:mod:`autolora.theory.information`, the module wants the r that minimises the Lagrangian of the bottleneck (Tishby,
Pereira & Bialek, arXiv physics/0004057, section 3)

.. math:: I(X; Z_r) - \beta \, I(Z_r; Y),

0 at r = 0, over r = 1, 2, 3, 4, 6, 8, 12, ... up to all directions; :math:`I(Z_r; Y)` is taken in excess of what
permuted labels get. Without ``beta`` the price is the one at which all modules together are indifferent between keeping
everything and nothing (:func:`autolora.theory.information.price_of_labels`), and where the inputs say no more of the
labels than of every permutation of them, ranks are uniform, and a note says so. Ranks are proportional to the optima.

What a module reads says what can be known at that place of the pretrained model, before anything is learned; that a
module whose inputs take many directions to tell the labels wants a large update is the hypothesis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from autolora.errors import PlanError
from autolora.plan import RankPlan
from autolora.strategies.base import Batch, Evaluate, LossFn, Strategy, StrategyOptions
from autolora.strategies.eva import inputs_of
from autolora.strategies.spectral import scaled

if TYPE_CHECKING:
    from torch import Tensor

    from autolora.adapters import Adapters
    from autolora.config import Conflict, RunConfig
    from autolora.theory.information import Code


_IGNORED = -100
"""The label of places that a loss passes over, in torch and transformers."""


class Options(StrategyOptions):
    """``examples`` of training data to look at, fewer where the data have fewer; ``beta``, the bits about the inputs
    that a bit about the labels is worth; ``permutations`` of the labels, which say what is chance.

    The time grows with the third power of ``examples``: 256 take 10 seconds of one core for a BERT of six layers.
    """

    examples: int = Field(default=256, ge=2)
    beta: float | None = Field(default=None, ge=0)
    permutations: int = Field(default=9, ge=2)

    def conflicts_with(self, config: RunConfig) -> Iterator[Conflict]:
        """Labels that a batch carries have to be those of the loss."""
        from autolora.config import Conflict

        if config.task.name == "planted_encoder":
            message = (
                "strategy=information: task=planted_encoder is to fit a teacher, and not the labels of its sentences, "
                "which the strategy would look at: choose another"
            )
            yield Conflict(("strategy.name", "task.name"), message)


class Information(Strategy[Options]):
    """Ranks proportional to the rank at which each module's bottleneck is best, scaled as by
    :func:`autolora.strategies.spectral.scaled`.

    Attributes:
        silent: whether the inputs were found to say nothing about the labels.
        codes, beta: what was found, and the multiplier, from :meth:`prepare` on.
    """

    Options = Options
    silent = False
    codes: dict[str, Code]
    beta: float | None

    def prepare(self, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        """Look at the inputs and the labels, and remove the components that the budget does not pay for.

        Raises:
            NonFiniteLossError: if the model gives no finite loss to begin with.
            PlanError: if batches have no label for each example.
        """
        from autolora.adapters import compact
        from autolora.theory.information import price_of_labels

        self.codes = codes_of_modules(self.adapters, batches, loss_fn, self.options)
        given = self.options.beta
        self.beta = price_of_labels(list(self.codes.values())) if given is None else given
        self.silent = self.beta is None
        self.adapters.keep_first(scaled(self.optima(), self.largest, self.allowance))
        compact(self.adapters)

    def optima(self) -> dict[str, int]:
        """The rank at which the criterion of each module is smallest; 0 where it has no code, or nobody has a price."""
        beta, codes = self.beta, self.codes
        return {name: codes[name].optimum(beta) if beta is not None and name in codes else 0 for name in self.largest}

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """The plan that the information gave."""
        return self.adapters.active_plan()

    @property
    def notes(self) -> list[str]:
        """Whether there was nothing to go by."""
        told = "what modules read says no more about the labels than about permutations of them: ranks are uniform"
        return [told] if self.silent else []

    def state_dict(self) -> dict[str, Any]:
        """What the note needs; the ranks are in the parameters."""
        return {"silent": self.silent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.silent = bool(state["silent"])


def codes_of_modules(
    adapters: Adapters, batches: Iterable[Batch], loss_fn: LossFn, options: Options
) -> dict[str, Code]:
    """What codes of each module's inputs say, for modules that are called with a row or a sequence for each example.

    Raises:
        NonFiniteLossError: if the model gives no finite loss to begin with.
        PlanError: if batches have no label for each example.
    """
    import torch

    from autolora.theory.information import codes_of, label_gram, permutations_of

    parts, labels = _look(adapters, batches, loss_fn, options.examples)
    try:
        gram = label_gram(labels)
    except ValueError as error:
        raise PlanError(f"strategy=information: {error}: choose another strategy") from None
    permuted = permutations_of(gram, options.permutations)
    computed: dict[tuple[int, ...], Code | None] = {}
    found = {}
    for name, tensors in parts.items():
        key = tuple(map(id, tensors))
        if key not in computed:
            computed[key] = (
                codes_of(torch.cat(tensors), gram, permuted) if sum(map(len, tensors)) == len(gram) else None
            )
        if (code := computed[key]) is not None:
            found[name] = code
    return found


def _look(
    adapters: Adapters, batches: Iterable[Batch], loss_fn: LossFn, examples: int
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """The pooled inputs of every module, a part for each batch, and the labels; who reads one tensor shares parts."""
    import torch

    parts: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    for batch in first_examples(batches, examples):
        labels.append(batch["labels"])
        pooled: dict[tuple[int, ...], Tensor | None] = {}
        for name, tensors in inputs_of(adapters, batch, loss_fn).items():
            key = tuple(map(id, tensors))
            if key not in pooled:
                pooled[key] = pool(tensors, batch.get("attention_mask"), len(labels[-1]))
            if (rows := pooled[key]) is not None:
                parts.setdefault(name, []).append(rows)
    return parts, torch.cat(_as_wide(labels))


def _as_wide(labels: list[Tensor]) -> list[Tensor]:
    """Labels of every batch; those for each token are padded to the longest sequence, with what no loss counts."""
    from torch.nn import functional as F

    if labels[0].dim() < 2 or labels[0].is_floating_point():
        return labels
    longest = max(part.shape[1] for part in labels)
    return [F.pad(part, (0, longest - part.shape[1]), value=_IGNORED) for part in labels]


def first_examples(batches: Iterable[Batch], examples: int) -> Iterator[Batch]:
    """Batches up to so many examples, the last one cut.

    Raises:
        PlanError: if one has no labels.
    """
    left = examples
    for batch in batches:
        if batch.get("labels") is None:
            raise PlanError("strategy=information: expected labels in every batch, got none: choose another strategy")
        count = len(batch["labels"])
        yield batch if count <= left else {key: value[:left] for key, value in batch.items()}
        left -= count
        if left <= 0:
            return


def pool(tensors: list[Tensor], mask: Tensor | None, count: int) -> Tensor | None:
    """One row for each example: the mean over whatever lies between the first and the last dimension, and over calls.

    Args:
        tensors: inputs of a module, one for each call, ``(count, ..., n)``. Others, such as position embeddings that
            all examples share, are passed over.
        mask: 1 for tokens and 0 for padding, ``(count, length)``; it is for inputs ``(count, length, n)`` alone.
        count: of examples.

    Returns:
        ``(count, n)``, or ``None`` if there is no such input.
    """
    import torch

    rows = []
    for tensor in (tensor for tensor in tensors if tensor.dim() >= 2 and len(tensor) == count):
        weights = torch.ones(tensor.shape[:-1], dtype=torch.double, device=tensor.device)
        if mask is not None and tensor.shape[:-1] == mask.shape:
            weights = mask.double()
        weights, flat = weights.reshape(count, -1), tensor.double().reshape(count, -1, tensor.shape[-1])
        rows.append(torch.einsum("et,etn->en", weights, flat) / weights.sum(1, keepdim=True).clamp(min=1))
    return torch.stack(rows).mean(0) if rows else None
