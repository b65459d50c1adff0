"""One forward of a model with what every module was given and gave: the facts that a structure is derived from."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clearspan.hf.attention import AttentionCall, Call
from clearspan.hf.observers import observed, uses_interface
from clearspan.hf.torch_hooks import after, before
from clearspan.hf.watch import PRODUCTS, SOFTMAXES

Change = Callable[[Tensor], Tensor]
"""Takes a module's output and returns the one to go on with."""


@dataclass(eq=False)
class Visit:
    """One call of a module in a traced forward.

    Attributes:
        path: The module's path.
        module: The module.
        order: How many calls began before it.
        end: How many calls had begun when it returned.
        args: What it was called with.
        kwargs: What it was called with, by name.
        entered: A copy of its first tensor, or None where it got none.
        left: A copy of its output, of several the first; None where it gave no tensor.
        returned: What kind of thing it returned: a tensor, a tuple, a list.
        n_returned: How many things it returned.
        is_overwritten: Whether its output was written into after it.
        entered_at: Where the storage of its first tensor began; 0 without one.
        left_at: Where that of its output began.
        outputs: All that it returned, where that is a tuple or a list.
        given: Its output itself, until the forward is over.
        known: What was found of the call, by the function that found it.
    """

    path: str
    module: nn.Module
    order: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    entered: Tensor | None = None
    end: int = 0
    left: Tensor | None = None
    returned: type = Tensor
    n_returned: int = 1
    is_overwritten: bool = False
    entered_at: int = 0
    left_at: int = 0
    outputs: tuple[Any, ...] = field(default=(), repr=False)
    given: Tensor | None = field(default=None, repr=False)
    known: dict[object, object] = field(default_factory=dict, repr=False)

    @property
    def depth(self) -> int:
        """How many modules are around it."""
        return self.path.count(".")

    @property
    def size(self) -> tuple[int, int]:
        """Rows and positions of what it was given."""
        assert self.entered is not None, "it takes a tensor"
        return self.entered.shape[0], self.entered.shape[1]

    def is_in(self, path: str) -> bool:
        """Whether the module is at a path or inside of what is there."""
        return not path or self.path == path or self.path.startswith(f"{path}.")


@dataclass(eq=False)
class Attended:
    """One product of queries and keys, and what became of it.

    Attributes:
        path: The module whose code attends.
        order: Order of this module's call.
        query: `[batch, head, pos, d_head]`, as multiplied.
        key: `[batch, kv_head, pos, d_head]`, as multiplied.
        value: `[batch, kv_head, pos, d_head]`, as multiplied.
        result: `[batch, pos, head, d_head]`, what attention makes of the values.
        uses_interface: Whether transformers' attention interface is called.
        joins_heads: Whether rows and heads share an axis in the product.
        joins_operands: Whether they share one in queries and keys alone.
        scores: The softmax's input `[batch, head, pos, pos]`, or what torch's kernel adds to products, where either was
            seen.
        call: The call of transformers' attention interface, if it was one.
    """

    path: str
    order: int
    query: Tensor
    key: Tensor
    value: Tensor
    result: Tensor
    uses_interface: bool
    joins_heads: bool = False
    joins_operands: bool = False
    scores: Tensor | None = None
    call: AttentionCall | None = field(default=None, repr=False)


@dataclass(eq=False)
class Trace:
    """A traced forward.

    Attributes:
        visits: All calls of modules, in the order in which they began.
        attended: All products of queries and keys.
        output: What the forward returned.
        during: The call that is looked at alone, or None for the whole forward.
        hides_heads: Why attention's heads are not looked for; empty where they are.
        turns: Whether positions come before rows in blocks' tensors.
    """

    visits: list[Visit] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)
    output: Any = None
    during: Visit | None = None
    hides_heads: str = ""
    turns: bool = False

    def at(self, path: str) -> list[Visit]:
        """Returns the calls of the module at a path."""
        return [visit for visit in self.visits if visit.path == path and self._has(visit.order)]

    def of(self, visit: Visit) -> "Trace":
        """Returns the trace of one call alone, of a module that is called several times."""
        attended = [one for one in self.attended if visit.order <= one.order < visit.end]
        return Trace(self.visits, attended, self.output, visit, self.hides_heads, self.turns)

    def _has(self, order: int) -> bool:
        return self.during is None or self.during.order <= order < self.during.end

    def inside(self, visit: Visit) -> list[Visit]:
        """Returns the calls that a call made of modules in its own, those that gave a tensor."""
        return [
            one for one in self.visits[visit.order + 1 : visit.end] if one.is_in(visit.path) and one.left is not None
        ]


def first_tensor(value: Any) -> Tensor | None:
    """Returns the first tensor in what a module takes or gives, or None."""
    match value:
        case Tensor():
            return value
        case tuple() | list():
            parts = value
        case Mapping():
            parts = value.values()
        case _:
            return None
    return next((found for found in map(first_tensor, parts) if found is not None), None)


