"""The contract between the core and a backend.  Versioned: a change here changes `API_VERSION`.

A plugin announces a `BackendPlugin` (see `lfm2kit.hookspecs`).  The core creates the backend once
per run, asks it for each block that the plan gives it, and from then on only calls the blocks.
Protocols, not base classes: there is nothing to inherit.  What a backend *can* do beyond building
blocks it shows by having the method of one of the capabilities at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from lfm2kit.batch import Batch, Form
from lfm2kit.batch_rules import PADDING
from lfm2kit.crossing import (
    ArrayForm,
    Call,
    CallsNatively,
    Channel,
    Crossing,
    Fills,
    FirstCall,
    NativeCall,
    Near,
    Picked,
    Picker,
    PicksRows,
    Server,
    Signals,
    first_call,
)
from lfm2kit.formats import BF16, F16, F32, Format
from lfm2kit.memory import (
    HOST,
    Adds,
    Array,
    Arriving,
    Bounded,
    Exclusive,
    HostMemory,
    Mark,
    Memory,
    Ordered,
    Timed,
)
from lfm2kit.pending import Begins, Over, Pending
from lfm2kit.precisions import BF16_GRADE, FP16_GRADE, FP32, FP32_GRADE, Grade, Precision
from lfm2kit.promises import Promise
from lfm2kit.specs import Spec
from lfm2kit.state import STEP_BACK, Room, State
from lfm2kit.weights import Tensor, Weights

if TYPE_CHECKING:
    from lfm2kit.engine.drawing import Sampler

API_VERSION = 1

__all__ = [
    "API_VERSION",
    "BF16",
    "BF16_GRADE",
    "F16",
    "F32",
    "FP16_GRADE",
    "FP32",
    "FP32_GRADE",
    "HOST",
    "PADDING",
    "STEP_BACK",
    "Adds",
    "Array",
    "ArrayForm",
    "Arriving",
    "Backend",
    "BackendPlugin",
    "Batch",
    "Begins",
    "Block",
    "Bounded",
    "BuildsAround",
    "BuildsOperators",
    "Call",
    "CallsNatively",
    "Captures",
    "Ceilings",
    "Channel",
    "Context",
    "Crosses",
    "Crossing",
    "Exclusive",
    "Explains",
    "Fills",
    "FirstCall",
    "Form",
    "Format",
    "Grade",
    "HostMemory",
    "KeepsFormats",
    "Mark",
    "Measures",
    "Memory",
    "MemoryFigures",
    "NamesHardware",
    "NativeCall",
    "Near",
    "Operator",
    "Ordered",
    "Over",
    "Pending",
    "Picked",
    "Picker",
    "PicksRows",
    "PinsMemory",
    "Precision",
    "PreventsCapture",
    "Promise",
    "ReadsRows",
    "Replay",
    "Room",
    "Samples",
    "Server",
    "Signals",
    "Spec",
    "State",
    "TakesIds",
    "TakesPadding",
    "TellsParts",
    "TellsWaits",
    "Tensor",
    "Timed",
    "Weights",
    "first_call",
]


class Block(Protocol):
    """A ready callable: weights packed, kernels compiled.

    It is called as its spec's docstring says.  It never writes its arguments (but see `RMSNorm`).
    An array that it returns belongs to the caller: no later call of any block changes it, and
    writing into it changes no later call.

    A block of an ordered memory enqueues its work on the memory's current stream, and its results
    are ready, in that order, for whatever is enqueued there after it.
    """

    def __call__(self, *inputs: Any) -> Any: ...


@runtime_checkable
class Operator(Protocol):
    """A block of a `ShortConv`, an `Attention` or a `Layer`: the ones that look across tokens.

    Its last argument is the state, or None for one forward over whole sequences.
    """

    def __call__(self, *inputs: Any) -> Any: ...

    def new_state(self, room: Room) -> State:
        """Return a state of `room.pages` pages, with any contents.

        The block finds the pages of a batch's sequences in `batch.pages`.  It reads no page that no
        sequence of the batch has, and writes only the pages of a sequence's new tokens.
        """
        ...


class Backend(Protocol):
    """A backend builds blocks.  All decisions are made here: the forward only calls blocks."""

    def why_unsupported(self, spec: Spec) -> str | None:
        """Return None if `build(spec, ...)` will work, else the reason in a few words."""
        ...

    def memory(self, spec: Spec) -> Memory:
        """Return the memory where the block of `spec` takes its arrays and leaves its result."""
        ...

    def build(self, spec: Spec, weights: Weights) -> Block:
        """Return the block of a spec that `why_unsupported` has accepted.

        `weights` holds the names of `spec.parameters()`, in shape, and perhaps others: only what
        is asked for is read.  The tensors may be read-only views of a memory map that outlives
        the block; what is packed is the block's own.
        """
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """The facts that a backend may use about the run that it is created for."""

    precision: str = "fp32"  # the name of one that the backend announces
    threads: int | None = None  # None: what suits the machine and the ranks that share it
    local_ranks: int = 1  # processes of this run on this machine
    local_rank: int = 0
    create_backend: Callable[[str], Backend] = field(  # by name, in this precision: "cuda"
        default=lambda name: _no_backends(name), repr=False
    )


@dataclass(frozen=True, slots=True)
class BackendPlugin:
    """A backend as a plugin announces it.  Making one must be free: `create` does heavy imports.

    `lfm2kit plan` creates backends, so compiling belongs into a backend's `build`.
    """

    name: str  # as in a plan
    summary: str  # one line for `lfm2kit backends`
    create: Callable[[Context], Backend]
    api_version: int  # the API_VERSION that it was written for
    why_unavailable: Callable[[], str | None] = lambda: None  # why it cannot run on this machine
    precisions: Sequence[Precision] = (FP32,)
    preference: int = 0  # `auto` takes the highest that can run; 0 is never taken
    not_promised: Mapping[Promise, str] = field(default_factory=dict)  # and why, in a few words


@runtime_checkable
class Explains(Protocol):
    """Capability: a backend with something to say about this run, in `plan` and on stderr."""

    def notes(self) -> Sequence[str]:
        """Return notes of one line each, without the backend's name."""
        ...


