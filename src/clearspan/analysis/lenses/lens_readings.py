"""Readings of the residual stream: what each depth says of chosen positions and targets, for one text or many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.places import Input, Place, depths_of, encoded, places_of, target_ids_of
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import lines
from clearspan.results import Columns, Result, melted

from .streams import Translator, depth_names, kl_divergence, read, stream_names, translator, word, words_of

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class LensReadings(Result):
    """What is read at each depth for each place, on the CPU. Log-probabilities, divergences and entropies in nats.

    Attributes:
        depths: A name for each depth read: `embed`, or the layer whose block the stream leaves.
        places: Rows and positions; in a padded row, positions are counted from its first real token.
        top_ids: Likeliest next tokens, likeliest first.
        top_log_probs: Their log-probabilities.
        target_ids: The token asked for at each place.
        target_log_probs: Its log-probability.
        target_ranks: How many tokens are likelier than it: 0 where it is the prediction.
        kl: KL(final || depth), where final is the model's own distribution.
        entropy: Of the distribution at that depth.
        words: Texts of tokens; empty without a tokenizer.
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
    words: Mapping[int, str]

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
        names = range(len(self.places))
        by_place = melted(self.target_log_probs.T, "target log prob", place=names, depth=self.depths)
        places = [self.places[place] for place in range(len(self.places)) for _ in self.depths]
        targets = [word(self.words, token) for token in self.target_ids.tolist() for _ in self.depths]
        return {
            "row": [row for row, _ in places],
            "position": [position for _, position in places],
            "depth": by_place["depth"],
            "predicts": [word(self.words, token) for token in self.top_ids[..., 0].T.flatten().tolist()],
            "target": targets,
            "log prob": by_place["target log prob"],
            "rank": self.target_ranks.T.flatten().tolist(),
            "KL": self.kl.T.flatten().tolist(),
            "entropy": self.entropy.T.flatten().tolist(),
        }

    def plot(self) -> "go.Figure":
        """Returns means over places by depth, in nats: the target's surprisal, the divergence, and the entropy."""
        means = {
            "-log p(target)": -self.target_log_probs,
            "KL(final || depth)": self.kl,
            "entropy": self.entropy,
        }
        series = {name: values.mean(-1).tolist() for name, values in means.items()}
        title = f"mean over {len(self.places)} places"
        return lines(series, x=self.depths, x_title="depth", value_title="nats", title=title)


@torch.no_grad()
def lens_readings(
    bridge: TransformerBridge,
    input: Input,
    *,
    positions: int | Sequence[int] | None = -1,
    targets: Sequence[str] | Int[Tensor, "batch"] | None = None,
    depths: Sequence[int] | None = None,
    top_k: int = 5,
    lens: Translator | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> LensReadings:
    r"""Returns what the model would predict from the residual stream at each depth, at chosen positions.

    `log_softmax(bridge(lens(resid), start_at_layer=n_layers))`: the model's own final norm, unembedding, and scale or
    cap of the logits.

    Args:
        bridge: The model.
        input: A text, texts (padded and masked), or token ids.
        positions: One, or several, counted among each row's real tokens; negative from the end; None for all.
        targets: One token for each row: a text that is a single token, or an id. By default, at each place, the token
            that the model itself holds to be likeliest.
        depths: Which: 0 for the embedding, `l + 1` for what leaves block `l`; negative from the end; None for all.
        top_k: How many of the likeliest tokens to keep.
        lens: A tuned lens, or a function `lens(resid, depth)`, through which each stream goes first.
        attention_mask: 1 for real tokens, where token ids have padding.

    Raises:
        InvalidArgumentError: A position, depth or `top_k` that is not there, targets that are not one a row, or a tuned
            lens of another width or depth.
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
    tokens, mask = encoded(bridge, input, attention_mask)
    rows, columns, places = places_of(torch.ones_like(tokens) if mask is None else mask, positions)
    read_depths = depths_of(bridge.cfg.n_layers, depths)
    names = stream_names(bridge.cfg.n_layers)
    translate = translator(bridge, lens)
    _check_top_k(bridge, top_k)
    target_ids = None if targets is None else target_ids_of(bridge, targets, len(tokens))[rows]
    chosen = [names[depth] for depth in read_depths]
    keep = list({*chosen, names[-1]})
    _, cache = bridge.run_with_cache(tokens, names_filter=keep, attention_mask=mask, return_type=None)
    # Read as the others are, and not taken from the run's logits, so that its own divergence is 0 and not rounding.
    final = read(bridge, cache[names[-1]][rows, columns])
    target_ids = final.argmax(-1) if target_ids is None else target_ids.to(final.device)
    streams = (translate(cache[name][rows, columns], depth) for depth, name in zip(read_depths, chosen, strict=True))
    by_depth = [_measured(read(bridge, stream), final, target_ids, top_k) for stream in streams]
    top_ids, top_log_probs, log_probs, ranks, kl, entropy = (
        torch.stack(column).cpu() for column in zip(*by_depth, strict=True)
    )
    every = depth_names(bridge.cfg.n_layers)
    return LensReadings(
        tuple(every[depth] for depth in read_depths),
        places,
        top_ids,
        top_log_probs,
        target_ids.cpu(),
        log_probs,
        ranks,
        kl,
        entropy,
        words_of(bridge, top_ids, target_ids),
    )


def _measured(
    log_probs: Float[Tensor, "place d_vocab"],
    final: Float[Tensor, "place d_vocab"],
    target_ids: Int[Tensor, "place"],
    top_k: int,
) -> tuple[Tensor, ...]:
    """Returns top ids and their log-probabilities, the target's and its rank, divergence and entropy."""
    top = log_probs.topk(top_k, dim=-1)
    target = log_probs.gather(-1, target_ids[:, None])
    ranks = (log_probs > target).sum(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return top.indices, top.values, target[:, 0], ranks, kl_divergence(final, log_probs), entropy


def _check_top_k(bridge: TransformerBridge, top_k: int) -> None:
    if not 1 <= top_k <= bridge.cfg.d_vocab:
        raise InvalidArgumentError(f"top_k={top_k} tokens cannot be kept", expected=f"1 to {bridge.cfg.d_vocab}")
