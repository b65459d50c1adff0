"""Verification of a bridge on the user's own model: what is read and written is what it is said to be."""

from clearspan.bridge.verification.report import Check as Check
from clearspan.bridge.verification.report import Verification as Verification
from clearspan.bridge.verification.run import verify as verify
