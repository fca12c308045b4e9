"""Records what this process is doing and how long that may take, for whoever watches it.

A rank that hangs would keep all others waiting for ever.  So each step is announced here before it
begins: building a block, computing a block, compiling a kernel.  A transport passes it on, and ends
the job if a step takes longer than allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm2kit.backend import Block, CallsNatively, Fills
from lfm2kit.batch import Batch
from lfm2kit.specs import Spec, Work

if TYPE_CHECKING:
    from lfm2kit.building.placement import Placed

DEADLINE = 60.0  # seconds that a step may take, unless it asks for more
COMPILING = 600.0  # seconds that one kernel may take to compile on a busy machine
# The rates of the slowest backend on a shared core, and of the slowest file system.
SLOWEST_FLOPS = 1e9
SLOWEST_BYTES = 1e7


class Step(NamedTuple):
    """The step that this process is in."""

    number: int  # how many steps came before
    name: str  # "layers.3.operator"
    seconds: float  # how long it may take


class Progress:
    """The steps of this process, in order.

    One thread announces them; `on_step` is called after each, and any thread may read `now`.
    """

    def __init__(self) -> None:
        self.deadline = DEADLINE
        self.now = Step(0, "starting", DEADLINE)
        self.allowed: dict[str, float] = {}  # seconds, of the steps that may take longer
        self.on_step: Callable[[], None] = lambda: None

    def step(self, name: str, seconds: float = 0.0) -> None:
        allowed = self.allowed.get(name, self.deadline)
        self.now = Step(self.now.number + 1, name, allowed if allowed > seconds else seconds)
        self.on_step()


THIS_PROCESS = Progress()


def step(name: str, seconds: float = 0.0) -> None:
    """Announce that `name` begins, and may take `seconds` if that is above the deadline.

    Costs less than a microsecond, and does nothing if nobody watches.  Anything that may take more
    than a few seconds should be announced, such as compiling a kernel or writing a file.
    """
    THIS_PROCESS.step(name, seconds)


def set_deadline(seconds: float) -> None:
    """Set how long a step may take unless it asks for more."""
    THIS_PROCESS.deadline = seconds


def allow(seconds: Mapping[str, float]) -> None:
    """Set how long the steps of these names may take, if that is above the deadline."""
    deadline = THIS_PROCESS.deadline
    THIS_PROCESS.allowed.update((name, s) for name, s in seconds.items() if s > deadline)


def allow_forward(blocks: Iterable[Placed], batch: Batch, ranks: int = 1) -> None:
    """Give each block the time that `batch` takes on the slowest machine.

    One of several ranks may get every token of all of them, and share its cores with them.
    """
    allow({block.name: ranks * longest(block.spec.work(batch)) for block in blocks})


def longest_of(names: Iterable[str]) -> float:
    """Return how long a step of one of these names may take, at the most."""
    allowed = THIS_PROCESS.allowed
    return max([THIS_PROCESS.deadline, *(allowed[name] for name in names if name in allowed)])


def longest(work: Work) -> float:
    """Return the seconds that `work` takes on the slowest machine worth using."""
    return work.flops / SLOWEST_FLOPS + work.bytes / SLOWEST_BYTES


Wrap = Callable[[str, Spec, Block], Block]


def telling(wrap: Wrap, names: set[str]) -> Wrap:
    """Return a `wrap` that also announces a step at each call of the blocks in `names`."""

    def telling_wrap(name: str, spec: Spec, block: Block) -> Block:
        wrapped = wrap(name, spec, block)
        return _telling(name, wrapped) if name in names else wrapped

    return telling_wrap


def _telling(name: str, block: Block) -> Block:
    """Return `block`, each call announced; those of its machine code have no time for it."""
    tell = THIS_PROCESS.step

    def called(*inputs: Any) -> Any:
        tell(name)
        return block(*inputs)

    if isinstance(block, CallsNatively):
        called.native = block.native  # type: ignore[attr-defined]
    if isinstance(block, Fills):
        called.fill = _telling(name, block.fill)  # type: ignore[attr-defined]
    return called
