"""Results to look at: figures, one self-contained page, and the terminal."""

from clearspan.view.edges import show_edges
from clearspan.view.figures import effect_figure, head_figure, lens_figure, pattern_figure
from clearspan.view.generations import show_generations
from clearspan.view.headline import Headline, headline
from clearspan.view.heads import show_head_scores
from clearspan.view.heat import show_effects
from clearspan.view.page import html_page, open_report, save_report
from clearspan.view.terminal import PARTS, show
from clearspan.view.verification import show_verification
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
    "PARTS",
    "save_report",
    "show",
    "show_edges",
    "show_effects",
    "show_generations",
    "show_head_scores",
    "show_verification",
    "show_zoo",
]
