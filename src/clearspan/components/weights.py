"""Weights as attributes: a view of the live parameter, or a copy that passes writes on, so that no write is lost."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor, nn

from clearspan.errors import InvalidArgumentError, MissingWeightError, UnwritableError

Shown = TypeVar("Shown", bound=Tensor)


class WeightTensor(Tensor):
    """Weights that act on writes, into them and into views of them. What is computed from one is an ordinary tensor.

    Two kinds of weight need it: a copy (layers stacked, heads laid out anew), which passes writes on to the model's
    parameters, and a parameter that another weight shares, which warns.
    """

    _before: Callable[[], None]
    _after: Callable[[], None]
    _leaf: Tensor | None

    @classmethod
    def of(
        cls,
        tensor: Tensor,
        *,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
        leaf: Tensor | None = None,
    ) -> "WeightTensor":
        """Returns the tensor, on the same storage, with functions to call before and after it is written.

        Args:
            tensor: The weights.
            before: Called before a write; it refuses the write by raising.
            after: Called after a write.
            leaf: The live parameter, if the tensor is all of it: operations then use the parameter.
        """
        weights = tensor.as_subclass(cls)
        weights._before = before or _nothing
        weights._after = after or _nothing
        weights._leaf = leaf
        return weights

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs a torch function on ordinary tensors."""
        kwargs = kwargs or {}
        written = _written(func, args, kwargs)
        if written is not None:
            written._before()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*_leaves(args), **{name: _leaves(value) for name, value in kwargs.items()})
            if written is None:
                source = args[0] if args else None
                return _views(result, source) if isinstance(source, WeightTensor) else result
        written._after()
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as an ordinary tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        """Copies as an ordinary tensor."""
        return copy.deepcopy(self.as_subclass(Tensor), memo)


def _leaves(value: Any) -> Any:
    """Returns an argument in which live parameters replace the weights that stand for all of them."""
    if isinstance(value, WeightTensor):
        return value if value._leaf is None else value._leaf
    if type(value) in (tuple, list):
        return type(value)(_leaves(part) for part in value)
    return value


def _nothing() -> None:
    pass


_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__imatmul__", "__ipow__"}


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> WeightTensor | None:
    """Returns the weight that a function writes, if any."""
    if isinstance(kwargs.get("out"), WeightTensor):
        return kwargs["out"]
    name = getattr(func, "__name__", "")
    is_write = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
    return args[0] if is_write and args and isinstance(args[0], WeightTensor) else None


def _views(result: Any, source: WeightTensor) -> Any:
    """Returns a function's result, in which views of the source act on writes as the source does."""
    if isinstance(result, tuple | list):
        return type(result)(_views(part, source) for part in result) if type(result) in (tuple, list) else result
    if not isinstance(result, Tensor) or result is source._leaf or _is_wrapped(result):
        return result
    if _address(result) == _address(source):
        return WeightTensor.of(result, before=source._before, after=source._after)
    return result


def _address(tensor: Tensor) -> int | None:
    """Returns where a tensor's storage begins; None where it has none of its own."""
    return None if tensor.is_meta or _is_wrapped(tensor) else tensor.untyped_storage().data_ptr()


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func follows the tensor, whose storage cannot be seen then."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


def write_through(shown: Tensor, source: Tensor, revert: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns weights from which every write reaches the source: a view as it is, a copy as a `WeightTensor`.

    Args:
        shown: The source in other axes.
        source: A live parameter, or a view of one.
        revert: From the shown axes to the source's.
    """
    if _address(shown) == _address(source):
        return shown

    def before() -> None:
        check_writable(source)

    def after() -> None:
        with torch.no_grad():
            source.copy_(revert(shown.detach()))

    return WeightTensor.of(shown, before=before, after=after)


def check_writable(source: Tensor) -> None:
    """Raises if a weight cannot be written now, and warns of what else a write changes."""
    if isinstance(source, WeightTensor):
        source._before()
    if torch.is_grad_enabled() and source.requires_grad:
        raise UnwritableError(
            "weights that gradients are computed for are written where no graph is made",
            fix="with torch.no_grad(): around the write, or assign the whole weight, which does that itself",
        )


@dataclass(frozen=True)
class LinearMap:
    """Where the parameters of a linear map are.

    Attributes:
        module: The module that holds them.
        weight: Name of the weight there.
        bias: Name of the bias there, whether the map has one or not; None if it cannot have one.
        in_axis: The weight's axis of inputs, counted from the end.
        out_axis: The weight's axis of outputs, counted from the end.
        around: The module that holds the bias, where that is another one.
    """

    module: nn.Module
    weight: str
    bias: str | None
    in_axis: int
    out_axis: int
    around: nn.Module | None = None

    @property
    def bias_holder(self) -> nn.Module:
        """The module that holds the bias, if the map has one."""
        return self.around or self.module


class Weight(Generic[Shown]):
    """A weight as an attribute: reading returns what the method returns, assigning writes into the model.

    Example:
        >>> import clearspan
        >>> attn = clearspan.boot("tiny-bigcode").blocks[0].attn
        >>> attn.W_O = attn.W_O * 0
        >>> bool(attn.o.module.weight.any())
        False
    """

    def __init__(self, read: Callable[[Any], Shown]) -> None:
        self._read = read
        self.__doc__ = read.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "Weight[Shown]": ...
    @overload
    def __get__(self, instance: object, owner: type) -> Shown: ...
    def __get__(self, instance: object | None, owner: type) -> "Weight[Shown] | Shown":
        return self if instance is None else self._read(instance)

    def __set__(self, instance: object, value: Tensor) -> None:
        shown = self._read(instance)
        if value is shown:
            return  # `W *= 2` has written already
        if value.shape != shown.shape:
            raise InvalidArgumentError(
                f"cannot assign {self._name}", expected=str(list(shown.shape)), got=str(list(value.shape))
            )
        with torch.no_grad():
            shown.copy_(value.detach() if isinstance(value, Tensor) else value)


class AbsentWeight(Weight[Tensor]):
    """A weight that a kind of component never has: reading it raises with the reason.

    Args:
        reason: Why it never has it.
    """

    def __init__(self, reason: str) -> None:
        def read(component: Any) -> Tensor:
            raise MissingWeightError(f"{component.path} has no {self._name}", reason=reason)

        super().__init__(read)
