"""Mixers: parts that move information between positions by a recurrence or a convolution, not by attention."""

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.components.linear import LinearBridge
from clearspan.components.mixer_kinds import MixerKind
from clearspan.components.weights import LinearMap, Weight
from clearspan.conversions import BaseTensorConversion
from clearspan.errors import MissingWeightError
from clearspan.points import Converted, HookPoint, Layout, Passed, Place, ReadOnly, Side


@dataclass(frozen=True)
class Part:
    """Where a mixer's value lies in the output of one of its parts, or in its input.

    Attributes:
        of: Which of the mixer's submodules.
        axes: The value's axes.
        conversion: Shows the value in these axes; None where the tensor is the value.
        side: Whether it is the part's output or its input.
    """

    of: str
    axes: str
    conversion: BaseTensorConversion | None = None
    side: Side = Side.OUTPUT


_ENDS = {
    "hook_in_proj": ("in_proj", Side.OUTPUT, "batch pos width"),
    "hook_x_proj": ("x_proj", Side.OUTPUT, "batch pos width"),
    "hook_ssm_out": ("out_proj", Side.INPUT, "batch pos d_inner"),
}
"""Points at the ends of parts that many kinds have."""

COMPUTED = ("attention", "state")
"""Values that no forward makes: they are computed, at some cost, for whoever asks for them by name."""


class WeightsBridge(GeneralizedComponent):
    """A module inside a mixer of which the weights are shown, and no ends.

    The mixer's code may use its weights without calling it (a convolution), or call it on tensors in axes of their own.
    """

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields nothing."""
        return iter(())

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields both ends."""
        for name in ("hook_in", "hook_out"):
            yield f"{self.path}.{name}", "the mixer's code does not call this module on a value of its own points"


