"""Linear maps as components of their own."""

from clearspan.components.base import GeneralizedComponent


class LinearBridge(GeneralizedComponent):
    """A linear map inside another component, which says what its ends mean."""
