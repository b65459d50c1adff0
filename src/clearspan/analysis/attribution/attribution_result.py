"""What direct logit attribution found: parts that sum to a logit, and how closely they do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.heads.heads import head_heatmap
from clearspan.analysis.lenses.streams import word
from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import bars
from clearspan.results import Columns, Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

AttributionUnit = Literal["component", "layer", "head", "neuron"]
REST = "rest"
"""The part that holds all that is not of the unit asked for."""
_BARS = 40


@dataclass(frozen=True)
class AttributedPart:
    """A part of the model, and what it adds to the logit.

    Attributes:
        label: `3_mlp_out`, `L3`, `L3H5`, `L3N80`, `embed`, `pos_embed`.
        logits: Mean over rows.
    """

    label: str
    logits: float

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, eq=False, repr=False)
class DirectLogitAttribution(Result):
    """What each part of the model adds to a token's logit, or to the difference of two, at one place of each row.

    In logits before any cap, on the CPU. Parts and constant sum to the model's own logit, but for rounding: `gap` says
    how closely.

    Attributes:
        per_row: What each part adds, for each row.
        labels: A name for each part; `rest`, where there is one, is the last, and is all that is not of the unit.
        constant: What biases of the last norm and of the unembedding add, for each row, whatever the input.
        model: The model's own logit (or difference), for each row.
        unit: What the model was divided into.
        positions: The position of each row, counted among its real tokens.
        answers: The tokens whose logits are attributed.
        incorrect: The tokens whose logits are subtracted, if any.
        words: Texts of tokens; empty without a tokenizer.
        cap: What the model caps its logits at after all this, or None.
    """

    per_row: Float[Tensor, "row part"]
    labels: tuple[str, ...]
    constant: Float[Tensor, "row"]
    model: Float[Tensor, "row"]
    unit: AttributionUnit
    positions: tuple[int, ...]
    answers: Int[Tensor, "row"]
    incorrect: Int[Tensor, "row"] | None
    words: Mapping[int, str]
    cap: float | None

    ranked_by: ClassVar[str | None] = "logits"

    @property
    def attribution(self) -> Float[Tensor, "part"]:
        """Mean over rows."""
        return self.per_row.mean(0)

    @property
    def total(self) -> Float[Tensor, "row"]:
        """The sum of all parts and the constant, for each row."""
        return self.per_row.sum(-1) + self.constant

    @property
    def gap(self) -> Float[Tensor, "row"]:
        """The sum, less the model's own logit, for each row.

        It is rounding, in the precision in which the model runs, unless a hook wrote into the stream between the parts.
        """
        return self.total - self.model

    @property
    def by_head(self) -> Float[Tensor, "layer head"]:
        """Mean over rows, by layer and head.

        Raises:
            InvalidArgumentError: The unit is another one.
        """
        if self.unit != "head":
            raise InvalidArgumentError(
                "this is not divided into heads", got=f"unit={self.unit!r}", fix="direct_logit_attribution(unit='head')"
            )
        n_heads = sum(label.startswith("L0H") for label in self.labels)
        return self.attribution[:-1].unflatten(0, (-1, n_heads))

    def top(self, k: int = 5) -> list[AttributedPart]:
        """Returns the `k` parts that add or take most, largest first; the rest is not among them."""
        return sorted((part for part in self._parts if part.label != REST), key=lambda part: -abs(part.logits))[:k]

    @property
    def _parts(self) -> list[AttributedPart]:
        return [AttributedPart(*pair) for pair in zip(self.labels, self.attribution.tolist(), strict=True)]

    @property
    def title(self) -> str:
        """What was attributed to what, the sum, and the model's own."""
        rows = len(self.model)
        of = f"direct attribution of the logit of {self._name(self.answers, 'answer')}"
        less = "" if self.incorrect is None else f" less that of {self._name(self.incorrect, 'incorrect token')}"
        cap = "" if self.cap is None else f", before the cap at {self.cap:g}"
        mean = "" if rows == 1 else f"; mean over {rows} rows"
        sums = f"sum {self.total.mean():z.4f}, the model's own {self.model.mean():z.4f}"
        return f"{of}{less} to each {self.unit}{cap}: {sums}, largest gap {self.gap.abs().max():.1e}{mean}"

    def _name(self, tokens: Int[Tensor, "row"], role: str) -> str:
        unique = tokens.unique().tolist()
        return word(self.words, unique[0]) if len(unique) == 1 else f"each row's {role}"

    def columns(self) -> Columns:
        """Returns one row for each part, and one for the constant, in their order."""
        return {
            "part": [*self.labels, "constant"],
            "logits": [*self.attribution.tolist(), self.constant.mean().item()],
        }

    def plot(self) -> "go.Figure":
        """Returns a heat map of heads, layers down; for other units bars, for neurons those of the largest."""
        if self.unit == "head":
            return head_heatmap(self.by_head, name="logits", title=self.title, sequential=False)
        parts = self.top(_BARS) if self.unit == "neuron" else self._parts
        names, values = [part.label for part in parts], [part.logits for part in parts]
        return bars(values, names=names, value_title="logits", title=self.title)
