"""Calls of attention, of a router's forward, and how each runs: as configured, or watched by those who observe it."""

import copy
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clearspan.errors import NotSeenError
from clearspan.hf.functions import Diversion
from clearspan.hf.modules import execution_device
from clearspan.hf.storages import Relocation
from clearspan.hf.torch_hooks import itself
from clearspan.hf.watch import OperandsWatch, RouterWatch, SoftmaxWatch, Visit, Visits, run_under
from clearspan.points import Passed, Side
from clearspan.transfers import Outbound

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_LEFT_OUT = {"sdpa": ("softcap",)}
"""What implementations do not compute: transformers 5.20 runs sdpa without the cap, and later releases refuse to."""

Observer = Callable[[Any], Any]
"""Takes a call, runs it in one way or another, and returns its output."""
Setting = bool | int | float | str | None


def _never() -> bool:
    return False


_IS_NATIVE: ContextVar[bool] = ContextVar("clearspan native attention", default=False)
"""Whether the configured implementation of attention is running, or being asked for."""


class ObservedName(str):
    """The name of an attention implementation, under which transformers' registry has this library's function instead.

    It equals the name: a forward that asks which implementation runs takes the branch that it takes unobserved. Its
    hash is another one, so that the registry, a dictionary, keeps the two apart.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(("clearspan", str(self)))

    def __repr__(self) -> str:
        return f"'clearspan: {self}'"


class ObservedConfig:
    """A module's own view of its config, whose attention implementation is this library's function, by the same name.

    Args:
        original: The config.
        attend: That function.
    """

    def __init__(self, original: Any, attend: Callable[..., Any]) -> None:
        self.original = original
        self._attend = attend
        self._names: dict[str | None, ObservedName] = {}

    @property
    def _attn_implementation(self) -> str | None:
        name = self.original._attn_implementation
        if _IS_NATIVE.get():
            return name
        observed = self._names.get(name)
        if observed is None:  # in a run's first layer
            observed = self._names[name] = self._registered(name)
        return observed

    def _registered(self, name: str | None) -> ObservedName:
        """Returns the name under which the registry has this library's function in the place of an implementation."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        # What looks the function up may take this prefix off, and would then have a plain name.
        observed = ObservedName((name or "eager").removeprefix("paged|"))
        if observed not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(observed, self._attend)
        return observed

    def __getattr__(self, name: str) -> Any:
        if "original" not in vars(self):  # while it is being copied
            raise AttributeError(name)
        return getattr(self.original, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)  # nobody observes a copy of the model

    def __reduce__(self) -> tuple[Any, ...]:
        return itself, (self.original,)


# --- calls -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watcher:
    """What one observer wants to see. The fields are the arguments of `run_watched`."""

    visits: Visits
    is_paused: Callable[[], bool]
    is_last: bool


@dataclass(frozen=True)
class Call(ABC):
    """A call under observation.

    Attributes:
        module: The module that is called.
        observers: Observers that have not seen the call yet.
        watchers: What the others want to see of its inside.
    """

    module: nn.Module
    observers: tuple[Observer, ...] = field(default=(), kw_only=True)
    watchers: tuple[_Watcher, ...] = field(default=(), kw_only=True)

    def run(self) -> Any:
        """Passes the call to the next observer; after the last one, runs it."""
        if self.observers:
            return self.observers[0](replace(self, observers=self.observers[1:]))
        if not self.watchers:
            return self._run_natively()
        visits: dict[Side | Passed, list[Visit]] = {}
        for watcher in sorted(self.watchers, key=lambda watcher: watcher.is_last):
            for side, visit in watcher.visits.items():
                visits.setdefault(side, []).append(visit)
        paused = [watcher.is_paused for watcher in self.watchers]
        return self._run_for(
            {side: _chained(there) for side, there in visits.items()}, lambda: any(one() for one in paused)
        )

    def run_watched(self, visits: Visits, is_paused: Callable[[], bool] = _never, *, is_last: bool = False) -> Any:
        """Runs the call, and gives the visitors what they want to see; what they return is used in its place.

        Args:
            visits: The visitors.
            is_paused: Asked at each operation: True where it is not the module's own.
            is_last: Whether they come after the visitors of all other observers.
        """
        return replace(self, watchers=(*self.watchers, _Watcher(visits, is_paused, is_last))).run()

    @abstractmethod
    def _run_natively(self) -> Any:
        """Runs the call as the model is configured."""

    @abstractmethod
    def _run_for(self, visits: Visits, is_paused: Callable[[], bool]) -> Any:
        """Runs the call with visitors."""


