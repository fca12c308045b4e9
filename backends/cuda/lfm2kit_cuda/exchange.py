"""The exchange of tokens between the GPUs of a machine, one for each MoE layer (exchange.cu).

Ranks store rows and products into each other's mailboxes, which all of them have mapped, and wait
for flags there.  The host takes no part: a call can be captured and replayed, and the host knows no
number of rows.  A forward has room for as many tokens of each rank as the largest rank has; rows
without a token or an expert are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import cupy
import numpy as np
import numpy.typing as npt
from cupy.cuda import runtime

from lfm2kit.transport import ExchangeCounts, Rows, Sent, Traffic
from lfm2kit_cuda.constants import EXCHANGE
from lfm2kit_cuda.device import on_device
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.upload import upload

if TYPE_CHECKING:
    from lfm2kit_cuda.meeting import Meeting

WORD = 4
LINE_WORDS = 2  # of a line that every call stores: the flag, and how many tokens come
MOST_CTAS = 128  # of a kernel, or for each rank: see exchange.cu


class PeerExchange:
    """The exchange of one layer, the `number`-th of its meeting."""

    def __init__(self, meeting: Meeting, number: int, traffic: Traffic) -> None:
        self._meeting = meeting
        self._number = number
        self._traffic = traffic
        self._home: cupy.ndarray | None = None  # the ids of the tokens that are under way
        self._ids: cupy.ndarray | None = None  # and of the rows that came
        self._told: Callable[[bool], None] | None = None  # of waits
        owners = np.array(traffic.owners[meeting.world.rank], np.int32)
        with on_device(meeting.device):
            self._owners = upload(owners)
            self._statistics = upload(np.zeros(EXCHANGE.STATISTICS + len(owners), np.uint64))
            cupy.cuda.get_current_stream().synchronize()  # whatever stream the first call is in

    def dispatch(
        self, x: cupy.ndarray, expert_ids: cupy.ndarray, expert_weights: cupy.ndarray
    ) -> Rows:
        with on_device(self._meeting.device):
            arrays = x, expert_ids, expert_weights
            return self._dispatched(*(cupy.ascontiguousarray(array) for array in arrays))

    def combine(self, products: cupy.ndarray) -> cupy.ndarray:
        with on_device(self._meeting.device):
            return self._combined(cupy.ascontiguousarray(products))

    def tell_waits(self, told: Callable[[bool], None] | None) -> None:
        """Tell of the kernels that wait, which also put what comes in order."""
        self._told = told

    def counted(self) -> ExchangeCounts:
        with on_device(self._meeting.device):
            numbers: npt.NDArray[np.uint64] = cupy.asnumpy(self._statistics)
            self._statistics.data.memset(0, self._statistics.nbytes)
            runtime.deviceSynchronize()  # whatever stream the next call is in
        return self._counts(numbers.astype(np.int64))

    def _dispatched(self, x: cupy.ndarray, ids: cupy.ndarray, weights: cupy.ndarray) -> Rows:
        meeting, (tokens, hidden_size) = self._meeting, x.shape
        slots, ranks, k = meeting.slots, meeting.world.size, self._traffic.num_experts_per_tok
        if tokens > slots:
            raise ValueError(
                f"{tokens} tokens, but the ranks have settled on {slots} for this forward; call "
                "`forward` inside of `running(tokens)`"
            )
        rows = Rows(
            cupy.empty((ranks * slots * k, hidden_size), self._traffic.row_format.block),
            cupy.empty((ranks * slots * k, 1), np.int32),
            cupy.empty((ranks * slots * k, 1), np.float32),
        )
        given = x, ids, weights, tokens, self._owners
        boxes = meeting.mailboxes
        self._kernel("send_tokens")(
            (_ctas(tokens),), EXCHANGE.THREADS, *given, *self._place(), boxes.state,
            self._statistics,
        )  # fmt: skip
        with self._waiting():
            self._kernel("take_rows")(
                (_ctas(slots), ranks), EXCHANGE.THREADS, *given, *self._place(), slots, *rows,
                self._number, boxes.state, boxes.control, self._statistics,
            )  # fmt: skip
        self._home, self._ids = ids, rows.expert_ids
        return rows

    def _combined(self, products: cupy.ndarray) -> cupy.ndarray:
        home, ids, self._home, self._ids = self._home, self._ids, None, None
        assert home is not None, "`dispatch` comes first"
        meeting, (tokens, k) = self._meeting, home.shape
        slots, boxes = meeting.slots, meeting.mailboxes
        delta = cupy.empty((tokens, self._traffic.hidden_size), np.float32)
        self._kernel("send_products")(
            (_ctas(slots * k), meeting.world.size), EXCHANGE.THREADS, products, ids,
            *self._place(), slots, boxes.state, self._statistics,
        )  # fmt: skip
        with self._waiting():
            self._kernel("add_products")(
                (_ctas(tokens),), EXCHANGE.THREADS, products, home, tokens, self._owners,
                *self._place(), slots, delta, self._number, boxes.state, boxes.control,
                self._statistics,
            )  # fmt: skip
        return delta

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        if self._told is not None:
            self._told(False)
        yield
        if self._told is not None:
            self._told(True)

    def _place(self) -> tuple[cupy.ndarray | int, ...]:
        """Return the arguments by which kernels find a place in the mailboxes."""
        traffic, world, boxes = self._traffic, self._meeting.world, self._meeting.mailboxes
        return boxes.base, world.rank, world.size, *boxes.size, traffic.hidden_size

    def _kernel(self, name: str) -> Kernel:
        vector = 4 if self._traffic.hidden_size % 4 == 0 else 1
        taken = self._traffic.num_experts_per_tok
        row = self._traffic.row_format.name
        return load_kernel("exchange", name, VECTOR=vector, TAKEN=taken, ROW=row)

    def _counts(self, numbers: npt.NDArray[np.int64]) -> ExchangeCounts:
        """Return the counts by what kernels have counted; see `Statistics` in exchange.cu."""
        of_calls, expert_rows = np.split(numbers, [EXCHANGE.STATISTICS])
        calls, tokens, rows_sent, products_sent, *nanoseconds = of_calls.tolist()
        others, hidden_size = self._meeting.world.size - 1, self._traffic.hidden_size
        row_bytes = self._traffic.row_format.nbytes((hidden_size,))
        lines = WORD * LINE_WORDS * calls * others
        headers = 2 * WORD * self._traffic.num_experts_per_tok * tokens * others + lines
        return ExchangeCounts(
            counts=Sent(),  # they travel with the tokens
            dispatch=Sent(
                calls * others, rows_sent, rows_sent * row_bytes + headers, headers,
                1e-9 * nanoseconds[0],
            ),
            combine=Sent(
                calls * others, products_sent, products_sent * WORD * hidden_size + lines, lines,
                1e-9 * nanoseconds[1],
            ),
            copied_rows=int(expert_rows.sum()),
            expert_rows=expert_rows,
        )  # fmt: skip


def _ctas(count: int) -> int:
    return min(max(count, 1), MOST_CTAS)
