"""Conversions of parameters, by canonical weight name."""

from dataclasses import dataclass

from torch import Tensor

from clearspan.conversions.base import BaseTensorConversion


@dataclass(frozen=True)
class ParamProcessingConversion:
    """How one weight shows in canonical axes.

    Attributes:
        tensor_conversion: Between the component's own layout and the canonical one.
    """

    tensor_conversion: BaseTensorConversion

    def convert(self, weight: Tensor) -> Tensor:
        """Returns the weight in canonical axes, a view where the layouts allow one."""
        return self.tensor_conversion.handle_conversion(weight)

    def revert(self, weight: Tensor) -> Tensor:
        """Returns the weight in the component's own layout."""
        return self.tensor_conversion.revert(weight)
