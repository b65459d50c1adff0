"""The corpus: source files of the Python standard library, split into training and held-out files."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.02
# Tables rather than code: character maps, and the language reference as one string literal.
EXCLUDED = ("site-packages/", "encodings/", "pydoc_data/", "lib-dynload/", "config-")


@dataclass(frozen=True)
class Source:
    """One source file: its path below the standard library's folder, and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file is kept from training: decided by a hash of its path, the same on every machine."""
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32

    @property
    def is_test(self) -> bool:
        """Whether the file belongs to the standard library's own test suite."""
        return "test" in self.path.split("/")[0] or "/test" in self.path


def standard_library(root: Path | None = None) -> list[Source]:
    """Returns the standard library's UTF-8 source files in the order of their paths.

    Args:
        root: The library's folder; by default that of the running interpreter.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if path.startswith(EXCLUDED) or "/site-packages/" in path:
            continue
        try:
            sources.append(Source(path, file.read_text(encoding="utf-8")))
        except UnicodeDecodeError:  # the test suite holds files in other encodings, and broken ones
            continue
    return sources
