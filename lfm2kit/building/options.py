"""The options of a model's set-up, each defined once: default, bounds, and what it means.

`lfm2kit.building.loading.set_up` takes them whole, and the command line makes its flags from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lfm2kit import bounds
from lfm2kit.building.plan import AUTO, Plan
from lfm2kit.errors import Lfm2kitError, Option

BACKEND_VARIABLE = "LFM2KIT_BACKEND"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _are_names(value: object) -> bool:
    return isinstance(value, (tuple, list)) and all(map(_is_name, value))


# What options that are not numbers must be, and how an error says it.
EXPECTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "model": (_is_text, "a path, or an embedded model's name, such as 'tiny'"),
    "backend": (_is_text, "a plan as text, such as 'auto'"),
    "plan": (lambda value: isinstance(value, (str, Path)), "the path of a TOML file"),
    "precision": (_is_name, "a name, such as 'fp32'"),
    "rewrites": (_are_names, "a tuple of names, such as ('NAME',)"),
}


@dataclass(frozen=True, slots=True)
class About:
    """A description of an option, for code that shows it or reads it from a text."""

    help: str
    default: str | None = None  # in words, where the value does not say it
    least: int | None = None  # of a whole number; None: the option is not a number
    most: int = bounds.COUNT
    metavar: str | None = None
    variable: str | None = None  # the environment variable that it may come from

    def check(self, name: str, value: object) -> None:
        """Raise `Lfm2kitError` if `value` is not a whole number within the bounds."""
        if self.least is None:
            return
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or value < self.least:  # type: ignore[operator]
            expected = f": expected a whole number of {self.least} or more, such as "
            raise Lfm2kitError(Option(name, value), expected, Option(name, self.least))
        if value > self.most:  # type: ignore[operator]
            raise Lfm2kitError(Option(name, value), f": lfm2kit takes up to {self.most}")


def option(default: Any, help: str, *, words: str | None = None, **about: Any) -> Any:
    """Return a dataclass field for an option; `words` describe the default, see `About`."""
    return field(default=default, metadata={"about": About(help, words, **about)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A choice of a model and its set-up.  Raises `Lfm2kitError` for values out of bounds."""

    model: str = option(
        "tiny",
        "Checkpoint folder, model.bin, TOML file of specs, or embedded model.",
        metavar="MODEL",
    )
    backend: str | None = option(
        None,
        "Which backend builds which block, such as auto, reference, 'auto,2-4.moe=reference' or "
        "'auto:bf16,head=auto:fp32'.",
        words="auto",
        metavar="PLAN",
        variable=BACKEND_VARIABLE,
    )
    plan: Path | None = option(None, "Read the plan from this TOML file instead.", metavar="FILE")
    precision: str = option(
        "fp32", "fp32, or another precision that the backends have.", metavar="NAME"
    )
    threads: int | None = option(
        None, "Number of CPU threads.", words="one for each core that this process may use", least=1
    )
    n_cpu_moe: int = option(0, "Build the experts of the first N MoE layers on the CPU.", least=0)
    rewrites: tuple[str, ...] = option(
        (), "Rewrites of the model, in the order of their names here."
    )
    seed: int | None = option(
        None,
        "Seed of random token ids, and of the random weights of a file of specs.",
        words="0",
        least=0,
        most=bounds.SEED,
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is None and one.default is None:
                continue
            if one.name in EXPECTED:
                is_right, words = EXPECTED[one.name]
                if not is_right(value):
                    raise Lfm2kitError(Option(one.name, value), f": expected {words}")
            one.metadata["about"].check(one.name, value)

    def chosen_plan(self) -> Plan:
        """Return the plan, from its text or its file; raise `Lfm2kitError` if it is wrong."""
        if self.plan is None:
            return Plan.parse(AUTO if self.backend is None else self.backend)
        if self.backend is not None:
            both = Option("backend", self.backend), " and ", Option("plan", self.plan)
            raise Lfm2kitError(*both, ": give only one of them")
        return Plan.read(Path(self.plan))
