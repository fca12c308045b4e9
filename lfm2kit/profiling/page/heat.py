"""The heat map of experts: how many tokens chose each expert of each layer, and who has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lfm2kit.profiling.loads import Loads
from lfm2kit.profiling.page.picture import WIDTH, Picture
from lfm2kit.profiling.page.svg import line, picture, rect, text

LEFT, ROW, TOP = 110, 16, 20
RATIO = 84  # from the right: where a ratio begins


def heat(loads: Loads) -> Picture:
    """Return the picture of the tokens by layer and expert; experts of one rank are together."""
    experts = max(map(len, loads.experts.values()))
    most = max(max(load) for load in loads.experts.values()) or 1
    ratios = 2 if loads.ranks else 1
    cell = (WIDTH - LEFT - ratios * RATIO - 6) / experts
    shapes = list(_headings(loads, experts))
    for i, (layer, load) in enumerate(loads.experts.items()):
        y = TOP + i * ROW
        shapes.append(text(LEFT - 6, y + 12, f"layer {layer}", text_anchor="end"))
        owners = loads.owners.get(layer, [])
        for place, expert in enumerate(_in_order(load, owners)):
            of = f" of rank {owners[expert]}" if owners else ""
            tip = f"layer {layer}, expert {expert}{of}: {load[expert]} tokens"
            x, shade = LEFT + place * cell, 0.04 + 0.96 * load[expert] / most
            shapes.append(rect(x, y, cell - 1, ROW - 1, tip, class_="heat", opacity=shade))
        for place in _borders(load, owners):
            x = LEFT + place * cell - 0.5
            shapes.append(line(x, y - 1, x, y + ROW - 1, class_="border"))
        for number, ratio in enumerate(_ratios(loads, layer)):
            shapes.append(text(WIDTH - (ratios - number) * RATIO, y + 12, ratio))
    return Picture(
        "Experts",
        "How many tokens of a forward chose each expert: the darker, the more. Beside each layer "
        f"is how much more the most chosen expert has than the mean.{_of_ranks(loads)}",
        picture(WIDTH, TOP + ROW * len(loads.experts) + 4, "Tokens by layer and expert", shapes),
        _columns(loads),
        [_row(loads, layer) for layer in loads.experts],
    )


def _headings(loads: Loads, experts: int) -> Iterator[str]:
    yield text(LEFT, 12, f"expert 0 to {experts - 1}")
    names = ("max / mean", "of ranks") if loads.ranks else ("max / mean",)
    for number, name in enumerate(names):
        yield text(WIDTH - (len(names) - number) * RATIO, 12, name)


def _in_order(load: Sequence[int], owners: Sequence[int]) -> list[int]:
    """Return the experts, those of rank 0 first."""
    return sorted(range(len(load)), key=lambda e: owners[e] if owners else 0)


def _borders(load: Sequence[int], owners: Sequence[int]) -> Iterator[int]:
    """Yield the places where another rank's experts begin."""
    order = _in_order(load, owners) if owners else []
    for place in range(1, len(order)):
        if owners[order[place]] != owners[order[place - 1]]:
            yield place


def _ratios(loads: Loads, layer: int) -> Iterator[str]:
    yield _max_over_mean(loads.experts[layer])
    if loads.ranks:
        yield _max_over_mean(loads.ranks[layer])


def _max_over_mean(counts: Sequence[int]) -> str:
    return f"{max(counts) * len(counts) / max(sum(counts), 1):.2f}"


def _of_ranks(loads: Loads) -> str:
    if not loads.ranks:
        return ""
    drawn = "Lines divide the experts of different ranks. " if loads.owners else ""
    return f" {drawn}The last column is the same ratio for the rows that ranks computed."


def _columns(loads: Loads) -> tuple[str, ...]:
    more = ("of ranks", "rows by rank") if loads.ranks else ()
    return ("layer", "max / mean", *more, "tokens by expert")


def _row(loads: Loads, layer: int) -> tuple[str, ...]:
    more = (", ".join(map(str, loads.ranks[layer])),) if loads.ranks else ()
    load = ", ".join(map(str, loads.experts[layer]))
    return (str(layer), *_ratios(loads, layer), *more, load)
