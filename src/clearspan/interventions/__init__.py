"""Interventions: what is done to which value of a run, as data that can be compared, stored and run again."""

from clearspan.interventions.actions import (
    Action,
    Add,
    AddMapped,
    Apply,
    Inject,
    Mask,
    Mean,
    Patch,
    PatchSubspace,
    ProjectOut,
    Resample,
    Scale,
    SourcePosition,
    Zero,
    derangement,
    exchanged,
    parse_action,
)
from clearspan.interventions.constant import Constant
from clearspan.interventions.functions import register_function
from clearspan.interventions.intervention import Intervention
from clearspan.interventions.site import Site, Taken, Written, located

__all__ = [
    "Action",
    "Add",
    "AddMapped",
    "Apply",
    "Constant",
    "Inject",
    "Intervention",
    "Mask",
    "Mean",
    "Patch",
    "PatchSubspace",
    "ProjectOut",
    "Resample",
    "Scale",
    "Site",
    "SourcePosition",
    "Taken",
    "Written",
    "Zero",
    "derangement",
    "exchanged",
    "located",
    "parse_action",
    "register_function",
]
