"""Hooks for a stretch of code or one run: attached together, taken off together, and required to fire."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from clearspan.bridge.index import Segment
from clearspan.errors import InvalidArgumentError, PointNotReachedError, UnwritableError
from clearspan.points import Direction, HookFunction, HookPoint, Listener, Side

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge

Hooks = Sequence[tuple[str | Callable[[str], bool], HookFunction]]
"""Pairs of a point's name, or a predicate of names, and a function."""
Attached = Sequence[tuple[HookPoint, Listener, Direction]]
"""Hooks that were attached: each with its point, and for which direction."""


@contextlib.contextmanager
def attached(
    bridge: "TransformerBridge",
    fwd_hooks: Hooks,
    bwd_hooks: Hooks,
    reset_hooks_end: bool,
    clear_contexts: bool,
    segment: Segment = (None, None),
) -> Iterator[list[tuple[HookPoint, Listener, Direction]]]:
    """Attaches hooks while the context is open; if one cannot be attached, none is.

    All names are looked up before anything is attached. A predicate is asked about the points in the segment alone, and
    for backward hooks about those that have a gradient.

    Raises:
        UnknownPointError: A name is unknown, or a predicate holds for none.
        HookTypeError: A hook is not callable.
    """
    bridge.taps.check_not_in_hook()
    wanted: list[tuple[HookPoint, str, HookFunction, Direction]] = []
    directions: list[tuple[Direction, Hooks]] = [("fwd", fwd_hooks), ("bwd", bwd_hooks)]
    for direction, hooks in directions:
        for pair in hooks:
            if not (isinstance(pair, tuple | list) and len(pair) == 2):
                raise InvalidArgumentError(f"{direction}_hooks holds {pair!r}", expected="pairs (name, function)")
            names, function = pair
            for point, name in bridge.index.matching(names, segment, with_gradient=direction == "bwd"):
                wanted.append((point, name, function, direction))
    with contextlib.ExitStack() as stack:
        listeners: list[tuple[HookPoint, Listener, Direction]] = []
        for point, name, function, direction in wanted:
            listener = point.add_hook(function, direction, name=name)
            stack.callback(point.remove, listener)
            listeners.append((point, listener, direction))
        try:
            yield listeners
        finally:
            if clear_contexts:
                for point, _, _ in listeners:
                    point.ctx.clear()
            if not reset_hooks_end:
                stack.pop_all()


def check_fired(listeners: Attached) -> None:
    """Raises if a forward hook was not called in the run that it was given to."""
    for point, listener, direction in listeners:
        if direction == "fwd" and listener.calls == 0:
            raise PointNotReachedError(
                f"the hook on {listener.name} did not fire",
                where=str(point.place),
                reason="the forward did not pass there in this run",
            )


def check_recomputation(listeners: Attached, lost: str | None) -> None:
    """Raises if hooks of one run are of a kind that changes the graph, and gradient checkpointing makes it again.

    Args:
        listeners: The run's hooks.
        lost: Why such hooks would be gone by then, or None where there is no checkpointing.
    """
    for point, listener, direction in listeners if lost is not None else ():
        if direction == "bwd" or point.place.side in (Side.SCORES, Side.PATTERN):
            raise UnwritableError(
                f"the hook on {listener.name} would be missing when the forward is made again",
                reason=lost,
                fix="with bridge.hooks(...): around forward and backward, or without gradient checkpointing",
            )
