"""The numbers that kernels share with the Python code that launches them, each written only here.

The compiler gets those of a source with -D (`compiling.definitions`).  Where a kernel's layout
allows a single value, an assertion in the source says so.
"""

from __future__ import annotations

from typing import NamedTuple

from lfm2kit.engine.sampling import LARGEST


class Slabs(NamedTuple):
    """The constants of slabs.cuh, which most sources include."""

    SLAB: int = 64  # k of a slab
    CHUNK: int = 8  # elements that are copied at once: 16 bytes


class Heights(NamedTuple):
    """The constants of panels.cuh: the rows of a tile of gemm.cu."""

    TALLEST: int = 48
    LOWEST: int = 16
    HEIGHT_STEP: int = 8


class Gemm(NamedTuple):
    """The constants of gemm.cu."""

    GROUPS: int = 6  # of warps: each sums a stretch of k
    STAGES: int = 2  # of a group; each of its warps fills one
    WIDTH: int = 128  # columns of a tile, and of a panel of W
    RUN: int = 32  # columns of w1 before 32 of w3
    STEP: int = 32  # the k of panels are a multiple of it: of two stages


class Panels(NamedTuple):
    """The constants of panels.cu."""

    PART: int = 64  # k of a CTA
    ARRANGE_THREADS: int = 256


class Gemm16(NamedTuple):
    """The constants of gemm16.cu."""

    THREADS: int = 256
    TILE_COLUMNS: int = 128


class Gemm90(NamedTuple):
    """The constants of gemm90.cu; PANEL also in packing.cu."""

    THREADS: int = 384
    PANEL: int = 256  # columns of packed weights
    STEP: int = 8  # the rows that a warpgroup multiplies are a multiple of it
    MOST_ROWS: int = 192  # that a warpgroup multiplies
    MOST_ROWS_OF_TERMS: int = 144  # the same with three terms
    MOST_STAGES: int = 8


class FewRows90(NamedTuple):
    """The constants of few_rows90.cu, beside the panels of gemm90.cu."""

    COPYING_WARPS: int = 4  # of a CTA, in turn: one alone would take longer than a stage's products
    BLOCK: int = 16  # columns
    MOST_BLOCKS: int = 8  # of a CTA
    MOST_ROWS: int = 16  # of a tile
    MOST_STAGES: int = 32


class Activations(NamedTuple):
    """The constants of activations.cu."""

    TERMS: int = 3  # of BF16, whose exact sum is a float32


class Rows(NamedTuple):
    """The constants of rows.cu."""

    NORM_THREADS: int = 256


class Attention(NamedTuple):
    """The constants of attention.cu."""

    ATTEND_THREADS: int = 128
    PART_KEYS: int = 256  # that are summed on their own, from multiples of it on
    MOST_ROWS: int = 16  # (row, head) pairs of a CTA, unless a group of heads is larger
    CTAS_OF_SM: int = 3  # that share parts


class Router(NamedTuple):
    """The constants of router.cu."""

    SPLITS: int = 16  # CTAs that share the k of a logit
    WARPS: int = 4  # of a CTA of `logits`
    ROWS: int = 16  # of a CTA of `logits`
    CHOOSING_ROWS: int = 8  # of a CTA of the other kernels, a warp for each
    PANEL: int = 32  # experts of a CTA
    MOST_STEP: int = 64  # k that a warp copies at once


class Experts(NamedTuple):
    """The constants of experts.cu."""

    GROUP_THREADS: int = 1024
    COMBINE_THREADS: int = 512
    ALIGNMENT: int = 8  # an expert's first slot is a multiple of it


class Grouping(NamedTuple):
    """The constants of grouping.cu, beside the router's sums and the experts' slots."""

    MOST_TOKENS: int = 32  # a warp for each
    MOST_EXPERTS: int = 256  # whose scores a warp's registers hold


