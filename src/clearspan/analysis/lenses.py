"""The logit lens: what the model would predict from the residual stream at each depth, for one text or many.

Depth 0 is the embedding, depth `l + 1` the residual stream that leaves block `l`; the model itself reads the last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.activations import Targets, depths_of
from clearspan.analysis.translators import Translator, checked_lens, depth_names, kl_divergence, stream_names
from clearspan.analysis.unembedding import Unembed, vocabulary_of
from clearspan.analysis.words import Words
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Input, Place, Positions
from clearspan.model import check_bridge
from clearspan.modes import no_grad
from clearspan.plots import HeatMap, LineChart, numbered
from clearspan.results import Columns, Result, melted


@dataclass(frozen=True, eq=False, repr=False)
class LensReadings(Result):
    """What the model would predict at each depth for each place, on the CPU. All but ids and ranks in nats.

    Attributes:
        depths: A name for each depth: `embed`, or the layer whose block the stream leaves.
        places: Rows, and positions among each row's real tokens.
        top_ids: Likeliest next tokens, likeliest first.
        top_log_probs: Their log-probabilities.
        target_ids: The token asked for at each place.
        target_log_probs: Its log-probability.
        target_ranks: How many tokens are likelier than it: 0 where it is the prediction.
        kl: KL(final || depth), where final is the model's own distribution.
        entropy: Of the distribution at that depth.
        words: Texts of tokens.
    """

    depths: tuple[str, ...]
    places: tuple[Place, ...]
    top_ids: Int[Tensor, "depth place k"]
    top_log_probs: Float[Tensor, "depth place k"]
    target_ids: Int[Tensor, "place"]
    target_log_probs: Float[Tensor, "depth place"]
    target_ranks: Int[Tensor, "depth place"]
    kl: Float[Tensor, "depth place"]
    entropy: Float[Tensor, "depth place"]
    words: Words

    shown: ClassVar[int] = 15

    @property
    def title(self) -> str:
        """What the columns are."""
        return (
            "lens readings: the likeliest next token, the target's log-probability and rank, "
            "KL(final || depth) and entropy, in nats"
        )

    def columns(self) -> Columns:
        """Returns one row for each place and depth."""
        places = [place for place in self.places for _ in self.depths]
        return {
            "row": [row for row, _ in places],
            "position": [position for _, position in places],
            "depth": [*self.depths] * len(self.places),
            "predicts": [self.words[token] for token in self.top_ids[..., 0].T.flatten().tolist()],
            "target": [self.words[token] for token in self.target_ids.tolist() for _ in self.depths],
            "log prob": self.target_log_probs.T.flatten().tolist(),
            "rank": self.target_ranks.T.flatten().tolist(),
            "KL": self.kl.T.flatten().tolist(),
            "entropy": self.entropy.T.flatten().tolist(),
        }

    def chart(self) -> LineChart:
        """Returns means over places by depth, in nats: the target's surprisal, the divergence, and the entropy."""
        means = {"-log p(target)": -self.target_log_probs, "KL(final || depth)": self.kl, "entropy": self.entropy}
        series = {name: values.mean(-1).tolist() for name, values in means.items()}
        title = f"mean over {len(self.places)} places"
        return LineChart(series, self.depths, "depth", "nats", title)


