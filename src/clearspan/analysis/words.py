"""Tokens as words: how the tokens of a finding are written."""

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.model import Model
from clearspan.plots import id_label


class Words(dict[int, str]):
    """Texts of tokens, with white space visible; a token without one is written as its id.

    Example:
        >>> words = Words({7: "self"})
        >>> words[7], words[8]
        ('self', '#8')
    """

    def __missing__(self, token: int) -> str:
        return id_label(token)


def words_of(bridge: Model, *ids: Int[Tensor, "..."]) -> Words:
    """Returns how each token is written."""
    unique = torch.cat([part.flatten().cpu() for part in ids]).unique().tolist()
    return Words({token: bridge.text.label(token) for token in unique})
