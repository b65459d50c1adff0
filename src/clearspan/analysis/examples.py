"""Texts on which a neuron, or any other feature, is largest, found in one pass over a stream."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.analysis.activations import stop_after
from clearspan.analysis.corpus import Corpus, texts_of
from clearspan.analysis.running import FeatureStatistics, RunningStatistics, RunningTop, Seen, Top
from clearspan.analysis.words import Words, words_of
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_flags, is_whole, whole_numbers
from clearspan.errors import InvalidArgumentError, NotFiniteError
from clearspan.model import check_bridge
from clearspan.modes import no_grad
from clearspan.plots import HeatMap, fragment, paragraph, shaded_tokens
from clearspan.plots.charts import ends
from clearspan.points import HookPoint
from clearspan.progress import Progress, shown
from clearspan.results import Columns, Result, counted

if TYPE_CHECKING:
    import plotly.graph_objects as go

Feature = Callable[[Tensor], Float[Tensor, "piece pos *feature"]]
"""From a hook point's value to one number for each position, or one for each position and feature."""


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
        words: Texts of tokens.
    """

    name: str
    features: tuple[int, ...]
    top: Top
    before: int
    statistics: FeatureStatistics
    text_count: int
    words: Words

    @property
    def title(self) -> str:
        """What was looked for, and in how much."""
        count = len(self.features)
        which = f"[{self.features[0]}]" if count == 1 else f", {count} features"
        texts = counted(self.text_count, "text")
        return f"largest activations of {self.name}{which}, among {self.statistics.positions} positions of {texts}"

    def examples(self, feature: int | None = None) -> list[MaxActivatingExample]:
        """Returns the examples of one feature, largest first; by default of the first.

        Raises:
            InvalidArgumentError: The feature was not looked for.
        """
        row, found = self._row(feature), []
        for value, text, position, tokens, around in zip(
            *(part[row].tolist() for part in self.top.parts()), strict=True
        ):
            if text < 0:
                break
            real = [place for place, token in enumerate(tokens) if token >= 0]
            ids = tuple(tokens[place] for place in real)
            words = tuple(self.words[token] for token in ids)
            activations = tuple(around[place] for place in real)
            at = real.index(self.before)
            found.append(MaxActivatingExample(self.features[row], value, text, position, ids, words, activations, at))
        return found

    def columns(self) -> Columns:
        """Returns one row for each example."""
        examples = [example for feature in self.features for example in self.examples(feature)]
        return {
            "feature": [example.feature for example in examples],
            "value": [example.value for example in examples],
            "text": [example.text for example in examples],
            "position": [example.position for example in examples],
            "example": [str(example) for example in examples],
        }

    def plot(self, feature: int | None = None) -> "go.Figure":
        """Returns a plotly figure; arguments are those of `chart`."""
        return self.chart(feature).figure()

    def chart(self, feature: int | None = None) -> HeatMap:
        """Returns a strip of tokens for each example of one feature, by default of the first.

        The largest is in column 0. Colours are the feature's values.
        """
        row, activations = self._row(feature), self._activations(feature)
        tokens = self.top.tokens[row, : len(activations)].tolist()
        offsets = range(-self.before, activations.shape[1] - self.before)
        return HeatMap(
            activations,
            [f"{offset:+d}" if offset else "0" for offset in offsets],
            [f"{rank}. {example.value:z.4g}" for rank, example in enumerate(self.examples(feature), start=1)],
            "position from the largest",
            "example",
            "value",
            f"largest activations of {self.name}[{self.features[row]}]",
            texts=[[self.words[token] if token >= 0 else "" for token in line] for line in tokens],
        )

    def to_html(self, feature: int | None = None) -> str:
        """Returns the examples of one feature as HTML, tokens shaded by its value; by default of the first.

        The largest has a frame, and each token's value shows under the pointer.
        """
        row, statistics = self._row(feature), self.statistics
        (low, bound), _ = ends(self._activations(feature))
        lines = []
        for example in self.examples(feature):
            place = f"<td>{example.value:z.4g}</td><td>text {example.text}, position {example.position}</td>"
            tokens = shaded_tokens(
                example.words, example.activations, bound=bound, sequential=low >= 0, marked=example.at
            )
            lines.append(f"<tr>{place}<td>{tokens}</td></tr>")
        caption = (
            f"{self.name}[{self.features[row]}]: mean {statistics.mean[row]:z.4g}, above 0 at "
            f"{statistics.active[row]:.2%} of {statistics.positions} positions"
        )
        return f'<table style="text-align:left"><caption>{caption}</caption>{"".join(lines)}</table>'

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the first features, their tokens shaded."""
        shown = self.features[:5]
        left = len(self.features) - len(shown)
        more = paragraph(f"… and {left} more features: .to_html(feature)") if left else ""
        return fragment(*map(self.to_html, shown), more)

    def _row(self, feature: int | None) -> int:
        if feature is None:
            return 0
        if not is_whole(feature) or feature not in self.features:
            raise InvalidArgumentError(
                f"feature {feature!r} was not looked for", expected=", ".join(map(str, self.features[:20]))
            )
        return self.features.index(feature)

    def _activations(self, feature: int | None) -> Float[Tensor, "example window"]:
        """Returns the values around those that were found."""
        row = self._row(feature)
        return self.top.activations[row, self.top.texts[row] >= 0]


