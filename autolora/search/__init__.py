"""Strategies that try many plans: a super-net that is trained once, and searchers that measure plans in it.

``strategy=rl_search``, ``evolution`` and ``random_search`` share everything but the searcher: the super-net of
:mod:`autolora.search.supernet`, the plans of :mod:`autolora.search.space` and the bounded, memoised measurements of
:mod:`autolora.search.measure`. So they compare at an equal number of evaluations.
"""
