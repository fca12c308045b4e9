"""The operators' kernels between their products on the CPU, where CUDA threads take turns.

They are called as blocks are: with rows, a batch and a state, so that the suite's sessions can feed
them.  Every state is full of NaN before, and what a call must leave alone is looked at.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lfm2kit_cuda.compiling import INCLUDE, SOURCES, definitions
from lfm2kit_cuda.paging import keys_shape, most_pages, rows_shape

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.state import STEP_BACK, Room
from tests.cuda.emulating import compiled_program, sources_in

Float32 = npt.NDArray[np.float32]

ATTENTION = specs.Attention(24, 4, 2, 6, rope_theta=100.0, norm_eps=1e-5)
CONVERSIONS = {
    'asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits))': "value = value_of_half(x.bits)",
    'asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x))': "half.bits = nearest_half(x)",
}
EMULATED_PART = 32  # keys: shorter than on a GPU, so that few tokens have several parts


def norm_weights(spec: specs.Attention) -> Float32:
    """Return the weights of the norms of queries and of keys."""
    return np.random.default_rng(7).standard_normal((2, spec.head_dim)).astype(np.float32)


def inverse_frequencies(spec: specs.Attention) -> Float32:
    halves = np.arange(spec.head_dim // 2, dtype=np.float32) / (spec.head_dim // 2)
    return (1 / np.float32(spec.rope_theta) ** halves).astype(np.float32)


def compiled(
    folder: Path, stem: str, fault: tuple[str, str] | None = None, **constants: int | str
) -> Path:
    """Return the program of `emulated/{name}.cpp` for `{stem}.cu`, with these constants.

    A `fault` has a part of the source, and what is put in its place.
    """
    name = Path(stem).name
    sources = sources_in(folder)
    (sources / "halves.h").write_text(halves(), encoding="utf-8")
    if fault is not None:
        source = (SOURCES / f"{stem}.cu").read_text(encoding="utf-8")
        assert source.count(fault[0]) == 1, f"{stem}.cu has no such part: {fault[0]}"
        (sources / f"{name}.cu").write_text(source.replace(*fault), encoding="utf-8")
    return compiled_program(sources, name, definitions(stem, constants))


def halves() -> str:
    """Return the types of 16 bits in types.cuh, with functions of conversions.h for their PTX."""
    text = (INCLUDE / "types.cuh").read_text(encoding="utf-8")
    text = text[text.index("struct BF16") :]
    for instruction, call in CONVERSIONS.items():
        assert text.count(instruction) == 1, f"types.cuh has no such instruction: {instruction}"
        text = text.replace(instruction, call)
    return text


def run(program: Path, numbers: list[int], arrays: list[Any]) -> Float32:
    done = subprocess.run(
        [str(program), *map(str, numbers)], input=b"".join(map(np.ndarray.tobytes, arrays)),
        stdout=subprocess.PIPE, check=True, timeout=300,
    )  # fmt: skip
    return np.frombuffer(done.stdout, np.float32)


@dataclass
class Kept:
    """A state: its arrays by page, and how many tokens a page has."""

    page_tokens: int
    arrays: list[Float32]

    def replace(self, written: Float32, batch: Batch) -> None:
        """Take over what a call has written; pages without new tokens must be as they were."""
        starts, ends = batch.starts, batch.starts + np.diff(batch.cu_seqlens)
        reached = [
            set(row[start // self.page_tokens : -(-end // self.page_tokens)])
            for row, start, end in zip(batch.pages, starts, ends, strict=True)
        ]
        others = [p for p in range(len(self.arrays[0])) if p not in set().union(*reached)]
        parts = np.split(written, np.cumsum([array.size for array in self.arrays])[:-1])
        for i, part in enumerate(parts):
            new = part.reshape(self.arrays[i].shape)
            np.testing.assert_array_equal(new[others], self.arrays[i][others])
            self.arrays[i] = new.copy()


@dataclass
class EmulatedAttention:
    """The attention after the projections: rows of queries, keys and values."""

    program: Path
    spec: specs.Attention = field(default=ATTENTION)
    ctas: int = 0  # that share the parts of a row; 0: a CTA goes through all keys of its rows

    def __call__(self, qkv: Float32, batch: Batch, state: Kept | None) -> Float32:
        size, (keys, values) = _size(state), state.arrays if state else _nothing()
        parts = -(-batch.pages.shape[1] * size[1] // EMULATED_PART) if self.ctas else 0
        out = run(
            self.program,
            [*_numbers(batch), *size, min(2, batch.sequences), parts, self.ctas],
            [qkv, norm_weights(self.spec), inverse_frequencies(self.spec), batch.positions,
             batch.cu_seqlens, batch.pages, keys, values],
        )  # fmt: skip
        heads, kept = np.split(out, [len(qkv) * self.spec.num_attention_heads * self.spec.head_dim])
        if state:
            state.replace(kept, batch)
        return heads.reshape(len(qkv), -1)

    def new_state(self, room: Room) -> Kept:
        shape = keys_shape(self.spec, room)
        return Kept(room.page_tokens, [np.full(shape, np.nan, np.float32) for _ in range(2)])


@dataclass
class EmulatedConv:
    """The convolution between the projections: rows of B, C and X."""

    program: Path
    spec: specs.ShortConv
    taps: Float32

    def __call__(self, bcx: Float32, batch: Batch, state: Kept | None) -> Float32:
        tokens, sequences, longest, width = _numbers(batch)
        size, (past, _) = _size(state), [*state.arrays, None] if state else _nothing()
        keeps = longest <= STEP_BACK
        reached = most_pages(longest, state.page_tokens) if state and not keeps else 0
        out = run(
            self.program, [tokens, sequences, self.spec.hidden_size, width, *size, reached],
            [bcx, self.taps, batch.positions, batch.cu_seqlens, batch.pages, past],
        )  # fmt: skip
        y, kept = np.split(out, [tokens * self.spec.hidden_size])
        if state:
            state.replace(kept, batch)
        return y.reshape(tokens, -1)

    def new_state(self, room: Room) -> Kept:
        return Kept(room.page_tokens, [np.full(rows_shape(self.spec, room), np.nan, np.float32)])


def _numbers(batch: Batch) -> list[int]:
    return [batch.tokens, batch.sequences, batch.max_seqlen, batch.pages.shape[1]]


def _size(state: Kept | None) -> tuple[int, int]:
    return (len(state.arrays[0]), state.page_tokens) if state else (0, 0)


def _nothing() -> list[Any]:
    return [np.empty(0, np.float32)] * 2
