"""What the singular vectors of a matrix read and write, as tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.lenses.streams import word
from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import heatmap
from clearspan.plots.labels import plotly_text
from clearspan.results import Columns, Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

ReadableMatrix = Literal["OV", "W_in", "W_gate", "W_out"]
Side = Literal["reads", "writes"]


@dataclass(frozen=True, eq=False)
class VocabularySide:
    """The tokens at both ends of each singular vector on one side of a matrix, on the CPU.

    The first end (`+`) is that of the vector, the second (`-`) that of the same vector with the other sign.

    Attributes:
        ids: Tokens, strongest first.
        scores: How strongly, each end by its own sign.
    """

    ids: Int[Tensor, "value end token"]
    scores: Float[Tensor, "value end token"]


@dataclass(frozen=True, eq=False, repr=False)
class SingularReadings(Result):
    """What the leading singular vectors of a matrix read and write, in tokens.

    The sign of a singular vector is free: that of both sides together is no property of the matrix. So each has two
    ends that belong together: what `+` reads makes it write `+`, and what `-` reads makes it write `-`.

    Attributes:
        matrix: Which matrix.
        layer: Of which layer.
        head: Of which head, for `OV`.
        values: Singular values, largest first.
        shares: Their squares, as shares of the sum of all squares.
        reads: Tokens whose embedding, through the norm that reads it, lies along the reading side; None for `W_out`,
            which reads neurons.
        writes: Tokens whose logit the writing side raises, for a scale of 1 of the norms after it; None for `W_in` and
            `W_gate`, which write to neurons.
        words: Texts of tokens; empty without a tokenizer.
    """

    matrix: ReadableMatrix
    layer: int
    head: int | None
    values: Float[Tensor, "value"]
    shares: Float[Tensor, "value"]
    reads: VocabularySide | None
    writes: VocabularySide | None
    words: Mapping[int, str]

    shown: ClassVar[int] = 16

    @property
    def title(self) -> str:
        """Which matrix it is, and the share of the vectors shown."""
        name = f"{self.matrix} of " + (f"layer {self.layer}" if self.head is None else f"L{self.layer}H{self.head}")
        count = len(self.values)
        return f"{name}: tokens of the first {count} singular vectors, {self.shares.sum():.0%} of the squared norm"

    @property
    def _sides(self) -> dict[Side, VocabularySide]:
        both: dict[Side, VocabularySide | None] = {"reads": self.reads, "writes": self.writes}
        return {name: side for name, side in both.items() if side is not None}

    def columns(self) -> Columns:
        """Returns two rows for each singular value, one for each end, with its tokens."""
        count = len(self.values)
        return {
            "vector": [number for number in range(count) for _ in "+-"],
            "singular value": [value for value in self.values.tolist() for _ in "+-"],
            "end": ["+", "-"] * count,
            **{
                name: [" ".join(word(self.words, token) for token in end) for end in side.ids.flatten(0, 1).tolist()]
                for name, side in self._sides.items()
            },
        }

    def plot(self, side: Side | None = None) -> "go.Figure":
        """Returns a grid of one side: singular vectors and their ends down, tokens from left to right, by score.

        Args:
            side: Which; by default what is written, where there is that.

        Raises:
            InvalidArgumentError: The matrix does not have that side in vocabulary.
        """
        name = side or list(self._sides)[-1]
        if name not in self._sides:
            raise InvalidArgumentError(
                f"{self.matrix} has no side {name!r} in vocabulary", expected=" or ".join(map(repr, self._sides))
            )
        shown = self._sides[name]
        figure = heatmap(
            shown.scores.flatten(0, 1),
            x=[str(rank) for rank in range(shown.ids.shape[-1])],
            y=[f"{number} {end}" for number in range(len(self.values)) for end in "+-"],
            x_title="rank",
            y_title="singular vector",
            name="score",
            title=f"{self.title}: what it {name}",
            sequential=True,
        )
        text = [[plotly_text(word(self.words, token), 11) for token in row] for row in shown.ids.flatten(0, 1).tolist()]
        return figure.update_traces(text=text, texttemplate="%{text}")