@dataclass(eq=False, repr=False)
class MixerBridge(GeneralizedComponent):
    """A mixer: submodule `out_proj`, which makes what it adds to the residual stream, and those of its kind.

    Attributes:
        kind: Which functions it calls, and which of their values are which points.
        dims: Sizes of its own axes: `d_inner`, `head`, `d_head`, `state`, `group`, ...
        parts: Points that lie in the output or input of one of its parts, by name.
        repeats_keys: Whether its code repeats queries and keys for all heads before it calls the function.
    """

    _: KW_ONLY
    kind: MixerKind
    dims: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    repeats_keys: bool = False

    out_proj: LinearBridge = field(init=False)
    hook_in_proj: HookPoint = field(init=False)
    hook_conv: HookPoint = field(init=False)
    hook_dt: HookPoint = field(init=False)
    hook_scan_in: HookPoint = field(init=False)
    hook_scan_out: HookPoint = field(init=False)
    hook_state: HookPoint = field(init=False)
    hook_recurrence_out: HookPoint = field(init=False)
    hook_effective_attention: HookPoint = field(init=False)
    hook_ssm_out: HookPoint = field(init=False)
    _shown = ("dims", "kind")

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the output projection."""
        return {"out_proj": LinearBridge}

    @property
    def first(self) -> GeneralizedComponent:
        """The part that reads the mixer's input: the mixer itself."""
        return self

    @property
    def last(self) -> GeneralizedComponent:
        """The part whose output the mixer adds: the mixer itself."""
        return self

    def claims(self) -> Iterator[str]:
        """Yields the parameters and buffers of the mixer's own module."""
        yield from super().claims()
        for name, tensor in (*self.module._parameters.items(), *self.module._buffers.items()):
            if tensor is not None:
                yield f"{self.module_path}.{name}"

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes; heads are the mixer's own."""
        own = {axis: size for axis, size in super().sizes().items() if axis in ("d_model", "1")}
        return {**own, "d_inner": self.out_proj.widths[0], **self.dims}

    # --- points ------------------------------------------------------------------------------------------------------

    def points(self) -> Iterator[HookPoint]:
        """Yields the points in the order of the forward: what is projected, what functions are given and return."""
        for name, (key, side, axes) in _ENDS.items():
            if isinstance(self.submodules.get(key), LinearBridge) and side is Side.OUTPUT:
                yield self._at_part(name, Part(key, axes, None, side))
        for name, part in self.parts.items():
            yield self._at_part(name, part)
        for name, (role, value) in self.kind.points.items():
            yield self._inside(name, Passed(self.kind.role(role), value))
        for name, (key, side, axes) in _ENDS.items():
            if isinstance(self.submodules.get(key), LinearBridge) and side is Side.INPUT:
                yield self._at_part(name, Part(key, axes, None, side))

    def _at_part(self, name: str, part: Part) -> HookPoint:
        of = self.submodules[part.of]
        access = None if part.conversion is None else Converted(part.conversion)
        point = self.point(name, of.place(part.side), access, dimensions=part.axes)
        if "width" in point.axes and isinstance(of, LinearBridge):
            point.sizes = {**point.sizes, "width": of.widths[part.side is Side.OUTPUT]}
        return point

    def _inside(self, name: str, passed: Passed) -> HookPoint:
        axes = passed.role.axes[passed.value]
        axes = axes.replace("qk_head", "head") if self.repeats_keys else axes
        layout = Layout.ROWS_BY_ROWS if "q_pos" in axes else Layout.TOKENS
        path = ".".join(part for part in (self.module_path, passed.role.caller) if part)
        access = ReadOnly() if passed.value == "attention" else None
        point = self.point(name, Place(path, passed, layout=layout), access, dimensions=axes)
        point.is_computed = passed.value in COMPUTED
        if "width" in point.axes:
            point.sizes = {**point.sizes, "width": self._conv.shape[0]}
        return point

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields the points that this kind of mixer lacks."""
        for name, reason in self.kind.absent.items():
            yield f"{self.path}.{name}", reason

    # --- weights -----------------------------------------------------------------------------------------------------

    @property
    def _conv(self) -> Tensor:
        return self.submodules["conv1d"].weight("weight")

    @Weight
    def W_in(self) -> Float[Tensor, "d_model width"]:
        """The input weight `[d_model, width]`, a view of the live parameter."""
        return self._linear("in_proj").matrix.T

    @Weight
    def W_out(self) -> Float[Tensor, "d_inner d_model"]:
        """The output weight `[d_inner, d_model]`, a view of the live parameter."""
        return self.out_proj.matrix.T

    @Weight
    def W_conv(self) -> Float[Tensor, "width taps"]:
        """The convolution's weight `[width, taps]`, a view of the live parameter; the last tap is the token itself."""
        return self._conv.squeeze(1)

    @Weight
    def A_log(self) -> Tensor:
        """The logarithm of how fast states decay, the live parameter: `[d_inner, state]` or `[head]`."""
        return self._with("A_log").weight("A_log")

    @Weight
    def D(self) -> Tensor:
        """How much of its input the scan adds to its result, the live parameter: `[d_inner]` or `[head]`."""
        return self.weight("D")

    @Weight
    def dt_bias(self) -> Tensor:
        """The bias of the step sizes, the live parameter: `[d_inner]` or `[head]`."""
        part = self.submodules.get("dt_proj")
        return self._with("dt_bias").weight("dt_bias") if part is None else part.weight("bias")

    def _with(self, name: str) -> GeneralizedComponent:
        """Returns the component that has a parameter: the mixer, or one of its parts."""
        parts = (self, *self.submodules.values())
        return next((part for part in parts if part.module._parameters.get(name) is not None), self)

    def _linear(self, key: str) -> LinearBridge:
        part = self.submodules.get(key)
        if not isinstance(part, LinearBridge):
            raise MissingWeightError(
                f"{self.path} has no part {key}", reason=f"this mixer's parts are {', '.join(self.submodules)}"
            )
        return part

    def reads(self) -> Iterator[LinearMap]:
        """Yields the maps that read the mixer's input, where those are linear maps of one token.

        Of two maps in a row, `x_a` and `x_b`, the first one does.
        """
        if self.kind.reads_linearly:
            for key, part in self.submodules.items():
                if isinstance(part, LinearBridge) and key not in self.kind.later and not key.endswith("_b"):
                    yield part.map

    def adds(self) -> Iterator[LinearMap]:
        """Yields the output projection."""
        yield self.out_proj.map

    def call_arguments(self, value: Tensor) -> dict[str, Any]:
        """Returns what the model itself passes to the module after its input."""
        return self._bound.arguments_of(self.module, value)