def _chained(visits: Sequence[Visit]) -> Visit:
    def visit(tensor: Tensor) -> Tensor:
        for one in visits:
            tensor = one(tensor)
        return tensor

    return visit


@dataclass(frozen=True)
class AttentionCall(Call):
    """One call of a layer's attention function, through transformers' attention interface.

    The model's configured implementation runs it; the model's own eager function does where someone wants to see scores
    or pattern.

    Attributes:
        query: `[batch, head, q_pos, d_head]`, as used in the product.
        key: `[batch, kv_head, k_pos, d_head]`.
        value: `[batch, kv_head, k_pos, d_head]`.
        mask: In the form made for the model's own implementation.
        kwargs: Further arguments.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kwargs: dict[str, Any]

    def _run_natively(self) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.query.is_meta:  # only shapes are wanted, which few kernels can do
            rows, heads, positions, _ = self.query.shape
            return self.query.new_empty(rows, positions, heads, self.value.shape[-1]), None
        module = self.module
        before = _IS_NATIVE.get()
        try:
            _IS_NATIVE.set(True)  # flash attention reads its own name in the module's config
            config: Any = module.config
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, _eager(module))
            return attend(module, self.query, self.key, self.value, self.mask, **self.kwargs)
        finally:
            _IS_NATIVE.set(before)

    def _run_eagerly(self) -> Any:
        eager, config = _eager(self.module), vars(self.module)["config"]
        left_out = _LEFT_OUT.get(str(config._attn_implementation), ())
        kwargs = {name: value for name, value in self.kwargs.items() if name not in left_out}
        mask = additive_mask(self.mask, self.query, self.key, self.module, kwargs)
        return eager(self.module, self.query, self.key, self.value, mask, **kwargs)

    def _run_for(self, visits: Visits, is_paused: Callable[[], bool]) -> Any:
        query = visits[Side.QUERY](self.query) if Side.QUERY in visits else self.query
        key = visits[Side.KEY](self.key) if Side.KEY in visits else self.key
        value = visits[Side.VALUE](self.value) if Side.VALUE in visits else self.value
        call = replace(self, query=query, key=key, value=value)
        inside = {side: visit for side, visit in visits.items() if side in (Side.SCORES, Side.PATTERN)}
        if not inside:
            return _with_z(call._run_natively(), visits)
        watch = SoftmaxWatch(inside, is_paused)
        output = run_under(watch, call._run_eagerly)
        watch.check(self.module)
        return _with_z(output, visits)

    def inside(self) -> tuple[Tensor, Tensor]:
        """Returns scores and pattern, `[batch, head, q_pos, k_pos]`, as the eager function computes them.

        They are computed on the module's device and returned on the call's.
        """
        seen: list[Tensor] = []

        def see(tensor: Tensor) -> Tensor:
            seen.append(tensor)
            return tensor

        narrow = replace(self, value=self.key[..., :1])  # what the pattern multiplies does not matter
        here, home = self.query.device, execution_device(self.module)
        there = narrow if here == home else narrow.to(Relocation(home))
        watch = SoftmaxWatch({Side.SCORES: see, Side.PATTERN: see}, _never)
        with torch.no_grad():
            run_under(watch, there._run_eagerly)
        watch.check(self.module)
        scores, pattern = seen
        with Outbound() as outbound:
            back = Relocation(here, outbound=outbound)
            return back(scores), back(pattern)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors that the call holds, except the module's own."""
        named = {"query": self.query, "key": self.key, "value": self.value, "attention_mask": self.mask, **self.kwargs}
        # To ask for parameters takes long, and every call of a run that keeps patterns asks.
        return {
            name: one
            for name, one in named.items()
            if isinstance(one, Tensor) and (type(one) is Tensor or not isinstance(one, nn.Parameter))
        }

    def without_values(self) -> "AttentionCall":
        """Returns the call with its keys in the place of its values, for scores and pattern alone."""
        return AttentionCall(self.module, self.query, self.key, self.key, self.mask, self.kwargs)

    def to(self, there: Relocation) -> "AttentionCall":
        """Returns the call with its tensors on another device; the module's own stay where they are."""
        named = {name: _moved(value, there) for name, value in self.kwargs.items()}
        query, key, value, mask = (_moved(one, there) for one in (self.query, self.key, self.value, self.mask))
        return replace(self, query=query, key=key, value=value, mask=mask, kwargs=named)

    def detached(self) -> "AttentionCall":
        """Returns the call with tensors outside the graph."""
        mask = None if self.mask is None else self.mask.detach()
        return replace(
            self, query=self.query.detach(), key=self.key.detach(), value=self.value.detach(), mask=mask, observers=()
        )


