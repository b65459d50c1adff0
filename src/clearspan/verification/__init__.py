"""Verification on the user's own model: points show what they promise, and writes reach what reads them."""

from clearspan.verification.report import Check as Check
from clearspan.verification.report import Verification as Verification
from clearspan.verification.run import Level as Level
from clearspan.verification.run import verify as verify
