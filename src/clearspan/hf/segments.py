"""Running some of the blocks: skipped ones are stepped over, and a run ends after the last one asked for."""

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from clearspan.errors import WholeForwardError
from clearspan.hf.adapters import acting
from clearspan.hf.tensors import primary_input, primary_output, with_input
from clearspan.hf.torch_hooks import StandIn, after, before, without_hooks
from clearspan.hf.turns import turns_of
from clearspan.modes import no_grad, same_draws
from clearspan.scopes import HERE
from clearspan.transfers import numbers_on
from clearspan.tree import module_at

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel


class Stopped(Exception):  # noqa: N818 (it ends a run as asked, and is no error)
    """Ends a forward at a block's boundary, with the residual stream there."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__("the forward was stopped at a block's boundary")
        self.residual = residual


class _Reached(Exception):  # noqa: N818 (likewise)
    """Ends a forward at a module, with the arguments that it was called with."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__("the forward was stopped at a module's input")
        self.args = args
        self.kwargs = kwargs


@contextlib.contextmanager
def starting_at(blocks: Sequence[nn.Module], start: int, residual: Tensor) -> Iterator[None]:
    """While the context is open, its own forwards skip the blocks before `start`, which gets the residual stream.

    Args:
        blocks: The model's blocks.
        start: The first one that runs.
        residual: The residual stream entering it.
    """
    own = HERE.get()

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return with_input(args, kwargs, residual) if HERE.get() is own else None

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks[:start]):
            stack.enter_context(_stepped_over(block, residual if index == start - 1 else None))
        if start == 0:
            stack.callback(before(blocks[0], enter, first=True).remove)
        yield