def _with_z(output: tuple[Any, ...], visits: Visits) -> tuple[Any, ...]:
    """Returns what an attention function returned, with its first, `[batch, q_pos, head, d_head]`, as visited."""
    return (visits[Side.Z](output[0]), *output[1:]) if Side.Z in visits else output


def _moved(value: Any, there: Relocation) -> Any:
    match value:
        case nn.Parameter():
            return value
        case Tensor():
            return there(value)
    # Flex attention's mask is no tensor, but moves like one.
    return value.to(there.device) if there.device is not None and hasattr(value, "to") else value


def _eager(module: nn.Module) -> Callable[..., Any]:
    eager = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    if eager is None:
        raise NotSeenError(
            "attention's scores and pattern cannot be reached here",
            where=type(module).__name__,
            reason=f"{type(module).__module__} has no eager attention function of its own",
        )
    return eager


@dataclass(frozen=True)
class StoredCall:
    """What scores and pattern are computed from, apart from the model: it can be written to a file.

    Attributes:
        tensors: `query`, `key`, `attention_mask` if there is one, and tensors among the further arguments.
        settings: Arguments that can be written as text.
        parameters: Arguments that are the module's own parameters, each with its name there.
    """

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Setting]
    parameters: Mapping[str, str]

    @classmethod
    def of(cls, call: AttentionCall) -> "StoredCall | None":
        """Returns a call as it can be stored, or None where an argument is neither a tensor nor a setting."""
        own = {id(parameter): name for name, parameter in call.module.named_parameters()}
        tensors, settings, parameters = {"query": call.query, "key": call.key}, {}, {}
        for name, value in {"attention_mask": call.mask, **call.kwargs}.items():
            match value:
                case nn.Parameter() if id(value) in own:
                    parameters[name] = own[id(value)]
                case Tensor():
                    tensors[name] = value
                case None | bool() | int() | float() | str():
                    settings[name] = value
                case _:
                    return None
        return cls(tensors, settings, parameters)

    def restored(self, module: nn.Module) -> AttentionCall:
        """Returns the call of a module. Its values, which nobody reads, are a part of its keys."""
        named: dict[str, Any] = {**self.tensors, **self.settings}
        named |= {name: module.get_parameter(own) for name, own in self.parameters.items()}
        query, key, mask = (named.pop(name) for name in ("query", "key", "attention_mask"))
        return AttentionCall(module, query, key, key[..., :1], mask, named)


