"""MLPs: plain and gated ones, and mixtures of experts."""

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Self

from jaxtyping import Float
from torch import Tensor, nn

from clearspan.components.base import Binding, GeneralizedComponent
from clearspan.components.linear import LinearBridge
from clearspan.components.weights import AbsentWeight, LinearMap, Weight
from clearspan.conversions import HalfConversion
from clearspan.points import Converted, HookPoint, Layout, Place, Side
from clearspan.tree import module_at


class ActivationBridge(GeneralizedComponent):
    """An MLP's activation function, where it must be named because the block itself calls it."""

    input_axes = "batch pos d_mlp"
    output_axes = "batch pos d_mlp"
    d_mlp: int | None = None
    """Width of the MLP that a live one is in."""

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, including the MLP's width."""
        return {**super().sizes(), **({} if self.d_mlp is None else {"d_mlp": self.d_mlp})}


class MLPBridge(GeneralizedComponent):
    """A linear map, an activation function, a linear map: submodules `in` and `out`.

    If the block itself calls the maps, the MLP has no name and no ends of its own, and a submodule `act` for the
    activation function (of the gate, in a gated MLP). A part `norm` is a norm before the output map (BitNet), whose
    output `hook_post` then is.
    """

    hook_pre: HookPoint
    hook_post: HookPoint
    out: LinearBridge
    W_gate = AbsentWeight("the MLP is not gated")
    b_gate = AbsentWeight("the MLP is not gated")

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the linear maps; and the activation function, if the MLP has no module of its own."""
        act = {"act": GeneralizedComponent} if self.name is None else {}
        return {**dict.fromkeys(self._maps, LinearBridge), **act}

    _maps: ClassVar[tuple[str, ...]] = ("in", "out")

    def bind(self, binding: Binding, path: str, parent: str = "") -> Self:
        """Returns the live MLP, whose activation function knows its width."""
        live = super().bind(binding, path, parent)
        act = live.submodules.get("act")
        if isinstance(act, ActivationBridge):
            act.d_mlp = live._linear("out").widths[0]
        return live

    def _linear(self, key: str) -> LinearBridge:
        part = self.submodules[key]
        assert isinstance(part, LinearBridge), f"{key} is a linear map"
        return part

    @Weight
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """The input weight `[d_model, d_mlp]`, a view of the live parameter."""
        return self._linear("in").matrix.T

    @Weight
    def b_in(self) -> Float[Tensor, "d_mlp"]:
        """The input bias `[d_mlp]`, the live parameter."""
        return self._linear("in").weight("bias")

    @Weight
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """The output weight `[d_mlp, d_model]`, a view of the live parameter."""
        return self._linear("out").matrix.T

    @Weight
    def b_out(self) -> Float[Tensor, "d_model"]:
        """The output bias `[d_model]`, the live parameter."""
        return self._linear("out").weight("bias")

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, including this MLP's own width."""
        return {**super().sizes(), "d_mlp": self._linear("out").widths[0]}

    @property
    def last(self) -> GeneralizedComponent:
        """The part whose output the MLP adds: itself, or its output map if it has no module."""
        return self if self.name is not None else self.submodules["out"]

    @property
    def first(self) -> GeneralizedComponent:
        """The part that reads the MLP's input: itself, or its input map if it has no module."""
        return self if self.name is not None else self.submodules["in"]

    def points(self) -> Iterator[HookPoint]:
        """Yields the activation function's input and the output projection's input."""
        yield self.point("hook_pre", self.submodules["in"].place(Side.OUTPUT))
        yield self.point("hook_post", self.submodules["out"].place(Side.INPUT))

    def reads(self) -> Iterator[LinearMap]:
        """Yields the maps that read the MLP's input."""
        for key, part in self.submodules.items():
            if isinstance(part, LinearBridge) and key != "out":
                yield part.map

    def adds(self) -> Iterator[LinearMap]:
        """Yields the output map."""
        yield self._linear("out").map

    def call_arguments(self, value: Tensor) -> dict[str, Any]:
        """Returns the module's further arguments, such as the residual stream that it adds (zeros)."""
        return self._bound.arguments_of(self.module, value)

    def __call__(self, value: Tensor) -> Tensor:
        """Runs the MLP alone; its listeners fire."""
        if self.name is not None:
            return super().__call__(value)
        out, act = self.submodules["out"].module, self.submodules["act"].module
        return out(self._hidden(value, act))

    def _hidden(self, value: Tensor, act: nn.Module) -> Tensor:
        """Returns the hidden layer, by modules that the block calls."""
        return act(self.submodules["in"].module(value))


