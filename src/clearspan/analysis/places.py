"""Which depths and targets a reading is about."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.errors import InvalidArgumentError
from clearspan.model import Model


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


def target_ids_of(bridge: Model, targets: Sequence[str] | Int[Tensor, "batch"], rows: int) -> Int[Tensor, "batch"]:
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