@runtime_checkable
class BuildsAround(Protocol):
    """Capability: a backend that can build a spec around parts that are computed elsewhere.

    The core asks for a layer, or a spec within it, that a backend does not build whole: where the
    plan gives some of its parts to others, or the backend itself computes them in another memory
    than `memory(spec)`.
    """

    def why_not_around(self, spec: Spec, parts: Sequence[str]) -> str | None:
        """Return None if `build_around` will build all of `spec` but `parts`, else the reason.

        A part is named by its path of roles: "feed_forward.router.choice".
        """
        ...

    def build_around(self, spec: Spec, weights: Weights, parts: Mapping[str, Block]) -> Block:
        """Return the block of `spec`, which calls the given blocks instead of its own.

        They are called as their specs say, with arrays of `memory(spec)`, and return such arrays:
        the core moves what has to be moved.
        """
        ...


@runtime_checkable
class Crosses(Protocol):
    """Capability: a backend that can call blocks in the midst of another memory's work.

    For a block that lives in another memory than its surroundings, the core asks the backends of
    the plan, the default one first.  The first that can makes a crossing of it, and the forward can
    be captured; without one, the core waits for copies around the block.
    """

    def why_not_crossed(self, spec: Spec, memory: Memory, outer: Memory) -> str | None:
        """Return None if `crossing` will work for a block of `spec`, else the reason.

        The block lives in `memory`, whichever backend has built it, and is called from `outer`.
        """
        ...

    def crossing(
        self, name: str, spec: Spec, block: Block, memory: Memory, outer: Memory
    ) -> Crossing:
        """Return `block` as one that takes and returns arrays of `outer`.

        `name` is the block's name in the model, for errors.
        """
        ...


