"""Reads what is to be simulated: "ranks=1..256,per-node=4,link=25Gbit,n=16..1024"."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from lfm2kit.building.byte_counts import parse_bytes
from lfm2kit.errors import Lfm2kitError, Option, choices

EXAMPLE = "ranks=1..256,per-node=4,link=25Gbit,n=16..1024"
MOST_RANKS = 1024
MOST_TOKENS = 2**18  # of all samples
MOST_JOBS = 4096  # numbers of ranks times numbers of samples
BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
BY_LOAD, IN_ORDER = "load", "order"
NUMBERS = "numbers such as 4, 1/2/4 or 1..64, which are the powers of two from 1 to 64"


@dataclass(frozen=True, slots=True)
class Request:
    """The jobs to simulate, and the machines that they run on."""

    ranks: tuple[int, ...]
    n: tuple[int, ...]  # samples
    per_node: int = 1  # ranks on a machine
    link: float | None = None  # bytes per second between machines; None: as measured
    latency: float | None = None  # seconds of a message between machines; None: as measured
    tokens: int = 16  # of each sample
    overlap: float = 0.0  # share of an exchange that is hidden where there is enough to compute
    memory: int | None = None  # bytes that a rank may take for weights
    placement: str = BY_LOAD  # of experts on ranks, if there is a load; the others need none


def parsed(text: str) -> Request:
    """Return the request in a text; raise `Lfm2kitError` that says what is wrong with it."""
    given: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in READ or not equals:
            raise _wrong(item, f"expected KEY=VALUE; {choices(key, READ)}")
        name = key.replace("-", "_")
        if name in given:
            raise _wrong(item, f"{key} is given twice; give it once")
        given[name] = READ[key](item, value)
    for key in ("ranks", "n"):
        if key not in given:
            raise _wrong(text, f"{key} is missing, such as in {EXAMPLE}")
    request = Request(**given)
    _check(text, request)
    return request


def _check(text: str, request: Request) -> None:
    """Raise `Lfm2kitError` for numbers that do not go together, or are more than it can take."""
    if request.latency is not None and request.link is None:
        raise _wrong(text, "latency needs a link, such as link=25Gbit")
    tokens = max(request.n) * request.tokens
    if tokens > MOST_TOKENS:
        most = MOST_TOKENS // request.tokens
        raise _wrong(text, f"{tokens} tokens; lfm2kit simulates up to {MOST_TOKENS}: n={most}")
    if (jobs := len(request.ranks) * len(request.n)) > MOST_JOBS:
        raise _wrong(text, f"{jobs} jobs; lfm2kit simulates up to {MOST_JOBS} at once")


def _wrong(text: str, why: str) -> Lfm2kitError:
    return Lfm2kitError(Option("simulate", text), f": {why}")


def _numbers(most: int, item: str, value: str) -> tuple[int, ...]:
    """Return the numbers of a list, in ascending order and each once."""
    found = {number for part in value.split("/") for number in _range(item, part.strip(), most)}
    return tuple(sorted(found))


def _range(item: str, text: str, most: int) -> Iterator[int]:
    """Yield a number, or the powers of two from one number to another."""
    ends = re.fullmatch(r"([0-9]{1,9})(?:\.\.([0-9]{1,9}))?", text)
    if ends is None:
        raise _wrong(item, f"expected {NUMBERS}")
    first, last = int(ends[1]), int(ends[2] or ends[1])
    if not 1 <= first <= last <= most:
        raise _wrong(item, f"expected numbers from 1 to {most}, the smaller one first")
    if ends[2] is None:
        yield first
        return
    powers = (2**i for i in range(last.bit_length()))
    within = [one for one in takewhile(lambda one: one <= last, powers) if one >= first]
    if not within:
        ends_alone = "/".join(dict.fromkeys(ends.groups()))
        raise _wrong(item, f"there is no power of two from {first} to {last}; give {ends_alone}")
    yield from within


def _whole(most: int, item: str, value: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value) or not 1 <= int(value) <= most:
        raise _wrong(item, f"expected a whole number from 1 to {most}")
    return int(value)


def _link(item: str, value: str) -> float:
    """Return bytes per second."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([kmgt]?)bit", value.lower())
    if found is None or float(found[1]) == 0:
        raise _wrong(item, "expected bits per second, such as 25Gbit or 200Mbit")
    return float(found[1]) * BITS[found[2]] / 8


def _latency(item: str, value: str) -> float:
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ns|us|ms|s)", value.lower())
    if found is None or float(found[1]) == 0:
        raise _wrong(item, "expected a time, such as 20us")
    return float(found[1]) * SECONDS[found[2]]


def _share(item: str, value: str) -> float:
    if not re.fullmatch(r"[0-9](?:\.[0-9]{1,9})?", value) or float(value) > 1:
        raise _wrong(item, "expected a share from 0 to 1, such as 0.8")
    return float(value)


def _memory(item: str, value: str) -> int:
    try:
        return parse_bytes(value)
    except ValueError:
        raise _wrong(item, "expected a size, such as 24GB or 24GiB") from None


def _placement(item: str, value: str) -> str:
    if value not in (BY_LOAD, IN_ORDER):
        raise _wrong(item, f"expected {BY_LOAD}, or {IN_ORDER} for experts in order of their ids")
    return value


READ: dict[str, Callable[[str, str], Any]] = {
    "ranks": partial(_numbers, MOST_RANKS),
    "per-node": partial(_whole, MOST_RANKS),
    "link": _link,
    "latency": _latency,
    "n": partial(_numbers, MOST_TOKENS),
    "tokens": partial(_whole, MOST_TOKENS),
    "overlap": _share,
    "memory": _memory,
    "placement": _placement,
}
