r"""A weight-sharing super-net: one training, many plans to choose from.

Components of a module are kept in order, and a plan of ranks r uses the first :math:`r_i` of module i. Every step
descends the mean loss of several plans (the sandwich rule of Yu & Huang, "Universally slimmable networks and improved
training techniques", ICCV 2019),

.. math:: L = \frac{1}{n + 2} \left( \ell(\text{largest}) + \ell(\text{smallest})
          + \sum_{j=1}^{n} \ell(\text{random}_j) \right)

so that the first components learn to do without the later ones, and any plan can be measured without training it: the
largest plan has the most of every module, the smallest rank 1, and random plans spend the budget, since it is plans of
this cost that will be compared. Without their distillation from the largest: the labels teach every plan.

While it trains, the model that is evaluated is that of uniform ranks at the budget. After the training a searcher
measures plans on the held-out slice, a forward pass each, and the best is kept, with the weights of the super-net. They
have served many plans, and the plan that was chosen is worth more when it is trained alone: that is
``retrain=found``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from autolora.errors import ConfigError
from autolora.plan import RankPlan
from autolora.search.measure import Measurements, search_at_random
from autolora.search.space import Levels, PlanSpace
from autolora.strategies.base import Batch, Evaluate, LossFn, Strategy, StrategyOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autolora.adapters import Adapters, AdapterSettings


class SearchOptions(StrategyOptions):
    """What every search is told.

    ``evaluations``: how many plans are measured, the uniform one included. ``objective``: what is measured, the
    primary metric or the (negative) loss; ``heldout_rows``: on how many rows of the held-out slice, the same for all
    plans, ``None`` for every row, and at least 3, since any two correlate. ``price``: what the parameters of the
    largest plan cost, in units of the objective. ``min_rank`` and ``step``: of the grid of ranks. ``random_plans``: n
    of the sandwich rule.
    """

    evaluations: int = Field(default=200, ge=1)
    objective: Literal["loss", "metric"] = "loss"
    heldout_rows: int | None = Field(default=256, ge=3)
    price: float = Field(default=0.01, ge=0)
    min_rank: int = Field(default=0, ge=0)
    step: int = Field(default=1, ge=1)
    random_plans: int = Field(default=2, ge=0)


class LearnedSearchOptions(SearchOptions):
    """``against_random``: also measure as many random plans afterwards as the search has measured, only to say whether
    it beat them.
    """

    against_random: bool = True


SearchT = TypeVar("SearchT", bound=SearchOptions)


class SuperNet(Strategy[SearchT]):
    """Base class of strategies that measure plans in a super-net; a searcher has to implement :meth:`search`.

    Attributes:
        space: the plans to choose from, from :meth:`attach` on.
        seed: of everything that is drawn, from :meth:`attach` on.
        measured: the plans that were measured, from :meth:`finalize` on.
        at_random: those of the comparison, from :meth:`compare` on.
    """

    space: PlanSpace
    seed: int
    measured: Measurements | None = None
    at_random: Measurements | None = None

    def search(self, measured: Measurements) -> None:
        """Measure plans until ``measured.done``, or until there is nothing more to try."""
        raise NotImplementedError(f"{type(self).__name__} has to say which plans it measures: implement search()")

    def initial_plan(self) -> RankPlan:
        """The largest plan on the grid.

        Raises:
            ConfigError: if ``max_rank`` is below ``min_rank``.
            PlanError: if the budget does not pay for ``min_rank`` everywhere.
        """
        options = self.options
        if self.max_rank < options.min_rank:
            raise ConfigError(f"max_rank={self.max_rank}: expected at least strategy.min_rank={options.min_rank}")
        self.space = PlanSpace(self.largest, self.allowance, min_rank=options.min_rank, step=options.step)
        return self.space.plan(self.space.top)

    def attach(self, model: nn.Module, settings: AdapterSettings) -> Adapters:
        """Adapters of the largest ranks; where no plan is tried, those of the uniform plan are on."""
        adapters = super().attach(model, settings)
        self.seed, self.drawn = settings.seed, 0
        adapters.keep_first(self.space.plan(self.space.uniform()))
        return adapters

    def training_loss(self, model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor:
        """The mean loss of the largest, the smallest, and some random plans."""
        import torch

        losses = []
        for plan in self.sandwich():
            with self.adapters.masked(plan):
                losses.append(loss_fn(model, batch))
        return torch.stack(losses).mean()

    def sandwich(self) -> list[RankPlan]:
        """The plans of the next step.

        Each draw has a random stream of its own, named by its number, so that the number is all there is to remember.
        """
        levels = [self.space.top, self.space.smallest()]
        for _ in range(self.options.random_plans):
            levels.append(self.space.random(random.Random(f"{self.seed}/sandwich/{self.drawn}")))
            self.drawn += 1
        return [self.space.plan(one) for one in levels]

    @property
    def scored_by(self) -> Literal["metric", "loss"]:  # type: ignore[override]
        """The objective."""
        return self.options.objective

    @property
    def scored_rows(self) -> int | None:  # type: ignore[override]
        """As many as the options say."""
        return self.options.heldout_rows

    @property
    def settled(self) -> bool:
        """Only after the search: while it trains, every plan is still possible."""
        return self.measured is not None

    def finalize(self, evaluate: Evaluate) -> RankPlan:
        """Measure the uniform plan and those that the searcher comes up with, and keep the best."""
        self.measured = self._measurements(evaluate, self.options.evaluations)
        self.search(self.measured)
        plan = self.space.plan(self.measured.best)
        self.adapters.keep_first(plan)
        return plan

    def compare(self, evaluate: Evaluate) -> None:
        """Measure as many random plans as the search has measured, where the options ask for it."""
        if isinstance(self.options, LearnedSearchOptions) and self.options.against_random and self.measured:
            self.at_random = self._measurements(evaluate, len(self.measured.scores), self.measured.scores)
            search_at_random(self.at_random, self.seed)

    def _measurements(
        self, evaluate: Evaluate, evaluations: int, known: Mapping[Levels, float] | None = None
    ) -> Measurements:
        return Measurements(self.space, evaluate, evaluations=evaluations, price=self.options.price, known=known)

    @property
    def notes(self) -> list[str]:
        """Whether the search has beaten uniform ranks, and random plans where it was compared with them."""
        found, drawn = self.measured, self.at_random
        if found is None:
            return []
        sign, what = (-1, "loss") if self.options.objective == "loss" else (1, "score")

        def said(measured: Measurements, levels: Levels) -> str:
            return f"{sign * measured.scores[levels]:.6g} at {self.space.plan(levels).cost:,} {self.largest.unit}"

        spent = len(found.scores) >= found.evaluations
        few = "" if spent else f" (of {found.evaluations}: the search came up with no others)"
        beaten = found.scores[found.best] > found.scores[found.uniform]
        notes = [
            f"{len(found.scores)} plans measured in the super-net{few}: held-out {what} {said(found, found.best)} for "
            "the plan of the highest worth, "
            f"{said(found, found.uniform)} for uniform ranks{'' if beaten else '; the search did not beat them'}"
        ]
        if found.undefined:
            notes.append(
                f"the score of {found.undefined} of these plans was undefined (constant predictions or labels)"
            )
        if drawn is not None:
            higher = found.scores[found.best] > drawn.scores[drawn.best]
            beat = higher and found.worth(found.best) > drawn.worth(drawn.best)
            verdict = "beat" if beat else "did not beat"
            notes.append(
                f"{len(drawn.scores)} random plans: {said(drawn, drawn.best)} for the best; the search {verdict} them"
            )
        return notes

    def state_dict(self) -> dict[str, Any]:
        """How many plans were drawn."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on drawing."""
        self.drawn = state["drawn"]
