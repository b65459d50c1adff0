"""What every kind of component has: a name, submodules, raw ends, and a life as template, then bound."""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from clearspan.components.weights import AbsentWeight, LinearMap, Weight, WeightTensor
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import ParamProcessingConversion
from clearspan.errors import (
    AdapterError,
    InvalidArgumentError,
    MissingWeightError,
    ModelChangedError,
    TiedWeightWarning,
    UnreadableWeightError,
    UnwritableError,
)
from clearspan.points import (
    Access,
    Converted,
    Derived,
    HookPoint,
    InPlace,
    Layout,
    Place,
    ReadOnly,
    SharedRow,
    Side,
    Whole,
    entry_of,
    nearest,
)
from clearspan.results import Summarised, Summary
from clearspan.shapes import axes, sizes, with_sizes
from clearspan.tree import module_at


@dataclass(frozen=True)
class Binding:
    """What a template needs to become live.

    Attributes:
        model: The Hugging Face model, which is only referred to.
        fixed: Its sizes; those that can change, such as the vocabulary's, as they were when `cfg_now` was last called.
        cfg_now: Returns them as they are now, which takes longer.
        weight_conversions: The adapter's conversions by canonical name, with `{i}` for the layer.
        arguments_of: Returns what the model itself passes to a module of a block after its input.
        dequantised: Returns a copy of a module's quantised parameter, or None for one that is not quantised.
        acting: Returns the module whose parameters a module uses: itself, or one in it where it is an adapter's.
        adapted: Returns a weight to which adapters add, or None for one that is a parameter.
        sources: Returns what a module's weights are made of.
        sharing: Returns the canonical names of the weights that share a parameter.
        follow: Brings torch hooks to modules that have taken others' place.
        expect: Says which call of a module the next one is, outside a forward of the model.
    """

    model: nn.Module
    fixed: TransformerBridgeConfig
    cfg_now: Callable[[], TransformerBridgeConfig]
    weight_conversions: Mapping[str, ParamProcessingConversion]
    arguments_of: Callable[[nn.Module, Tensor], dict[str, Any]] = lambda _, __: {}
    dequantised: Callable[[nn.Module, str], Tensor | None] = lambda _, __: None
    acting: Callable[[nn.Module], nn.Module] = lambda module: module
    adapted: Callable[[nn.Module, str, str], Tensor | None] = lambda *_: None
    sources: Callable[[nn.Module], Sequence[Any]] = lambda module: list(module._parameters.values())
    sharing: Callable[[Tensor], Sequence[str]] = lambda _: ()
    follow: Callable[[], None] = lambda: None
    expect: Callable[[str, int], None] = lambda _, __: None

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """The model's sizes."""
        return self.cfg_now()


