r"""Ranks from random matrix theory: a weight with many directions above its own noise gets a large rank.

Each pretrained weight is taken for independent noise, whose level is estimated from the median of its singular values,
and some directions that training has added. A module counts the directions whose singular value is above

``hard``
    the optimal hard threshold of Gavish & Donoho (IEEE Trans. Information Theory 2014): those that are worth keeping;
``edge``
    the edge of the Marchenko-Pastur law, with the allowance for matrices of this size: all that noise would not show.

Ranks are proportional to the counts. (Martin & Mahoney, JMLR 2021, section 3, read the spectra of trained weights in
this way; :mod:`autolora.theory.random_matrix` has the equations. That a weight which has learned much wants a large
update is the hypothesis.)
"""

from __future__ import annotations

from typing import Literal

from autolora.plan import RankPlan
from autolora.strategies.base import Planned, StrategyOptions
from autolora.strategies.spectral import frozen_weight, scaled


class Options(StrategyOptions):
    """``threshold``: the singular value that a direction has to be above to be counted."""

    threshold: Literal["hard", "edge"] = "hard"


class MarchenkoPastur(Planned[Options]):
    """Ranks proportional to the signal directions of each weight, scaled as by
    :func:`autolora.strategies.spectral.scaled`: uniform where no weight has any, as at random initialisation.
    """

    Options = Options

    def plan(self) -> RankPlan:
        """The counts, scaled."""
        from autolora.theory.random_matrix import signal_directions
        from autolora.theory.spectra import spectrum_of

        spectra = {name: spectrum_of(frozen_weight(self.model, name)) for name in self.largest}
        self.signals = {name: signal_directions(spectra[name], self.options.threshold) for name in self.largest}
        return scaled(self.signals, self.largest, self.allowance)

    @property
    def notes(self) -> list[str]:
        """Whether nothing was found."""
        # A resumed run attaches too, so the counts are there.
        return [] if any(self.signals.values()) else ["no weight has a direction above its noise: ranks are uniform"]