@dataclass(eq=False, repr=False)
class GatedMLPBridge(MLPBridge):
    """A gate through an activation function times a linear branch, then a linear map: `gate`, `in` and `out`.

    Attributes:
        linear_limit: Where the model cuts the linear branch off, at this number and at minus it, before it multiplies
            the gate; None where it does not.
        linear_offset: What the model adds to the linear branch after that (1 in MiniMax M3).
    """

    _: KW_ONLY
    linear_limit: float | None = None
    linear_offset: float = 0.0

    hook_pre_linear: HookPoint = field(init=False)
    _maps = ("gate", "in", "out")

    def _hidden(self, value: Tensor, act: nn.Module) -> Tensor:
        return act(self.submodules["gate"].module(value)) * self.branch(self.submodules["in"].module(value))

    def branch(self, linear: Float[Tensor, "*place d_mlp"]) -> Float[Tensor, "*place d_mlp"]:
        """Returns what multiplies the gate, for a value of `hook_pre_linear`."""
        limit = self.linear_limit
        within = linear if limit is None else linear.clamp(-limit, limit)
        return within + self.linear_offset if self.linear_offset else within

    @Weight
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """The gate's weight `[d_model, d_mlp]`, a view of the live parameter."""
        return self._linear("gate").matrix.T

    @Weight
    def b_gate(self) -> Float[Tensor, "d_mlp"]:
        """The gate's bias `[d_mlp]`, the live parameter."""
        return self._linear("gate").weight("bias")

    def points(self) -> Iterator[HookPoint]:
        """Yields the gate before its activation function, the linear branch, and their product."""
        yield self.point("hook_pre", self.submodules["gate"].place(Side.OUTPUT))
        yield self.point("hook_pre_linear", self.submodules["in"].place(Side.OUTPUT))
        yield self.point("hook_post", self.submodules["out"].place(Side.INPUT))


@dataclass(eq=False, repr=False)
class JointGateMLPBridge(GatedMLPBridge):
    """A gated MLP whose gate and linear branch are the halves of one linear map: submodules `gate_up` and `out`.

    Attributes:
        gate_is_second: Whether the gate is the second half.
    """

    _: KW_ONLY
    gate_is_second: bool = False
    _maps = ("gate_up", "out")

    def _hidden(self, value: Tensor, act: nn.Module) -> Tensor:
        halves = self.submodules["gate_up"].module(value).chunk(2, dim=-1)
        return act(halves[self.gate_is_second]) * self.branch(halves[not self.gate_is_second])

    @Weight
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """The gate's weight `[d_model, d_mlp]`, a view of the live parameter."""
        return self._half(self.gate_is_second)

    @Weight
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """The linear branch's weight `[d_model, d_mlp]`, a view of the live parameter."""
        return self._half(not self.gate_is_second)

    @Weight
    def b_gate(self) -> Float[Tensor, "d_mlp"]:
        """The gate's bias `[d_mlp]`, a view of the live parameter."""
        return HalfConversion(self.gate_is_second).handle_conversion(self._linear("gate_up").weight("bias"))

    @Weight
    def b_in(self) -> Float[Tensor, "d_mlp"]:
        """The linear branch's bias `[d_mlp]`, a view of the live parameter."""
        return HalfConversion(not self.gate_is_second).handle_conversion(self._linear("gate_up").weight("bias"))

    def _half(self, is_second: bool) -> Tensor:
        return HalfConversion(is_second).handle_conversion(self._linear("gate_up").matrix.T)

    def points(self) -> Iterator[HookPoint]:
        """Yields the gate before its activation function, the linear branch, and their product."""
        fused = self.submodules["gate_up"].place(Side.OUTPUT)
        yield self.point("hook_pre", fused, Converted(HalfConversion(self.gate_is_second)))
        yield self.point("hook_pre_linear", fused, Converted(HalfConversion(not self.gate_is_second)))
        yield self.point("hook_post", self.submodules["out"].place(Side.INPUT))


