"""Refuses constraints that `llguidance` would compile for hours, or with more memory than there is.

Its limits count steps of a regex, but one step of an intersection of regexes takes time and memory
that double with each of them, and a `multipleOf` takes a state for each remainder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

from lfm2kit.errors import Lfm2kitError
from lfm2kit.text import shortened

INTERSECTED = 8  # regexes
REMAINDERS = 100_000

_JSON = "%json"  # what a schema within a grammar follows


def check_grammar(rules: str) -> None:
    """Raise `Lfm2kitError` if a grammar, or a schema in it, could cost too much."""
    if rules.lstrip().startswith("{"):
        raise Lfm2kitError("the grammar is JSON; expected rules, the first of them named start")
    if (count := rules.count("&")) > INTERSECTED:
        raise Lfm2kitError(f"the grammar has {count} signs &; lfm2kit takes up to {INTERSECTED}")
    for schema in _schemas_in(rules):
        check_schema(schema)


def check_schema(schema: Any) -> None:
    """Raise `Lfm2kitError` if a JSON schema could cost too much."""
    nodes = list(_nodes(schema))
    regexes = {
        (key, node[key])
        for node in nodes
        for key in ("pattern", "format")
        if isinstance(node.get(key), str)
    }
    if len(regexes) > INTERSECTED and any(_intersects(node) for node in nodes):
        raise Lfm2kitError(
            f"the JSON schema has {len(regexes)} patterns and formats; lfm2kit takes up to "
            f"{INTERSECTED} where allOf, or $ref, anyOf or oneOf beside others, combines schemas"
        )
    _check_multiples([node["multipleOf"] for node in nodes if "multipleOf" in node])


def _schemas_in(rules: str) -> Iterator[Any]:
    for after in rules.split(_JSON)[1:]:
        try:
            yield json.JSONDecoder().raw_decode(after.lstrip())[0]
        except (ValueError, RecursionError) as error:
            said = shortened(str(error))
            raise Lfm2kitError(f"what follows {_JSON} in the grammar is not JSON: {said}") from None


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects of a schema."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left += value.values()
        elif isinstance(value, list):
            left += value


def _intersects(node: dict[str, Any]) -> bool:
    """Return whether a value must obey several schemas at this node."""
    others = [key for key in ("$ref", "anyOf", "oneOf") if key in node]
    own = any(key in node for key in ("pattern", "format"))
    return "allOf" in node or len(others) + own > 1


def _check_multiples(values: Iterable[Any]) -> None:
    """Raise `Lfm2kitError` if there are too many remainders; zeros at the end need none."""
    numbers = [value for value in values if isinstance(value, int | float) and value > 0]
    if not numbers:
        return
    if max(numbers) < 1e15:
        decimals = [Decimal(str(number)) for number in numbers]
        places = max(-int(decimal.as_tuple().exponent) for decimal in decimals)
        common = str(math.lcm(*(int(decimal.scaleb(places)) for decimal in decimals)))
        if len(digits := common.rstrip("0")) < 20 and int(digits) <= REMAINDERS:
            return
    raise Lfm2kitError(
        "the JSON schema's values of multipleOf have a common multiple of more than "
        f"{REMAINDERS}, zeros at its end aside; lfm2kit takes up to that"
    )
