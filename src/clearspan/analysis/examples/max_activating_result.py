"""What maximises features: places in texts, with the tokens around them and the feature's value at each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from clearspan.analysis.lenses.streams import word
from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import heatmap
from clearspan.plots.labels import plotly_text
from clearspan.plots.shading import shaded_tokens
from clearspan.results import Columns, Result

from .feature_statistics import FeatureStatistics
from .running_top import Top

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class MaxActivatingExample:
    """One place at which a feature is large.

    Attributes:
        feature: Which.
        value: Its value there.
        text: Number of the text in the stream, from 0.
        position: Of the token in the text; a BOS counts.
        tokens: Token ids around it, as far as the model saw them at once.
        words: Their texts, with white space visible.
        activations: The feature's value at each of them.
        at: Which of them is the one.
    """

    feature: int
    value: float
    text: int
    position: int
    tokens: tuple[int, ...]
    words: tuple[str, ...]
    activations: tuple[float, ...]
    at: int

    def __str__(self) -> str:
        before, after = self.words[: self.at], self.words[self.at + 1 :]
        return "".join([*before, f"«{self.words[self.at]}»", *after])


@dataclass(frozen=True, eq=False, repr=False)
class MaxActivatingExamples(Result):
    """The largest values of features over a stream of texts, on the CPU.

    Attributes:
        name: The hook point; `feature(...)` of it where values were computed from its value.
        features: Numbers of the features, on the value's third axis.
        top: The largest values, where they stand, and what is around them.
        before: Where in a window of `top` the largest stands.
        statistics: What the values are like over all positions.
        text_count: Texts that were read.
        words: Texts of tokens; empty without a tokenizer.
    """

    name: str
    features: tuple[int, ...]
    top: Top
    before: int
    statistics: FeatureStatistics
    text_count: int
    words: Mapping[int, str]

    @property
    def title(self) -> str:
        """What was looked for, and in how much."""
        count = len(self.features)
        which = f"[{self.features[0]}]" if count == 1 else f", {count} features"
        texts = f"{self.text_count} text{'s' * (self.text_count > 1)}"
        return f"largest activations of {self.name}{which}, among {self.statistics.positions} positions of {texts}"

    def examples(self, feature: int | None = None) -> list[MaxActivatingExample]:
        """Returns the examples of one feature, largest first; by default of the first.

        Raises:
            InvalidArgumentError: The feature was not looked for.
        """
        return self._examples(self._row(feature))

    def columns(self) -> Columns:
        """Returns one row for each example."""
        examples = [example for row in range(len(self.features)) for example in self._examples(row)]
        return {
            "feature": [example.feature for example in examples],
            "value": [example.value for example in examples],
            "text": [example.text for example in examples],
            "position": [example.position for example in examples],
            "example": [str(example) for example in examples],
        }

    def plot(self, feature: int | None = None) -> "go.Figure":
        """Returns a strip of tokens for each example of one feature, by default of the first.

        The largest is in column 0. Colours are the feature's values.
        """
        row = self._row(feature)
        tokens, activations = self.top.tokens[row], self._activations(row)
        offsets = range(-self.before, tokens.shape[1] - self.before)
        figure = heatmap(
            activations,
            x=[f"{offset:+d}" if offset else "0" for offset in offsets],
            y=[f"{rank}. {example.value:.4g}" for rank, example in enumerate(self._examples(row), start=1)],
            x_title="position from the largest",
            y_title="example",
            name="value",
            title=f"largest activations of {self.name}[{self.features[row]}]",
            sequential=_is_sequential(activations),
            bound=_bound(activations),
        )
        words = [
            [plotly_text(word(self.words, token), 11) if token >= 0 else "" for token in line]
            for line in tokens[: len(activations)].tolist()
        ]
        return figure.update_traces(text=words, texttemplate="%{text}")

    def to_html(self, feature: int | None = None) -> str:
        """Returns the examples of one feature as HTML, tokens shaded by its value; by default of the first.

        The largest has a frame, and each token's value shows under the pointer.
        """
        row = self._row(feature)
        activations, statistics = self._activations(row), self.statistics
        bound, sequential = _bound(activations), _is_sequential(activations)
        lines = []
        for example in self._examples(row):
            place = f"<td>{example.value:.4g}</td><td>text {example.text}, position {example.position}</td>"
            tokens = shaded_tokens(
                example.words, example.activations, bound=bound, sequential=sequential, marked=example.at
            )
            lines.append(f"<tr>{place}<td>{tokens}</td></tr>")
        caption = (
            f"{self.name}[{self.features[row]}]: mean {statistics.mean[row]:.4g}, above 0 at "
            f"{statistics.active[row]:.2%} of {statistics.positions} positions"
        )
        return f'<table style="text-align:left"><caption>{caption}</caption>{"".join(lines)}</table>'

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the first features."""
        shown = self.features[:5]
        left = len(self.features) - len(shown)
        more = f"<p>… and {left} more features: .to_html(feature)</p>" if left else ""
        return "".join(map(self.to_html, shown)) + more

    def _row(self, feature: int | None) -> int:
        if feature is None:
            return 0
        if feature not in self.features:
            raise InvalidArgumentError(
                f"feature {feature} was not looked for", expected=", ".join(map(str, self.features[:20]))
            )
        return self.features.index(feature)

    def _activations(self, row: int) -> Float[Tensor, "example window"]:
        """Returns the values around those that were found."""
        return self.top.activations[row, self.top.texts[row] >= 0]

    def _examples(self, row: int) -> list[MaxActivatingExample]:
        found = []
        for value, text, position, tokens, around in zip(
            *(part[row].tolist() for part in self.top.parts()), strict=True
        ):
            if text < 0:
                break
            real = [place for place, token in enumerate(tokens) if token >= 0]
            found.append(
                MaxActivatingExample(
                    self.features[row],
                    value,
                    text,
                    position,
                    tuple(tokens[place] for place in real),
                    tuple(word(self.words, tokens[place]) for place in real),
                    tuple(around[place] for place in real),
                    real.index(self.before),
                )
            )
        return found


def _bound(activations: Float[Tensor, "example window"]) -> float:
    return float(activations.abs().nan_to_num().max()) if activations.numel() else 1.0


def _is_sequential(activations: Float[Tensor, "example window"]) -> bool:
    return bool((activations.nan_to_num() >= 0).all())
