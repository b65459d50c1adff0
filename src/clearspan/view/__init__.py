"""Results to look at: figures, one self-contained page, and the terminal."""

from clearspan.view.figures import effect_figure, head_figure, lens_figure, pattern_figure
from clearspan.view.page import html_page
from clearspan.view.terminal import show, show_verification
from clearspan.view.zoo import show_zoo

__all__ = [
    "effect_figure",
    "head_figure",
    "html_page",
    "lens_figure",
    "pattern_figure",
    "show",
    "show_verification",
    "show_zoo",
]
