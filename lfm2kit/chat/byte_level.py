"""The bytes of the pieces in a byte-level vocabulary, where one character stands for each byte.

Printable bytes of Latin-1 stand for themselves, and the others for characters from 256 on.
"""

from __future__ import annotations

_THEMSELVES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _THEMSELVES]
BYTE_OF = {chr(byte): byte for byte in _THEMSELVES} | {
    chr(256 + position): byte for position, byte in enumerate(_OTHERS)
}


def bytes_of_piece(piece: str) -> bytes:
    """Return a piece's bytes; as in the library, one with other characters is text in UTF-8."""
    try:
        return bytes(BYTE_OF[character] for character in piece)
    except KeyError:
        return piece.encode()
