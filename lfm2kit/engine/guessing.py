"""The guesses of one sequence, made by code that may be anybody's, and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from lfm2kit.batch_rules import integers
from lfm2kit.engine.guesses import Guesses
from lfm2kit.errors import Lfm2kitError
from lfm2kit.plugin_faults import blaming, name_of


class Guessing:
    """Guesses for one sequence.  What goes wrong with them ends it alone, and is kept as `error`.

    There are no guesses after an error.
    """

    def __init__(self, make: Callable[[], Guesses]) -> None:
        self.error: Lfm2kitError | None = None
        self._guesses: Guesses | None = None
        self._name = name_of(make)
        with self._keeping_error():
            made = make()
            self._name = name_of(type(made))
            if not isinstance(made, Guesses):
                raise Lfm2kitError(f"{self._name} has no methods guess and told")
            self._guesses = made

    def guess(self, ids: npt.NDArray[np.int32], most: int) -> tuple[int, ...]:
        """Return up to `most` guesses of the tokens after these."""
        if self._guesses is None or self.error is not None:
            return ()
        shown = ids.view()
        shown.flags.writeable = False
        with self._keeping_error():
            guessed = self._guesses.guess(shown, most)
            return tuple(self._row_of(guessed)[:most].tolist())
        return ()

    def told(self, guessed: int, right: int) -> None:
        """Pass on how many of the last guesses were right."""
        if self._guesses is not None and self.error is None:
            with self._keeping_error():
                self._guesses.told(guessed, right)

    def check(self, guessed: tuple[int, ...], vocab_size: int) -> None:
        """Keep an error if one of these guesses is not a token."""
        outside = [token_id for token_id in guessed if not 0 <= token_id < vocab_size]
        if outside and self.error is None:
            said = f"token id {outside[0]} lies outside the vocabulary of {vocab_size}"
            self.error = Lfm2kitError(f"{self._name} guesses wrongly: {said}")

    def _row_of(self, guessed: list[int]) -> npt.NDArray[np.int32]:
        try:
            ids = integers("the guesses", guessed)
        except ValueError as error:
            raise Lfm2kitError(f"{self._name} guesses wrongly: {error}") from None
        if ids.ndim != 1:
            raise Lfm2kitError(f"{self._name} guesses wrongly: shape {ids.shape}, not one row")
        return ids

    @contextmanager
    def _keeping_error(self) -> Iterator[None]:
        try:
            with blaming(self._name):
                yield
        except Lfm2kitError as error:
            self.error = error