@dataclass(eq=False, repr=False)
class RouterBridge(GeneralizedComponent):
    """The router of a mixture of experts: it says for each token which experts are chosen, with which weights.

    Attributes:
        logits: Path, in the router, of the linear map whose output the logits are (AFMoE: `gate`); empty where the
            router's own forward computes them by one linear function.
        weights: Which of the router's outputs are the weights of the experts chosen; or, where it does not return them,
            the name of the argument by which the experts' module is given them.
        indices: As `weights`, for the indices of the experts chosen.
        k: How many are chosen for each token, where the router's module has no `top_k`.
        changes_input: Whether it norms or multiplies its input before the map to logits (Gemma 4).
        holder: Path, in the router, of the module whose weight that linear function takes (LongCat: `classifier`, which
            is not called); empty for the router's own.
    """

    _: KW_ONLY
    layout: Layout = Layout.FLAT
    logits: str = ""
    holder: str = ""
    weights: int | str = 1
    indices: int | str = 2
    k: int | None = None
    changes_input: bool = False

    output_axes = "batch pos expert"

    @property
    def logits_place(self) -> Place:
        """Where the logits are."""
        path = f"{self.module_path}.{self.logits}" if self.logits else self.module_path
        side = Side.OUTPUT if self.logits else Side.ROUTER
        return replace(self.place(side), module=path)

    def chosen(self, what: int | str, experts: "ExpertsBridge") -> Place:
        """Returns where weights or indices are: an output of the router, or an argument of the experts."""
        if isinstance(what, int):
            return self.place(Side.OUTPUT, what)
        return replace(experts.place(Side.INPUT), argument=what, layout=Layout.FLAT)

    def reads(self) -> Iterator[LinearMap]:
        """Yields the map to its logits."""
        module = module_at(self.acting, self.logits or self.holder)
        yield LinearMap(module, "weight", "bias" if "bias" in module._parameters else None, in_axis=-1, out_axis=-2)

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, including how many experts there are, and how many are chosen."""
        k = self.setting("top_k") if self.k is None else self.k
        return {**super().sizes(), "expert": self.shape("weight")[0], **({} if k is None else {"k": k})}

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields the input. The output is three tensors, which have points of the mixture."""
        yield self.point("hook_in", self.place(Side.INPUT), dimensions=self.input_axes)


_EACH_EXPERTS = "the MLP is a mixture, and each expert has its own: bridge.blocks[layer].mlp.experts.module"


