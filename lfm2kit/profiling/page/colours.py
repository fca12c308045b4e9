"""Colours of kinds of blocks and of backends, the same in all pictures of a page."""

from __future__ import annotations

from collections.abc import Iterable

# Okabe and Ito's palette, which people who see few colours can tell apart, and three greys.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f",
    "#b0b0b0", "#505050",
)  # fmt: skip
KINDS = ("conv", "attn", "experts", "mlp", "router", "head", "norm", "embed", "rows", "moe")


def of_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """Return a colour for each kind; those that the page does not know share the last one."""
    known = dict(zip(KINDS, PALETTE, strict=True))
    return {kind: known.get(kind, PALETTE[-1]) for kind in dict.fromkeys(kinds)}