@runtime_checkable
class TellsParts(Protocol):
    """Capability of a block that computes several parts: it tells when it is done with each.

    With it `lfm2kit profile` shows where the time of a whole layer goes.
    """

    def tell_parts(self, passed: Callable[[str], None] | None) -> None:
        """Call `passed` in each later call, after a part's work is done or enqueued.

        It gets the part's path of roles, such as "operator" or "feed_forward.router".  Parts that
        one kernel computes together are told together, as the last of them.  None: call nothing.
        """
        ...


@runtime_checkable
class TellsWaits(Protocol):
    """Capability of a crossing, or of an exchange between ranks: it tells when it waits.

    With it `lfm2kit profile` shows waits apart from work.
    """

    def tell_waits(self, told: Callable[[bool], None] | None) -> None:
        """Call `told(False)` before each wait of a later call, and `told(True)` after it.

        A crossing waits for the answer to a trip, and an exchange for what other ranks send: the
        less is done between the two calls beside waiting, the better.  In an ordered memory, each
        comes once what lies before it is enqueued.  All ranks of an exchange tell as many waits.
        The first call of a crossing with arguments of new shapes need not tell.  None: call
        nothing.
        """
        ...


@runtime_checkable
class BuildsOperators(Protocol):
    """A backend that builds operators or layers, and so must say how large their states are."""

    def state_bytes(self, spec: Spec, room: Room) -> int:
        """Return the bytes that `new_state(room)` of an operator or a layer will take.

        It is asked before anything is built, and only for specs that have a state.
        """
        ...


@runtime_checkable
class MemoryFigures(Protocol):
    """Capability: a backend that can say before building how much memory a block will take.

    Without it `lfm2kit plan` shows no sizes, and a model too large is not refused in advance.
    Return no more than is really needed: a run is refused if it exceeds what is free.
    """

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        """Return the bytes of its weights that the block keeps, in the block's memory.

        This counts every copy, packed, widened or moved to another memory.  Views of the
        checkpoint's memory map do not count, because the system can reclaim their pages.
        `weights` are those that `build` will get; look only at formats and shapes, because reading
        values takes minutes.
        """
        ...

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        """Return the bytes that a call with `tokens` rows needs, only while it runs.

        Arguments, result and state do not count.
        """
        ...


@runtime_checkable
class PinsMemory(Protocol):
    """Capability: a backend whose blocks keep weights in pinned memory of the host.

    A device reads it at the link's speed, and the system can neither move nor reclaim it.  A model
    that would pin more than half of what is free is refused before it is built.
    """

    def pinned_bytes(self, spec: Spec, weights: Weights) -> int:
        """Return the bytes that the block pins, beside its `kept_bytes`."""
        ...


@runtime_checkable
class KeepsFormats(Protocol):
    """Capability: a backend that can say in which formats a block will keep its weights.

    `lfm2kit plan` then shows which ones are kept as stored, widened or rounded.
    """

    def kept_formats(self, spec: Spec, weights: Weights) -> Mapping[str, Format]:
        """Return the format of each of `spec.parameters()` in a block of `spec`, by name.

        `weights` are those that `build` will get; look only at formats and shapes.
        """
        ...


@runtime_checkable
class ReadsRows(Protocol):
    """Capability: a backend whose products read the rows of experts in 16 bits.

    Ranks then send each other rows of 16 bits.  Without it they send float32.
    """

    def row_format(self, spec: Spec) -> Format:
        """Return the format to which a block rounds the rows that its experts read.

        It is BF16 or F16 for an `Experts` or a `StreamedExperts` whose block, beside an x of
        float32, takes an x [rows, hidden_size] of the format's `block` that
        `lfm2kit.formats.rounded` has made.  Both give the same bits.  It is F32 for all others.  It
        is the same on all machines.
        """
        ...


class Ceilings(NamedTuple):
    """The most that the machine achieves, as measured."""

    flops: float  # per second, of the unit that multiplies weights in the backend's precision
    bytes: float  # per second, reading memory too large for any cache


@runtime_checkable
class Measures(Protocol):
    """Capability: a backend that can measure the ceilings of the machine it runs on."""

    def ceilings(self) -> Ceilings: ...


