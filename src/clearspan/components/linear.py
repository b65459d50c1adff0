"""Linear maps as components of their own."""

from collections.abc import Iterator

from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.components.weights import LinearMap
from clearspan.points import HookPoint, Layout, Side


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

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields input and output, each of the residual stream's width or of its own."""
        for name, side, width in zip(("hook_in", "hook_out"), (Side.INPUT, Side.OUTPUT), self.widths, strict=True):
            axis = "d_model" if width == self.cfg.d_model else "width"
            one_head = "1 " if self.layout is Layout.HEADS_FIRST else ""
            point = self.point(name, self.place(side), dimensions=f"batch pos {one_head}{axis}")
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