@contextlib.contextmanager
def stopping_at(blocks: Sequence[nn.Module], stop: int) -> Iterator[None]:
    """While the context is open, its own forwards raise `Stopped` before block `stop`, or after the last block."""
    own = HERE.get()

    def on_entry(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if HERE.get() is own:
            raise Stopped(primary_input(args, kwargs))

    def on_exit(_: nn.Module, __: tuple[Any, ...], ___: Mapping[str, Any], output: Any) -> None:
        if HERE.get() is own:
            raise Stopped(primary_output(output))

    handle = before(blocks[0], on_entry) if stop == 0 else after(blocks[stop - 1], on_exit)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def narrowed(module: nn.Module, positions: Sequence[int]) -> Iterator[None]:
    """While the context is open, a module that treats each position alone computes some positions only in its forwards.

    Its output is zero at the others, which nobody may read.

    Args:
        module: From one tensor `[batch, pos, ...]` to another.
        positions: Which, in the tensor that it is given.
    """

    def forward(run: Callable[..., Any], value: Tensor) -> Tensor:
        index = numbers_on(value.device, positions)
        found = run(value.index_select(1, index))
        return found.new_zeros(*value.shape[:2], *found.shape[2:]).index_copy_(1, index, found)

    with _replaced(module, forward):
        yield


def _stepped_over(block: nn.Module, replacement: Tensor | None) -> contextlib.AbstractContextManager[None]:
    def forward(_: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kind = type(block)
        if kind not in _RETURNS:
            _RETURNS[kind] = _returned(block, args, kwargs)
        left, returned = primary_input(args, kwargs) if replacement is None else replacement, _RETURNS[kind]
        return left if returned is None else returned.kind((left, *[None] * (returned.length - 1)))

    return _replaced(block, forward)


@dataclass(frozen=True)
class _Returned:
    """What a block returns with the residual stream first: a tuple or a list, of some length."""

    kind: type[tuple[Any, ...]] | type[list[Any]]
    length: int


_RETURNS: "weakref.WeakKeyDictionary[type[nn.Module], _Returned | None]" = weakref.WeakKeyDictionary()
"""For each class of blocks, what it returns, or None for a tensor; known once one was run."""


@no_grad
def _returned(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Returned | None:
    """Runs a block that is to be skipped, and returns what holds the residual stream that it gives, or None for itself.

    Releases of transformers differ in it, and no signature says it. No hook on the block is called, and random numbers
    that it draws are drawn again.
    """
    entering = primary_input(args, kwargs)
    with same_draws(entering.device):
        output = without_hooks(block)(*args, **kwargs)
    if isinstance(output, list):
        return _Returned(list, len(output))
    return _Returned(tuple, len(output)) if isinstance(output, tuple) else None


@contextlib.contextmanager
def _replaced(module: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    """Replaces a module's forward while the context is open, in the context's own forwards of the model.

    Args:
        module: The module.
        replacement: Called with the module's own forward, and with what that would be called with.
    """
    here = HERE.get()

    def forward(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return replacement(run, *args, **kwargs) if HERE.get() is here else run(*args, **kwargs)

    stand_in = StandIn(module, forward)
    try:
        yield
    finally:
        stand_in.restore()


def _takes_more(module: nn.Module) -> bool:
    """Whether a module's forward takes more than its input."""
    _, *others = inspect.signature(type(acting(module)).forward).parameters.values()
    return sum(one.kind is not inspect.Parameter.VAR_KEYWORD for one in others) > 1


class ArgumentsOf:
    """What a model's own forward passes to a module of a block after its first input, from a run that nobody sees.

    Attributes:
        model: The Hugging Face model.
        blocks: Paths of its blocks.
        embedding_width: Width of the token embedding.
        refused: Why the model cannot be run up to a module, or None if it can.
        stream_shape: The sizes of the residual behind rows and positions.
        stream_dtype: The residual's dtype, where it is not the model's, or None.
        raw_stream: Returns a residual `[batch, pos, ...]` as blocks take it.
        firsts: For each layer, the one from which a run must start that reaches it.
        reads_tokens: Whether blocks read the tokens beside the residual stream.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks: Sequence[str] = ()
        self.embedding_width = 0
        self.refused: str | None = None
        self.stream_shape: tuple[int, ...] = ()
        self.stream_dtype: torch.dtype | None = None
        self.raw_stream: Callable[[Tensor], Tensor] = lambda residual: residual
        self.firsts: Sequence[int] = ()
        self.reads_tokens = False

    def __call__(self, module: nn.Module, value: Tensor) -> dict[str, Any]:
        """Returns the arguments of a block, or of a module in one, by name.

        Args:
            module: The module.
            value: Its input `[batch, pos, d_model]`.
        """
        if self.refused is not None and _takes_more(module):
            raise WholeForwardError(
                f"this {type(module).__name__} is not called alone",
                reason=f"the model passes it more than its input, and {self.refused}",
                fix="a run of the whole model, with its hook_in and hook_out",
            )
        with turns_of(self.model).unseen():
            return _arguments_of(
                self.model,
                [module_at(self.model, path) for path in self.blocks],
                module,
                self.raw_stream(value.new_zeros((*value.shape[:2], *self.stream_shape), dtype=self.stream_dtype)),
                firsts=self.firsts,
                **self._input(value),
            )

    def _input(self, value: Tensor) -> dict[str, Tensor]:
        """Returns what the model is given, whose numbers do not matter."""
        if self.reads_tokens:
            return {"input_ids": value.new_zeros(value.shape[:2]).long()}
        dtype = None if self.stream_dtype is None else cast("PreTrainedModel", self.model).dtype
        return {"inputs_embeds": value.new_zeros((*value.shape[:2], self.embedding_width), dtype=dtype)}


def _arguments_of(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    module: nn.Module,
    residual: Tensor,
    *,
    firsts: Sequence[int],
    **given: Tensor,
) -> dict[str, Any]:
    """Returns what the model's own forward passes to a module of a block after its first input: masks, positions.

    It runs the model on a residual stream of zeros up to the module. A residual stream that the module would add to its
    result is zero.

    Args:
        model: The Hugging Face model.
        blocks: Its blocks.
        module: A block, or a module in one.
        residual: The residual stream of zeros, as blocks take it.
        firsts: For each layer, the one from which a run must start that reaches it.
        **given: What the model is given.
    """
    module = acting(module)  # an adapter's own forward takes anything
    if not _takes_more(module):
        return {}
    first, *others = inspect.signature(type(module).forward).parameters.values()
    own = HERE.get()

    def reached(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if HERE.get() is own:
            raise _Reached(args, kwargs)

    layer = next(index for index, block in enumerate(blocks) if any(part is module for part in block.modules()))
    handle = before(module, reached)
    try:
        with torch.no_grad(), starting_at(blocks, firsts[layer], residual):
            model(**given, use_cache=False)
    except _Reached as there:
        bound = inspect.signature(type(module).forward).bind(module, *there.args, **there.kwargs)
        named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        skipped = {first.name, others[0].name, "kwargs"}
        found = {name: what for name, what in named.items() if name not in skipped}
        return {**found, **({"residual": torch.zeros_like(residual)} if "residual" in found else {})}
    finally:
        handle.remove()
    raise AssertionError("the forward passes every block")
