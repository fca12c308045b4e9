"""The heat map of experts: how many tokens chose each expert of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lfm2kit.profiling.page.picture import Picture
from lfm2kit.profiling.page.svg import picture, rect, text

WIDTH, LEFT, ROW, TOP = 900, 110, 16, 20


def heat(loads: Mapping[int, Sequence[int]]) -> Picture:
    """Return the picture of the tokens by layer and expert."""
    experts = max(map(len, loads.values()))
    most = max(max(load) for load in loads.values()) or 1
    cell = (WIDTH - LEFT - 90) / experts
    shapes = [text(LEFT, 12, f"expert 0 to {experts - 1}"), text(WIDTH - 84, 12, "max / mean")]
    rows = []
    for i, (layer, load) in enumerate(loads.items()):
        y = TOP + i * ROW
        shapes.append(text(LEFT - 6, y + 12, f"layer {layer}", text_anchor="end"))
        for expert, tokens in enumerate(load):
            tip = f"layer {layer}, expert {expert}: {tokens} tokens"
            x, shade = LEFT + expert * cell, 0.04 + 0.96 * tokens / most
            shapes.append(rect(x, y, cell - 1, ROW - 1, tip, class_="heat", opacity=shade))
        ratio = max(load) * len(load) / max(sum(load), 1)
        shapes.append(text(WIDTH - 84, y + 12, f"{ratio:.2f}"))
        rows.append((str(layer), f"{ratio:.2f}", ", ".join(map(str, load))))
    return Picture(
        "Experts",
        "How many tokens of a forward chose each expert: the darker, the more. Beside each layer "
        "is how much more the most chosen expert has than the mean.",
        picture(WIDTH, TOP + ROW * len(loads) + 4, "Tokens by layer and expert", shapes),
        ("layer", "max / mean", "tokens by expert"),
        rows,
    )
