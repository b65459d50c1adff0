"""Linear maps as components of their own."""

from torch import Tensor

from clearspan.components.base import GeneralizedComponent


class LinearBridge(GeneralizedComponent):
    """A linear map inside another component, which says what its ends mean."""

    def bias_or_none(self) -> Tensor | None:
        """Returns the live bias, or None where the map has none."""
        return dict(self.module.named_parameters(recurse=False)).get("bias")
