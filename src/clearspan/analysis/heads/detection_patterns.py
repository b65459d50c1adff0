"""Attention patterns that heads are known by, built from a text's own tokens as matrices of zeros and ones."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.errors import InvalidArgumentError
from clearspan.points import nearest

PatternName = Literal["previous_token", "duplicate_token", "induction"]
PatternFunction = Callable[[Int[Tensor, "pos"]], Float[Tensor, "q_pos k_pos"]]
"""From the token ids of one text, without padding, to what each position should attend to."""
DetectionPattern = PatternName | Float[Tensor, "q_pos k_pos"] | PatternFunction
ErrorMeasure = Literal["mul", "abs"]
Row = tuple[Int[Tensor, "real"], Float[Tensor, "q_pos k_pos"]]
"""Where a row's real tokens are, and the pattern that heads are compared with there."""


def previous_token_pattern(tokens: Int[Tensor, "pos"]) -> Float[Tensor, "q_pos k_pos"]:
    """Returns 1 where the key is the token just before the query.

    Example:
        >>> previous_token_pattern(torch.tensor([5, 6, 7]))
        tensor([[0., 0., 0.],
                [1., 0., 0.],
                [0., 1., 0.]])
    """
    return torch.eye(len(tokens)).roll(-1, dims=1).tril(-1)


def duplicate_token_pattern(tokens: Int[Tensor, "pos"]) -> Float[Tensor, "q_pos k_pos"]:
    """Returns 1 where the key is an earlier occurrence of the query's token.

    Example:
        >>> duplicate_token_pattern(torch.tensor([5, 6, 5]))
        tensor([[0., 0., 0.],
                [0., 0., 0.],
                [1., 0., 0.]])
    """
    return (tokens[:, None] == tokens).float().tril(-1)


def induction_pattern(tokens: Int[Tensor, "pos"]) -> Float[Tensor, "q_pos k_pos"]:
    """Returns 1 where the key is the token after an earlier occurrence of the query's token.

    Where a token stands twice in a row, the token after its earlier occurrence is the query itself, and counts.

    Example:
        >>> induction_pattern(torch.tensor([5, 6, 5]))
        tensor([[0., 0., 0.],
                [0., 0., 0.],
                [0., 1., 0.]])
    """
    before = duplicate_token_pattern(tokens)
    return torch.cat([torch.zeros(len(tokens), 1), before[:, :-1]], dim=1)


PATTERNS: Mapping[PatternName, PatternFunction] = {
    "previous_token": previous_token_pattern,
    "duplicate_token": duplicate_token_pattern,
    "induction": induction_pattern,
}
"""Patterns by name."""


def rows_of(
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
    pattern: DetectionPattern,
    measure: ErrorMeasure,
    least: int,
) -> list[Row]:
    """Returns where each row's real tokens are, and its pattern.

    Raises:
        InvalidArgumentError: A row has less than `least` real tokens, or the pattern does not fit it.
    """
    masks = torch.ones_like(tokens) if mask is None else mask.cpu()
    rows = []
    for number, (row, present) in enumerate(zip(tokens, masks.bool(), strict=True)):
        real = present.nonzero()[:, 0]
        if len(real) < least:
            raise InvalidArgumentError(
                f"row {number} is too short to be scored", expected=f"{least} tokens or more", got=str(len(real))
            )
        expected = _pattern_of(row[real], pattern).detach().float().cpu()
        _check_pattern(expected, len(real), measure)
        rows.append((real, expected))
    return rows


def _pattern_of(tokens: Int[Tensor, "pos"], pattern: DetectionPattern) -> Float[Tensor, "q_pos k_pos"]:
    match pattern:
        case Tensor():
            return pattern
        case str() if pattern in PATTERNS:
            return PATTERNS[pattern](tokens)
        case _ if callable(pattern):
            return pattern(tokens)
    raise InvalidArgumentError(
        f"unknown pattern {pattern!r}",
        expected=f"one of {', '.join(PATTERNS)}, a matrix [q_pos, k_pos], or a function of the tokens [pos]",
        nearest=nearest(pattern, PATTERNS) if isinstance(pattern, str) else (),
    )


def _check_pattern(expected: Tensor, length: int, measure: ErrorMeasure) -> None:
    if expected.shape != (length, length):
        raise InvalidArgumentError(
            "the pattern does not fit the text",
            expected=f"[q_pos={length}, k_pos={length}], the row's real tokens",
            got=str(list(expected.shape)),
            fix="a function of the tokens, for rows of different lengths",
        )
    if expected.triu(1).any():
        raise InvalidArgumentError(
            "the pattern looks ahead", expected="a lower-triangular matrix", fix="pattern.tril()"
        )
    if measure == "mul" and not torch.isin(expected, torch.tensor([0.0, 1.0])).all():
        raise InvalidArgumentError(
            "error_measure='mul' is the share of attention on a pattern",
            expected="0 and 1 alone",
            got=f"values from {expected.min().item():.3g} to {expected.max().item():.3g}",
            fix="error_measure='abs'",
        )
