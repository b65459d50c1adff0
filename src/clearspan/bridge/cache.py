"""The activation cache: the raw tensors of one run, under every name in canonical axes, and what one does with them."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from clearspan.bridge import cache_file
from clearspan.bridge.cache_file import StoredCache
from clearspan.bridge.cache_lookup import places_left
from clearspan.bridge.cache_table import described
from clearspan.bridge.reading_methods import ReadingMethods
from clearspan.bridge.run_weights import RunWeights
from clearspan.bridge.stack_methods import StackMethods
from clearspan.errors import InvalidArgumentError
from clearspan.hf.recording import Recording, storages
from clearspan.hf.relocation import Relocation

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge


class ActivationCache(StackMethods, ReadingMethods):
    """The activations of one run: a mapping from names to tensors, with tools for the residual stream.

    It keeps the tensors that the forward itself made, by reference, and no others. A look-up converts to canonical axes
    and computes, at that moment, derived values (`hook_scale`, `hook_normalized`, `hook_result`, path inputs) and the
    inside of attention, by the model's own eager function on the run's queries, keys and mask. Entries are detached.
    They share storage with each other where their values do, so clone one before editing it in place: an entry whose
    storage was written since it was kept raises when it is looked up (tensors made under
    `torch.inference_mode` do not count edits, so there it does not). So does what would be computed with weights that
    were written since the run.

    The tools are exact on the model's own weights: they use the norms' weights, biases and scales, so that nothing has
    to be folded.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> _, cache = bridge.run_with_cache("import os", names_filter=lambda name: "hook_resid" in name)
        >>> cache["resid_pre", 3].shape == cache["blocks.3.hook_resid_pre"].shape == cache["resid_pre", -2].shape
        True
        >>> cache
        ActivationCache: 15 entries, 33.0 KiB kept; batch 1, pos 3
        name                        layers  axes
        blocks.{l}.hook_resid_pre   0-4     [batch 1, pos 3, d_model 256]
        blocks.{l}.hook_resid_mid   0-4     [batch 1, pos 3, d_model 256]
        blocks.{l}.hook_resid_post  0-4     [batch 1, pos 3, d_model 256]
    """

    def remove_batch_dim(self) -> Self:
        """Has look-ups leave out the batch axis; returns the cache.

        Raises:
            InvalidArgumentError: The run had more than one row.
        """
        if self.has_batch_dim:
            if self.n_rows != 1:
                raise InvalidArgumentError(
                    "cannot leave out the batch axis", expected="one row", got=f"{self.n_rows} rows"
                )
            self._row_choices = (*self._row_choices, 0)
            self.has_batch_dim = False
        return self

    def to(self, device: torch.device | str) -> Self:
        """Returns a cache of the same on a device; dtypes stay, and what shares storage does so there.

        Scores and patterns that were not looked up yet are computed where the model is when they are, and moved.
        """
        new = copy.copy(self)
        new._recording = self._recording.to(device)
        there = Relocation(device)
        new._gradients = {name: there(gradient) for name, gradient in self._gradients.items()}
        return new

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Has what this cache computes with the model's weights be on their graph (True), or off it.

        Entries stay detached from the run. torch's own global mode is not touched, and under `torch.no_grad` there is
        no graph.
        """
        self.is_on_graph = mode

    def save(self, path: str | Path) -> None:
        """Writes the cache to one safetensors file; what shares storage is written once.

        Scores and patterns are not written: the queries and keys that they are computed from are. Those of a
        generation, and under flex attention, are computed and written. Of the model the file has the name, sizes, and
        checksums of the weights that the cache computes with. A cache of some rows or positions is written with all of
        them.

        Raises:
            EditedEntryError: An entry was written since it was kept.
            InvalidArgumentError: The cache is on the meta device, and has no values.
        """
        self.check_unedited()
        rows, positions = self._row_choices, self._pos_choices
        stored = StoredCache(
            list(self._points),
            self._rows,
            places_left(self._rows, rows, "row").tolist() if rows else None,
            places_left(self._n_kept(), positions, "position").tolist() if positions else None,
            self._recording.contents(),
            self._gradients,
            self._run_weights.checksums(),
        )
        cache_file.write(stored, path, self.bridge.cfg)

    @classmethod
    def load(cls, path: str | Path, bridge: "TransformerBridge", device: torch.device | str | None = None) -> Self:
        """Returns the cache of a file that `save` wrote.

        It does all that the saved one did. What is computed with weights that are not those of the cache's run raises.

        Args:
            path: The file.
            bridge: The model that was run.
            device: Where to put it; by default where the bridge's inputs are.

        Raises:
            InvalidArgumentError: The file is no cache, or one of a model of another architecture or size.
            FileNotFoundError: There is no such file.

        Example:
            >>> import clearspan, tempfile
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> _, cache = bridge.run_with_cache("import os")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cache.save(f"{folder}/run.safetensors")
            ...     loaded = clearspan.ActivationCache.load(f"{folder}/run.safetensors", bridge)
            >>> torch.equal(loaded["pattern", 2], cache["pattern", 2])
            True
        """
        stored = cache_file.read(path, bridge.cfg, bridge.device if device is None else device)
        lacking = [name for name in stored.points if name not in bridge.hook_dict]
        if lacking:
            raise InvalidArgumentError(
                f"{Path(path).name} is of a model with other hook points than the bridge's",
                got=", ".join(lacking[:3]) + ", ..." * (len(lacking) > 3),
                where=bridge.cfg.architecture,
            )
        cache = cls(
            bridge,
            {name: bridge.hook_dict[name] for name in stored.points},
            Recording.of(stored.contents, stored.rows, bridge.hf_model),
            rows=stored.rows,
            gradients=stored.gradients,
            run_weights=RunWeights(bridge.weight_slots, stored.checksums),
        )
        cache = cache.apply_slice_to_batch_dim(stored.rows_shown)
        return cache.apply_slice_to_pos_dim(stored.positions_shown)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept, each storage counted once."""
        return sum(storages([*self._recording.tensors(), *self._gradients.values()]).values())

    def __repr__(self) -> str:
        return described(self)

    # --- names that TransformerLens has ------------------------------------------------------------------------------

    @property
    def model(self) -> "TransformerBridge":
        """The model that was run."""
        return self.bridge

    @property
    def cache_dict(self) -> Self:
        """The cache itself, which is a mapping."""
        return self

    @property
    def has_embed(self) -> bool:
        """Whether it has `hook_embed`."""
        return "hook_embed" in self

    @property
    def has_pos_embed(self) -> bool:
        """Whether it has `hook_pos_embed`."""
        return "hook_pos_embed" in self