@dataclass(eq=False, repr=False)
class MoEBridge(GeneralizedComponent):
    """A mixture of experts: submodules `router` and `experts`, and `shared` for an expert that sees every token.

    A linear map `shared_gate` beside them makes one number for each token, whose sigmoid multiplies the shared expert's
    output before it is added (Qwen 2 MoE). Linear maps `project_in` and `project_out` lie before and after experts that
    are narrower than the residual stream (Nemotron-H). A part `norm` is a norm of the sum (A.X K1), which then is the
    output.

    Attributes:
        runs_all: Whether all experts run on all tokens, on an input that their score multiplies (LLaMA 4). There are
            then no weights of chosen experts.
        multiplier: What the mixture multiplies the experts' sum by, outside of their module (Beam).
        shared_multiplier: The same of the shared expert's output (Cohere 2 MoE takes the mean).
        has_identities: Whether some experts return their input (LongCat): it reaches the output by no linear map.
    """

    _: KW_ONLY
    runs_all: bool = False
    multiplier: float = 1.0
    shared_multiplier: float = 1.0
    has_identities: bool = False

    router: RouterBridge = field(init=False)
    experts: "ExpertsBridge" = field(init=False)
    hook_router_logits: HookPoint = field(init=False)
    hook_expert_weights: HookPoint = field(init=False)
    hook_expert_indices: HookPoint = field(init=False)
    W_in = AbsentWeight(_EACH_EXPERTS)
    W_gate = AbsentWeight(_EACH_EXPERTS)
    W_out = AbsentWeight(_EACH_EXPERTS)
    b_in = AbsentWeight(_EACH_EXPERTS)
    b_gate = AbsentWeight(_EACH_EXPERTS)
    b_out = AbsentWeight(_EACH_EXPERTS)

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the router and the experts."""
        return {"router": RouterBridge, "experts": ExpertsBridge}

    def reads(self) -> Iterator[LinearMap]:
        """Yields the maps of the router and of all experts that read the input, where nothing else does."""
        narrow = ("experts", "project_out") if "project_in" in self.submodules else ()
        if self.has_identities or not list(self.router.reads()):
            return
        for key, part in self.submodules.items():
            if key not in narrow:
                yield from part.reads()

    def adds(self) -> Iterator[LinearMap]:
        """Yields the output maps of all experts, where their sum is the output."""
        if "norm" in self.submodules or self.has_identities:
            return
        last = self.submodules.get("project_out")
        if isinstance(last, LinearBridge):
            yield last.map
        for key in ("shared",) if last is not None else ("experts", "shared"):
            if key in self.submodules:
                yield from self.submodules[key].adds()

    def points(self) -> Iterator[HookPoint]:
        """Yields the router's logits, and the experts chosen with their weights."""
        router = self.router
        sizes = router.sizes()
        places = {"hook_router_logits": router.logits_place}
        if not self.runs_all:
            places["hook_expert_weights"] = router.chosen(router.weights, self.experts)
            places["hook_expert_indices"] = router.chosen(router.indices, self.experts)
        for name, place in places.items():
            point = self.point(name, place)
            point.sizes = {axis: sizes[axis] for axis in point.axes if axis in sizes}
            yield point

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields the points of a dense MLP, and what is chosen where nothing is."""
        if self.runs_all:
            reason = "all experts run on all tokens, on inputs that their scores multiply; hook_router_logits has these"
            for name in ("hook_expert_weights", "hook_expert_indices"):
                yield f"{self.path}.{name}", reason
        reason = "the experts run side by side in one module, each on the tokens that chose it"
        for name in ("hook_pre", "hook_pre_linear", "hook_post"):
            yield f"{self.path}.{name}", reason


@dataclass(eq=False, repr=False)
class ExpertsBridge(GeneralizedComponent):
    """All experts of a mixture in one module, whose weights are each one parameter for all experts.

    Attributes:
        is_transposed: Whether its weights are `[expert, in, out]`, not `[expert, out, in]`.
        reading: Paths of the parameters that read the input: gates and linear branches.
        adding: Path of the parameter that makes the output.
        adding_is_transposed: As `is_transposed`, of that parameter; None where it is as the others.
        has_ends: Whether its input and output are one row for each token; not where all experts run (LLaMA 4).
        is_narrow: Whether they are of another width than the residual stream.
    """

    _: KW_ONLY
    layout: Layout = Layout.FLAT
    is_transposed: bool = False
    reading: tuple[str, ...] = ("gate_up_proj",)
    adding: str = "down_proj"
    adding_is_transposed: bool | None = None
    has_ends: bool = True
    is_narrow: bool = False

    @property
    def input_axes(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The axes of input and output."""
        return "batch pos width" if self.is_narrow else "batch pos d_model"

    output_axes = input_axes  # pyright: ignore[reportAssignmentType]

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, including the experts' own width."""
        if not self.is_narrow:
            return super().sizes()
        each = next(self.reads())
        return {**super().sizes(), "width": each.module.get_parameter(each.weight).shape[each.in_axis]}

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields input and output, where these are of tokens."""
        if self.has_ends:
            yield from super().raw_ends()

    def reads(self) -> Iterator[LinearMap]:
        """Yields the gates and linear branches of all experts, each kind one weight."""
        for path in self.reading:
            yield self._map(path, self.is_transposed)

    def adds(self) -> Iterator[LinearMap]:
        """Yields the output maps of all experts, which are one weight."""
        own = self.adding_is_transposed
        yield self._map(self.adding, self.is_transposed if own is None else own)

    def _map(self, path: str, is_transposed: bool) -> LinearMap:
        around, _, weight = path.rpartition(".")
        module, bias = module_at(self.acting, around), f"{weight}_bias"
        in_axis, out_axis = (-2, -1) if is_transposed else (-1, -2)
        return LinearMap(module, weight, bias if bias in module._parameters else None, in_axis, out_axis)
