"""Matrices of colour numbers as PNG images, written without any library of pictures."""

import struct
import zlib
from collections.abc import Sequence

from torch import Tensor

from .colors import channels


def png(numbers: Tensor, palette: Sequence[str]) -> bytes:
    r"""Returns a PNG of one pixel for each number.

    Args:
        numbers: `[row, column]`, each the number of a colour; one past the last colour is transparent.
        palette: At most 255 colours `#rrggbb`.

    Example:
        >>> import torch
        >>> png(torch.zeros(2, 3), ["#ffffff"])[:8]
        b'\x89PNG\r\n\x1a\n'
    """
    rows, columns = numbers.shape
    lines = b"".join(b"\0" + bytes(line) for line in numbers.int().tolist())  # each line unfiltered
    colors = b"".join(bytes(channels(color)) for color in palette) + b"\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            _chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", colors),
            _chunk(b"tRNS", b"\xff" * len(palette) + b"\0"),
            _chunk(b"IDAT", zlib.compress(lines, 9)),
            _chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