@no_grad
def max_activating_examples(
    bridge: TransformerBridge,
    texts: Corpus,
    name: str,
    *,
    index: int | Sequence[int] | None = None,
    feature: Feature | None = None,
    k: int = 10,
    context: int | tuple[int, int] = (15, 5),
    one_per_text: bool = True,
    exclude_bos: bool = True,
    length: int = 128,
    batch_size: int = 8,
    sample: int = 0,
    seed: int = 0,
    progress: bool | Progress = True,
) -> MaxActivatingExamples:
    r"""Returns the places in a stream of texts at which features of a hook point are largest.

    Texts are read as they come, cut into pieces that the model sees one by one, and forgotten: what is kept is the `k`
    largest values of each feature with the tokens around them. Of a point in a block, no later block is run.

    Args:
        bridge: The model.
        texts: Any input, or any iterable of inputs. Empty texts are passed over.
        name: A hook point, such as `blocks.3.mlp.hook_post`.
        index: Which features, by their place on the value's third axis: one, several, or all (None).
        feature: A function from the point's value to `[piece, pos]` or `[piece, pos, feature]`, where the value is not
            itself `[piece, pos, feature]`, or is not what is looked for: an attention pattern, the norm of a head's
            output, a projection on a direction, the encoder of a sparse autoencoder. With a minus sign, it finds the
            smallest.
        k: Examples of each feature.
        context: Tokens to keep around the largest: before and after, or one number for both. They end where the piece
            does.
        one_per_text: Whether a text gives its largest value alone, and not neighbours of it.
        exclude_bos: Whether the first position of each piece, BOS or what stands in for one, is left out. Many features
            are largest there, whatever the text is.
        length: Tokens in a piece, at most; the model's context where that is less.
        batch_size: Pieces run at a time.
        sample: Positions to draw uniformly, from which `statistics.quantile` reads; 0 for none.
        seed: Of the sample.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, 0)`: how many texts there are
            is not known.

    Returns:
        The examples of each feature, largest first (of equal values, the one that came first), and each feature's mean
        and share of positions above 0. Values are in float32.

    Raises:
        UnknownPointError: There is no such point.
        InvalidArgumentError: The value, or what `feature` returned, is not one number for each feature of a position;
            an index that is not there; a size that is not positive; or no text.
        InputError: A text that is no input.
        NotFiniteError: A value is NaN.
        NoTokenizerError: Texts, and the bridge has no tokenizer.
        PointNotReachedError: Somebody else's hook is on a layer that is not run.

    Example:
        >>> import inspect, clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> found = max_activating_examples(bridge, [inspect.getsource(inspect)], "blocks.0.mlp.hook_post", index=4)
        >>> [example.words[example.at] for example in found.examples(4)]
        ['·raise']

    References:
        Bolukbasi et al. (2021), "An Interpretability Illusion for BERT", arXiv:2104.07143: the largest values of one
        corpus may show something else than those of another, or than middling values. `sample` shows the latter.
    """
    sides = whole_numbers("context", context)
    before, after = sides * 2 if len(sides) == 1 else sides if len(sides) == 2 else (-1, -1)
    check_counts(k=k, length=length, batch_size=batch_size)
    check_counts(0, context=min(before, after), sample=sample, seed=seed)
    check_flags(one_per_text=one_per_text, exclude_bos=exclude_bos)
    before, after = (min(side, length - 1) for side in (before, after))  # a piece has no more
    wanted = None if index is None else tuple(dict.fromkeys(whole_numbers("index", index)))
    point = _point(bridge, name, feature)
    stream = _seen(bridge, _batches(bridge, texts, length, batch_size), point, wanted, feature, exclude_bos)
    first = next(stream, None)
    if first is None:
        raise InvalidArgumentError("there is nothing to read", expected="at least one text", got="none")
    count, read = first.values.shape[-1], 0
    top = RunningTop(count, k, before=before, after=after, one_per_text=one_per_text, device=first.values.device)
    statistics = RunningStatistics(count, sample=sample, seed=seed)
    with shown(progress) as tell:
        for seen in itertools.chain([first], stream):
            values = seen.values[seen.counted]
            if values.isnan().any():
                raise NotFiniteError("a value is not a number (NaN), so it cannot be ranked", where=name)
            top.update(seen)
            statistics.update(values)
            read = int(seen.texts[-1]) + 1
            tell("texts", read, 0)
    if not (result := statistics.result()).positions:
        raise InvalidArgumentError(
            "there is no position to rank", expected="pieces of two tokens or more", fix="exclude_bos=False"
        )
    found = top.top.cpu()
    words = words_of(bridge, found.tokens[found.tokens >= 0])
    name = name if feature is None else f"feature({name})"
    return MaxActivatingExamples(name, wanted or tuple(range(count)), found, before, result, read, words)


