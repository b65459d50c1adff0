"""Draws the picture of the README: `python docs/draw_first_look.py`."""

from pathlib import Path

import clearspan
from clearspan.patching import activation_patching
from clearspan.sweep import LogitDifference

PICTURE = Path(__file__).parent / "images/first-look.svg"


def picture() -> str:
    """Returns the picture of what the README's first example finds."""
    bridge = clearspan.boot("tiny-bigcode")
    clean, corrupted = "def rename(self, name):\n    self._value =", "def rename(self, path):\n    self._value ="
    metric = LogitDifference.between(bridge, " name", " path")
    return activation_patching(bridge, clean, corrupted, metric, progress=False).chart().svg()


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
