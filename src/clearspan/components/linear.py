"""Linear maps as components of their own."""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor, nn

from clearspan.components.base import GeneralizedComponent
from clearspan.components.weights import LinearMap
from clearspan.conversions import ShiftedConversion
from clearspan.points import Access, Converted, HookPoint, Layout, Side, Whole
from clearspan.tree import module_at


class LinearBridge(GeneralizedComponent):
    """A linear map inside another component. Its weight is `[out, in]`."""

    _shown = ("widths",)

    @property
    def matrix(self) -> Tensor:
        """The weight `[out, in]`, the live parameter or a view of it."""
        return self.weight("weight")

    @property
    def map(self) -> LinearMap:
        """Where its parameters are."""
        return LinearMap(self.acting, "weight", "bias", in_axis=-1, out_axis=-2)

    def reads(self) -> Iterator[LinearMap]:
        """Yields the map itself."""
        yield self.map

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of input and output."""
        return self.setting("in_features"), self.setting("out_features")  # a packed weight has another shape

    @property
    def module_bias(self) -> Tensor | None:
        """The bias that the map's own module adds, or None where it adds none."""
        return self.bias_or_none()

    @property
    def output_access(self) -> Access:
        """How the map's output shows in its module's."""
        return Whole()

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields input and output, each of the residual stream's width or of its own."""
        for name, side, width in zip(("hook_in", "hook_out"), (Side.INPUT, Side.OUTPUT), self.widths, strict=True):
            axis = "d_model" if width == self._fixed.d_model else "width"
            one_head = "1 " if self.layout is Layout.HEADS_FIRST else ""
            access = self.output_access if side is Side.OUTPUT else Whole()
            point = self.point(name, self.place(side), access, dimensions=f"batch pos {one_head}{axis}")
            point.sizes = {**point.sizes, axis: width}
            yield point


class TransposedLinearBridge(LinearBridge):
    """A linear map whose weight is `[in, out]` (GPT-2's `Conv1D`)."""

    @property
    def matrix(self) -> Tensor:
        """The weight `[out, in]`, a view of the live parameter."""
        return self.weight("weight").T

    @property
    def map(self) -> LinearMap:
        """Where its parameters are."""
        return LinearMap(self.acting, "weight", "bias", in_axis=-2, out_axis=-1)

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of input and output."""
        inward, outward = self.shape("weight")
        return inward, outward


@dataclass(eq=False, repr=False)
class LateBiasLinearBridge(LinearBridge):
    """A linear map whose bias is a parameter of the module around it, added after that has returned.

    `hook_out` has the bias, and so has what the sublayer adds (GPT-NeoX-Japanese's last attention).

    Attributes:
        late_bias: Name of the parameter in the module of the component around.
    """

    _: KW_ONLY
    late_bias: str

    def claims(self) -> Iterator[str]:
        """Yields the map's module and the bias."""
        yield from super().claims()
        yield f"{self.parent_path}.{self.late_bias}"

    @property
    def map(self) -> LinearMap:
        """Where its parameters are."""
        return LinearMap(self.acting, "weight", self.late_bias, in_axis=-1, out_axis=-2, around=self._around)

    @property
    def module_bias(self) -> None:
        """None: the bias is added later."""
        return

    def __call__(self, value: Tensor) -> Tensor:
        """Runs the map alone, and adds the bias."""
        return super().__call__(value) + self._bias()

    @property
    def output_access(self) -> Access:
        """The module's output, and the bias."""
        return Converted(ShiftedConversion(self._bias))

    def has(self, name: str) -> bool:
        """Whether there is such a parameter."""
        return name == "bias" or super().has(name)

    def parameter(self, name: str) -> Tensor:
        """Returns a live parameter, the bias from the module around."""
        return self._bias() if name == "bias" else super().parameter(name)

    def weight(self, name: str) -> Tensor:
        """Returns a live parameter, the bias from the module around.

        Raises:
            MissingWeightError: There is no such parameter.
            UnreadableWeightError: It is offloaded, or the weight is quantised in an unknown way.
        """
        is_here = name == "bias" and not self._bias().is_meta
        return self._bias() if is_here else super().weight(name)

    def sources(self, name: str) -> Sequence[Any]:
        """Returns what a weight is made of."""
        return [self._bias()] if name == "bias" else super().sources(name)

    @property
    def _around(self) -> nn.Module:
        return module_at(self._bound.model, self.parent_path)

    def _bias(self) -> Tensor:
        return self._around.get_parameter(self.late_bias)
