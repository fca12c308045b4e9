"""What stands before the tensors of a GGUF file: keys, and where each tensor is.

The library gguf parses it.  It trusts the file, so it is kept from looking beyond the file's end
and from headers without end, which damaged files claim.  Lists are read at once: item by item, a
vocabulary would take it eight seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderField

from lfm2kit import bounds
from lfm2kit.errors import Lfm2kitError

MOST_BYTES = 2**25  # of a header: a vocabulary of 128000 tokens takes a fifth of that
MOST_ITEMS = 2**20  # of a list of texts
MOST_COUNTED = {"GGUF.kv_count": 10_000, "GGUF.tensor_count": bounds.TENSORS}
DAMAGES = (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError)


class Header(GGUFReader):
    """The header of the file at `path`.

    Raise `Lfm2kitError` for a file that ends too early, for one that is not GGUF in this machine's
    byte order, for whatever else the library cannot parse, and for one that cannot be read at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._blaming(), np.errstate(all="ignore"):  # damaged sizes overflow
            super().__init__(path)
        if self.byte_order != "I":
            raise Lfm2kitError(f"{path}: its numbers are in another byte order than this machine's")

    def value(self, key: str) -> Any:
        """Return a key's value, a list for numbers; None if there is no such key.

        Lists of texts are empty.
        """
        field = self.get_field(key)
        if field is None:
            return None
        with self._blaming():
            value = field.contents()
        if field.types == [GGUFValueType.FLOAT32]:
            return float(str(np.float32(value)))  # 1e-5 as it was written, not 9.99999975e-06
        return value

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Say of what the library raises which file it is about."""
        try:
            yield
        except DAMAGES as error:
            said = error.args[0] if isinstance(error, KeyError) else error  # without quotes
            raise Lfm2kitError(f"{self.path}: the library gguf cannot read it: {said}") from None
        except OSError as error:
            raise Lfm2kitError(f"{self.path}: {error.strerror or error}") from None

    def _push_field(self, field: ReaderField, skip_sum: bool = False) -> int:
        """Keep a field, of which the first say how many keys and tensors there are."""
        most = MOST_COUNTED.get(field.name)
        if most is not None and (count := int(field.parts[0][0])) > most:
            what = field.name.removeprefix("GGUF.")
            raise Lfm2kitError(f"{self.path}: its {what} is {count}; lfm2kit takes up to {most}")
        return super()._push_field(field, skip_sum)

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
    ) -> np.ndarray[Any, Any]:
        """Return numbers of the file, which everything in it is read by."""
        self._check_end(int(offset) + np.dtype(dtype).itemsize * int(count))
        numbers: np.ndarray[Any, Any] = super()._get(offset, dtype, count, override_order)
        return numbers

    def _check_end(self, end: int) -> None:
        """Raise `Lfm2kitError` if the file, or its header, cannot reach to the byte `end`."""
        if end > len(self.data):
            raise Lfm2kitError(
                f"{self.path}: it needs {end} bytes at least, but has {len(self.data)} "
                "(truncated download?)"
            )
        is_header = not hasattr(self, "data_offset")
        if is_header and end > MOST_BYTES:
            raise Lfm2kitError(f"{self.path}: its header does not end within {MOST_BYTES} bytes")

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Return the bytes of a value, its parts, which of them are data, and their types."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        kind, start = GGUFValueType(item[0]), orig_offs + 12
        types = [GGUFValueType.ARRAY, kind]
        if kind == GGUFValueType.STRING:
            return self._end_of_texts(start, int(length[0])) - orig_offs, [], [], types
        numbers = self._get(start, self.gguf_scalar_to_np[kind], length[0])
        return 12 + numbers.nbytes, [numbers], [0], types

    def _end_of_texts(self, start: int, count: int) -> int:
        """Return where a list of texts ends; it is passed over, because vocabularies are long."""
        if count > MOST_ITEMS:
            raise Lfm2kitError(f"{self.path}: a list in its header claims {count} texts")
        mapped: Any = self.data
        data, end = memoryview(mapped), start
        for _ in range(count):
            end += 8 + int.from_bytes(data[end : end + 8], "little")
        self._check_end(end)
        return end
