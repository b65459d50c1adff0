"""What a conversion is: a way between Hugging Face's layout of a tensor and the canonical one."""

from abc import ABC, abstractmethod

from torch import Tensor


class BaseTensorConversion(ABC):
    """An invertible change of layout.

    `handle_conversion` gives a view wherever the layouts allow one. `revert` is its inverse; a conversion that shows a
    part of a tensor needs the whole tensor to put the part back into, and gets it as the second argument.
    """

    @abstractmethod
    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the tensor in canonical axes."""

    @abstractmethod
    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the tensor in Hugging Face's layout."""
