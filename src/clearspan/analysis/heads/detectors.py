"""Which heads attend as a known kind of head does: their patterns on a text against a pattern made from its tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.places import Input, encoded
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.points import HookFunction
from clearspan.results import Columns, Result

from .detection_patterns import DetectionPattern, ErrorMeasure, rows_of
from .heads import Head, head_heatmap, strongest

if TYPE_CHECKING:
    import plotly.graph_objects as go

Heads = Sequence[tuple[int, int]] | Mapping[int, Sequence[int]]
"""Heads as pairs of layer and head, or as lists of heads by layer."""


@dataclass(frozen=True, eq=False, repr=False)
class DetectedHeads(Result):
    """How well each head's attention fits a pattern, mean over texts, on the CPU.

    Attributes:
        scores: By layer and head; NaN for heads that were not asked for.
        pattern: The pattern's name, or `custom`.
        error_measure: What the scores are: `mul`, the share of attention that is on the pattern, from 0 to 1; `abs`,
            1 minus the absolute difference, from -1 to 1.
        rows: Texts averaged over.
    """

    scores: Float[Tensor, "layer head"]
    pattern: str
    error_measure: ErrorMeasure
    rows: int

    @property
    def title(self) -> str:
        """What the scores are."""
        meaning = {"mul": "share of attention on the pattern", "abs": "1 - |attention - pattern|"}[self.error_measure]
        return f"{self.pattern.replace('_', ' ')} heads: {meaning}, mean over {self.rows} row{'s' * (self.rows > 1)}"

    def strongest(self, k: int = 5) -> list[Head]:
        """Returns the `k` heads with the highest score, highest first."""
        found = strongest(self.scores.nan_to_num(-torch.inf), k)
        return [head for head in found if head.score > -torch.inf]

    def columns(self) -> Columns:
        """Returns one row for each head that was asked for, the highest score first."""
        heads = self.strongest(self.scores.numel())
        return {
            "layer": [head.layer for head in heads],
            "head": [head.head for head in heads],
            "score": [head.score for head in heads],
        }

    def plot(self) -> "go.Figure":
        """Returns a heat map: layers down, heads from left to right."""
        is_share = self.error_measure == "mul"
        return head_heatmap(self.scores, name="score", title=self.title, sequential=is_share, bound=1.0)


@torch.no_grad()
def detect_heads(
    bridge: TransformerBridge,
    input: Input,
    pattern: DetectionPattern,
    *,
    heads: Heads | None = None,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: ErrorMeasure = "mul",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> DetectedHeads:
    r"""Returns how well each head's attention on a text fits a pattern.

    With attention `A` and pattern `D`, both `[q_pos, k_pos]` over a text's real tokens:

    - `"mul"`: `(A * D).sum() / A.sum()`, the share of attention that is on the pattern. `D` is 0 or 1.
    - `"abs"`: `1 - |A - D|.sum() / pos`. A head that fits exactly has 1.

    What is excluded is left out of both sums. Each row is scored on its own, then the rows are averaged. Padding is
    neither attended from nor to. Layers after the last one asked for are not run.

    Args:
        bridge: The model.
        input: Text, a list of texts, or token ids `[batch, pos]`.
        pattern: `"previous_token"`, `"duplicate_token"` or `"induction"`; a lower-triangular matrix, for rows that are
            all as long as it; or a function from the token ids `[pos]` of one row (on the CPU, without padding) to one.
        heads: Which; by default all. The others' scores are NaN.
        exclude_bos: Whether attention to the first real token, BOS or not, is left out: heads that have nothing to do
            attend there.
        exclude_current_token: Whether attention of a token to itself is left out.
        error_measure: `"mul"` or `"abs"`.
        attention_mask: Where a token tensor is padded: 1 for real tokens. Texts make their own.

    Returns:
        Scores by layer and head. Where all of a head's attention is excluded, `"mul"` gives 0.

    Raises:
        InvalidArgumentError: An unknown pattern, measure or head; a row too short to be scored; a matrix of the wrong
            size, not lower triangular, or, with `"mul"`, of other values than 0 and 1.
        NoTokenizerError: Text, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> found = detect_heads(bridge, "def f(self):\n    return self", "previous_token")
        >>> found.strongest(1)[0].layer
        3

    References:
        TransformerLens, `head_detector.detect_head`, whose patterns and measures these are. There `"abs"` is rounded to
        three digits, heads that were not asked for have -1, and `"mul"` only warns of other values than 0 and 1.
        Olsson et al. (2022), arXiv:2209.11895, for induction heads; Wang et al. (2022), arXiv:2211.00593, for
        duplicate-token heads.
    """
    if error_measure not in get_args(ErrorMeasure):
        raise InvalidArgumentError(f"unknown error_measure {error_measure!r}", expected="'mul' or 'abs'")
    chosen = _heads_by_layer(bridge, heads)
    tokens, mask = encoded(bridge, input, attention_mask)
    # Of the first token and itself, which a second token can attend to, something must be left.
    least = 2 + (exclude_bos and exclude_current_token)
    rows = rows_of(tokens.cpu(), mask, pattern, error_measure, least)
    scores = torch.full((bridge.cfg.n_layers, bridge.cfg.n_heads), torch.nan)

    def scorer(layer: int) -> HookFunction:
        def score(attention: Tensor, hook: object) -> None:  # noqa: ARG001
            each = []
            for row, (real, expected) in zip(attention, rows, strict=True):
                seen = row[chosen[layer]][:, real[:, None], real].double()
                kept = _kept(len(real), exclude_bos, exclude_current_token).to(seen.device)
                each.append(_score(seen * kept, expected.to(seen) * kept, error_measure))
            scores[layer, chosen[layer]] = torch.stack(each).mean(0).float().cpu()

        return score

    hooks = [(f"blocks.{layer}.attn.hook_pattern", scorer(layer)) for layer in chosen]
    bridge.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=max(chosen) + 1, attention_mask=mask)
    return DetectedHeads(scores, pattern if isinstance(pattern, str) else "custom", error_measure, len(rows))


def _score(
    seen: Float[Tensor, "head q_pos k_pos"], expected: Float[Tensor, "q_pos k_pos"], measure: ErrorMeasure
) -> Float[Tensor, "head"]:
    if measure == "abs":
        return 1 - (seen - expected).abs().sum((-2, -1)) / len(expected)
    total = seen.sum((-2, -1))
    return (seen * expected).sum((-2, -1)) / total.where(total > 0, 1.0)


def _kept(length: int, exclude_bos: bool, exclude_current_token: bool) -> Float[Tensor, "q_pos k_pos"]:
    """Returns 1 where attention counts."""
    kept = torch.ones(length, length)
    if exclude_bos:
        kept[:, 0] = 0
    if exclude_current_token:
        kept.fill_diagonal_(0)
    return kept


def _heads_by_layer(bridge: TransformerBridge, heads: Heads | None) -> dict[int, list[int]]:
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    pairs: Iterable[tuple[int, int]]
    match heads:
        case None:
            return {layer: list(range(n_heads)) for layer in range(n_layers)}
        case Mapping():
            pairs = [(layer, head) for layer, each in heads.items() for head in each]
        case _:
            pairs = heads
    chosen: dict[int, list[int]] = {}
    for layer, head in pairs:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise InvalidArgumentError(
                f"there is no head L{layer}H{head}", expected=f"layers 0 to {n_layers - 1}, heads 0 to {n_heads - 1}"
            )
        chosen.setdefault(layer, []).append(head)
    if not chosen:
        raise InvalidArgumentError("there is no head to score", expected="heads=None for all", got="none")
    return chosen