@dataclass(eq=False, repr=False)
class GeneralizedComponent(Summarised):
    """A part of a transformer, under a canonical name.

    In an adapter's mapping it is a template: it says where the part lives and what it is made of. `bind` returns a live
    copy that refers to the model's own module, has its hook points as attributes (`attn.hook_q`), and can be called
    alone.

    Attributes:
        name: Path of the module in the Hugging Face model, relative to the component around this one.
        config: Settings of the adapter's own.
        submodules: Its parts by canonical name.
        layout: How rows and positions lie in the module's input and output.
        output_is_overwritten: Whether the model writes into the output's storage afterwards.
        input_is_overwritten: Whether the model writes into the input's storage afterwards, or the module itself does.
        same_inputs: Names of further arguments of the module's forward that are the same tensor as the first, which it
            reads in the same way (CTRL's attention is given `v`, `k` and `q`): a write to the input reaches all.
        call: Which call of its module in a forward the component is, from 0, where the model calls it several times
            (nanochat norms the embedding and the last stream by one module); None where it is called once.
        reads_tokens: Whether its module is given the tokens, or what the model makes of them, besides its input.
        reads_layer: The layer that gives what its module is given besides its input (HY4's choice of keys), or None.
        path: Canonical path of a live component, such as `blocks.3.attn`.
        module_path: The module's path in the Hugging Face model.
        parent_path: Path of the Hugging Face module around it whose input tells the batch's rows.
    """

    name: str | None = None
    config: object | None = None
    submodules: "Mapping[str, GeneralizedComponent]" = field(default_factory=dict)
    layout: Layout = field(default=Layout.TOKENS, kw_only=True)
    output_is_overwritten: bool = field(default=False, kw_only=True)
    input_is_overwritten: bool = field(default=False, kw_only=True)
    same_inputs: tuple[str, ...] = field(default=(), kw_only=True)
    call: int | None = field(default=None, kw_only=True)
    reads_tokens: bool = field(default=False, kw_only=True)
    reads_layer: int | None = field(default=None, kw_only=True)

    path: str = field(init=False)
    module_path: str = field(init=False)
    parent_path: str = field(init=False)
    hook_in: HookPoint = field(init=False)
    hook_out: HookPoint = field(init=False)

    _binding: Binding | None = field(init=False, default=None)
    input_axes = "batch pos d_model"
    output_axes = "batch pos d_model"

    def at_layer(self, layer: int) -> "GeneralizedComponent":
        """Returns the template of one layer."""
        own = copy.copy(self)
        own.submodules = {key: part.at_layer(layer) for key, part in self.submodules.items()}
        return own

    def bind(self, binding: Binding, path: str, parent: str = "") -> Self:
        """Returns the live component.

        Args:
            binding: The model and what the adapter knows of it.
            path: The component's canonical path.
            parent: Path of the Hugging Face module around this one.

        Raises:
            AdapterError: The model has no module where the adapter says, or a part is missing or of another kind.
        """
        check_parts(path, self.submodules, self.required())
        live = copy.copy(self)
        live._binding = binding
        live.path = path
        live.parent_path = parent
        live.module_path = ".".join(part for part in (parent, self.name) if part)
        _check_is_there(binding.model, live.module_path, path)
        live.submodules = {
            key: part.bind(binding, f"{path}.{key}", live.module_path) for key, part in self.submodules.items()
        }
        if self.layout.joins_rows:  # its own input does not tell the batch's rows
            for part in live.submodules.values():
                part.parent_path = parent
        vars(live).update(live.submodules)  # `in`, a keyword, is reached by getattr
        return live

    @property
    def module(self) -> nn.Module:
        """The Hugging Face module itself, the one that is there now.

        Raises:
            ModelChangedError: There is none any more.
        """
        return module_at(self._bound.model, self.module_path)

    @property
    def acting(self) -> nn.Module:
        """The module whose parameters are used: the component's own, or one in it where that is an adapter's."""
        return self._bound.acting(self.module)

    def sources(self, name: str) -> Sequence[Any]:
        """Returns what a weight is made of: its parameter, or a record of the module where an adapter is on it."""
        parameter = self.module._parameters.get(name)
        return self._bound.sources(self.module) if parameter is None else [parameter]

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """The model's sizes."""
        return self._bound.cfg

    @property
    def _fixed(self) -> TransformerBridgeConfig:
        """The model's sizes, for those that cannot change: `cfg` finds out about the others."""
        return self._bound.fixed

    @property
    def _bound(self) -> Binding:
        if self._binding is None:
            raise InvalidArgumentError(
                f"this {type(self).__name__} is a template of an adapter's mapping, bound to no model",
                fix="use the live one, such as bridge.blocks[0].attn",
            )
        return self._binding

    def is_of(self, kind: "type[GeneralizedComponent]") -> bool:
        """Whether the component is of a kind; of a part that differs from layer to layer, whether all are."""
        return isinstance(self, kind)

    def required(self) -> "Mapping[str, type[GeneralizedComponent]]":
        """Returns the parts that this kind of component must have, by name, each with its kind."""
        return {}

    def claims(self) -> Iterator[str]:
        """Yields the paths of modules and parameters that the component accounts for, with all that is in them.

        A component that has parts leaves what is in its module to them.
        """
        if self.name is not None and not self.submodules:
            yield self.module_path

    def points(self) -> Iterator[HookPoint]:
        """Yields the component's own points; those of one tensor in the order in which they fire."""
        return iter(())

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields the input and the output of the component's own module, where it has one."""
        if self.name is not None:
            yield self.point("hook_in", self.place(Side.INPUT), dimensions=self.input_axes)
            yield self.point("hook_out", self.place(Side.OUTPUT), dimensions=self.output_axes)

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields points that only this kind of component knows to be absent, each with the reason."""
        return iter(())

    def reads(self) -> Iterator[LinearMap]:
        """Yields all that reads the component's input, if that is linear maps."""
        return iter(())

    def adds(self) -> Iterator[LinearMap]:
        """Yields the linear maps whose outputs add up to the component's."""
        return iter(())

    @property
    def first(self) -> "GeneralizedComponent":
        """The part that reads what the component reads: itself, if it has a module."""
        return self

    @property
    def last(self) -> "GeneralizedComponent":
        """The part whose output is the component's: itself, if it has a module."""
        return self

    def walk(self) -> "Iterator[GeneralizedComponent]":
        """Yields the component and all parts in it, outer ones first."""
        yield self
        for part in self.submodules.values():
            yield from part.walk()

    @property
    def is_wrapped(self) -> bool:
        """Whether a wrapper has taken the module's place, and hands on the parts of the module in it."""
        children = self.acting._modules
        return any(part.name and part.name.partition(".")[0] not in children for part in self.submodules.values())

    @property
    def why_not_alone(self) -> str | None:
        """Why the component cannot run alone, or None where it can."""
        if self.reads_layer is not None:
            return f"its module is given what layer {self.reads_layer} found"
        if self.reads_tokens:
            return "its module is given the tokens, or what the model makes of them, besides its input"
        return next((reason for part in self.submodules.values() if (reason := part.why_not_alone)), None)

    def refuse_alone(self) -> None:
        """Raises InvalidArgumentError where the component cannot run alone."""
        reason = self.why_not_alone
        if reason is not None:
            raise InvalidArgumentError(
                f"{self.path} cannot run alone", reason=reason, fix="a run of the whole model, with hooks where needed"
            )

    def __call__(self, value: Tensor) -> Tensor:
        """Runs the component's own module alone; its listeners fire.

        Args:
            value: The module's input, in this component's input axes.

        Returns:
            The module's output; of a tuple, the first.

        Raises:
            InvalidArgumentError: It needs more than its input: keys of another layer, or an input made of the tokens.
        """
        self.refuse_alone()
        self._bound.follow()
        for part in self.walk():
            if part.call is not None:
                self._bound.expect(part.module_path, part.call)
        turn = self.layout is Layout.POS_FIRST
        # A copy, since a write in place, as at `hook_resid_mid`, must not reach the caller's tensor.
        own = value.transpose(0, 1).contiguous() if turn else value.clone()
        output = self.module(own, **{**self.call_arguments(value), **dict.fromkeys(self.same_inputs, own)})
        output = output[0] if isinstance(output, tuple | list) else output
        return output.transpose(0, 1) if turn else output

    def call_arguments(self, value: Tensor) -> dict[str, Any]:
        """Returns the further arguments of the module's forward, for a call of it alone."""
        return {}

    def place(self, side: Side, item: int = 0) -> Place:
        """Returns a place at the component's module."""
        enters = side is Side.INPUT
        overwritten = self.input_is_overwritten if enters else side is Side.OUTPUT and self.output_is_overwritten
        also = self.same_inputs if enters else ()
        return Place(self.module_path, side, item, self.layout, self.parent_path, overwritten, also, self.call)

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes in this component that the model fixes."""
        return sizes(self.cfg)

    def point(
        self, name: str, place: Place, access: Access | None = None, *, dimensions: str | None = None
    ) -> HookPoint:
        """Returns a hook point under this component's path.

        Args:
            name: Its name in the component.
            place: Where its raw tensor is.
            access: How its value shows there; by default it is the raw tensor.
            dimensions: Its axes; by default those of the vocabulary.
        """
        full = f"{self.path}.{name}"
        own = entry_of(full).axes if dimensions is None else axes(dimensions)
        known = self.sizes()
        return HookPoint(
            full, own, place, access or Whole(), sizes={axis: known[axis] for axis in own if axis in known}
        )

    def bias_or_none(self) -> Tensor | None:
        """Returns the live bias of the component's module, or None where it has none.

        Raises:
            UnreadableWeightError: It is offloaded, or quantised in an unknown way.
        """
        return self.weight("bias") if self.has("bias") else None

    def weight(self, name: str) -> Tensor:
        """Returns a live parameter of the component's module.

        A quantised parameter, or one to which an adapter adds, comes as a copy of the values, which refuses writes.

        Raises:
            MissingWeightError: The module has no such parameter.
            UnreadableWeightError: It is offloaded, quantised in an unknown way, or no one weight under its adapter.
        """
        module = self.module
        plain = module._parameters.get(name)
        if type(plain) is nn.Parameter and self._bound.acting(module) is module and _is_here(plain):
            return plain  # nearly always
        parameter = self.parameter(name)
        values = None if parameter.is_meta else self._bound.adapted(self.module, name, self.path)
        if values is not None:
            return WeightTensor.of(values, before=self._refuse_sum)
        values = None if parameter.is_meta else self._bound.dequantised(self.acting, name)
        if values is not None:
            return WeightTensor.of(values, before=self._refuse_write)
        if not _is_here(parameter):
            raise UnreadableWeightError(
                f"the {name} of {self.path} cannot be read",
                where=f"{type(self.module).__name__} at {self.module_path}",
                reason="the module is offloaded: its weights are in memory only while it runs"
                if parameter.is_meta
                else f"it is quantised, and held as {parameter.dtype}",
                fix="load the model without offloading and quantisation, or use points that need no weight",
            )
        return parameter

    @property
    def is_quantised(self) -> bool:
        """Whether the module's weight is quantised in a known way."""
        acting = self.acting
        has_weight = acting._parameters.get("weight") is not None
        return has_weight and self._bound.dequantised(acting, "weight") is not None

    def _refuse_write(self) -> None:
        raise UnwritableError(
            f"the weight of {self.path} is quantised, and what was read is a copy of its values",
            where=f"{type(self.module).__name__} at {self.module_path}",
            fix="load the model without quantisation to edit its weights",
        )

    def _refuse_sum(self) -> None:
        raise UnwritableError(
            f"the weight of {self.path} is made of a base weight and an adapter, and what was read is a copy",
            where=f"{type(self.module).__name__} at {self.module_path}",
            fix="peft_model.merge_and_unload(), and boot what it returns; or write the parameters in "
            f"bridge.hf_model.get_submodule({self.module_path!r})",
        )

    def told_of_ties(self, name: str, shown: Tensor, parameter: Tensor) -> Tensor:
        """Returns a weight; writing it warns if its parameter is another weight too.

        Args:
            name: The weight's name.
            shown: The weight, a view of the parameter; or a copy, which refuses writes.
            parameter: The live parameter.
        """
        if isinstance(shown, WeightTensor):
            return shown
        others = [other for other in self._bound.sharing(parameter) if other != name]
        if not others:
            return shown

        def warn() -> None:
            shared = f"{name} and {', '.join(others)} are one parameter: all of them change"
            warnings.warn(shared, TiedWeightWarning, stacklevel=4)

        return WeightTensor.of(shown, before=warn, leaf=parameter if shown is parameter else None)

    def parameter(self, name: str) -> Tensor:
        """Returns a live parameter of the component's module; its values may be elsewhere (offloaded).

        Raises:
            MissingWeightError: The module has no such parameter.
            UnreadableWeightError: Only a module in it has: it is a wrapper.
        """
        module, holder = self.module, self._holder(name)
        if holder is None:
            raise MissingWeightError(
                f"{self.path} has no {name}",
                where=f"{type(module).__name__} at {self.module_path}",
                reason="the model's own module has none, and zeros are not made up",
            )
        if holder is not module and holder is not self._bound.acting(module):
            raise UnreadableWeightError(
                f"the {name} of {self.path} is not known",
                where=f"{type(module).__name__} at {self.module_path}",
                reason=f"it wraps a {type(holder).__name__}, and what it makes of that one's {name} cannot be told",
                fix="points that need no weight; or replace the wrapper by one module with the weight that acts",
            )
        parameter = holder._parameters[name]
        assert parameter is not None, "the holder has it"
        return parameter

    def checked_parameter(self, name: str) -> Tensor:
        """Returns a live parameter of the component's module, if adapters make one weight of it.

        Raises:
            MissingWeightError: The module has no such parameter.
            UnreadableWeightError: Adapters make no one weight of it, or a wrapper does.
        """
        parameter = self.parameter(name)
        if not parameter.is_meta:
            self._bound.adapted(self.module, name, self.path)
        return parameter

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a parameter of the component's module; of a wrapper, that of the module in it.

        Raises:
            MissingWeightError: There is no such parameter.
        """
        holder = self._holder(name)
        parameter = self.parameter(name) if holder is None else holder._parameters[name]
        assert parameter is not None, "the holder has it"
        return parameter.shape

    def has(self, name: str) -> bool:
        """Whether the component's module has such a parameter; of a wrapper, whether the module in it has."""
        return self._holder(name) is not None

    def _holder(self, name: str) -> nn.Module | None:
        """Returns the module that has such a parameter: the component's, an adapter's, or the first in a wrapper."""
        module = self.module
        if module._parameters.get(name) is not None:  # nearly always, and asked for in every run
            return module
        acting = self._bound.acting(module)
        if acting is not module:
            return acting if acting._parameters.get(name) is not None else None
        return next((part for part in module.modules() if part._parameters.get(name) is not None), None)

    def setting(self, *names: str) -> Any:
        """Returns the first of these attributes that the component's module has, or a module in it; or None."""
        settings = map(vars, self.module.modules())
        return next((own[name] for own in settings for name in names if own.get(name) is not None), None)

    _shown: ClassVar[tuple[str, ...]] = ("cfg", "is_quantised", "module", "module_path", "path", "submodules", "weight")
    """What `dir` lists of every component, besides its points, parts and weights."""

    def __dir__(self) -> list[str]:
        """Returns what users of a live component reach for; of a template, all."""
        names = super().__dir__()
        if self._binding is None:
            return list(names)
        shown = {name for kind in type(self).__mro__ for name in vars(kind).get("_shown", ())}
        own = {*shown, *self._own_points, *self.submodules, *self._own_weights}
        return sorted({*own, *(name for name in names if name[:2] == "__")})

    @property
    def _own_weights(self) -> list[str]:
        """Names of the weights that its kind has."""
        named = ((name, getattr(type(self), name, None)) for name in super().__dir__())
        return sorted(name for name, one in named if isinstance(one, Weight) and not isinstance(one, AbsentWeight))

    @property
    def _own_points(self) -> dict[str, HookPoint]:
        """Its hook points by the names that they have as its attributes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, HookPoint)}

    def _summary(self) -> Summary:
        """Returns its parts, hook points and weights."""
        rows = [["part", f".{key}", type(part).__name__, part.name or ""] for key, part in self.submodules.items()]
        for name, point in self._own_points.items():
            rows.append(["hook point", f".{name}", with_sizes(point.axes, point.sizes), entry_of(point.name).value])
        if self._binding is not None:
            rows += [["weight", f".{name}", "", ""] for name in self._own_weights]
        about = [f"{type(self.module).__name__} at {self.module_path}"] if self._binding and self.module_path else []
        return Summary(repr(self), ["", "name", "kind or axes", "module or value"] if rows else [], rows, about)

    def __repr__(self) -> str:
        where = f" at {self.path}" if self._binding else ""
        return f"{type(self).__name__}({self.name!r}){where}"


def check_parts(
    path: str,
    parts: Mapping[str, GeneralizedComponent],
    required: Mapping[str, type[GeneralizedComponent]],
) -> None:
    """Raises AdapterError unless a component has its parts, each of its kind; other parts are not looked at."""
    for key, kind in required.items():
        part = parts.get(key)
        if part is None or not part.is_of(kind):
            raise AdapterError(
                f"{path or 'the mapping'} has no part {key!r}" if part is None else f"{path}.{key} is of another kind",
                expected=f"{key!r}: {kind.__name__}",
                got=", ".join(parts) or "no parts" if part is None else type(part).__name__,
                fix="the component's submodules in the adapter",
            )


def _is_here(parameter: Tensor) -> bool:
    """Whether a parameter's numbers are in memory, as they are computed with."""
    return parameter.is_floating_point() and not parameter.is_meta


