"""What keeps the inputs and outputs of modules in a run: forwards in the place of their own, made once for all runs."""

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from clearspan.hf.tensors import primary_input, primary_output
from clearspan.hf.torch_hooks import StandIn, is_unhooked, nothing
from clearspan.scopes import HERE, Scope

Keep = Callable[[str, Tensor], None]
Names = tuple[str | None, str | None]
"""Under which a module's input and output are kept; None for what is not kept."""
_NOBODY = object()


class _Served:
    """The run that keepers serve now.

    Attributes:
        owner: Its scope, or nobody's.
        keep: Keeps a tensor under a name.
    """

    __slots__ = ("keep", "owner")

    def __init__(self) -> None:
        self.owner: object = _NOBODY
        self.keep: Keep = nothing


class Keeper(StandIn):
    """A forward in the place of a module's own, which keeps the input and the output.

    It refers to the module weakly: it is there as long as the plan of a choice, and users replace modules.

    Args:
        module: The module.
        entry: The name under which the input is kept, or None.
        exit: That of the output, or None.
        served: The run that keeps them.
    """

    def __init__(self, module: nn.Module, entry: str | None, exit: str | None, served: _Served) -> None:
        self._of = weakref.ref(module)
        self._entry = entry
        self._exit = exit
        self._served = served
        self._before = None

    @property
    def _module(self) -> nn.Module:
        module = self._of()
        assert module is not None, "it is asked only by the module's caller"
        return module

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        module = self._module
        return functools.partial(type(module).forward, module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward, and keeps what it was called with and what it returned."""
        module: Any = self._of()
        output = type(module).forward(module, *args, **kwargs)
        served = self._served
        if HERE.get() is served.owner:
            keep = served.keep
            if self._entry is not None:
                keep(self._entry, args[0] if args else primary_input(args, kwargs))
            if self._exit is not None:
                keep(self._exit, output if type(output) is Tensor else primary_output(output))
        return output


class Keepers:
    """The keepers of one plan. They serve one run at a time."""

    def __init__(self) -> None:
        self._served = _Served()
        self._made: dict[str, Keeper] = {}
        self._put: list[tuple[dict[str, Any], Keeper]] = []

    def serve(self, keep: Keep, owner: Scope | None) -> None:
        """Has the keepers that are put on modules keep tensors in forwards of a scope."""
        self._served.keep, self._served.owner = keep, owner

    def put(self, names: Mapping[str, Names], modules: Mapping[str, nn.Module]) -> list[str]:
        """Puts keepers on modules where they see what a torch hook would; returns the paths of the others.

        Args:
            names: Under which each module's input and output are kept, by its path.
            modules: The modules by their paths.
        """
        made, left = self._made, list[str]()
        for path, own_names in names.items():  # up to some hundreds, in every run with a cache
            module = modules[path]
            own = vars(module)
            if "forward" in own or not is_unhooked(module):
                left.append(path)
                continue
            keeper = made.get(path)
            if keeper is None or keeper._of() is not module:
                keeper = made[path] = Keeper(module, *own_names, self._served)
            self._put.append((own, keeper))
            own["forward"] = keeper
        return left

    def rest(self) -> None:
        """Takes all keepers off."""
        self._served.keep, self._served.owner = nothing, _NOBODY
        while self._put:
            own, keeper = self._put.pop()
            if own["forward"] is keeper:
                del own["forward"]
            else:  # another one came later, and stays
                keeper.restore()