def _point(bridge: TransformerBridge, name: str, feature: Feature | None) -> HookPoint:
    """Returns the hook point, checked: without `feature`, its value is one number for each feature of a position."""
    check_bridge(bridge)
    if not isinstance(name, str):
        raise InvalidArgumentError("a hook point is given by its name", got=repr(name))
    if feature is not None and not callable(feature):
        raise InvalidArgumentError("`feature` is no function", got=repr(feature))
    point = bridge.index.find(name)
    if feature is None and (len(point.axes) != 3 or point.axes[:2] != ("batch", "pos")):
        raise InvalidArgumentError(
            f"{name} is not one number for each feature of a position",
            expected="[batch, pos, feature]",
            got=f"[{', '.join(point.axes)}]",
            fix="feature=fn, with a function from this value to [batch, pos] or [batch, pos, feature]",
        )
    return point


Cut = tuple[int, int, Tensor]
"""Number of a text, where in it a piece starts, and the piece."""


def _batches(bridge: TransformerBridge, texts: Corpus, length: int, size: int) -> Iterator[list[Cut]]:
    """Yields pieces of at most `length` tokens, `size` at a time; no text is asked for before its batch."""
    length = min(length, bridge.cfg.n_ctx)
    cut = (
        (number, start, text[start : start + length])
        for number, text in enumerate(texts_of(bridge, texts))
        for start in range(0, len(text), length)
    )
    while batch := list(itertools.islice(cut, size)):
        yield batch


def _seen(
    bridge: TransformerBridge,
    stream: Iterator[list[Cut]],
    point: HookPoint,
    wanted: Sequence[int] | None,
    feature: Feature | None,
    exclude_bos: bool,
) -> Iterator[Seen]:
    """Yields what is read of each batch."""
    for parts in stream:
        texts, starts, tokens = zip(*parts, strict=True)
        batch = bridge.to_batch(list(tokens), padding_side="right")
        _, cache = bridge.run_with_cache(
            batch, names_filter=point.name, stop_at_layer=stop_after([point.name]), return_type=None
        )
        value = cache[point.name]
        values = _chosen(value if feature is None else feature(value), batch.ids.shape, wanted, point.name)
        counted = batch.real.bool().to(values.device)
        if exclude_bos:
            counted[:, 0] = False
        numbers, places = torch.tensor([texts, starts], device=values.device)
        yield Seen(values, batch.to(values.device), counted, numbers, places)


def _chosen(
    values: Tensor, size: torch.Size, wanted: Sequence[int] | None, name: str
) -> Float[Tensor, "piece pos feature"]:
    """Returns the features asked for, in float32."""
    if not isinstance(values, Tensor) or values.ndim not in (2, 3) or values.shape[:2] != size:
        batch, pos = size
        raise InvalidArgumentError(
            "`feature` did not return one number for each position, or for each position and feature",
            expected=f"[batch={batch}, pos={pos}] or [batch={batch}, pos={pos}, feature]",
            got=str(list(values.shape)) if isinstance(values, Tensor) else type(values).__name__,
            where=name,
        )
    values = (values if values.ndim == 3 else values[..., None]).float()
    if wanted is None:
        return values
    features = values.shape[-1]
    if not wanted:
        raise InvalidArgumentError("there is no feature to look for", expected="index=None for all", where=name)
    for place in wanted:
        if not 0 <= place < features:
            raise InvalidArgumentError(f"there is no feature {place}", expected=f"0 to {features - 1}", where=name)
    return values[..., list(wanted)]