def _check_is_there(model: nn.Module, module_path: str, path: str) -> None:
    try:
        module_at(model, module_path)
    except ModelChangedError:
        parent, _, name = module_path.rpartition(".")
        _check_is_there(model, parent, path)
        around = module_at(model, parent)
        there = [child for child, _ in around.named_children()]
        raise AdapterError(
            f"{path} is not where the adapter says",
            expected=f"a module {name!r} in {parent or 'the model'}",
            got=", ".join(there) or "no modules",
            where=type(around).__name__,
            nearest=nearest(name, there),
            fix="the component's name in the adapter",
        ) from None


def causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns an additive causal mask `[1, 1, q_pos, k_pos]`: 0 where a position may look, else the dtype's least."""
    least = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device=device)
    return least.triu(1)[None, None]


class PerLayer(GeneralizedComponent):
    """A part that differs from layer to layer: attention, an MLP, or the block itself.

    Args:
        templates: The part of each layer. Of blocks, each has the path of their list as its name.
    """

    def __init__(self, templates: Sequence[GeneralizedComponent]) -> None:
        super().__init__()
        self.templates = templates

    def is_of(self, kind: type[GeneralizedComponent]) -> bool:
        """Whether the part of each layer is of a kind."""
        return bool(self.templates) and all(template.is_of(kind) for template in self.templates)

    def at_layer(self, layer: int) -> GeneralizedComponent:
        """Returns the template of one layer."""
        if not layer < len(self.templates):
            raise AdapterError(
                "a part that differs from layer to layer does not have them all",
                expected=f"a template for layer {layer}",
                got=f"{len(self.templates)} templates",
                fix="PerLayer([...]) with as many templates as cfg.n_layers",
            )
        return self.templates[layer].at_layer(layer)


