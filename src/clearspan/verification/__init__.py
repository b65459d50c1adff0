"""Verification of a bridge on the user's own model: what is read and written is what it is said to be."""

from clearspan.verification.report import Check as Check
from clearspan.verification.report import Verification as Verification
from clearspan.verification.run import Level as Level
from clearspan.verification.run import verify as verify
