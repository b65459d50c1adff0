"""What the workbench shows: one class for each kind of view."""

from collections.abc import Mapping
from typing import Any

from clearspan.checks import check_choice, check_fields
from clearspan.workbench.views.attention import AttentionView
from clearspan.workbench.views.attribution import AttributionView
from clearspan.workbench.views.generation import GenerationView
from clearspan.workbench.views.lens import LensView
from clearspan.workbench.views.patching import PatchingView
from clearspan.workbench.views.text import TextView
from clearspan.workbench.views.verification import VerificationView
from clearspan.workbench.views.view import Answer, Call, Prompt, View, Watch

KINDS: Mapping[str, type[View]] = {
    view.kind: view
    for view in (
        TextView,
        LensView,
        AttentionView,
        AttributionView,
        PatchingView,
        GenerationView,
        VerificationView,
    )
}

__all__ = [
    "KINDS",
    "Answer",
    "AttentionView",
    "AttributionView",
    "Call",
    "GenerationView",
    "LensView",
    "PatchingView",
    "Prompt",
    "TextView",
    "VerificationView",
    "View",
    "Watch",
    "parse_view",
]


def parse_view(data: Mapping[str, Any]) -> View:
    """Returns the request of its JSON form.

    Raises:
        InvalidArgumentError: It is none.
    """
    check_fields("request", data, "view")
    check_choice(KINDS, view=data["view"])
    return KINDS[data["view"]].from_json({name: value for name, value in data.items() if name != "view"})
