"""Names of TransformerLens's hook points."""

from typing import TYPE_CHECKING, Any, Literal, Protocol

from clearspan.checks import check_choice, check_flags
from clearspan.errors import InvalidArgumentError
from clearspan.transformer_lens.renamed import OF_HOOK_POINT, Hook, missing


def check_no_level(level: object) -> None:
    """Raises InvalidArgumentError unless TransformerLens's level of a hook is None."""
    if level is not None:
        raise InvalidArgumentError(
            f"level={level!r}: hooks have no levels", fix="with bridge.hooks(...), which takes its own hooks off"
        )


class _Point(Protocol):
    """What of a hook point is asked for."""

    ctx: dict[str, Any]

    def listeners(self, dir: Literal["fwd", "bwd"]) -> tuple[Any, ...]: ...
    def add_hook(self, hook: Any, dir: Literal["fwd", "bwd"] = ..., is_permanent: bool = ...) -> Any: ...


class HookPointNames:
    """Names of TransformerLens's hook points."""

    @property
    def fwd_hooks(self: _Point) -> list[Any]:
        """The listeners of values, in order: `function`, `is_permanent`."""
        return list(self.listeners("fwd"))

    @property
    def bwd_hooks(self: _Point) -> list[Any]:
        """The listeners of gradients, in order."""
        return list(self.listeners("bwd"))

    def has_hooks(
        self: _Point,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
        level: int | None = None,
    ) -> bool:
        """Returns whether functions are on the point.

        Args:
            dir: Of which direction.
            including_permanent: Whether permanent ones count.
            level: None: hooks have no levels.
        """
        check_flags(including_permanent=including_permanent)
        check_no_level(level)
        return any(including_permanent or not one.is_permanent for one in listeners_of(self, dir))

    def add_perma_hook(self: _Point, hook: Hook, dir: Literal["fwd", "bwd"] = "fwd") -> Any:
        """Puts a function on the point that `reset_hooks` leaves there, as `add_hook(..., is_permanent=True)`."""
        return self.add_hook(hook, dir, is_permanent=True)

    def clear_context(self: _Point) -> None:
        """Empties `ctx`."""
        self.ctx.clear()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return missing(
                self, name, "a hook point", OF_HOOK_POINT, "hook points are no modules; bridge.hf_model has these"
            )


def listeners_of(point: _Point, dir: Literal["fwd", "bwd", "both"]) -> list[Any]:
    """Returns a point's listeners of a direction, or of both."""
    check_choice(("fwd", "bwd", "both"), dir=dir)
    directions: tuple[Literal["fwd", "bwd"], ...] = ("fwd", "bwd") if dir == "both" else (dir,)
    return [one for direction in directions for one in point.listeners(direction)]