@no_grad
def lens_readings(
    bridge: TransformerBridge,
    input: Input,
    *,
    positions: Positions = -1,
    targets: Targets | None = None,
    depths: int | Sequence[int] | None = None,
    top_k: int = 5,
    lens: Translator | None = None,
    unembed: Unembed | None = None,
    attention_mask: Int[Tensor, "row pos"] | None = None,
) -> LensReadings:
    r"""Returns what the model would predict from the residual stream at each depth, at chosen positions.

    `log_softmax(bridge.read_out(lens(resid)))`: the model's own final norm, unembedding, and scale or cap of the
    logits. Hooks on the bridge take part in the run that makes the streams, and not in the reading.

    Args:
        bridge: The model.
        input: Any input: text, texts, token ids, a tokenizer's output, a `Batch`, ...
        positions: One, several, or a list for each row, counted among its real tokens; negative from the last one; None
            for all.
        targets: A token as text or id: one for all rows, or one for each. By default, at each place, the token that the
            model itself finds likeliest.
        depths: Which: 0 for the embedding, `l + 1` for what leaves block `l`; negative from the end; None for all.
        top_k: How many of the likeliest tokens to keep; all where an unembedding has fewer.
        lens: A tuned or Jacobian lens, or a function `lens(resid, depth)` from streams `[place, d_model]` to streams.
        unembed: What reads the streams in place of the model's own unembedding: a matrix `[d_model, n]`, an
            `Unembedding` with labels, or another bridge. A matrix reads what the model's last norm gives; another
            bridge reads with its own norm. Targets and what is predicted are then columns or tokens of this, and
            `final` is the last depth read in the same way.
        attention_mask: 1 for real tokens, where bare token ids have padding.

    Raises:
        InvalidArgumentError: A position, depth or `top_k` that is not there, targets that are not one a row, a
            fitted lens or an unembedding of another width, or a lens that does not return a stream.
        InputError: A target that is not a single token.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> found = lens_readings(bridge, ["import os", "def f(self"], targets=["\n", ","])
        >>> found.depths, found.places
        (('embed', '0', '1', '2', '3', '4'), ((0, 2), (1, 4)))
        >>> found.kl[-1]
        tensor([0., 0.])

    References:
        nostalgebraist (2020), "interpreting GPT: the logit lens". Belrose et al. (2023), arXiv:2303.08112.
    """
    check_bridge(bridge)
    batch, n_layers = bridge.to_batch(input, attention_mask), bridge.cfg.n_layers
    rows, columns, places = batch.places(positions)
    read, names, translate = depths_of(n_layers, depths), stream_names(n_layers), checked_lens(bridge, lens)
    vocabulary = vocabulary_of(bridge, unembed)
    check_counts(top_k=top_k)
    top_k = min(top_k, vocabulary.size) if unembed is not None else top_k
    if top_k > vocabulary.size:
        raise InvalidArgumentError(f"top_k={top_k} tokens cannot be kept", expected=f"1 to {vocabulary.size}")
    target_ids = None if targets is None else vocabulary.ids(targets, batch.rows)[rows]
    kept = list({names[depth] for depth in (*read, n_layers)})
    _, cache = bridge.run_with_cache(batch, kept, return_type=None, stop_at_layer=n_layers)
    final = vocabulary.log_probs(cache[names[-1]][rows, columns])
    target_ids = final.argmax(-1) if target_ids is None else target_ids.to(final.device)
    found = []
    for depth in read:
        at_depth = vocabulary.log_probs(translate(cache[names[depth]][rows, columns], depth))
        top, target = at_depth.topk(top_k), at_depth.gather(-1, target_ids[:, None])
        ranks, entropy = (at_depth > target).sum(-1), -(at_depth.exp() * at_depth).sum(-1)
        found.append((top.indices, top.values, target[:, 0], ranks, kl_divergence(final, at_depth), entropy))
    top_ids, top_log_probs, target_log_probs, ranks, kl, entropy = (
        torch.stack(column).cpu() for column in zip(*found, strict=True)
    )
    return LensReadings(
        depths=tuple(depth_names(n_layers)[depth] for depth in read),
        places=places,
        top_ids=top_ids,
        top_log_probs=top_log_probs,
        target_ids=target_ids.cpu(),
        target_log_probs=target_log_probs,
        target_ranks=ranks,
        kl=kl,
        entropy=entropy,
        words=vocabulary.words(top_ids, target_ids),
    )


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Result):
    """Predictions read from the residual stream of one text at every depth, on the CPU.

    Row 0 is the embedding, row `l + 1` the stream that leaves block `l`; the last row is the model's own prediction.
    Printed, it shows the last positions.

    Attributes:
        top_ids: Likeliest next token at that depth.
        top_probs: Its probability.
        final_ids: The model's own likeliest next token, the last row of `top_ids`.
        final_probs: The probability that each depth gives to `final_ids`.
        final_ranks: How many tokens are likelier than `final_ids` at each depth: 0 where it agrees.
        tokens: The text's own token ids, where they are known.
        words: Texts of what is read.
        texts: How the text's own tokens are written.
    """

    top_ids: Int[Tensor, "depth pos"]
    top_probs: Float[Tensor, "depth pos"]
    final_ids: Int[Tensor, "pos"]
    final_probs: Float[Tensor, "depth pos"]
    final_ranks: Int[Tensor, "depth pos"]
    tokens: tuple[int, ...] = ()
    words: Words = field(default_factory=Words)
    texts: tuple[str, ...] = ()

    ranked_by: ClassVar[str | None] = "position"

    @property
    def title(self) -> str:
        """What the rows are."""
        return "logit lens: likeliest next token by depth, its probability, and the rank of the model's own"

    @property
    def depths(self) -> tuple[str, ...]:
        """A name for each row: `embed`, then the layer whose block the stream leaves."""
        return depth_names(len(self.top_ids) - 1)

    @property
    def settled(self) -> Int[Tensor, "pos"]:
        """The depth from which on the likeliest token is the model's own, at each position."""
        agreeing = (self.final_ranks == 0).flip(0).long().cumprod(0).sum(0)
        return len(self.final_ranks) - agreeing

    def columns(self) -> Columns:
        """Returns one row for each position and depth."""
        places = melted(self.top_ids.T, "id", position=range(self.top_ids.shape[1]), depth=self.depths)
        return {
            **places,
            "predicts": [self.words[token] for token in self.top_ids.T.flatten().tolist()],
            "probability": self.top_probs.T.flatten().tolist(),
            "final rank": self.final_ranks.T.flatten().tolist(),
        }

    def chart(self) -> HeatMap:
        """Returns the grid: positions down, depth from left to right, the likeliest token in each cell."""
        return HeatMap(
            self.top_probs.T,
            list(map(str, self.depths)),
            numbered(self.texts or [""] * self.top_ids.shape[1]),
            "depth",
            "position",
            "probability",
            self.title,
            span=(0, 1),
            texts=[[self.words[token] for token in row] for row in self.top_ids.T.tolist()],
        )


