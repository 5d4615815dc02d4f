"""Strategies in loops that are not ours. Nothing here is imported by the rest of the package."""