class Channel(NamedTuple):
    """channel.cu, and host_layout.py: vectors of 16 bytes, and words of `control`."""

    MOST_THREADS: int = 1024
    OF_THREAD: int = 4  # vectors that a thread copies at once
    LINE: int = 4  # vectors; no two arrays share a line of the host's memory
    FAILED: int = 32  # the first word of the marks of failure; kernels load four from here
    DEADLINE: int = 34  # a float32, in seconds
    ANSWERED: int = 64  # the first word of the workers
    WORKER: int = 16  # words of a worker


class Picking(NamedTuple):
    """picking.cu."""

    THREADS: int = 512
    ROWS: int = 16  # of a CTA, at least


class Sampling(NamedTuple):
    """sampling.cu."""

    CTAS: int = 8  # of a row's cluster; on chips without clusters a row has one CTA
    THREADS: int = 512
    BITS: int = 8  # of a digit of a score's rank
    LARGEST: str = f"{LARGEST}f"


class Exchange(NamedTuple):
    """exchange.cu, and exchange.py."""

    THREADS: int = 512
    LANES: int = 32  # threads that have a row together
    MOST_RANKS: int = 32  # bits of a word
    LINE: int = 32  # words; what comes from a rank has one of its own
    STATISTICS: int = 6


class Ceilings(NamedTuple):
    """The constants of ceilings.cu and ceilings16.cu."""

    CHAINS: int = 16  # of multiply-adds in a thread, or of products in a warp


SLABS, HEIGHTS, GEMM, PANELS, GEMM16, GEMM90, FEW_ROWS90 = (
    Slabs(), Heights(), Gemm(), Panels(), Gemm16(), Gemm90(), FewRows90(),
)  # fmt: skip
ACTIVATIONS, ROWS, ATTENTION = Activations(), Rows(), Attention()
ROUTER, EXPERTS, GROUPING = Router(), Experts(), Grouping()
CHANNEL, CEILINGS = Channel(), Ceilings()
PICKING, SAMPLING, EXCHANGE = Picking(), Sampling(), Exchange()

OF_SOURCES: dict[str, dict[str, int]] = {
    "gemm": {**HEIGHTS._asdict(), **GEMM._asdict()},
    "few_rows": {name: getattr(GEMM, name) for name in ("GROUPS", "WIDTH", "RUN", "STEP")},
    "panels": {**HEIGHTS._asdict(), **PANELS._asdict()},
    "gemm16": {**SLABS._asdict(), **GEMM16._asdict()},
    "gemm90": {**SLABS._asdict(), **GEMM90._asdict()},
    "few_rows90": {
        **SLABS._asdict(),
        **FEW_ROWS90._asdict(),
        "PANEL": GEMM90.PANEL,
        "TERMS": 1,
    },
    "packing": {**SLABS._asdict(), "PANEL": GEMM90.PANEL},
    "activations": {**SLABS._asdict(), **ACTIVATIONS._asdict()},
    "channel": CHANNEL._asdict(),
    "picking": {"THREADS": PICKING.THREADS},
    "sampling": SAMPLING._asdict(),
    "exchange": EXCHANGE._asdict(),
    "peers": {"THREADS": EXCHANGE.THREADS},
    "ceilings": CEILINGS._asdict(),
    "ceilings16": CEILINGS._asdict(),
    "ceilings90": {},
    "sums": {},
    "after_copies": {},
    "blocks/rows": {**SLABS._asdict(), **ROWS._asdict()},
    "blocks/short_conv": SLABS._asdict(),
    "blocks/rotation": {},
    "blocks/attention": {**SLABS._asdict(), **ATTENTION._asdict()},
    "blocks/router": ROUTER._asdict(),
    "blocks/grouping": {
        **GROUPING._asdict(),
        "SPLITS": ROUTER.SPLITS,
        "PANEL": ROUTER.PANEL,
        "ALIGNMENT": EXPERTS.ALIGNMENT,
    },
    "blocks/experts": EXPERTS._asdict(),
}
