"""The structure of a model that no adapter is written for, derived from its modules and one traced forward.

Nothing here knows a family or reads a module's name: what a module is follows from what it is given and gives. The
result is what adapters are made of, component templates, with what each finding rests on.
"""

from clearspan.structure.adapter import Structure as Structure
from clearspan.structure.adapter import derive as derive
from clearspan.structure.finding import Finding as Finding
from clearspan.structure.large import derive_from_small as derive_from_small
from clearspan.structure.source import adapter_of as adapter_of
from clearspan.structure.source import source as source

__all__ = ["Finding", "Structure", "adapter_of", "derive", "derive_from_small", "source"]
