"""Colours of kinds of blocks and of backends, the same in all pictures of a page."""

from __future__ import annotations

from collections.abc import Iterable

from lfm2kit.profiling.marks import WAIT

# Okabe and Ito's palette, which people who see few colours can tell apart, three greys, and two
# colours for what travels between ranks.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f",
    "#b0b0b0", "#505050", "#a5673f", "#999933",
)  # fmt: skip
KINDS = (
    "conv", "attn", "experts", "mlp", "router", "head", "norm", "embed", "rows", "moe", "exchange",
    "sending",
)  # fmt: skip
UNKNOWN, WAITS = "#505050", "#ff9d9d"


def of_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """Return a colour for each kind; all waits share one, and all kinds that are not known."""
    known = dict(zip(KINDS, PALETTE, strict=True))
    return {
        kind: WAITS if kind.startswith(WAIT) else known.get(kind, UNKNOWN)
        for kind in dict.fromkeys(kinds)
    }