def fresh_arguments(visit: Visit, value: Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns what a module was called with, with a new tensor wherever it was given its first one.

    Args:
        visit: The call.
        value: The new tensor; by default a copy of what the first was then, since the model may have written into it.
    """
    new = visit.entered.clone() if value is None and visit.entered is not None else value
    tensors = (one for one in (*visit.args, *visit.kwargs.values()) if isinstance(one, Tensor))
    old = next(tensors, None)
    args = tuple(new if old is not None and one is old else one for one in visit.args)
    return args, {name: new if old is not None and one is old else one for name, one in visit.kwargs.items()}


def same_arguments(visit: Visit) -> tuple[str, ...]:
    """Returns the names of a module's further arguments that are the same tensor as its first one."""
    names = list(inspect.signature(visit.module.forward).parameters)
    named = [*zip(names, visit.args, strict=False), *visit.kwargs.items()]
    tensors = [(name, value) for name, value in named if isinstance(value, Tensor)]
    return tuple(name for name, value in tensors[1:] if value is tensors[0][1])


def traced(model: nn.Module, run: Callable[[], Any], changes: Mapping[str, Change] | None = None) -> Trace:
    """Runs something and returns what all modules of a model did.

    Args:
        model: The model whose modules are looked at.
        run: What to run.
        changes: What becomes of the outputs of modules, by path.
    """
    tracer = _Tracer(model, changes or {})
    with torch.no_grad(), tracer.attached(), tracer:
        tracer.trace.output = run()
    for visit in tracer.trace.visits:
        visit.is_overwritten = visit.given is not None and visit.given._version != tracer.versions[id(visit)]
        visit.given = None
    return tracer.trace


class _Tracer(TorchFunctionMode):
    """Hooks on all modules of a model, and a look at each softmax and the products around it."""

    def __init__(self, model: nn.Module, changes: Mapping[str, Change]) -> None:
        super().__init__()
        self.model = model
        self.changes = changes
        self.trace = Trace()
        self.versions: dict[int, int] = {}
        self._paths = {module: path for path, module in model.named_modules()}
        self._stack: list[Visit] = []
        self._products: dict[int, tuple[Tensor, Tensor]] = {}
        self._awaited: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While the context is open, the hooks are on the modules."""
        attending = {module: self._attend for module in self._paths if _attends_by_interface(module)}
        with contextlib.ExitStack() as stack, observed(attending):
            for module in self._paths:
                stack.callback(before(module, self._enter, first=True).remove)
                stack.callback(after(module, self._leave).remove)
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = first_tensor(args)
        if given is None:
            given = first_tensor(kwargs)
        entered = None if given is None else given.detach().clone()
        visit = Visit(self._paths[module], module, len(self.trace.visits), args, kwargs, entered)
        visit.entered_at = 0 if given is None else given.data_ptr()
        self.trace.visits.append(visit)
        self._stack.append(visit)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        visit = self._stack.pop()
        visit.end = len(self.trace.visits)
        visit.returned = next((kind for kind in (Tensor, tuple, list) if isinstance(output, kind)), type(output))
        visit.outputs = tuple(output) if isinstance(output, tuple | list) else ()
        visit.n_returned = len(visit.outputs) or 1
        result = first_tensor(output)
        if result is None:
            return None
        change = self.changes.get(visit.path)
        if change is not None:
            result = change(result)
            output = result if isinstance(output, Tensor) else type(output)((result, *output[1:]))
        visit.left, visit.given = result.detach().clone(), result
        self.versions[id(visit)], visit.left_at = result._version, result.data_ptr()
        return None if change is None else output

    def _attend(self, call: Call) -> Any:
        output = call.run()
        if isinstance(call, AttentionCall):
            query, key, value = (one.detach().clone() for one in (call.query, call.key, call.value))
            result = output[0].detach().clone()
            visit = self._stack[-1]
            found = Attended(visit.path, visit.order, query, key, value, result, True)
            found.scores, found.call = _bias(call.mask), call
            self.trace.attended.append(found)
        return output

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._stack and not _attends_by_interface(self._stack[-1].module):
            self._see(func, args, kwargs or {}, result)
        return result

    def _see(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Notes queries, keys and values of a module that attends by itself."""
        visit = self._stack[-1]
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
            bias = _bias(named.get("attn_mask"))
            self._attended(visit, named["query"], named["key"], named["value"], result, bias)
        elif func in SOFTMAXES:
            if visit.order in self._products:
                self._awaited[visit.order] = (*self._products.pop(visit.order), args[0])
        elif func in PRODUCTS or func in _ADDED_PRODUCTS:
            operands = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)][-2:]
            if len(operands) == 2 and min(one.ndim for one in operands) > 2:
                if visit.order in self._awaited:
                    query, key, scores = self._awaited.pop(visit.order)
                    self._attended(visit, query, key, operands[1], result, scores, is_joined=scores.ndim == 3)
                else:
                    self._products[visit.order] = operands[0], operands[1].transpose(-1, -2)

    def _attended(
        self,
        visit: Visit,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: Tensor,
        scores: Tensor | None,
        *,
        is_joined: bool = False,
    ) -> None:
        rows = 0 if visit.entered is None else len(visit.entered)
        joins_operands = query.ndim == 3 and not is_joined
        given = (query, key, value, result)
        query, key, value, result = (_by_head(one.detach().clone(), rows) for one in given)
        if min(one.ndim for one in (query, key, value, result)) < 4:
            return
        found = Attended(
            visit.path, visit.order, query, key, value, result.transpose(1, 2), False, is_joined, joins_operands
        )
        found.scores = None if scores is None else _by_head(scores.detach().clone(), rows)
        self.trace.attended.append(found)


def _by_head(value: Tensor, rows: int) -> Tensor:
    """Returns a tensor with rows and heads in two axes."""
    return value.unflatten(0, (rows, -1)) if value.ndim == 3 and rows and len(value) % rows == 0 else value


def _bias(mask: Tensor | None) -> Tensor | None:
    """Returns a mask that is added to scores."""
    return mask if mask is not None and mask.is_floating_point() and mask.ndim == 4 else None


_ADDED_PRODUCTS = frozenset({torch.baddbmm, Tensor.baddbmm})


def _attends_by_interface(module: nn.Module) -> bool:
    return "config" in vars(module) and uses_interface(module)
