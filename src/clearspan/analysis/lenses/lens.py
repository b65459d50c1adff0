"""The logit lens: what the model would predict if it stopped after each block."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import heatmap
from clearspan.plots.labels import plotly_text, positions
from clearspan.results import Columns, Result, melted

from .streams import Translator, depth_names, stream_names, translator, word, words_of

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Result):
    """Predictions read from the residual stream at every depth, on the CPU.

    Row 0 is the embedding, row `l + 1` the stream that leaves block `l`; the last row is the model's own prediction.
    Printed, it shows the last positions.

    Attributes:
        top_ids: Likeliest next token at that depth.
        top_probs: Its probability.
        final_ids: The model's own likeliest next token, which is the last row of `top_ids`.
        final_probs: The probability that each depth gives to `final_ids`.
        final_ranks: How many tokens each depth holds to be likelier than `final_ids`: 0 where it agrees.
        tokens: The text's own token ids, where they are known.
        words: Texts of tokens; those that are not in it are shown as ids.
    """

    top_ids: Int[Tensor, "depth pos"]
    top_probs: Float[Tensor, "depth pos"]
    final_ids: Int[Tensor, "pos"]
    final_probs: Float[Tensor, "depth pos"]
    final_ranks: Int[Tensor, "depth pos"]
    tokens: tuple[int, ...] = ()
    words: Mapping[int, str] = field(default_factory=dict)

    ranked_by: ClassVar[str | None] = "position"

    @property
    def title(self) -> str:
        """What the rows are."""
        return "logit lens: likeliest next token by depth, its probability, and the rank of the model's own"

    @property
    def depths(self) -> tuple[str, ...]:
        """A name for each row: `embed`, then the layer whose block the stream leaves."""
        return depth_names(len(self.top_ids) - 1)

    def columns(self) -> Columns:
        """Returns one row for each position and depth."""
        count = self.top_ids.shape[1]
        places = melted(self.top_ids.T, "id", position=range(count), depth=self.depths)
        return {
            **places,
            "predicts": [word(self.words, token) for token in self.top_ids.T.flatten().tolist()],
            "probability": self.top_probs.T.flatten().tolist(),
            "final rank": self.final_ranks.T.flatten().tolist(),
        }

    def plot(self) -> "go.Figure":
        """Returns a grid: positions down, depth from left to right, the likeliest token and its probability."""
        count = self.top_ids.shape[1]
        read = [word(self.words, token) for token in self.tokens] or [""] * count
        figure = heatmap(
            self.top_probs.T,
            x=self.depths,
            y=positions(read),
            x_title="depth",
            y_title="position",
            name="probability",
            title=self.title,
            sequential=True,
            bound=1.0,
        )
        text = [[plotly_text(word(self.words, token), 11) for token in row] for row in self.top_ids.T.tolist()]
        return figure.update_traces(text=text, texttemplate="%{text}")


@torch.no_grad()
def logit_lens(
    bridge: TransformerBridge, tokens: Int[Tensor, "1 pos"] | str, *, lens: Translator | None = None
) -> LogitLens:
    """Returns what the residual stream at each depth says when read as if it were the last, at every position.

    The stream after block `l` goes to the model's own final norm, unembedding and scale or cap of the logits:
    `softmax(bridge(resid_post[l], start_at_layer=n_layers))`, which skips every block. `lens_readings` reads chosen
    positions of several texts, with targets, entropy and divergence.

    Args:
        bridge: The model.
        tokens: One text, or its token ids.
        lens: A tuned lens, or a function `lens(resid, depth)`, through which each stream goes first. Depth 0 is the
            embedding, depth `l + 1` leaves block `l`.

    Raises:
        InvalidArgumentError: Several rows, or a tuned lens of another width or depth.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> logit_lens(bridge, "def f(self").depths
        ('embed', '0', '1', '2', '3', '4')

    References:
        nostalgebraist (2020), "interpreting GPT: the logit lens", lesswrong.com/posts/AcKRB8wDpdaN6v6ru.
    """
    tokens = bridge.to_tokens(tokens) if isinstance(tokens, str) else tokens
    if tokens.ndim == 2 and len(tokens) > 1:
        raise InvalidArgumentError(
            "a logit lens shows one text",
            expected="token ids [1, pos]",
            got=str(list(tokens.shape)),
            fix="lens_readings(bridge, tokens)",
        )
    translate, names = translator(bridge, lens), stream_names(bridge.cfg.n_layers)
    logits, cache = bridge.run_with_cache(tokens, names_filter=names)
    final_ids = logits[0].argmax(-1)
    streams = (translate(cache[name], depth) for depth, name in enumerate(names))
    rows = [_read(bridge(stream, start_at_layer=bridge.cfg.n_layers)[0], final_ids) for stream in streams]
    top_ids, top_probs, final_probs, final_ranks = (torch.stack(column).cpu() for column in zip(*rows, strict=True))
    words = words_of(bridge, tokens, top_ids)
    given = tuple(tokens.flatten().tolist())
    return LogitLens(top_ids, top_probs, final_ids.cpu(), final_probs, final_ranks, given, words)


def _read(logits: Float[Tensor, "pos d_vocab"], final_ids: Int[Tensor, "pos"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns top id, its probability, and probability and rank of `final_ids`, each `[pos]`."""
    probs = logits.float().softmax(-1)
    top = probs.max(-1)
    final = logits.gather(-1, final_ids[:, None])
    return top.indices, top.values, probs.gather(-1, final_ids[:, None])[:, 0], (logits > final).sum(-1)
