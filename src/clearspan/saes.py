"""Methods that put sparse autoencoders on a bridge, under the names of SAELens's HookedSAETransformer."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from clearspan._run import runs
from clearspan._run.autoencoders import Autoencoder, Splice, Splices, spliced
from clearspan._run.hooks import Hooked, Hooks
from clearspan.cache import ActivationCache
from clearspan.checks import check_flags
from clearspan.errors import InvalidArgumentError
from clearspan.model import Model
from clearspan.modes import eager
from clearspan.scopes import HERE

Autoencoders = Autoencoder | Sequence[Autoencoder]
"""One autoencoder or several, each on another hook point."""


class SparseAutoencoders(Model):
    """A model on whose hook points sparse autoencoders and transcoders can be.

    An autoencoder is any object with `encode`, `decode` and a configuration that names its hook point, such as those of
    SAELens. While it is on, `decode(encode(value))` takes the value's place. With `use_error_term=True` what it does
    not reconstruct is added, and the model goes on with the value itself, to the last digit, until a hook changes
    something inside; gradients pass through its features alone.

    Behind the name of the point that it writes there are points of its own: `hook_sae_input`, `hook_sae_acts_post`,
    `hook_sae_recons`, `hook_sae_error` (with the error term) and `hook_sae_output`, such as
    `blocks.2.hook_resid_post.hook_sae_acts_post`. Hooks, interventions and caches take them like any other.
    """

    @functools.cached_property
    def _splices(self) -> Splices:
        return Splices(self.taps)

    @property
    def acts_to_saes(self) -> Mapping[str, Autoencoder]:
        """The autoencoders that are on, by the name that each has for the point that it reads."""
        return {splice.name: splice.autoencoder for splice in self._splices.values()}

    def saes(
        self, saes: Autoencoders = (), reset_saes_end: bool = True, use_error_term: bool | None = None
    ) -> contextlib.AbstractContextManager[Self]:
        """Has autoencoders on while the context is open; the forwards of this context (`contextvars`) alone see them.

        Args:
            saes: One, or several.
            reset_saes_end: Whether they come off at the end; otherwise they stay as after `add_sae`. One that was on
                the same point before comes back.
            use_error_term: Whether what they do not reconstruct is added; by default as the `use_error_term` of each
                says.

        Raises:
            InvalidArgumentError: Something is no autoencoder, does not fit its point, or two are on the same point.
            UnknownPointError: The model has no such point.

        Example:
            >>> import clearspan, torch
            >>> from types import SimpleNamespace
            >>> class Halves(torch.nn.Module):
            ...     cfg = SimpleNamespace(hook_name="blocks.2.hook_resid_post")
            ...     def encode(self, value):
            ...         return torch.cat([value.relu(), (-value).relu()], -1)
            ...     def decode(self, acts):
            ...         return acts[..., :256] - acts[..., 256:]
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> def first_off(acts, hook):
            ...     acts[..., 0] = 0
            >>> name = "blocks.2.hook_resid_post.hook_sae_acts_post"
            >>> with bridge.saes(Halves(), use_error_term=True):
            ...     torch.equal(bridge("import os"), bridge.hf_model(bridge.to_tokens("import os")).logits)
            ...     logits = bridge.run_with_hooks("import os", fwd_hooks=[(name, first_off)])
            True
        """
        return self._with_saes(saes, reset_saes_end, use_error_term)

    @contextlib.contextmanager
    def _with_saes(self, saes: Autoencoders, reset_saes_end: bool, use_error_term: bool | None) -> Iterator[Self]:
        check_flags(reset_saes_end=reset_saes_end)
        splices = [spliced(self, sae, use_error_term) for sae in _listed(saes)]
        _check_apart(splices)
        if not reset_saes_end:
            for splice in splices:
                self._keep_on(splice)
            yield self
            return
        with contextlib.ExitStack() as stack:
            for splice in splices:
                stack.callback(self._splices.remove, self, splice, self._splices.put(self, splice))
            stack.enter_context(Hooked(self, [hook for splice in splices for hook in splice.hooks()]))
            for splice in splices:
                splice.scope = HERE.get()
            yield self

    def add_sae(self, sae: Autoencoder, use_error_term: bool | None = None) -> None:
        """Puts an autoencoder on its hook point until `reset_saes`, in the place of one that is there.

        Args:
            sae: The autoencoder.
            use_error_term: As for `saes`.

        Raises:
            InvalidArgumentError: It is no autoencoder, or does not fit its point.
            UnknownPointError: The model has no such point.
        """
        self._keep_on(spliced(self, sae, use_error_term))

    def _keep_on(self, splice: Splice) -> None:
        earlier = self._splices.put(self, splice)
        if earlier is not None:
            self._take_off(earlier)
        for name, hook in splice.hooks():
            hooked = self.index.find(name)
            splice.lasting.append((hooked, hooked.add_hook(hook, is_permanent=True)))

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Takes autoencoders off.

        Args:
            act_names: The points that they read; by default all.

        Raises:
            InvalidArgumentError: None is on such a point.
            UnknownPointError: The model has no such point.
        """
        there: dict[str, list[Splice]] = {}
        for splice in self._splices.values():
            there.setdefault(splice.reads.name, []).append(splice)
        names = list(there) if act_names is None else [point.name for point in self.index.select(act_names)]
        for name in names:
            if name not in there:
                raise InvalidArgumentError(
                    f"no sparse autoencoder is on {name}", expected=", ".join(there) or "one that is on"
                )
        for splice in [splice for name in names for splice in there[name]]:
            self._take_off(splice)

    def _take_off(self, splice: Splice) -> None:
        self._splices.remove(self, splice)
        splice.is_off = True
        while splice.lasting:
            hooked, listener = splice.lasting.pop()
            hooked.remove(listener)

    @eager
    def run_with_saes(
        self,
        input: Any = None,
        *,
        saes: Autoencoders = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **forward_kwargs: Any,
    ) -> Any:
        """Runs the model with autoencoders on; see `saes` for these, and `run_with_hooks` for all other arguments."""
        with self.saes(saes, reset_saes_end, use_error_term):
            return runs.run_with_hooks(self, input, **forward_kwargs)

    @eager
    def run_with_hooks_with_saes(
        self,
        input: Any = None,
        *,
        saes: Autoencoders = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        **forward_kwargs: Any,
    ) -> Any:
        """Runs the model with autoencoders and hooks on; see `saes` and `run_with_hooks`."""
        with self.saes(saes, reset_saes_end, use_error_term):
            return runs.run_with_hooks(self, input, fwd_hooks, bwd_hooks, **forward_kwargs)

    @eager
    def run_with_cache_with_saes(
        self,
        input: Any = None,
        *,
        saes: Autoencoders = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **forward_kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Runs the model with autoencoders on, and keeps its activations and theirs; see `saes` and `run_with_cache`.

        Example:
            >>> import clearspan, torch
            >>> from types import SimpleNamespace
            >>> class Positive(torch.nn.Module):
            ...     cfg = SimpleNamespace(hook_name="blocks.0.mlp.hook_post")
            ...     def encode(self, value):
            ...         return value.relu()
            ...     def decode(self, acts):
            ...         return acts
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> _, cache = bridge.run_with_cache_with_saes("import os", saes=[Positive()])
            >>> bool((cache["blocks.0.mlp.hook_post.hook_sae_acts_post"] >= 0).all())
            True
        """
        with self.saes(saes, reset_saes_end, use_error_term):
            return runs.run_with_cache(self, input, **forward_kwargs)


def _listed(saes: Autoencoders) -> list[Autoencoder]:
    """Returns one autoencoder or several as a list."""
    return list(saes) if isinstance(saes, Sequence) else [saes]


def _check_apart(splices: Sequence[Splice]) -> None:
    """Raises if two autoencoders write the same point."""
    names = [splice.writes.name for splice in splices]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise InvalidArgumentError(f"two sparse autoencoders are on {twice[0]}", expected="one on each hook point")
