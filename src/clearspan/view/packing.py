"""Data for a page: tensors in 8 or 16 bits with the JSON that names them, in one piece of gzip written as base64.

The piece holds the JSON's length (4 bytes, little-endian), the JSON, and the tensors' bytes. `drawings/data.js` reads
it.
"""

import base64
import gzip
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clearspan.errors import InvalidArgumentError

_DTYPES = {8: torch.uint8, 16: torch.uint16}


@dataclass(frozen=True)
class Quantised:
    """A tensor in whole steps between two values; the highest code stands for NaN.

    A value read back differs by half a step at most: `(high - low) / (2**bits - 2) / 2`. Both ends, and the middle, are
    exact.

    Attributes:
        values: Finite or NaN, from `low` to `high`; what lies outside is brought to the nearer end.
        low: The value of code 0.
        high: The value of the highest code but one.
        bits: 8 or 16.
        is_triangular: Whether only entries at or left of the diagonal of the last two axes are kept, as in causal
            attention; the others are read as `low`.
    """

    values: Tensor
    low: float = 0.0
    high: float = 1.0
    bits: int = 16
    is_triangular: bool = False

    def __post_init__(self) -> None:
        if self.bits not in _DTYPES:
            raise InvalidArgumentError(f"there is no code of {self.bits} bits", expected="8 or 16")
        if not self.low < self.high:
            raise InvalidArgumentError(f"no values lie from {self.low} to {self.high}", expected="low < high")
        if self.is_triangular and (self.values.ndim < 2 or self.values.shape[-1] != self.values.shape[-2]):
            got = str(list(self.values.shape))
            raise InvalidArgumentError("a triangle is half of a square", expected="[..., pos, pos]", got=got)

    def codes(self) -> Tensor:
        """Returns the codes in the order in which they are kept, on one axis."""
        values = self.values.detach().cpu().double()
        if self.is_triangular:
            rows, columns = torch.tril_indices(*values.shape[-2:])
            values = values[..., rows, columns]
        missing = 2**self.bits - 1
        codes = ((values - self.low) / (self.high - self.low) * (missing - 1)).round().clamp(0, missing - 1)
        return codes.nan_to_num(nan=missing).to(torch.int64).flatten()

    def to_bytes(self) -> bytes:
        """Returns the codes as bytes, little-endian."""
        return self.codes().to(_DTYPES[self.bits]).numpy().astype(f"<u{self.bits // 8}").tobytes()


Document = str | int | float | None | Tensor | Quantised | Mapping[str, object] | Sequence[object]


@dataclass
class _Body:
    """The tensors' bytes, one after the other, each from an even place so that it can be read as 16 bits."""

    parts: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, tensor: Quantised) -> dict[str, object]:
        """Appends a tensor and returns what the JSON says of it."""
        content, offset = tensor.to_bytes(), self.size
        content += bytes(len(content) % 2)
        self.parts.append(content)
        self.size += len(content)
        kept = {"shape": list(tensor.values.shape), "low": tensor.low, "high": tensor.high, "bits": tensor.bits}
        return {"$tensor": {**kept, "isTriangular": tensor.is_triangular, "offset": offset}}


def packed(document: Document) -> str:
    """Returns a document of plain data, tensors of whole numbers and `Quantised` tensors as base64.

    Example:
        >>> import torch
        >>> text = packed({"drop": Quantised(torch.zeros(2, 3)), "ids": torch.tensor([5, 7])})
        >>> text.isascii()
        True
    """
    body = _Body()
    header = json.dumps(_plain(document, body), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    header += b" " * (len(header) % 2)
    return compressed(struct.pack("<I", len(header)) + header + b"".join(body.parts))


def compressed(content: bytes) -> str:
    """Returns gzip of some bytes as base64; the same bytes give the same text."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _plain(document: object, body: _Body) -> object:
    match document:
        case Quantised():
            return body.add(document)
        case Tensor():
            return document.tolist()
        case Mapping():
            return {name: _plain(one, body) for name, one in document.items()}
        case list() | tuple():
            return [_plain(one, body) for one in document]
        case str() | int() | float() | None:
            return document
        case _:
            raise TypeError(f"a page holds no {type(document).__name__}")
