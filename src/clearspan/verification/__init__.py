"""Verification on the user's own model: points show what they promise, and writes reach what reads them."""

from clearspan.verification.report import Check, Verification
from clearspan.verification.run import Level, verify

__all__ = ["Check", "Level", "Verification", "verify"]
