"""A layer's own input: a vector for each token that the model hands to the block beside the residual stream."""

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace

from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.components.linear import LinearBridge
from clearspan.components.mlp import GatedMLPBridge
from clearspan.components.weights import AbsentWeight, LinearMap
from clearspan.points import HookPoint, Side

_NO_MAP = "the linear branch is the layer's own input, which the model makes of the tokens and hands to the block"


@dataclass(eq=False, repr=False)
class PerLayerInputBridge(GatedMLPBridge):
    """A gated MLP whose linear branch is the layer's own input (Gemma 3n, Gemma 4): submodules `gate`, `act` and `out`.

    The block itself calls the maps. `hook_pre` is the gate before its activation function, `hook_pre_linear` the
    layer's own input, and `hook_post` their product, which `out` maps to the residual stream.

    Attributes:
        argument: Name of the argument of the block's forward that is the layer's own input `[batch, pos, width]`.
    """

    _: KW_ONLY
    argument: str = "per_layer_input"
    reads_tokens: bool = True

    W_in = AbsentWeight(_NO_MAP)
    b_in = AbsentWeight(_NO_MAP)
    _maps = ("gate", "out")

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the two maps, and the activation function between them."""
        return {"gate": LinearBridge, "act": GeneralizedComponent, "out": LinearBridge}

    @property
    def first(self) -> GeneralizedComponent:
        """The gate's map, which reads the residual stream."""
        return self.submodules["gate"]

    @property
    def why_not_alone(self) -> str:
        """Why it cannot run alone."""
        return f"it multiplies by {self.path}.hook_pre_linear, which the model makes of the tokens"

    def reads(self) -> Iterator[LinearMap]:
        """Yields the gate's map."""
        yield self._linear("gate").map

    def points(self) -> Iterator[HookPoint]:
        """Yields the gate before its activation function, the layer's own input, and their product."""
        block = replace(self.place(Side.INPUT), module=self.module_path, argument=self.argument)
        yield self.point("hook_pre", self.submodules["gate"].place(Side.OUTPUT))
        yield self.point("hook_pre_linear", block)
        yield self.point("hook_post", self.submodules["out"].place(Side.INPUT))

    def __call__(self, value: Tensor) -> Tensor:
        """Raises: the maps alone do not say what they are multiplied with.

        Raises:
            InvalidArgumentError: Always.
        """
        self.refuse_alone()
        raise AssertionError("it cannot run alone")
