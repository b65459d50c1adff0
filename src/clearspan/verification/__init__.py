"""Verification on the user's own model: points show what they promise, and writes reach what reads them."""

from clearspan.verification.derived import check_derived, not_holding
from clearspan.verification.report import Check, Verification
from clearspan.verification.run import verify
from clearspan.verification.structure import warn_of_structure
from clearspan.verification.trial import FAULTS, Level

__all__ = ["FAULTS", "Check", "Level", "Verification", "check_derived", "not_holding", "verify", "warn_of_structure"]
