"""Dense MLPs without a gate."""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.components.linear import LinearBridge
from clearspan.points import HookPoint, Side


class MLPBridge(GeneralizedComponent):
    """A linear map, an activation function, a linear map: submodules `in` and `out`."""

    hook_pre: HookPoint
    hook_post: HookPoint
    out: LinearBridge

    @property
    def _in(self) -> GeneralizedComponent:
        return self.submodules["in"]

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """The input weight `[d_model, d_mlp]`, a view of the live parameter."""
        return self._in.weight("weight").T

    @property
    def b_in(self) -> Float[Tensor, "d_mlp"]:
        """The input bias `[d_mlp]`, the live parameter."""
        return self._in.weight("bias")

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """The output weight `[d_mlp, d_model]`, a view of the live parameter."""
        return self.out.weight("weight").T

    @property
    def b_out(self) -> Float[Tensor, "d_model"]:
        """The output bias `[d_model]`, the live parameter."""
        return self.out.weight("bias")

    def points(self) -> Iterator[HookPoint]:
        """Yields the activation function's input and the output projection's input."""
        yield self.point(
            "hook_pre", "batch pos d_mlp", self._in.place(Side.OUTPUT), aliases=(f"{self.path}.in.hook_out",)
        )
        yield self.point(
            "hook_post", "batch pos d_mlp", self.out.place(Side.INPUT), aliases=(f"{self.path}.out.hook_in",)
        )
