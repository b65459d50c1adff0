"""The check of a derived adapter before anyone uses it: what its points are called must be what they are."""

from clearspan.errors import UnsupportedArchitectureError
from clearspan.model import Model
from clearspan.verification.reads import reads
from clearspan.verification.run import checks_of, trial_of
from clearspan.verification.structure import findings

SHOWN = 5
"""Failures that an error names."""


def check_derived(model: Model) -> None:
    """Runs a model twice on a few random tokens, and checks the identities between its points.

    Raises:
        UnsupportedArchitectureError: One does not hold, or parts of the model are in no component.
    """
    failed = [check.what for check in checks_of(trial_of(model, "quick", None), reads) if not check.passed]
    failed += [what for what, _ in findings(model)]
    if failed:
        more = f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
        raise UnsupportedArchitectureError(
            f"no adapter for {model.cfg.architecture}, and what was derived of its structure does not hold",
            reason="; ".join(failed[:SHOWN]) + more,
            fix="boot(model, adapter=...) with an adapter of your own: CONTRIBUTING.md shows how, step by step",
        )
