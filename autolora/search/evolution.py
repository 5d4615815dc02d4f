r"""Evolution of plans: a :math:`(\mu + 1)` evolution strategy in a super-net.

A population of :math:`\mu` plans, at first the uniform one and others drawn at random and around it. Again and again a
child is made of one or two of them, repaired to the budget, measured, and the best :math:`\mu` of all live on (the
steady state among evolution strategies: Beyer & Schwefel, "Evolution strategies: a comprehensive introduction", Natural
Computing 1, 2002). Measurements in a super-net that is not trained any more do not vary, so that a good plan has no
reason to die. That evolution suits weight-sharing super-nets: Guo et al., "Single path one-shot neural architecture
search with uniform sampling", ECCV 2020.
"""

from __future__ import annotations

import random

from pydantic import Field

from autolora.search.measure import Measurements
from autolora.search.supernet import LearnedSearchOptions, SuperNet


class Options(LearnedSearchOptions):
    """``population``: plans that live. ``crossover``: share of children with two parents. ``mutations``: modules whose
    level a mutation moves, at the cost or to the profit of others.
    """

    population: int = Field(default=5, ge=1)
    crossover: float = Field(default=0.5, ge=0, le=1)
    mutations: int = Field(default=3, ge=1)


class Evolution(SuperNet[Options]):
    """Measures children of the best plans so far."""

    Options = Options

    def search(self, measured: Measurements) -> None:
        """Evolve until every evaluation is spent."""
        evolve(measured, self.options, self.seed)


def evolve(measured: Measurements, options: Options, seed: int) -> None:
    """Measure plans of a population that evolves.

    Args:
        measured: measures plans and remembers them.
        options: of the evolution.
        seed: of the draws.
    """
    rng, space = random.Random(f"{seed}/evolution"), measured.space
    living = {measured.uniform: measured(measured.uniform)}
    for i in range(1, options.population):
        if not measured.done:
            far = space.random(rng) if i % 2 else space.mutated(measured.uniform, rng, len(space.names) // 3)
            living[far] = measured(far)
    while not measured.done:
        parents = list(living)
        child = rng.choice(parents)
        if rng.random() < options.crossover:
            child = space.crossed(child, rng.choice(parents), rng)
        child = space.mutated(child, rng, options.mutations)
        living[child] = measured(child)
        if len(living) > options.population:
            del living[min(living, key=living.__getitem__)]
