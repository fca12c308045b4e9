"""The kernel that draws tokens, on the CPU, where CUDA threads take turns.

It must draw what NumPy draws from the same logits.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.compiling import SOURCES

from lfm2kit.engine.asked import asked_by
from lfm2kit.engine.drawing import ALL_EXCLUDED, NOT_FINITE, Drawn, NotANumber, NumPySampler, Row
from lfm2kit.engine.sampling import Sampling
from tests.cuda import late_cupy
from tests.cuda.emulated_operators import compiled

SMALL = {"CTAS": 2, "THREADS": 64, "BITS": 4}
ERRORS = {-1: NOT_FINITE, -2: ALL_EXCLUDED}
NOTHING = -100  # as in emulated/sampling.cpp
NO_IDS = np.zeros(0, np.int32)

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def sampling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("sampling"), "sampling", **SMALL)


def drawn(
    program: Path, logits: Floats, rows: Sequence[Row | None], newest: Sequence[int] = ()
) -> list[int]:
    """Return the tokens, or errors, in whose place ids are 0; no count is left behind."""
    asked, newest = asked_by(rows), np.array(newest, np.int32)
    given = (array.nbytes // 4 for array in (*asked, newest))
    numbers = [len(asked.records), *logits.shape, *given]
    out = subprocess.run(
        [str(program), *map(str, numbers)], stdout=subprocess.PIPE, check=True, timeout=300,
        input=b"".join(array.tobytes() for array in (*asked, logits, newest)),
    ).stdout  # fmt: skip
    *both, counts = np.frombuffer(out, np.int32).tolist()
    assert counts == 0
    tokens, ids = both[: len(rows)], both[len(rows) :]
    assert ids == [0 if token in ERRORS else token for token in tokens]
    return tokens


def assert_drawn_as_numpy_does(program: Path, logits: Floats, rows: Sequence[Row | None]) -> None:
    tokens = drawn(program, logits, rows)
    for token, row, there in zip(tokens, rows, NumPySampler().draw(logits, rows), strict=True):
        if there is None:
            assert token == NOTHING
        else:
            expected = there.token_id if isinstance(there, Drawn) else there.why
            assert ERRORS.get(token, token) == expected, row


def logits_of(rng: np.random.Generator, kind: int, vocab_size: int) -> Floats:
    """Return a peaked row, a flat one, one with many ties, or one with excluded tokens."""
    logits = rng.standard_normal(vocab_size).astype(np.float32)
    if kind == 0:
        return 8 * logits
    if kind == 1:
        return logits * np.float32(1e-3)
    if kind == 2:
        return np.round(2 * logits) * np.float32(rng.choice([-0.5, 0.5]))
    logits[rng.random(vocab_size) < 0.8] = -np.inf
    logits[int(rng.integers(vocab_size))] = rng.choice([0, 80, -1e29])
    return logits


def row_of(rng: np.random.Generator, vocab_size: int) -> Row:
    """Return a row that asks for any of all things."""

    def one_of(*values: float) -> float:
        return float(rng.choice(values))

    ids = rng.integers(vocab_size, size=int(rng.integers(40))).astype(np.int32)
    is_masked = rng.random() < 0.3
    return Row(
        Sampling(
            temperature=one_of(0, 0.3, 1, 1, 7),
            top_k=int(one_of(0, 0, 1, 5, vocab_size - 1, vocab_size + 3)),
            top_p=one_of(1, 1, 0.01, 0.5, 0.9),
            min_p=one_of(0, 0, 0.15, 1),
            repetition_penalty=one_of(1, 1.05, 0.8),
            presence_penalty=one_of(0, 0, 0.7),
            frequency_penalty=one_of(0, 0, -0.2),
            logit_bias={} if rng.random() < 0.7 else {3: -4.5, int(vocab_size - 1): 2.25},
        ),
        seed=int(rng.integers(2**63)),
        position=int(rng.integers(2**20)),
        prompt=ids[:9],
        generated=ids[9:],
        mask=rng.integers(2**32, size=(vocab_size - 5) // 32, dtype=np.uint32)
        if is_masked
        else None,
        forbidden=(1, 7) if rng.random() < 0.3 else (),
    )


@pytest.mark.parametrize("vocab_size", [37, 500])
def test_any_row_draws_what_numpy_draws(sampling: Path, vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = np.stack([logits_of(rng, number % 4, vocab_size) for number in range(60)])
    asked = [row_of(rng, vocab_size) for _ in logits]
    assert_drawn_as_numpy_does(sampling, logits, [None, *asked[1:30], None, *asked[31:]])


@pytest.mark.long
def test_a_cluster_of_the_size_on_a_gpu_draws_what_numpy_draws(tmp_path: Path) -> None:
    rng = np.random.default_rng(5001)
    logits = np.stack([logits_of(rng, number % 4, 5001) for number in range(12)])
    asked = [row_of(rng, 5001) for _ in logits]
    assert_drawn_as_numpy_does(compiled(tmp_path, "sampling"), logits, asked)


def test_a_vocabulary_may_be_smaller_than_a_cluster(sampling: Path) -> None:
    for vocab_size in (1, 2, 33):
        asked = Sampling(top_k=1, top_p=0.5), Sampling(), Sampling(temperature=0)
        rows = [Row(one, 3, 4, NO_IDS, np.zeros(2, np.int32)) for one in asked]
        assert_drawn_as_numpy_does(sampling, np.eye(3, vocab_size, dtype=np.float32), rows)


def test_the_newest_token_may_be_on_the_device_alone(sampling: Path) -> None:
    """What stands in its place among the generated ones counts for nothing."""
    rng = np.random.default_rng(9)
    logits = np.stack([logits_of(rng, number % 4, 37) for number in range(30)])
    asked = [row_of(rng, 37) for _ in logits]
    newest = rng.integers(37, size=len(asked)).tolist()
    known = [with_newest(row, id) for row, id in zip(asked, newest, strict=True)]
    assert drawn(sampling, logits, asked, newest) == drawn(sampling, logits, known)
    assert drawn(sampling, logits, asked) != drawn(sampling, logits, known)


def with_newest(row: Row, token_id: int) -> Row:
    """Return the row with this id as the last of its generated ones, if it has any."""
    generated = row.generated.copy()
    generated[-1:] = token_id
    return row._replace(generated=generated)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_equal_tokens_are_cut_where_numpy_cuts_them(sampling: Path, top_p: float) -> None:
    """Of those with the lowest ids, so each must be drawn by some position, and no other."""
    logits = np.zeros((40, 10), np.float32)
    rows = [Row(Sampling(top_p=top_p), 5, position, NO_IDS, NO_IDS) for position in range(40)]
    assert_drawn_as_numpy_does(sampling, logits, rows)


def test_a_row_from_which_nothing_can_be_drawn_says_why(sampling: Path) -> None:
    logits = np.zeros((4, 70), np.float32)
    logits[0, 69], logits[1, 3] = np.nan, np.inf
    logits[2] = -np.inf
    mask = np.zeros(2, np.uint32)
    rows = [Row(Sampling(), 0, 9, NO_IDS, NO_IDS, mask if i == 3 else None) for i in range(4)]
    assert drawn(sampling, logits, rows) == [-1, -1, -2, -2]
    assert_drawn_as_numpy_does(sampling, logits, rows)


def test_the_device_gets_what_rows_ask_and_the_host_gets_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(6)
    rows = [row_of(rng, 37)._replace(logprobs=2 if i == 0 else None) for i in range(3)]
    logits = rng.standard_normal((3, 37)).astype(np.float32)
    launches: list[str] = []
    newest_of_launches: list[Any] = []

    def kernel(stem: str, name: str, CTAS: int) -> Any:
        parameters = re.search(rf"{name}\(([^)]*)\)", (SOURCES / f"{stem}.cu").read_text())

        def launch(grid: Any, threads: int, *arguments: Any) -> None:
            assert parameters is not None
            assert len(parameters[1].split(",")) == len(arguments)
            given, vocab_size, there, *starts, newest, changed, counts, token_ids, ids = arguments
            newest_of_launches.append(newest)
            assert (grid, vocab_size) == ((3 * CTAS,), 37)
            assert changed.shape == counts.shape == (3, 37)

            def work() -> None:
                np.testing.assert_array_equal(given.values, logits)
                for start, array in zip([0, *starts], asked_by(rows), strict=True):
                    assert there.values[start:].tobytes()[: array.nbytes] == array.tobytes()
                assert not counts.values.any()
                token_ids.values[:] = [5, -1, -2]
                ids.values[:] = [5, 0, 0]
                launches.append(name)

            given.enqueue(work)

        return launch

    with late_cupy.loaded("sampling", "memory") as (module, memories):
        monkeypatch.setattr(module, "load_kernel", kernel)
        memory = memories.memory_of(0)
        sampler = module.Sampler(memory)
        there = memory.from_host(logits)
        drawn, *failed = sampler.draw(there, rows)
        assert (drawn.token_id, len(drawn.best)) == (5, 2)
        assert failed == [
            NotANumber(rows[1].position, NOT_FINITE), NotANumber(rows[2].position, ALL_EXCLUDED),
        ]  # fmt: skip
        assert sampler.draw(there[:0], []) == []
        first = sampler.begin(there, rows)
        second = sampler.begin(there, rows, first.token_ids)
        assert memory.to_host(second.token_ids).tolist() == [5, 0, 0]
        assert second.end() == first.end() == [drawn, *failed]
        assert newest_of_launches == [None, None, first.token_ids]
        with pytest.raises(ValueError, match="3 rows for 2 rows of ids"):
            sampler.begin(there, rows, first.token_ids[:2])
        with pytest.raises(ValueError, match="2 rows for 3 rows of logits"):
            sampler.draw(there, rows[:2])
    assert launches == ["draw_tokens"] * 3
