"""Random search: as many plans as the others may measure, each drawn by itself; what a cleverer search has to beat.

Bergstra & Bengio, "Random search for hyper-parameter optimization", JMLR 13, 2012. What searches are praised for is
often the merit of their space: Li & Talwalkar, "Random search and reproducibility for neural architecture search",
UAI 2019.
"""

from __future__ import annotations

from autolora.search.measure import Measurements, search_at_random
from autolora.search.supernet import SearchOptions, SuperNet


class Options(SearchOptions):
    """Nothing but what every search is told."""


class RandomSearch(SuperNet[Options]):
    """Measures plans whose shares of the budget are uniform on the simplex."""

    Options = Options

    def search(self, measured: Measurements) -> None:
        """Draw until every evaluation is spent."""
        search_at_random(measured, self.seed)
