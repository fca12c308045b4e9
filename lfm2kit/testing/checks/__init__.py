"""All checks, by subject.  `CHECKS` maps their ids to them, in the order in which they run."""

from lfm2kit.testing.checks import (  # noqa: I001 (the order in which they run)
    contract,
    results,
    order,
    values,
    feed_forward,
    router,
    router_limits,
    non_finite,
    attention,
    rows,
    sizes,
    state,
    around,
    crossings,
    channels,
    picking,
    whole_model,
)
from lfm2kit.testing.checks.registry import CHECKS, Check

__all__ = [
    "CHECKS",
    "Check",
    "around",
    "attention",
    "channels",
    "contract",
    "crossings",
    "feed_forward",
    "non_finite",
    "order",
    "picking",
    "results",
    "router",
    "router_limits",
    "rows",
    "sizes",
    "state",
    "values",
    "whole_model",
]
