"""Results to look at: figures, one self-contained page, and the terminal."""

from clearspan.view.figures import effect_figure, head_figure, lens_figure, pattern_figure
from clearspan.view.headline import Headline, headline
from clearspan.view.page import html_page, open_report, save_report
from clearspan.view.terminal import show, show_verification
from clearspan.view.zoo import show_zoo

__all__ = [
    "Headline",
    "effect_figure",
    "head_figure",
    "headline",
    "html_page",
    "lens_figure",
    "open_report",
    "pattern_figure",
    "save_report",
    "show",
    "show_verification",
    "show_zoo",
]
