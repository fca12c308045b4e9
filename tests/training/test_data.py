"""The prepared data, and the windows that are drawn from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lfm2kit.errors import Lfm2kitError
from training.data import HELD_OUT, LEARNT, Part, Windows, read_data, write_data

BOS = 1


def part(first: int, lengths: list[int]) -> Part:
    """Return a part whose ids count up from `first`, in paragraphs of some lengths."""
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int32)
    return Part(np.arange(first, first + sum(lengths), dtype=np.uint16), starts, sum(lengths))


def parts() -> dict[str, Part]:
    """Return parts of all names, whose ids tell them apart."""
    names = (*LEARNT, *HELD_OUT)
    return {name: part(100 + 1000 * i, [5, 30, 7, 40, 10]) for i, name in enumerate(names)}


def test_data_comes_back(tmp_path: Path) -> None:
    write_data(tmp_path, parts())
    back = read_data(tmp_path)
    assert list(back) == [*LEARNT, *HELD_OUT]
    for name, expected in parts().items():
        np.testing.assert_array_equal(back[name].ids, expected.ids)
        np.testing.assert_array_equal(back[name].starts, expected.starts)
        assert back[name].nbytes == expected.nbytes


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 not a zip", b"text"])
def test_data_that_cannot_be_read_says_how_to_make_it(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "tokens.npz").write_bytes(content)
    with pytest.raises(Lfm2kitError, match=r"tokens\.npz: .*python -m training\.prepare"):
        read_data(tmp_path)


def test_a_window_is_the_bos_and_tokens_from_the_beginning_of_a_paragraph() -> None:
    starts = {int(p.ids[s]) for name, p in parts().items() if name in LEARNT for s in p.starts}
    for window in Windows(parts(), 20, BOS, seed=0).draw(200):
        assert window[0] == BOS
        assert window[1] in starts
        np.testing.assert_array_equal(np.diff(window[1:]), 1)


def test_a_token_of_a_novel_is_drawn_twice_as_often_as_one_of_a_speech() -> None:
    in_another_order = dict(reversed(parts().items()))
    drawn = Windows(in_another_order, 20, BOS, seed=0).draw(4000)[:, 1] // 1000
    speeches, novels, turns = (np.count_nonzero(drawn == kind) for kind in range(3))
    assert 1.8 < novels / speeches < 2.2
    assert 0.4 < turns / speeches < 0.6


def test_the_seed_fixes_the_windows() -> None:
    drawn = [Windows(parts(), 20, BOS, seed).draw(9) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_windows_longer_than_a_part_are_refused() -> None:
    with pytest.raises(Lfm2kitError, match="windows of 92 tokens are longer than a part"):
        Windows(parts(), 92, BOS, seed=0)