def hook_points(components: Iterable[GeneralizedComponent]) -> dict[str, HookPoint]:
    """Returns the points of live components by canonical name, and makes each an attribute of its component.

    Two points that show the same tensor in the same way are one: the later name is an alias of the earlier, as
    `ln2.hook_in` is of `hook_mlp_in`. Raw ends come last, and a part comes after the component around it. The points of
    one tensor fire in this order: what all readers see, what one reader sees, what is computed from it.
    """
    live = {part.path: part for component in components for part in component.walk()}
    points: dict[str, HookPoint] = {}
    owners: dict[str, HookPoint] = {}
    shown: dict[tuple[Place, Access], HookPoint] = {}
    declared = [part.points() for part in live.values()] + [part.raw_ends() for part in live.values()]
    for point in itertools.chain.from_iterable(declared):
        if point.name in owners:
            continue
        first = shown.setdefault((point.place, point.access), point)
        if first is point:
            points[point.name] = point
        else:
            first.aliases = (*first.aliases, point.name)
        owners[point.name] = first
    for name, point in owners.items():
        path, _, attribute = name.rpartition(".")
        if path in live:
            setattr(live[path], attribute, point)
    at: dict[Place, list[HookPoint]] = {}
    for point in points.values():
        at.setdefault(point.place, []).append(point)
    together = (sorted(there, key=lambda point: _FIRES.index(type(point.access))) for there in at.values())
    return {point.name: point for there in together for point in there}


_FIRES = (InPlace, Whole, ReadOnly, SharedRow, Converted, Derived)


def logits_point(cfg: TransformerBridgeConfig) -> HookPoint:
    """Returns the point of the model's own output."""
    return HookPoint(
        "hook_logits", entry_of("hook_logits").axes, Place("", Side.OUTPUT), sizes={"d_vocab": cfg.d_vocab}
    )
