"""The tokens of the traced forward."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel

ROWS, POSITIONS = 11, 7
"""Of the traced forward: primes, which are unlikely to be a model's sizes.

The more rows, the less two channels are alike by chance.
"""
MOST = 1000
"""Ids above it are not drawn."""


def tokens_for(model: "PreTrainedModel") -> Tensor:
    """Returns random token ids `[ROWS, POSITIONS]` that stand for text: none that the config gives another meaning."""
    special = set(_special(model.config.to_dict()))
    plain = torch.tensor([one for one in range(min(n_tokens(model), MOST)) if one not in special])
    drawn = torch.randint(len(plain), (ROWS, POSITIONS), generator=torch.Generator().manual_seed(0))
    return plain[drawn].to(model.device)


def n_tokens(model: "PreTrainedModel") -> int:
    """Returns how many token ids a model knows."""
    said = vars(model.config.get_text_config(decoder=True)).get("vocab_size")
    return said or model.get_input_embeddings().get_parameter("weight").shape[0]


def _special(entries: Mapping[str, object]) -> Iterator[int]:
    """Yields the token ids that a config names, its nested ones included."""
    for name, value in entries.items():
        match value:
            case Mapping():
                yield from _special(value)
            case int() if name.endswith(("token_id", "token_index")):
                yield value
            case [*ids] if name.endswith("token_id"):
                yield from (one for one in ids if isinstance(one, int))
