"""Strings in R's .rdb files."""

from __future__ import annotations

import struct

import pytest

from lfm2kit.errors import Lfm2kitError
from tests.training.archives import block
from training.rdata import string_vectors

NUMBERS = 14  # REALSXP


@pytest.mark.parametrize("version", [2, 3])
def test_vectors_of_strings_come_back_in_order(version: int) -> None:
    first, second = ["EMMA", "", "£5 a naïve line"], ["one"]
    data = block([*first], version) + block([*second], version)
    assert list(string_vectors(data)) == [first, second]


def test_na_is_the_empty_string() -> None:
    assert list(string_vectors(block([None, "x"]))) == [["", "x"]]


def test_objects_of_another_type_are_refused() -> None:
    with pytest.raises(Lfm2kitError, match="an R object of type 14, expected strings"):
        list(string_vectors(block([], kind=NUMBERS)))


def test_a_block_of_another_length_is_refused() -> None:
    data = block(["x"])
    with pytest.raises(Lfm2kitError, match="another length"):
        list(string_vectors(struct.pack(">i", 1) + data[4:]))
