"""Values at hook points, gathered over many texts at chosen positions, a batch at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._run.runs import run_with_cache
from clearspan.analysis.corpus import check_positive
from clearspan.analysis.reporting.predictions import NotFiniteError
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Input, Place, Positions
from clearspan.model import Model
from clearspan.points import Address, get_act_name

Layers = int | Sequence[int] | None
"""One layer, several, or all (None); negative from the end."""


@dataclass(frozen=True, eq=False)
class Activations:
    """Values at chosen places of many texts, in float32 at least, on the CPU.

    Attributes:
        values: By point: its value at each place.
        places: Rows of the input, and positions among their real tokens.
        texts: The real tokens of each row.
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


def points_of(bridge: Model, name: str, layers: Layers) -> tuple[str, ...]:
    """Returns the full names of a point in each layer, or the one name where it is full already.

    Raises:
        UnknownPointError: There is no such point, or no such layer.
        InvalidArgumentError: A full name and layers too, no layer, or a point that is not a value at each position.

    Example:
        >>> import clearspan
        >>> points_of(clearspan.boot("tiny-bigcode"), "resid_post", [0, -1])
        ('blocks.0.hook_resid_post', 'blocks.4.hook_resid_post')
    """
    is_full = "." in name or name.startswith("hook_")
    if is_full or Address.parse(get_act_name(name, 0)).layer is None:
        if layers is not None:
            raise InvalidArgumentError(f"{name!r} is one point, in one place", expected="layers=None", got=str(layers))
        names = [name if is_full else get_act_name(name)]
    else:
        every = range(bridge.cfg.n_layers)
        wanted = every if layers is None else [layers] if isinstance(layers, int) else layers
        places = dict.fromkeys(layer + len(every) if -len(every) <= layer < 0 else layer for layer in wanted)
        names = [get_act_name(name, layer) for layer in places]
    if not names:
        raise InvalidArgumentError("there is no layer to read", expected="layers=None for all", got="none")
    for each in names:
        axes = bridge.hook_dict[each].axes
        if axes[:2] != ("batch", "pos"):
            raise InvalidArgumentError(
                f"{each} is not a value at each position", expected="[batch, pos, ...]", got=f"[{', '.join(axes)}]"
            )
    return tuple(names)


def layers_of(names: Sequence[str]) -> list[int]:
    """Returns the layer of each point; none at all if one of them is in no block.

    Example:
        >>> layers_of(["blocks.2.hook_resid_post"]), layers_of(["blocks.2.hook_resid_post", "hook_embed"])
        ([2], [])
    """
    found = [Address.parse(name).layer for name in names]
    return [] if None in found else [layer for layer in found if layer is not None]


@torch.no_grad()
def gathered(
    bridge: Model,
    input: Input,
    names: Sequence[str],
    *,
    positions: Positions,
    mask: Int[Tensor, "batch pos"] | None,
    batch_size: int,
) -> Activations:
    """Returns values at `names`, at chosen positions of each row. Blocks after the last point are not run.

    Args:
        bridge: The model.
        input: Text, a list of texts, or token ids `[batch, pos]`.
        names: Full names of points with the axes `[batch, pos, ...]`.
        positions: Counted among each row's real tokens, negative from the end.
        mask: 1 for real tokens, where token ids have padding.
        batch_size: Rows run at a time.

    Raises:
        InvalidArgumentError: No row, a position that a row does not have, or integers, which are no activations.
        NotFiniteError: A value is infinite or not a number.
    """
    check_positive(batch_size=batch_size)
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    places: list[Place] = []
    texts: list[tuple[int, ...]] = []
    for batch in bridge.to_batch(input, mask).split(batch_size):
        rows, columns, found = batch.places(positions)
        _, cache = run_with_cache(bridge, batch, list(names), return_type=None, stop_at_layer=_stop(names))
        for name in names:
            kept[name].append(_checked(name, cache[name][rows, columns]).cpu())
        places += [(row + len(texts), position) for row, position in found]
        texts += [tuple(own[list(real)].tolist()) for own, real in zip(batch.ids, batch.real_columns, strict=True)]
    return Activations({name: torch.cat(parts) for name, parts in kept.items()}, tuple(places), tuple(texts))


def _stop(names: Sequence[str]) -> int | None:
    """Returns the block before which a run can stop; None for its end."""
    layers = layers_of(names)
    return max(layers) + 1 if layers else None


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
