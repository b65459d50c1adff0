"""What an analysis reads: points in layers, depths, target tokens, and values gathered over many texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, whole_numbers
from clearspan.errors import InvalidArgumentError, NotFiniteError, argument
from clearspan.inputs import Batch, Input, Place, Positions
from clearspan.model import check_bridge
from clearspan.modes import no_grad
from clearspan.points import Address, get_act_name
from clearspan.progress import Progress, silent, told

Layers = int | Sequence[int] | None
"""One layer, several, or all (None); negative from the end."""
Targets = str | Sequence[str] | int | Sequence[int] | Int[Tensor, "row"]
"""One token for all rows, or one for each, as text or as ids."""


@dataclass(frozen=True, eq=False)
class Activations:
    """Values at chosen places of many texts, in float32 at least, on the CPU.

    Attributes:
        values: By point: its value at each place.
        places: Rows of the input, and positions among their real tokens.
        texts: The real tokens of each row; empty for embeddings.
    """

    values: Mapping[str, Float[Tensor, "place *axes"]]
    places: tuple[Place, ...]
    texts: tuple[tuple[int, ...], ...]

    def means(self, name: str) -> Float[Tensor, "row *axes"]:
        """Returns the mean of each row's places."""
        values = self.values[name]
        rows = torch.tensor([row for row, _ in self.places])
        sums = values.new_zeros(len(self.texts), *values.shape[1:]).index_add_(0, rows, values)
        return sums / rows.bincount().view(-1, *[1] * (values.ndim - 1))


def points_of(bridge: TransformerBridge, name: str, layers: Layers) -> tuple[str, ...]:
    """Returns the full names of a point in each layer, or the one name where it is full already.

    Raises:
        UnknownPointError: There is no such point, or no such layer.
        InvalidArgumentError: A full name and layers too, no layer, or a point that is not a value at each position.

    Example:
        >>> import clearspan
        >>> points_of(clearspan.boot("tiny-bigcode"), "resid_post", [0, -1])
        ('blocks.0.hook_resid_post', 'blocks.4.hook_resid_post')
    """
    check_bridge(bridge)
    if not isinstance(name, str):
        raise InvalidArgumentError("a hook point is given by its name", got=repr(name))
    n_layers = bridge.cfg.n_layers
    is_full = "." in name or name.startswith("hook_")
    if is_full or Address.parse(get_act_name(name, 0)).layer is None:
        if layers is not None:
            raise InvalidArgumentError(f"{name!r} is one point, in one place", expected="layers=None", got=str(layers))
        names = [get_act_name(name)]
    else:
        # With no layers named, those are left out that lack the point, as attention in a layer with a mixer.
        every = bridge.index.layers_with(get_act_name(name, 0)) or range(n_layers)
        wanted = whole_numbers("layers", every if layers is None else layers)
        names = [
            get_act_name(name, layer)
            for layer in dict.fromkeys(one + n_layers if -n_layers <= one < 0 else one for one in wanted)
        ]
    if not names:
        raise InvalidArgumentError("there is no layer to read", expected="layers=None for all", got="none")
    for each in names:
        axes = bridge.index.find(each).axes
        if axes[:2] != ("batch", "pos"):
            raise InvalidArgumentError(
                f"{each} is not a value at each position", expected="[batch, pos, ...]", got=f"[{', '.join(axes)}]"
            )
    return tuple(names)


def layers_of(names: Sequence[str]) -> list[int]:
    """Returns the layer of each point; an empty list if one of them is in no block.

    Example:
        >>> layers_of(["blocks.2.hook_resid_post"]), layers_of(["blocks.2.hook_resid_post", "hook_embed"])
        ([2], [])
    """
    found = [Address.parse(name).layer for name in names]
    return [] if None in found else [layer for layer in found if layer is not None]


def stop_after(names: Sequence[str]) -> int | None:
    """Returns the block before which a run that reads these points can stop; None for the model's end."""
    layers = layers_of(names)
    return max(layers) + 1 if layers else None


