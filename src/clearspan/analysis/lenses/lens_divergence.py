"""How far a tuned lens and the logit lens are from the model's own predictions, on held-out text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.analysis.corpus import Corpus, check_positive, padded, pieces
from clearspan.bridge import TransformerBridge
from clearspan.plots.charts import lines
from clearspan.results import Columns, Result

from .streams import depth_names, kl_divergence, read, real_streams, stream_names
from .tuned_lens import TunedLens

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class LensDivergence(Result):
    """How far two lenses are from the model's own predictions: KL(final || lens) in nats, mean over positions.

    Attributes:
        logit_lens: Of the stream read as it is.
        tuned_lens: Of the stream read through the lens.
        positions: How many were averaged over.
    """

    logit_lens: Float[Tensor, "depth"]
    tuned_lens: Float[Tensor, "depth"]
    positions: int

    @property
    def title(self) -> str:
        """What was measured, and on how much."""
        return f"KL(final || lens) in nats by depth, mean over {self.positions} positions"

    @property
    def depths(self) -> tuple[str, ...]:
        """A name for each depth: `embed`, then the layer whose block the stream leaves."""
        return depth_names(len(self.logit_lens) - 1)

    def columns(self) -> Columns:
        """Returns one row for each depth."""
        plain, tuned = self.logit_lens.tolist(), self.tuned_lens.tolist()
        return {"depth": self.depths, "logit lens": plain, "tuned lens": tuned}

    def plot(self) -> "go.Figure":
        """Returns both lenses by depth."""
        series = {"logit lens": self.logit_lens.tolist(), "tuned lens": self.tuned_lens.tolist()}
        return lines(series, x=self.depths, x_title="depth", value_title="KL(final || lens), nats", title=self.title)


@torch.no_grad()
def lens_divergence(
    bridge: TransformerBridge, corpus: Corpus, lens: TunedLens, *, batch_size: int = 8, length: int = 128
) -> LensDivergence:
    """Returns how far a tuned lens and the logit lens are from the model's predictions, on text it was not trained on.

    Args:
        bridge: The model.
        corpus: Held-out texts, cut into pieces, or token ids `[text, pos]` without padding.
        lens: A lens for this model.
        batch_size: Pieces read at a time.
        length: Tokens in a piece, at most.

    Raises:
        InvalidArgumentError: No text, a size that is not positive, or a lens of another width or depth.
        NoTokenizerError: Texts, and the bridge has no tokenizer.

    Example:
        >>> import inspect, clearspan
        >>> from clearspan.analysis.lenses.tuned_lens_training import train_tuned_lens
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> lens = train_tuned_lens(bridge, [inspect.getsource(inspect)], steps=4, batch_size=2, length=64)
        >>> found = lens_divergence(bridge, [inspect.getsource(inspect.cleandoc)], lens)
        >>> bool((found.tuned_lens[:-1] < found.logit_lens[:-1]).all())
        True

    References:
        Belrose et al. (2023), arXiv:2303.08112.
    """
    check_positive(batch_size=batch_size)
    lens.check_fits(bridge)
    rows = pieces(bridge, corpus, length)
    names = stream_names(bridge.cfg.n_layers)
    totals = torch.zeros(2, len(names), dtype=torch.double)
    for start in range(0, len(rows), batch_size):
        streams, _ = real_streams(bridge, padded(rows[start : start + batch_size]), names)
        final = read(bridge, streams[-1])
        for depth, stream in enumerate(streams):
            for number, seen in enumerate((stream, lens.translate(stream, depth))):
                totals[number, depth] += float(kl_divergence(final, read(bridge, seen)).sum())
    positions = sum(map(len, rows))
    plain, tuned = (totals / positions).float()
    return LensDivergence(plain, tuned, positions)
