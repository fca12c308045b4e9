"""The options of a model's set-up, each defined once: default, bounds, and what it means.

`lfm2kit.building.loading.set_up` takes them whole, and the command line makes its flags from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lfm2kit import bounds
from lfm2kit.building.byte_counts import parse_bytes
from lfm2kit.building.plan import AUTO, Plan
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.host_exchange import AUTO as AUTO_EXCHANGE
from lfm2kit.host_exchange import EXCHANGE
from lfm2kit.overlapped import AUTO as AUTO_OVERLAP
from lfm2kit.overlapped import OVERLAP
from lfm2kit.ranks.groups import AUTO as AUTO_PARALLEL
from lfm2kit.ranks.groups import DP, PARALLEL

BACKEND_VARIABLE = "LFM2KIT_BACKEND"
FREE = "free"  # as the size of a device's memory: what is free

SIZE = f"a size such as 24GiB or 20GB, or '{FREE}' for what is free"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_path(value: object) -> bool:
    return isinstance(value, Path) or _is_name(value)


def _are_names(value: object) -> bool:
    return isinstance(value, (tuple, list)) and all(map(_is_name, value))


# What options that are not numbers must be, and how an error says it.
EXPECTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "model": (_is_text, "a path, or a model's name, such as 'tiny'"),
    "backend": (_is_text, "a plan as text, such as 'auto'"),
    "plan": (_is_path, "the path of a TOML file"),
    "precision": (_is_name, "a name, such as 'fp32'"),
    "gpu_memory": (_is_text, SIZE),
    "rates": (_is_path, "the path of a file"),
    "load": (_is_path, "the path of a file"),
    "parallel": (lambda value: value in PARALLEL, f"{', '.join(PARALLEL[:-1])} or {PARALLEL[-1]}"),
    "overlap": (lambda value: value in OVERLAP, f"{', '.join(OVERLAP[:-1])} or {OVERLAP[-1]}"),
    "exchange": (lambda value: value in EXCHANGE, f"{', '.join(EXCHANGE[:-1])} or {EXCHANGE[-1]}"),
    "rewrites": (_are_names, "a tuple of names, such as ('NAME',)"),
    "check": (_is_bool, "True or False"),
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
    """A choice of a model and its set-up.  Raise `Lfm2kitError` for values out of bounds."""

    model: str = option(
        "tiny",
        "Checkpoint folder, model.bin, TOML file of specs, embedded model, or the name of a model "
        "that the Hugging Face cache has, such as LiquidAI/LFM2-8B-A1B. A path of that name comes "
        "first, and nothing is downloaded.",
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
    gpu_memory: str | None = option(
        None,
        "Take no more of a GPU's memory, such as 24GiB or 20GB; free: what is free. Experts that "
        "do not fit are computed on the CPU, or streamed.",
        words="all experts stay where the plan puts them",
        metavar="SIZE",
    )
    streamed_experts: int | None = option(
        None,
        "Of each layer's experts that do not fit, stream N ahead of their layer.",
        words="0, or with rates as many as is fastest",
        least=0,
    )
    rates: Path | None = option(
        None,
        "Predict times from what lfm2kit calibrate measured, and place experts by them.",
        words="what it has kept for this machine, if it has",
        metavar="FILE",
    )
    load: Path | None = option(
        None,
        "Place experts by the load that a run recorded: those that are used most stay on the GPU, "
        "and ranks that share experts have equal work.",
        metavar="FILE",
    )
    parallel: str = option(
        AUTO_PARALLEL,
        "How ranks divide the experts of a layer. ep: among the ranks of a machine, or of all "
        "machines; dp: not at all; auto: among those of a machine, of all where one has too little "
        "memory, and not at all on devices that have room and many rows for each expert.",
        metavar="|".join(PARALLEL),
    )
    ep_size: int | None = option(
        None,
        "Divide experts inside groups of K ranks.",
        words="the ranks of a machine, or all",
        metavar="K",
        least=1,
    )
    replicate_experts: int = option(
        0,
        "Let each rank hold the K experts of a layer that are used most, by the load.",
        metavar="K",
        least=0,
    )
    overlap: str = option(
        AUTO_OVERLAP,
        "Compute some of a rank's experts while tokens of others travel between ranks. auto: where "
        "the exchange takes 15 % of its and the experts' time or more, in the first forward.",
        metavar="|".join(OVERLAP),
    )
    exchange: str = option(
        AUTO_EXCHANGE,
        "Where tokens travel between ranks. device: between the devices' memories; host: through "
        "the host's; auto: between the devices where every rank can.",
        metavar="|".join(EXCHANGE),
    )
    rewrites: tuple[str, ...] = option(
        (), "Rewrites of the model, in the order of their names here."
    )
    check: bool = option(
        False,
        "Look at all that blocks return, once, in a short forward before the first one.",
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
        if self.streamed_experts is not None:
            self.check_limited("streamed_experts")
        if self.ep_size is not None and self.parallel == DP:
            both = Option("parallel", DP), " and ", Option("ep_size", self.ep_size)
            raise Lfm2kitError(*both, ": give only one of them")
        if self.replicate_experts and self.load is None:
            asked = Option("replicate_experts", self.replicate_experts)
            raise Lfm2kitError(asked, ": needs a load, such as ", Option("load", "load.json"))
        self.gpu_bytes()

    def check_limited(self, name: str) -> None:
        """Raise `Lfm2kitError` if the option `name` is given without a limit of a device's memory.

        Rates have another use where jobs are simulated, so who sets up a model checks them.
        """
        value = getattr(self, name)
        if value is not None and self.gpu_memory is None:
            size = Option("gpu_memory", "24GiB")
            raise Lfm2kitError(Option(name, value), ": needs a limit, such as ", size)

    def gpu_bytes(self) -> int | None:
        """Return the bytes that may be taken of a device's memory; None for what is free."""
        if self.gpu_memory is None or self.gpu_memory == FREE:
            return None
        try:
            return parse_bytes(self.gpu_memory)
        except ValueError:
            asked = Option("gpu_memory", self.gpu_memory)
            raise Lfm2kitError(asked, f": expected {SIZE}") from None

    def chosen_plan(self) -> Plan:
        """Return the plan, from its text or its file; raise `Lfm2kitError` if it is wrong."""
        if self.plan is None:
            return Plan.parse(AUTO if self.backend is None else self.backend)
        if self.backend is not None:
            both = Option("backend", self.backend), " and ", Option("plan", self.plan)
            raise Lfm2kitError(*both, ": give only one of them")
        return Plan.read(Path(self.plan))
