"""Hook points: names, axes, places and listeners. They know no model and no module."""

from clearspan.points.address import Address
from clearspan.points.catalogue import (
    OF_AUTOENCODERS,
    RAW_ENDS,
    VOCABULARY,
    Entry,
    entry_of,
    is_in_vocabulary,
    template_of,
)
from clearspan.points.functions import Argument, Function, Role
from clearspan.points.hook_point import Direction, HookFunction, HookPoint, Listener, Stretch
from clearspan.points.names import NamesFilter, get_act_name, is_short_name, nearest
from clearspan.points.place import (
    Access,
    Converted,
    Derivation,
    Derived,
    InPlace,
    Layout,
    Offered,
    Passed,
    Place,
    ReadOnly,
    SharedRow,
    Side,
    Whole,
    read,
)

__all__ = [
    "Access",
    "Address",
    "Argument",
    "Converted",
    "Derivation",
    "Derived",
    "Direction",
    "Entry",
    "Function",
    "HookFunction",
    "HookPoint",
    "InPlace",
    "Layout",
    "Listener",
    "NamesFilter",
    "OF_AUTOENCODERS",
    "Offered",
    "Passed",
    "Place",
    "RAW_ENDS",
    "ReadOnly",
    "Role",
    "SharedRow",
    "Side",
    "Stretch",
    "VOCABULARY",
    "Whole",
    "entry_of",
    "get_act_name",
    "is_in_vocabulary",
    "is_short_name",
    "nearest",
    "read",
    "template_of",
]