def logit_lens(
    bridge: TransformerBridge,
    input: Input,
    *,
    lens: Translator | None = None,
    unembed: Unembed | None = None,
    attention_mask: Int[Tensor, "row pos"] | None = None,
) -> LogitLens:
    """Returns what the model would predict from the residual stream at each depth, at every position of one text.

    These are `lens_readings` of all positions, with the model's own prediction as the target.

    Args:
        bridge: The model.
        input: Any input of one row.
        lens: A tuned or Jacobian lens, or a function `lens(resid, depth)`, as for `lens_readings`.
        unembed: What reads the streams in place of the model's own unembedding, as for `lens_readings`.
        attention_mask: 1 for real tokens, where bare token ids have padding.

    Raises:
        InvalidArgumentError: Several rows, or a lens as for `lens_readings`.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> logit_lens(bridge, "def f(self").depths
        ('embed', '0', '1', '2', '3', '4')

    References:
        nostalgebraist (2020), "interpreting GPT: the logit lens", lesswrong.com/posts/AcKRB8wDpdaN6v6ru.
    """
    check_bridge(bridge)
    batch = bridge.to_batch(input, attention_mask)
    if batch.rows > 1:
        raise InvalidArgumentError(
            "a logit lens shows one text",
            expected="an input of one row",
            got=f"{batch.rows} rows",
            fix="lens_readings(bridge, input)",
        )
    found = lens_readings(bridge, batch, positions=None, top_k=1, lens=lens, unembed=unembed)
    own = () if batch.tokens is None else tuple(batch.tokens[0, list(batch.real_columns[0])].tolist())
    return LogitLens(
        found.top_ids[..., 0],
        found.top_log_probs[..., 0].exp(),
        found.target_ids,
        found.target_log_probs.exp(),
        found.target_ranks,
        own,
        found.words,
        tuple(bridge.text.label(token) for token in own),
    )
