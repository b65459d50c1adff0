"""The bridge's methods that run with hooks or interventions; the work is in `hooks.py` and `intervening.py`."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from clearspan.bridge.forward import ReturnType, gradients_lost, run
from clearspan.bridge.hooks import Attached, Hooks, attached, check_fired, check_recomputation
from clearspan.bridge.index import Segment
from clearspan.bridge.inputs import Input, ModelInput
from clearspan.bridge.intervening import intervention_hooks
from clearspan.bridge.sources import Source
from clearspan.interventions import Intervention
from clearspan.points import Direction, HookFunction

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge


class HookMethods:
    """Names what hooks and interventions do."""

    def run_with_hooks(
        self,
        input: Input,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        **forward_kwargs: Any,
    ) -> Any:
        """Runs the model with hooks that are there for this run.

        Args:
            input: As for `forward`.
            fwd_hooks: Pairs of a name, or a predicate of names, and `fn(value, hook)`. The function edits the value in
                place, or returns one of the same shape and dtype, or returns None. Edits in place are known by torch's
                count of them, which `value.data` and numpy go past: use `value` itself.
            bwd_hooks: Likewise with the value's gradient, called in the `backward` of what this run returns.
            reset_hooks_end: Whether the hooks come off at the end, also after an exception.
            clear_contexts: Whether the `ctx` of their points is emptied at the end.
            return_type: As for `forward`.
            loss_per_token: As for `forward`.
            **forward_kwargs: Further arguments of `forward`.

        Returns:
            What `forward` returns.

        Raises:
            UnknownPointError: A name is unknown, or a predicate holds for none; nothing was run.
            PointNotReachedError: A hook cannot fire, or did not fire, in this run.
            HookValueError, HookTypeError: A function returned a value of the wrong shape, dtype or device.
            UnwritableError: A write that gradient checkpointing would lose.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> def ablate_head_3(z, hook):
            ...     z[:, :, 3] = 0
            >>> logits = bridge.run_with_hooks("import os", fwd_hooks=[("blocks.1.attn.hook_z", ablate_head_3)])
        """
        bridge = _known(self)
        given, segment = bridge.prepare(input, **forward_kwargs)
        with attached(bridge, fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts, segment) as listeners:
            return _run(bridge, given, segment, listeners, return_type, loss_per_token)

    def run_with_interventions(
        self,
        input: Input,
        interventions: Sequence[Intervention],
        sources: Mapping[str, Source] | None = None,
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        **forward_kwargs: Any,
    ) -> Any:
        """Runs the model with interventions, which are data: see `clearspan.interventions`.

        Args:
            input: As for `forward`.
            interventions: What is done, in this order where several are at one point.
            sources: The runs from which values are taken, by name: text or token ids, which are run, a cache, or
                tensors by hook point's name. They have the input's positions, and its rows or one.
            return_type: As for `forward`.
            loss_per_token: As for `forward`.
            **forward_kwargs: Further arguments of `forward`.

        Returns:
            What `forward` returns.

        Raises:
            InvalidArgumentError: Places that the point does not have, a source that is not given or does not fit.
            UnknownPointError: The model has no such point; nothing was run.

        Example:
            >>> import clearspan
            >>> from clearspan.interventions import Intervention, Patch
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> patch = Intervention("resid_pre", Patch("other"), layer=2, positions=-1)
            >>> logits = bridge.run_with_interventions("import os", [patch], sources={"other": "import re"})
        """
        bridge = _known(self)
        given, segment = bridge.prepare(input, **forward_kwargs)
        found = intervention_hooks(bridge, given, interventions, sources or {})
        with attached(bridge, found, (), True, False, segment) as listeners:
            return _run(bridge, given, segment, listeners, return_type, loss_per_token)

    @contextlib.contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> "Iterator[TransformerBridge]":
        """Keeps hooks on while the context is open: for several runs, generation, or a forward and its backward.

        The arguments are those of `run_with_hooks`.
        """
        bridge = _known(self)
        with attached(bridge, fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            yield bridge

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
    ) -> None:
        """Puts a function on a point, or on all that a predicate holds for, until `reset_hooks`.

        Args:
            name: A point's name, or a predicate of names.
            hook: As in `run_with_hooks`.
            dir: `"fwd"` for the value, `"bwd"` for its gradient.
            is_permanent: Whether `reset_hooks` leaves it unless told otherwise.
        """
        for point, found in _known(self).index.matching(name):
            point.add_hook(hook, dir, is_permanent, name=found)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
    ) -> None:
        """Takes hooks off all points.

        Args:
            clear_contexts: Whether every point's `ctx` is emptied too.
            direction: Which hooks.
            including_permanent: Whether permanent ones go too.
        """
        for point in _known(self).index:
            if point.is_listening:
                point.remove_hooks(direction, including_permanent)
            if clear_contexts:
                point.ctx.clear()


def _known(methods: HookMethods) -> "TransformerBridge":
    return cast("TransformerBridge", methods)


def _run(
    bridge: "TransformerBridge",
    given: ModelInput,
    segment: Segment,
    listeners: Attached,
    return_type: ReturnType | None,
    loss_per_token: bool,
) -> Any:
    """Runs the model with hooks of this run alone, each of which must fire."""
    bridge.taps.refuse_writes = lost = gradients_lost(bridge)
    check_recomputation(listeners, lost)
    try:
        output = run(bridge, given, segment, return_type, loss_per_token)
    finally:
        bridge.taps.refuse_writes = None
    check_fired(listeners)
    return output
