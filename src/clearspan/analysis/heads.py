"""What kind of attention heads pay: their patterns against those that known kinds of heads have."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.repeats import repeated_tokens
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_flags
from clearspan.effects import Effects
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Batch, Input
from clearspan.model import check_bridge, check_layers
from clearspan.modes import no_grad
from clearspan.points import HookFunction, nearest
from clearspan.results import Columns, counted

PatternName = Literal["previous_token", "duplicate_token", "induction"]
PatternFunction = Callable[[Int[Tensor, "pos"]], Float[Tensor, "q_pos k_pos"]]
"""From the token ids of one text, without padding, to what each position should attend to."""
DetectionPattern = PatternName | Float[Tensor, "q_pos k_pos"] | PatternFunction
ErrorMeasure = Literal["mul", "abs"]
Heads = Sequence[tuple[int, int]] | Mapping[int, Sequence[int]]
"""Heads as pairs of layer and head, or as lists of heads by layer; both negative from the end."""


@dataclass(frozen=True)
class Head:
    """One head and its score."""

    layer: int
    head: int
    score: float

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


def strongest(scores: Float[Tensor, "layer head"], k: int = 5) -> list[Head]:
    """Returns the `k` heads with the highest score, highest first; heads whose score is NaN are left out.

    Raises:
        InvalidArgumentError: `scores` has other axes, or `k` is no count.

    Example:
        >>> [str(head) for head in strongest(torch.tensor([[0.1, 0.9], [0.4, 0.2]]), k=2)]
        ['L0H1', 'L1H0']
    """
    check_counts(0, k=k)
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        shape = str(list(scores.shape)) if isinstance(scores, Tensor) else type(scores).__name__
        raise InvalidArgumentError("scores are one for each head", expected="a tensor [layer, head]", got=shape)
    flat = scores.detach().flatten()
    order = flat.nan_to_num(-torch.inf).sort(descending=True, stable=True).indices
    best = order[~flat[order].isnan()][:k].tolist()
    n_heads = scores.shape[1]
    return [Head(place // n_heads, place % n_heads, flat[place].item()) for place in best]


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Effects):
    """Two scores of every head on each text, `induction` and `previous_token`, in attention from 0 to 1, on the CPU."""

    @property
    def induction(self) -> Float[Tensor, "layer head"]:
        """Attention to the token after the first occurrence of the present one, mean over texts."""
        return self.mean("induction")

    @property
    def previous_token(self) -> Float[Tensor, "layer head"]:
        """Attention to the token before the present one, mean over texts."""
        return self.mean("previous_token")


@no_grad
def head_scores(
    bridge: TransformerBridge,
    *,
    rows: int = 4,
    period: int = 50,
    seed: int = 0,
    vocabulary: Sequence[int] | Int[Tensor, "token"] | None = None,
) -> HeadScores:
    """Returns each head's induction and previous-token score.

    The text is BOS (where the tokenizer has one), then a block of `period` random tokens, twice. There nothing but
    the repetition can be predicted.

    - Induction: mean attention from a token of the second block to the token *after* its first occurrence.
    - Previous token: mean attention from each token of the two blocks to the one before it.

    Args:
        bridge: The model.
        rows: Random texts.
        period: Length of a block; half of the context where that is less.
        seed: Of the random tokens.
        vocabulary: Token ids to draw from, uniformly; by default all but special ones.

    Returns:
        Scores by layer, head and text, in attention from 0 to 1; NaN in layers without attention.

    Raises:
        MissingPartError: No layer has attention.
        InvalidArgumentError: No rows, a period of less than two tokens, or an unusable vocabulary.

    Example:
        >>> import clearspan
        >>> scores = head_scores(clearspan.boot("tiny-bigcode"))
        >>> strongest(scores.induction, k=1)[0].layer
        4

    References:
        Olsson et al. (2022), "In-context Learning and Induction Heads", arXiv:2209.11895: prefix matching, section
        "Model analysis table". There the repeated block is 25 tokens long and stands four times.
    """
    text = repeated_tokens(bridge, rows=rows, period=period, seed=seed, vocabulary=vocabulary)
    check_layers(bridge, "attn", [])
    names = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in bridge.layers_with("attn")}
    _, cache = bridge.run_with_cache(text.tokens, list(names.values()), return_type=None)
    induction = torch.full((bridge.cfg.n_layers, bridge.cfg.n_heads, text.tokens.shape[0]), torch.nan)
    previous = induction.clone()
    for layer, name in names.items():
        pattern = cache[name].float()
        # The diagonal at offset k - q: `period - 1` tokens back for induction, one for the previous token.
        after_first = pattern.diagonal(1 - text.period, dim1=-2, dim2=-1)[..., -text.period :]
        before = pattern.diagonal(-1, dim1=-2, dim2=-1)[..., max(text.start - 1, 0) :]
        induction[layer], previous[layer] = after_first.mean(-1).T.cpu(), before.mean(-1).T.cpu()
    return HeadScores(
        {"induction": induction, "previous_token": previous},
        _axes(bridge),
        what="each head, in attention from 0 to 1",
        span=(0, 1),
        row="text",
    )


def _axes(bridge: TransformerBridge) -> dict[str, tuple[int, ...]]:
    return {"layer": tuple(range(bridge.cfg.n_layers)), "head": tuple(range(bridge.cfg.n_heads))}


def previous_token_pattern(tokens: Int[Tensor, "pos"]) -> Float[Tensor, "q_pos k_pos"]:
    """Returns 1 where the key is the token just before the query.

    Example:
        >>> previous_token_pattern(torch.tensor([5, 6, 7]))
        tensor([[0., 0., 0.],
                [1., 0., 0.],
                [0., 1., 0.]])
    """
    return torch.eye(len(_one_text(tokens))).roll(-1, dims=1).tril(-1)


def duplicate_token_pattern(tokens: Int[Tensor, "pos"]) -> Float[Tensor, "q_pos k_pos"]:
    """Returns 1 where the key is an earlier occurrence of the query's token.

    Example:
        >>> duplicate_token_pattern(torch.tensor([5, 6, 5]))
        tensor([[0., 0., 0.],
                [0., 0., 0.],
                [1., 0., 0.]])
    """
    own = _one_text(tokens)
    return (own[:, None] == own).float().tril(-1)


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
    return torch.cat([before.new_zeros(len(before), 1), before[:, :-1]], dim=1)


def _one_text(tokens: Int[Tensor, "pos"] | Sequence[int]) -> Int[Tensor, "pos"]:
    try:
        own = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        own = torch.empty(0, 0)
    if own.ndim != 1:
        raise InvalidArgumentError("a pattern is made from tokens of one text", expected="ids [pos]", got=repr(tokens))
    return own


PATTERNS: Mapping[PatternName, PatternFunction] = {
    "previous_token": previous_token_pattern,
    "duplicate_token": duplicate_token_pattern,
    "induction": induction_pattern,
}
"""Patterns by name."""


@dataclass(frozen=True, eq=False, repr=False)
class DetectedHeads(Effects):
    """How well each head's attention fits a pattern on each text, on the CPU; NaN for heads that were not asked for.

    Attributes:
        pattern: The pattern's name, or `custom`.
        error_measure: What the scores are: `mul`, the share of attention that is on the pattern, from 0 to 1; `abs`,
            1 minus the absolute difference, from -1 to 1.
    """

    pattern: str = "custom"
    error_measure: ErrorMeasure = "mul"

    @property
    def scores(self) -> Float[Tensor, "layer head"]:
        """Mean over texts."""
        return self.mean()

    @property
    def title(self) -> str:
        """What the scores are."""
        meaning = {"mul": "share of attention on the pattern", "abs": "1 - |attention - pattern|"}[self.error_measure]
        rows = counted(self.of().shape[-1], self.row)
        return f"{self.pattern.replace('_', ' ')} heads: {meaning}, mean over {rows}"

    def strongest(self, k: int = 5) -> list[Head]:
        """Returns the `k` heads with the highest score, highest first."""
        return strongest(self.scores, k)

    def columns(self) -> Columns:
        """Returns one row for each head that was asked for, the highest score first."""
        table = super().columns()
        scores = dict(enumerate(cast("Sequence[float]", table["score"])))
        order = sorted((i for i, score in scores.items() if score == score), key=lambda i: -scores[i])
        return {name: [column[i] for i in order] for name, column in table.items()}

    @property
    def rank(self) -> None:
        """None: the table is in order."""


@no_grad
def detect_heads(
    bridge: TransformerBridge,
    input: Input,
    pattern: DetectionPattern,
    *,
    heads: Heads | None = None,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: ErrorMeasure = "mul",
    attention_mask: Int[Tensor, "row pos"] | None = None,
) -> DetectedHeads:
    r"""Returns how well each head's attention on a text fits a pattern.

    With attention `A` and pattern `D`, both `[q_pos, k_pos]` over a text's real tokens:

    - `"mul"`: `(A * D).sum() / A.sum()`, the share of attention that is on the pattern. `D` is 0 or 1.
    - `"abs"`: `1 - |A - D|.sum() / pos`. A head that fits exactly has 1.

    Both sums leave out what is excluded, and padding. Each row is scored on its own. Layers after the last one
    asked for are not run.

    Args:
        bridge: The model.
        input: Any input: text, texts, token ids, a tokenizer's output, a `Batch`, ...
        pattern: `"previous_token"`, `"duplicate_token"` or `"induction"`; a lower-triangular matrix, for rows that are
            all as long as it; or a function from the token ids `[pos]` of one row (on the CPU, without padding) to one.
        heads: Which; by default all. The others' scores are NaN.
        exclude_bos: Whether attention to the first real token, BOS or not, is left out: heads that have nothing to do
            attend there.
        exclude_current_token: Whether attention of a token to itself is left out.
        error_measure: `"mul"` or `"abs"`.
        attention_mask: 1 for real tokens, where bare token ids have padding.

    Returns:
        Scores by layer, head and row. Where all of a head's attention is excluded, `"mul"` gives 0.

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
    check_bridge(bridge)
    check_flags(exclude_bos=exclude_bos, exclude_current_token=exclude_current_token)
    if error_measure not in get_args(ErrorMeasure):
        raise InvalidArgumentError(f"unknown error_measure {error_measure!r}", expected="'mul' or 'abs'")
    chosen = _heads_by_layer(bridge, heads)
    batch = bridge.to_batch(input, attention_mask)
    # A second token can attend to the first token and to itself. One of the two must be left.
    least = 2 + (exclude_bos and exclude_current_token)
    wanted, counting = [], []
    for row, length in enumerate(batch.lengths.tolist()):
        if length < least:
            raise InvalidArgumentError(
                f"row {row} is too short to be scored", expected=f"{least} tokens or more", got=str(length)
            )
        kept = torch.ones(length, length)
        kept[:, :1] = 0 if exclude_bos else 1
        counting.append(kept.fill_diagonal_(0) if exclude_current_token else kept)
        wanted.append(_checked(_pattern_of(batch, row, pattern), length, error_measure) * counting[-1])
    scores = torch.full((bridge.cfg.n_layers, bridge.cfg.n_heads, batch.rows), torch.nan)

    def scorer(layer: int) -> HookFunction:
        def score(attention: Tensor, hook: object) -> None:  # noqa: ARG001
            each = []
            for row, real, expected, kept in zip(attention, batch.real_columns, wanted, counting, strict=True):
                columns = torch.tensor(real, device=row.device)
                seen = row[chosen[layer]][:, columns[:, None], columns].double() * kept.to(row.device)
                each.append(_score(seen, expected.to(seen), error_measure))
            scores[layer, chosen[layer]] = torch.stack(each, dim=1).float().cpu()

        return score

    hooks = [(f"blocks.{layer}.attn.hook_pattern", scorer(layer)) for layer in chosen]
    bridge.run_with_hooks(batch, fwd_hooks=hooks, stop_at_layer=max(chosen) + 1, return_type=None)
    name = pattern if isinstance(pattern, str) else "custom"
    span = (0, 1) if error_measure == "mul" else (-1, 1)
    return DetectedHeads({"score": scores}, _axes(bridge), span=span, pattern=name, error_measure=error_measure)


