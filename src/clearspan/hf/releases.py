"""Releases of transformers: which ones this library is tested with, and what one of them leaves out."""

import functools
import warnings
from typing import TYPE_CHECKING

from clearspan.errors import LeftOutWarning, UntestedReleaseWarning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OLDEST, NEWEST = (5, 20), (5, 24)
"""The oldest and the newest release of transformers that the tests run with."""


def warn_of_release() -> None:
    """Warns, once, if transformers is newer than what the tests run with."""
    from transformers import __version__

    _warn_of(__version__)


@functools.cache
def _warn_of(version: str) -> None:
    major, minor, *_ = version.split(".")
    if (int(major), int(minor)) > NEWEST:
        warnings.warn(
            f"clearspan is tested with transformers {_text(OLDEST)} to {_text(NEWEST)}, and this is {version}. "
            "Releases have moved what this library reads. bridge.verify() checks it on your model; "
            f"pip install 'transformers<{NEWEST[0]}.{NEWEST[1] + 1}' installs what is tested.",
            UntestedReleaseWarning,
            stacklevel=4,
        )


def warn_of_what_is_left_out(model: "PreTrainedModel") -> None:
    """Warns if the model's attention leaves out the cap on its scores: transformers 5.20 runs sdpa without it."""
    cap = vars(model.config).get("attn_logit_softcapping")
    if cap is not None and model.config._attn_implementation == "sdpa":
        warnings.warn(
            f"this {type(model).__name__} does not cap attention's scores at {cap:g}, as its config asks for: "
            "sdpa has no cap, and transformers 5.20 does not say so. "
            "from_pretrained(..., attn_implementation='eager') caps them. "
            "hook_attn_scores and hook_pattern show what the model computes, without the cap.",
            LeftOutWarning,
            stacklevel=3,
        )


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
