"""Backends that have a capability, and are wrong about what they say, begin, replay or close."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import (
    BF16,
    F16,
    F32,
    Backend,
    Ceilings,
    HostMemory,
    Memory,
    NativeCall,
    Spec,
    Weights,
)
from lfm2kit.batch_rules import ARRAYS
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing.checks.capabilities import NATIVE
from tests.conformance.broken import Around, BakedIn, BrokenBackend, around

MLP, CHOICE, EMBEDDING = specs.MLP, specs.Choice, specs.Embedding
ROUTER = specs.Router


# What is said before anything is built


class Says(BrokenBackend):
    """The reference, which says something else in one of its answers."""

    def __init__(self, **answers: Any) -> None:
        super().__init__({})
        for name, answer in answers.items():
            setattr(self, name, answer)


def kept_formats(spec: Spec, weights: Weights) -> Any:
    return {name: weights[name].format for name in spec.parameters()}


def one_format_less(spec: Spec, weights: Weights) -> Any:
    """Return the formats of matrices alone."""
    return {n: f for n, f in kept_formats(spec, weights).items() if len(weights[n].shape) > 1}


def names_of_formats(spec: Spec, weights: Weights) -> Any:
    return {name: str(format) for name, format in kept_formats(spec, weights).items()}


def formats_of_what_it_read(spec: Spec, weights: Weights) -> Any:
    """Look whether the values would fit into F16."""
    return {n: F16 if np.abs(weights.float32(n)).max() < 6e4 else F32 for n in spec.parameters()}


def formats_of_a_checkpoint(spec: Spec, weights: Weights) -> Any:
    """Return the formats of whatever is there, with names that nobody asked about."""
    return {f"model.{name}": format for name, format in kept_formats(spec, weights).items()}


def bytes_of_all_values(spec: Spec, weights: Weights) -> int:
    return sum(weights.float32(name).nbytes for name in spec.parameters())


def measures_nothing() -> Ceilings:
    raise ZeroDivisionError("the clock has not moved")


def bytes_of_nothing(spec: Spec, tokens: int) -> int:
    return 0


def kept_twice(spec: Spec, weights: Weights) -> int:
    """Count weights that stay views of the checkpoint."""
    return 8 * spec.weight_elements()


class PacksUncounted(BrokenBackend):
    """Keeps a packed copy of its weights, and counts none."""

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        return 0

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        return 0

    def build(self, spec: Spec, weights: Weights) -> Any:
        block = super().build(spec, weights)
        packed = [weights.float32(name).copy() for name in spec.parameters()]

        def call(*inputs: Any) -> Any:
            assert packed is not None
            return block(*inputs)

        return block if spec.has_state else call


class ChangesItsHardware(BrokenBackend):
    """Names a device by a counter."""

    count = 0

    def hardware(self) -> dict[str, str]:
        self.count += 1
        return {"device": f"device {self.count}"}


class LivesIn(BrokenBackend):
    def __init__(self, memory: Memory) -> None:
        super().__init__({})
        self._memory = memory

    def memory(self, spec: Spec) -> Memory:
        return self._memory


class OfManyUnits(HostMemory):
    """Names itself by what it has left."""

    left = 7

    def unit(self) -> str:
        self.left -= 1
        return f"memory {self.left}"


class NearNoCore(HostMemory):
    def near_cores(self) -> list[int]:
        return [-1]


# Calls in two halves, or without Python


class Begun(Around):
    """A call that has begun, of a block that computes when it is ended."""

    def begin(self, *inputs: Any) -> Any:
        return _Later(lambda: self.block(*inputs))

    def __call__(self, *inputs: Any) -> Any:
        return self.block(*inputs)


class _Later:
    def __init__(self, end: Callable[[], Any]) -> None:
        self.end = end


class EndsTheNewest(Begun):
    """Has one place for arguments, which the next call takes."""

    def begin(self, *inputs: Any) -> Any:
        self.inputs = inputs
        return _Later(lambda: self.block(*self.inputs))


class EndsInOrder(Begun):
    """Ends calls in the order in which they were begun, whichever is asked for."""

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.waiting: list[Any] = []

    def begin(self, *inputs: Any) -> Any:
        self.waiting.append(inputs)
        return _Later(lambda: self.block(*self.waiting.pop(0)))


class OtherBitsWhenBegun(Begun):
    def begin(self, *inputs: Any) -> Any:
        return _Later(lambda: self.block(*inputs) * np.float32(1 + 1e-7))


class Native(Around):
    """A choice as machine code, which is a callback here."""

    def __call__(self, scores: Any) -> Any:
        return self.block(scores)

    def rows(self, rows: int, part: int, parts: int) -> tuple[int, int]:
        return rows * part // parts, rows * (part + 1) // parts

    def native(self) -> NativeCall:
        function = NATIVE(self._call)
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        return NativeCall(address, 0, function)

    def _call(
        self, argument: Any, inputs: Any, results: Any, rows: int, part: int, of: int
    ) -> None:
        spec = self.block.spec
        first, end = self.rows(rows, part, of)
        if first == end:
            return
        (scores,) = _arrays(inputs, (rows, spec.num_experts), np.float32)
        shape = rows, spec.num_experts_per_tok
        ids, weights = _arrays(results, shape, np.int32, np.float32)
        ids[first:end], weights[first:end] = self.block(scores[first:end])


class NativePartsOfEqualSize(Native):
    """Divides the rows by the parts, and leaves the rest of them out."""

    def rows(self, rows: int, part: int, parts: int) -> tuple[int, int]:
        return rows // parts * part, rows // parts * (part + 1)


class NativeFirstPart(Native):
    """Computes its rows at the beginning of the results."""

    def _call(
        self, argument: Any, inputs: Any, results: Any, rows: int, part: int, of: int
    ) -> None:
        first, end = self.rows(rows, part, of)
        super()._call(argument, inputs, results, end - first, 0, 1)


def _arrays(pointers: int, shape: tuple[int, ...], *types: Any) -> list[Any]:
    """Return views of the arrays whose addresses lie at an address."""
    addresses = (ctypes.c_void_p * len(types)).from_address(pointers)
    size = int(np.prod(shape))
    return [
        np.frombuffer((ctypes.c_byte * (4 * size)).from_address(a), t).reshape(shape)
        for a, t in zip(addresses, types, strict=True)
    ]


# Parts that are told


class Tells(Around):
    """A router that tells its parts."""

    passed: Any = None
    parts = ("scores", "choice")

    def tell_parts(self, passed: Any) -> None:
        self.passed = passed

    def __call__(self, x: Any) -> Any:
        result = self.block(x)
        for part in self.parts if self.passed is not None else ():
            self.passed(part)
        return result


class TellsByTheWeights(Tells):
    parts = ("gate", "expert_bias")


class TellsBackwards(Tells):
    parts = ("choice", "scores")


class TellsTwice(Tells):
    parts = ("scores", "scores", "choice")


class TellsNothing(Tells):
    parts = ()


class TellsForEver(Tells):
    def tell_parts(self, passed: Any) -> None:
        self.passed = passed or self.passed


class TellsOneCall(Tells):
    def __call__(self, x: Any) -> Any:
        result = super().__call__(x)
        self.passed = None
        return result


class OtherBitsWhenTelling(Tells):
    """Computes the scores in another order to know when they are done."""

    def __call__(self, x: Any) -> Any:
        ids, weights = super().__call__(x)
        return ids, weights if self.passed is None else np.nextafter(weights, np.float32(2))


# Replays


class Captures(BrokenBackend):
    """Captures forwards, and replays them rightly."""

    replay: Any = BakedIn

    def __init__(self) -> None:
        super().__init__({})
        self.replays: list[Any] = []

    def capture(self, step: Any, batch: Any) -> Any:
        self.replays.append(self.replay(step, batch, ARRAYS))
        return self.replays[-1]


class LogitsInOnePlace(BakedIn):
    """Leaves the logits where a graph has left them before."""

    logits: Any = None

    def __call__(self, batch):
        made = super().__call__(batch)
        if self.logits is None:
            self.logits = made
        self.logits[...] = made
        return self.logits


class ReplaysIntoOneArray(Captures):
    replay = LogitsInOnePlace


class ReplaysShareAnArray(Captures):
    """All replays write the logits into the same memory, as graphs of one pool may."""

    def capture(self, step: Any, batch: Any) -> Any:
        self.pool = np.empty(10_000, np.float32)
        return _OfAPool(super().capture(step, batch), self)


class _OfAPool(Around):
    nbytes = 0

    def __init__(self, block: Any, owner: Any) -> None:
        super().__init__(block)
        self.owner = owner

    def __call__(self, batch):
        made = self.block(batch)
        place = self.owner.pool[: made.size].reshape(made.shape)
        place[...] = made
        return place


class CloseFreesAll(Captures):
    """Frees the pool of all replays with the first that is closed."""

    def capture(self, step: Any, batch: Any) -> Any:
        return _Closing(super().capture(step, batch), self)


class _Closing(Around):
    nbytes = 0

    def __init__(self, block: Any, owner: Any) -> None:
        super().__init__(block)
        self.owner = owner

    def __call__(self, batch):
        logits = self.block(batch)
        return logits if self.owner.replays else np.zeros_like(logits)

    def close(self):
        self.owner.replays.clear()


class OneReplayForManyForms(Captures):
    """Finds a replay by the number of tokens, and copies as many wanted rows as that one had."""

    def capture(self, step: Any, batch: Any) -> Any:
        for replay in self.replays:
            if replay.batch.tokens == batch.tokens:
                return _OfItsForm(replay)
        return super().capture(step, batch)


class _OfItsForm(Around):
    nbytes = 0

    def __call__(self, batch):
        return self.block(batch.unchecked(logits_rows=batch.logits_rows[:4]))


# Rows that travel, and rows of padding


class PaddingWritesAPage(ReferenceBackend):
    """Its padding rows write page -1, which is the last one to NumPy."""

    def build(self, spec: Spec, weights: Weights) -> Any:
        block = super().build(spec, weights)
        return _WritesTheLastPage(block) if isinstance(spec, specs.Attention) else block


class _WritesTheLastPage(Around):
    def __call__(self, x, batch, state):
        if state is not None and (batch.positions < 0).any():
            state.values[-1, 0] = 0
        return self.block(x, batch, state)


class PaddingIsNotANumber(ReferenceBackend):
    """Leaves what memory held in padding rows."""

    def build(self, spec: Spec, weights: Weights) -> Any:
        block = super().build(spec, weights)
        return _LeavesPadding(block) if isinstance(spec, specs.ShortConv) else block


class _LeavesPadding(Around):
    def __call__(self, x, batch, state):
        delta = self.block(x, batch, state)
        delta[batch.positions < 0] = np.nan
        return delta


CEILINGS = "ceilings-are-those-of-a-machine"
UNREAD, KEPT, FACTS = (
    "weights-are-described-unread",
    "kept-bytes-are-kept",
    "facts-about-the-machine",
)
BEGUN, NATIVELY = "begun-calls-have-the-blocks-bits", "native-calls-have-the-blocks-bits"
TOLD = "parts-are-told-by-their-paths"
REPLAYS = "replays-do-not-disturb-each-other"

MUTANTS: dict[str, tuple[Backend, tuple[str, ...]]] = {
    "kept_formats_of_matrices_alone": (Says(kept_formats=one_format_less), (UNREAD,)),
    "kept_formats_as_names": (Says(kept_formats=names_of_formats), (UNREAD,)),
    "kept_formats_by_other_names": (Says(kept_formats=formats_of_a_checkpoint), (UNREAD,)),
    "kept_formats_by_values": (Says(kept_formats=formats_of_what_it_read), (UNREAD,)),
    "kept_bytes_by_values": (
        Says(kept_bytes=bytes_of_all_values, scratch_bytes=bytes_of_nothing),
        (UNREAD,),
    ),
    "kept_bytes_of_views": (
        Says(kept_bytes=kept_twice, scratch_bytes=bytes_of_nothing),
        (KEPT,),
    ),
    "kept_bytes_without_what_is_packed": (PacksUncounted({}), (KEPT,)),
    "pinned_bytes_by_values": (Says(pinned_bytes=bytes_of_all_values), (UNREAD,)),
    "pinned_bytes_below_0": (Says(pinned_bytes=lambda spec, weights: -1), (UNREAD,)),
    "notes_in_one_text": (Says(notes=lambda: "uses 4 threads"), (FACTS,)),
    "notes_of_two_lines": (Says(notes=lambda: ["uses 4 threads\nof 8"]), (FACTS,)),
    "hardware_of_numbers": (Says(hardware=lambda: {"device": 0}), (FACTS,)),
    "hardware_without_a_name": (Says(hardware=dict), (FACTS,)),
    "hardware_that_changes": (ChangesItsHardware({}), (FACTS,)),
    "ceilings_without_names": (Says(ceilings=lambda: (1e12, 1e10)), (CEILINGS,)),
    "ceilings_of_nothing": (Says(ceilings=lambda: Ceilings(0.0, 1e10)), (CEILINGS,)),
    "ceilings_below_0": (Says(ceilings=lambda: Ceilings(1e12, -1.0)), (CEILINGS,)),
    "ceilings_that_are_nan": (Says(ceilings=lambda: Ceilings(np.nan, 1e10)), (CEILINGS,)),
    "ceilings_without_end": (Says(ceilings=lambda: Ceilings(1e12, np.inf)), (CEILINGS,)),
    "ceilings_in_billions": (Says(ceilings=lambda: Ceilings(94.3, 12.3)), (CEILINGS,)),
    "ceilings_that_raise": (Says(ceilings=measures_nothing), (CEILINGS,)),
    "unit_that_changes": (LivesIn(OfManyUnits()), (FACTS,)),
    "cores_below_0": (LivesIn(NearNoCore()), (FACTS,)),
    "row_format_of_mlps": (
        Says(row_format=lambda spec: BF16 if isinstance(spec, MLP) else F32),
        ("rows-are-rounded-for-experts-alone",),
    ),
    "row_format_by_name": (
        Says(row_format=lambda spec: "F32"),
        ("rows-are-rounded-for-experts-alone",),
    ),
    "begun_in_one_place": (around(MLP, EndsTheNewest), (BEGUN,)),
    "begun_and_ended_in_order": (around(MLP, EndsInOrder), (BEGUN,)),
    "begun_with_other_bits": (around(MLP, OtherBitsWhenBegun), (BEGUN,)),
    "native_in_parts_of_equal_size": (around(CHOICE, NativePartsOfEqualSize), (NATIVELY,)),
    "native_at_the_beginning": (around(CHOICE, NativeFirstPart), (NATIVELY,)),
    "parts_told_by_weights": (around(ROUTER, TellsByTheWeights), (TOLD,)),
    "parts_told_backwards": (around(ROUTER, TellsBackwards), (TOLD,)),
    "parts_told_twice": (around(ROUTER, TellsTwice), (TOLD,)),
    "parts_never_told": (around(ROUTER, TellsNothing), (TOLD,)),
    "parts_told_for_ever": (around(ROUTER, TellsForEver), (TOLD,)),
    "parts_told_in_one_call": (around(ROUTER, TellsOneCall), (TOLD,)),
    "other_bits_when_telling": (around(ROUTER, OtherBitsWhenTelling), (TOLD,)),
    "replays_into_one_array": (ReplaysIntoOneArray(), (REPLAYS,)),
    "replays_share_an_array": (ReplaysShareAnArray(), (REPLAYS,)),
    "replays_closed_together": (CloseFreesAll(), (REPLAYS,)),
    "replay_of_another_form": (OneReplayForManyForms(), (REPLAYS,)),
    "padding_writes_a_page": (PaddingWritesAPage(), ("padding-rows",)),
    "padding_is_not_a_number": (PaddingIsNotANumber(), ("padding-rows",)),
}

# Sound ones, of which the faulty ones above are made: no check may fail with them.
SOUND: dict[str, Backend] = {
    "begins": around(MLP, Begun),
    "native": around(CHOICE, Native),
    "tells": around(ROUTER, Tells),
    "captures": Captures(),
}
