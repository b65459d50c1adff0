"""Names of TransformerLens 4.3 for those who bring code along: thin methods, and what is called otherwise here.

`TransformerLensNames` is for the bridge, `HookPointNames` for hook points, `ConfigNames` for `bridge.cfg`. Nothing else
in this library calls these names. A name that means the same does the same; any other raises, and says what to call.
"""

from clearspan.transformer_lens.bridge import TransformerLensNames as TransformerLensNames
from clearspan.transformer_lens.config import ConfigNames as ConfigNames
from clearspan.transformer_lens.generation import GENERATION_KEYWORDS as GENERATION_KEYWORDS
from clearspan.transformer_lens.generation import hugging_face_keywords as hugging_face_keywords
from clearspan.transformer_lens.hook_point import HookPointNames as HookPointNames
from clearspan.transformer_lens.hook_point import check_no_level as check_no_level
from clearspan.transformer_lens.renamed import FORWARD_KEYWORDS as FORWARD_KEYWORDS
from clearspan.transformer_lens.renamed import missing_from_library as missing_from_library

__all__ = [
    "FORWARD_KEYWORDS",
    "GENERATION_KEYWORDS",
    "ConfigNames",
    "HookPointNames",
    "TransformerLensNames",
    "check_no_level",
    "hugging_face_keywords",
    "missing_from_library",
]
