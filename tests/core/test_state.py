"""A room is whole numbers of any integer type, within what kernels count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lfm2kit.state import Room


@pytest.mark.parametrize("wrong", [-1, 2.0, "2", None, True])
def test_its_numbers_are_whole(wrong: Any) -> None:
    for name, make in {
        "pages": lambda: Room(wrong),
        "page_tokens": lambda: Room(2, wrong),
        "sequences": lambda: Room.of_sequences(wrong, 8),
        "tokens": lambda: Room.of_sequences(2, wrong),
    }.items():
        with pytest.raises(ValueError, match=f"{name} is .* must be a (whole number|multiple)"):
            make()


@pytest.mark.parametrize("wrong", [0, 1, 32, 65, 100])
def test_a_page_has_a_multiple_of_64_tokens(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"page_tokens is {wrong}, but must be a multiple of 64"):
        Room(2, wrong)


def test_narrow_integers_do_not_wrap_around() -> None:
    assert Room.of_sequences(np.uint8(200), np.uint8(200)) == Room(400)
    assert Room.of_sequences(16, np.uint16(4096)) == Room(512)
    assert Room(np.int64(2), np.int32(64)).pages_of(np.int8(65)) == 2


def test_a_state_has_fewer_than_2_to_the_31_tokens() -> None:
    assert Room(2**24 - 1).pages == 2**24 - 1
    for pages, page_tokens in ((2**24, 128), (2**100, 64), (1, 2**40)):
        with pytest.raises(ValueError, match="more than the 2147483647 tokens"):
            Room(pages, page_tokens)
