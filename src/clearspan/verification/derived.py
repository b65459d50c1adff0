"""The check of a derived adapter before anyone uses it: what its points are called must be what they are."""

import re
from dataclasses import dataclass

from clearspan.errors import UnsupportedArchitectureError
from clearspan.model import Model
from clearspan.verification.reads import reads
from clearspan.verification.report import Check
from clearspan.verification.run import checks_of, trial_of
from clearspan.verification.structure import findings

SHOWN = 5
"""Failures that an error names."""


def check_derived(model: Model) -> None:
    """Runs a model twice on a few random tokens, and checks the identities between its points.

    Of a model without weights, on the meta device, only its parts and their sizes are checked.

    Raises:
        UnsupportedArchitectureError: One does not hold, or parts of the model are in no component.
    """
    is_meta = any(one.is_meta for one in model.hf_model.parameters())
    failed = [] if is_meta else [check.what for check in _failing(model)]
    failed += [what for what, _ in findings(model)]
    if failed:
        more = f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
        raise UnsupportedArchitectureError(
            f"no adapter for {model.cfg.architecture}, and what was derived of its structure does not hold",
            reason="; ".join(failed[:SHOWN]) + more,
            fix="boot(model, partial=True) for what holds; or boot(model, adapter=...) with an adapter of your own: "
            "CONTRIBUTING.md shows how, step by step",
        )


def _failing(model: Model) -> list[Check]:
    return [check for check in checks_of(trial_of(model, "quick", None), reads) if not check.passed]


@dataclass(frozen=True)
class NotHolding:
    """What does not hold of a derived structure.

    Attributes:
        points: Points that do not show what they are called, each with the reason.
        layers: Blocks inside of which an identity does not hold, each with the reason.
    """

    points: dict[str, str]
    layers: dict[int, str]


def not_holding(model: Model) -> NotHolding:
    """Returns which points of a derived adapter do not hold, on a few random tokens."""
    found = NotHolding({}, {})
    for check in _failing(model):
        why = f"it was derived, and does not hold: {check.what}"
        layers = [int(number) for number in re.findall(r"blocks\.(\d+)\.", check.what)]
        if check.what in model.hook_dict:
            found.points[model.hook_dict[check.what].name] = why
        elif layers:
            found.layers.update(dict.fromkeys(layers, why))
        else:
            found.points.update({name: why for name in model.hook_dict if name in check.what.split()})
    return found
