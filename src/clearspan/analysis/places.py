"""Which rows, positions, depths and targets of an input a reading is about."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError

Input = str | Sequence[str] | Int[Tensor, "batch pos"]
Place = tuple[int, int]
"""A row of the input, and a position among its real tokens."""


def encoded(
    bridge: TransformerBridge, input: Input, mask: Int[Tensor, "batch pos"] | None
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
    """Returns token ids and the mask of padded ones; a mask that is given goes before that of padded texts."""
    own = None
    if isinstance(input, Tensor):
        tokens = torch.atleast_2d(input)
    else:
        tokens, own = bridge.text.encode(input)
    mask = own if mask is None else mask
    return tokens.to(bridge.device), None if mask is None else mask.to(bridge.device)


def padding_of(mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"] | None:
    """Returns the mask where something is padded, otherwise None, so that the model runs as it does without one."""
    return None if bool(mask.all()) else mask


def places_of(
    mask: Int[Tensor, "batch pos"], positions: int | Sequence[int] | None
) -> tuple[Int[Tensor, "place"], Int[Tensor, "place"], tuple[Place, ...]]:
    """Returns the rows and columns of chosen real tokens, and their places as they are counted."""
    chosen = [positions] if isinstance(positions, int) else positions
    if chosen is not None and not len(chosen):
        raise InvalidArgumentError("there is no position to read", expected="positions=None for all", got="none")
    rows, columns, places = [], [], []
    for row, real in enumerate(mask.cpu()):
        at = real.nonzero()[:, 0].tolist()
        for position in range(len(at)) if chosen is None else chosen:
            if not -len(at) <= position < len(at):
                raise InvalidArgumentError(
                    f"row {row} has no position {position}", expected=f"-{len(at)} to {len(at) - 1}", got=str(position)
                )
            rows.append(row)
            columns.append(at[position])
            places.append((row, position % len(at)))
    device = mask.device
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device), tuple(places)


def depths_of(n_layers: int, depths: Sequence[int] | None) -> list[int]:
    """Returns depths counted from 0."""
    wanted = range(n_layers + 1) if depths is None else depths
    if not len(wanted):
        raise InvalidArgumentError("there is no depth to read", expected="depths=None for all", got="none")
    for depth in wanted:
        if not -n_layers - 1 <= depth <= n_layers:
            raise InvalidArgumentError(
                f"there is no depth {depth}",
                expected=f"0 (the embedding) to {n_layers}, or -{n_layers + 1} to -1",
                got=str(depth),
            )
    return [depth % (n_layers + 1) for depth in wanted]


def target_ids_of(
    bridge: TransformerBridge, targets: Sequence[str] | Int[Tensor, "batch"], rows: int
) -> Int[Tensor, "batch"]:
    """Returns one token id for each row."""
    match targets:
        case Tensor():
            ids = targets.reshape(-1).long()
        case str():
            ids = torch.tensor([bridge.to_single_token(targets)])
        case _:
            ids = torch.tensor([bridge.to_single_token(target) for target in targets])
    outside = ids.numel() > 0 and not 0 <= int(ids.min()) <= int(ids.max()) < bridge.cfg.d_vocab
    if len(ids) != rows or outside:
        raise InvalidArgumentError(
            "targets are one token for each row",
            expected=f"{rows} tokens, ids from 0 to {bridge.cfg.d_vocab - 1}",
            got=f"{len(ids)}: {ids.tolist()}",
        )
    return ids.to(bridge.device)