@runtime_checkable
class NamesHardware(Protocol):
    """Capability: a backend that can name the device that it works on.

    What is measured on a machine is kept with these names.
    """

    def hardware(self) -> Mapping[str, str]:
        """Return names and versions: {"device": "NVIDIA H200", "driver": "580.95.05"}."""
        ...


class Replay(Protocol):
    """A recorded forward: called with a host batch, it leaves the logits in its memory.

    They belong to the caller, as every block's result does.
    """

    def __call__(self, batch: Batch) -> Array: ...

    @property
    def nbytes(self) -> int:
        """Return the bytes of its backend's memory that it holds until it is closed."""
        ...

    def close(self) -> None:
        """Give them back.  The core keeps only the replays that it used last."""
        ...


@runtime_checkable
class TakesIds(Protocol):
    """Capability of a replay: it takes token ids that the host does not know yet.

    An engine then begins a step before it has read the tokens of the last one, if the sampler of
    the logits draws ahead as well (`lfm2kit.engine.drawing.DrawsAhead`).
    """

    def with_ids(self, batch: Batch, token_ids: Array) -> Array:
        """Return the logits of a host batch whose ids are those in `token_ids`.

        They are an int32 array [tokens] of the backend's memory, within the vocabulary but for
        padding rows, and ready for what is enqueued in the current stream.  The batch's own ids
        mean nothing.
        """
        ...


@runtime_checkable
class Captures(Protocol):
    """Capability: a backend that can record a whole forward and replay it, as a CUDA graph does.

    The core asks for it only if every block of the model works in this backend's memory, or is
    called by a crossing (see `Crosses`).
    """

    def capture(self, step: Callable[[Batch], Array], batch: Batch) -> Replay:
        """Return a replay of `step` for every batch whose `family()` has the same forms.

        `step` takes a batch whose arrays lie in the backend's memory; it may read and write a
        state.  It has run before with a batch of these forms.  Recording need not run it, because
        the core replays this batch right after.  It may be called any number of times here, because
        that replay writes the same pages again.  The replay takes host batches, and must copy all
        of their arrays, ids, positions and pages included: see `Batch.packed` and `Batch.unpacked`.
        Raise MemoryError if there is no room; the core then closes other replays and tries once
        more.
        """
        ...


@runtime_checkable
class PreventsCapture(Protocol):
    """Capability: a backend with blocks whose calls cannot be recorded, whoever records them.

    The recording backend shares their memory, and is often another one.  Examples are a block that
    looks at numbers on the host, and one whose arrays come from a pool that does not know of the
    recording.  A model with such a block is not captured, and `lfm2kit plan` says why.
    """

    def why_not_captured(self, spec: Spec) -> str | None:
        """Return None if a replay does all that a call of the block does, else the reason.

        It is not asked about blocks that a crossing calls: their calls are not recorded.
        """
        ...


@runtime_checkable
class TakesPadding(Protocol):
    """Capability: a backend whose blocks take batches that end in padding rows (see `Batch`).

    An engine then rounds the number of sequences in a captured step up, so that steps of few sizes
    are captured.  Blocks that are given no batch take padding rows as any others.
    """

    def takes_padding(self, spec: Spec) -> bool:
        """Return whether the block of a spec that is called with a batch takes padding rows.

        An `Embedding` then returns zeros in them, whatever their ids.  Operators read and write no
        page for them, and return any finite numbers if they are given such.  No bit of another row
        changes.
        """
        ...


@runtime_checkable
class Samples(Protocol):
    """Capability: a backend that draws tokens from the logits of its LM head, where they are.

    Without it, NumPy draws on the host.
    """

    def sampler(self) -> Sampler:
        """Return a sampler for logits in `memory(head)`, for one thread at a time.

        It draws the tokens that `lfm2kit.engine.drawing.NumPySampler` draws from the same logits,
        to which it does not write.
        """
        ...


def _no_backends(name: str) -> Backend:
    raise LookupError(f"no backend {name!r}: this context was made without plugins")
