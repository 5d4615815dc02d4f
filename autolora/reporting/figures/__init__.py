"""Figures of a report, each as SVG and PNG, and as the same SVG in a page, whose marks say what they are."""

from autolora.reporting.figures.canvas import Figure
from autolora.reporting.figures.ranks import found_against_true, rank_heatmaps
from autolora.reporting.figures.scores import budget_curves, panels, score_against
from autolora.reporting.figures.training import over_training

__all__ = [
    "Figure",
    "budget_curves",
    "found_against_true",
    "over_training",
    "panels",
    "rank_heatmaps",
    "score_against",
]