def depths_of(n_layers: int, depths: int | Sequence[int] | None) -> list[int]:
    """Returns depths counted from 0: the embedding is 0, what leaves the last block `n_layers`.

    Raises:
        InvalidArgumentError: There is no such depth, or none is given.
    """
    wanted = whole_numbers("depths", range(n_layers + 1) if depths is None else depths)
    if not wanted:
        raise InvalidArgumentError("there is no depth to read", expected="depths=None for all", got="none")
    for depth in wanted:
        if not -n_layers - 1 <= depth <= n_layers:
            raise InvalidArgumentError(
                f"there is no depth {depth}",
                expected=f"0 (the embedding) to {n_layers}, or -{n_layers + 1} to -1",
                got=str(depth),
            )
    return [depth % (n_layers + 1) for depth in wanted]


def target_ids_of(bridge: TransformerBridge, targets: Targets, rows: int, name: str = "targets") -> Int[Tensor, "row"]:
    """Returns one token id for each row; one token alone is that of every row.

    Args:
        bridge: The model.
        targets: The tokens.
        rows: How many rows.
        name: The argument's name, for the error.

    Raises:
        InvalidArgumentError: Not one token for each row, or ids outside the vocabulary.
        InputError: A text that is not one token.
    """
    with argument(name):
        match targets:
            case str():
                ids = [bridge.to_single_token(targets)]
            case list() | tuple() if any(isinstance(target, str) for target in targets):
                ids = [
                    bridge.to_single_token(target) if isinstance(target, str) else whole_numbers(name, target)[0]
                    for target in targets
                ]
            case Tensor() | np.ndarray():
                ids = whole_numbers(name, targets.reshape(-1))
            case _:
                ids = whole_numbers(name, targets)
    if len(ids) not in (1, rows) or not all(0 <= token < bridge.cfg.d_vocab for token in ids):
        raise InvalidArgumentError(
            f"{name} are one token for each row",
            expected=f"{rows} tokens, ids from 0 to {bridge.cfg.d_vocab - 1}",
            got=f"{len(ids)}: {ids}",
        )
    return torch.tensor(ids, device=bridge.device).expand(rows)


@no_grad
def gathered(
    bridge: TransformerBridge,
    input: Input,
    names: Sequence[str],
    *,
    positions: Positions,
    mask: Int[Tensor, "row pos"] | None = None,
    batch_size: int,
    tell: Progress = silent,
) -> Activations:
    """Returns values at `names`, at chosen positions of each row. Blocks after the last point are not run.

    Args:
        bridge: The model.
        input: Any input.
        names: Full names of points with the axes `[batch, pos, ...]`.
        positions: Which: None for all; see `Batch.positions`.
        mask: 1 for real tokens, where bare token ids have padding.
        batch_size: Rows run at a time.
        tell: Is told how far it is.

    Raises:
        InvalidArgumentError: A position that a row does not have, or integers, which are no activations.
        NotFiniteError: A value is infinite or not a number.
    """
    check_counts(batch_size=batch_size)
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    places: list[Place] = []
    batch = bridge.to_batch(input, mask)
    by_row = batch.positions(positions)
    for numbers in told(tell, "activations", torch.arange(batch.rows).split(batch_size)):
        part = batch.select(numbers)
        rows, columns, found = part.places([by_row[row] for row in numbers.tolist()])
        _, cache = bridge.run_with_cache(part, list(names), return_type=None, stop_at_layer=stop_after(names))
        for name in names:
            kept[name].append(_checked(name, cache[name][rows, columns]).cpu())
        places += [(row + int(numbers[0]), position) for row, position in found]
    return Activations({name: torch.cat(parts) for name, parts in kept.items()}, tuple(places), _real_ids(batch))


def _real_ids(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Returns the real tokens of each row; empty rows for embeddings."""
    if batch.tokens is None:
        return ((),) * batch.rows
    return tuple(tuple(row[list(real)].tolist()) for row, real in zip(batch.ids.cpu(), batch.real_columns, strict=True))


def _checked(name: str, value: Tensor) -> Float[Tensor, "place *axes"]:
    """Returns a value in float32 at least."""
    if not value.is_floating_point():
        raise InvalidArgumentError(f"{name} is no activation", expected="floating point", got=str(value.dtype))
    if not value.isfinite().all():
        raise NotFiniteError(
            f"the values at {name} are not finite",
            got=str(value.dtype),
            fix="clearspan.boot(model, dtype=torch.float32), if they overflow",
        )
    return value.to(torch.promote_types(value.dtype, torch.float32))