def _score(
    seen: Float[Tensor, "head q_pos k_pos"], expected: Float[Tensor, "q_pos k_pos"], measure: ErrorMeasure
) -> Float[Tensor, "head"]:
    if measure == "abs":
        return 1 - (seen - expected).abs().sum((-2, -1)) / len(expected)
    total = seen.sum((-2, -1))
    return (seen * expected).sum((-2, -1)) / total.where(total > 0, 1.0)


def _pattern_of(batch: Batch, row: int, pattern: DetectionPattern) -> object:
    """Returns what the heads are compared with in one row."""
    if isinstance(pattern, Tensor):
        return pattern
    is_name = isinstance(pattern, str)
    if not callable(pattern) and not (is_name and pattern in PATTERNS):
        raise InvalidArgumentError(
            f"unknown pattern {pattern!r}",
            expected=f"one of {', '.join(PATTERNS)}, a matrix [q_pos, k_pos], or a function of the tokens [pos]",
            nearest=nearest(pattern, PATTERNS) if is_name else (),
        )
    make = pattern if callable(pattern) else PATTERNS[pattern]
    return make(batch.ids[row, list(batch.real_columns[row])].cpu())


def _checked(expected: object, length: int, measure: ErrorMeasure) -> Float[Tensor, "q_pos k_pos"]:
    if not isinstance(expected, Tensor) or expected.shape != (length, length):
        raise InvalidArgumentError(
            "the pattern does not fit the text",
            expected=f"[q_pos={length}, k_pos={length}], the row's real tokens",
            got=str(list(expected.shape)) if isinstance(expected, Tensor) else type(expected).__name__,
            fix="a function of the tokens, for rows of different lengths",
        )
    found = expected.detach().float().cpu()
    if found.triu(1).any():
        raise InvalidArgumentError(
            "the pattern looks ahead", expected="a lower-triangular matrix", fix="pattern.tril()"
        )
    if measure == "mul" and not torch.isin(found, torch.tensor([0.0, 1.0])).all():
        raise InvalidArgumentError(
            "error_measure='mul' is the share of attention on a pattern",
            expected="0 and 1 alone",
            got=f"values from {found.min().item():.3g} to {found.max().item():.3g}",
            fix="error_measure='abs'",
        )
    return found


def _heads_by_layer(bridge: TransformerBridge, heads: Heads | None) -> dict[int, list[int]]:
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    if heads is None:
        check_layers(bridge, "attn", [])
        return {layer: list(range(n_heads)) for layer in bridge.layers_with("attn")}
    chosen: dict[int, list[int]] = {}
    try:
        if isinstance(heads, Mapping):
            heads = [(layer, head) for layer, each in heads.items() for head in each]
        pairs = [(int(layer), int(head)) for layer, head in cast("Iterable[tuple[int, int]]", heads)]
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            f"heads={heads!r}", expected="pairs of layer and head, or lists of heads by layer"
        ) from None
    for layer, head in pairs:
        if not (-n_layers <= layer < n_layers and -n_heads <= head < n_heads):
            raise InvalidArgumentError(
                f"there is no head L{layer}H{head}", expected=f"layers 0 to {n_layers - 1}, heads 0 to {n_heads - 1}"
            )
        check_layers(bridge, "attn", [layer % n_layers])
        chosen.setdefault(layer % n_layers, []).append(head % n_heads)
    if not chosen:
        raise InvalidArgumentError("there is no head to score", expected="heads=None for all", got="none")
    return chosen
