"""Results to look at: figures, one self-contained page, and the terminal."""

from .figures import effect_figure as effect_figure
from .figures import head_figure as head_figure
from .figures import lens_figure as lens_figure
from .figures import pattern_figure as pattern_figure
from .page import html_page as html_page
from .terminal import show as show
from .terminal import show_verification as show_verification