@dataclass(frozen=True)
class ForwardCall(Call):
    """One call of a module's forward, where nothing less can be watched: attention without the interface, or a router.

    Attributes:
        forward: The module's forward.
        args: Its arguments.
        kwargs: Its arguments by keyword.
    """

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def _run_natively(self) -> Any:
        return self.forward(*self.args, **self.kwargs)

    def _run_for(self, visits: Visits, is_paused: Callable[[], bool]) -> Any:
        passed = {side: visit for side, visit in visits.items() if isinstance(side, Passed)}
        if passed:
            return Diversion(self.module, self.forward, passed, is_paused).run(*self.args, **self.kwargs)
        if Side.Z in visits or Side.VALUE in visits:
            raise NotSeenError(
                "attention's values, and what it makes of them before a gate, cannot be reached here",
                expected="attention by transformers' interface",
                got="a forward of its own",
                where=type(self.module).__name__,
            )
        if Side.ROUTER in visits:
            call, watch = self, RouterWatch(visits[Side.ROUTER], is_paused)
        elif visits.keys() <= {Side.QUERY, Side.KEY}:
            call, watch = self, OperandsWatch(visits, is_paused)
        else:
            call, watch = self._eager_call(), SoftmaxWatch(visits, is_paused)
        output = run_under(watch, call._run_natively)
        watch.check(self.module)
        return output

    def _eager_call(self) -> "ForwardCall":
        """Returns the call with the arguments that make the module take its eager path."""
        config = vars(self.module).get("config")
        if config is None or config._attn_implementation == "eager" or self.kwargs.get("output_attentions"):
            return self
        takes_it = "output_attentions" in inspect.signature(type(self.module).forward).parameters
        kwargs = {**self.kwargs, "output_attentions": True} if takes_it else self.kwargs
        mask = kwargs.get("attention_mask")
        if mask is None:
            return replace(self, kwargs=kwargs)
        dtype = self.args[0].dtype if self.args else kwargs["hidden_states"].dtype
        return replace(self, kwargs={**kwargs, "attention_mask": _without_bias(mask, dtype)})


# --- masks -----------------------------------------------------------------------------------------------------------


def additive_mask(
    mask: "Tensor | BlockMask | None", query: Tensor, key: Tensor, module: nn.Module, kwargs: Mapping[str, Any]
) -> Tensor:
    """Returns the mask that eager attention adds to its scores, from the one made for the model's implementation.

    Args:
        mask: As sdpa gets it (None where its `is_causal` says all, or boolean), as flash attention does (None, or two
            axes that mark padding), as flex attention does (a function of positions), or additive already.
        query: `[batch, head, q_pos, d_head]`.
        key: `[batch, kv_head, k_pos, d_head]`.
        module: The attention module.
        kwargs: Further arguments of the attention function.
    """
    if mask is not None and not isinstance(mask, Tensor):
        mask = _written_out(mask, query, key)
    if mask is not None and mask.is_floating_point() and mask.ndim == 4:
        return mask
    allowed = mask.bool() if mask is not None and mask.ndim == 4 else _allowed(mask, query, key, module, kwargs)
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(allowed, zero, least_score(query.dtype))


def _written_out(mask: "BlockMask", query: Tensor, key: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask  # It takes long to import.

    return create_mask(mask.mask_mod, query.shape[0], None, query.shape[2], key.shape[2], device=query.device)


def least_score(dtype: torch.dtype) -> float:
    """Returns the score of a key that a mask hides."""
    # Eager attention often takes its softmax in float32, where float64's least number would be -inf, and a row that is
    # masked throughout would be NaN.
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def _allowed(mask: Tensor | None, query: Tensor, key: Tensor, module: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
    """Returns where queries may look, `[batch or 1, 1, q_pos, k_pos]`, for a missing mask or one of padding alone."""
    q_len, k_len = query.shape[2], key.shape[2]
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    k_pos = torch.arange(k_len, device=key.device)
    # Without a mask sdpa aligns queries with the first keys (a cache of fixed length has empty ones after them); flash
    # attention, whose mask marks padding alone, aligns them with the last.
    first = 0 if mask is None and q_len > 1 else k_len - q_len
    q_pos = torch.arange(q_len, device=key.device)[:, None] + first
    allowed = k_pos <= q_pos if is_causal else torch.ones_like(k_pos <= q_pos)
    window = kwargs.get("sliding_window")
    if window is not None:
        allowed = allowed & (k_pos > q_pos - window)
    return allowed[None, None] if mask is None else allowed & mask.bool()[:, None, None, :]


def _without_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an additive mask that hides what the given one hides, and adds nothing else.

    A module with an eager path of its own adds its position bias there itself, while the mask made for its fused path
    already contains the bias.

    Args:
        mask: Boolean, or additive.
        dtype: Of the scores.
    """
    least = torch.finfo(dtype).min
    allowed = mask if mask.dtype == torch.bool else mask > least / 2
    return torch.where(allowed, torch.zeros((), dtype=dtype, device=mask.device), least)
