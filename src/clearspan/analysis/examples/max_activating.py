"""Texts on which a neuron, or any other feature, is largest, found in one pass over a stream."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.corpus import check_positive, padded
from clearspan.analysis.lenses.streams import words_of
from clearspan.analysis.places import padding_of
from clearspan.analysis.reporting.predictions import NotFiniteError
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.points import HookPoint

from .feature_statistics import RunningStatistics
from .max_activating_result import MaxActivatingExamples
from .running_top import RunningTop, Seen
from .text_stream import Part, Texts, batches

Feature = Callable[[Tensor], Float[Tensor, "batch pos *feature"]]
"""From a hook point's value to one number for each position, or one for each position and feature."""


@torch.no_grad()
def max_activating_examples(
    bridge: TransformerBridge,
    texts: Texts,
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
) -> MaxActivatingExamples:
    r"""Returns the places in a stream of texts at which features of a hook point are largest.

    Texts are read as they come, cut into pieces that the model sees one by one, and forgotten: what is kept is the `k`
    largest values of each feature with the tokens around them. Of a point in a block, no later block is run.

    Args:
        bridge: The model.
        texts: Any iterable. Empty texts are passed over.
        name: A hook point, such as `blocks.3.mlp.hook_post`.
        index: Which features, by their place on the value's third axis: one, several, or all (None).
        feature: A function from the point's value to `[batch, pos]` or `[batch, pos, feature]`, where the value is not
            itself `[batch, pos, feature]`, or is not what is looked for: an attention pattern, the norm of a head's
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

    Returns:
        The examples of each feature, largest first (of equal values, the one that came first), and each feature's mean
        and share of positions above 0. Values are in float32.

    Raises:
        UnknownPointError: There is no such point.
        InvalidArgumentError: The value, or what `feature` returned, is not one number for each feature of a position;
            an index that is not there; a size that is not positive; or no text.
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
    before, after = (context, context) if isinstance(context, int) else context
    _check_sizes(k=k, length=length, batch_size=batch_size, before=before, after=after, sample=sample)
    wanted = (index,) if isinstance(index, int) else index
    stream = _seen(bridge, batches(bridge, texts, length=length, size=batch_size), name, wanted, feature, exclude_bos)
    first = next(stream, None)
    if first is None:
        raise InvalidArgumentError("there is nothing to read", expected="at least one text", got="none")
    count, read = first.values.shape[-1], 0
    top = RunningTop(count, k, before=before, after=after, one_per_text=one_per_text, device=first.values.device)
    statistics = RunningStatistics(count, sample=sample, seed=seed)
    for seen in itertools.chain([first], stream):
        values = seen.values[seen.counted]
        if values.isnan().any():
            raise NotFiniteError("a value is not a number (NaN), so it cannot be ranked", where=name)
        top.update(seen)
        statistics.update(values)
        read = seen.texts[-1] + 1
    if not (result := statistics.result()).positions:
        raise InvalidArgumentError(
            "there is no position to rank", expected="pieces of two tokens or more", fix="exclude_bos=False"
        )
    features = tuple(range(count)) if wanted is None else tuple(dict.fromkeys(wanted))
    found = top.top.cpu()
    name = name if feature is None else f"feature({name})"
    words = words_of(bridge, found.tokens[found.tokens >= 0])
    return MaxActivatingExamples(name, features, found, before, result, read, words)


def _seen(
    bridge: TransformerBridge,
    stream: Iterator[list[Part]],
    name: str,
    wanted: Sequence[int] | None,
    feature: Feature | None,
    exclude_bos: bool,
) -> Iterator[Seen]:
    """Yields what is read of each batch."""
    point = bridge.hook_dict[name]
    if feature is None:
        _check_axes(point, name)
    layer = Address.parse(point.name).layer
    stop = None if layer is None else layer + 1
    for parts in stream:
        tokens, mask = padded([part.tokens for part in parts])
        _, cache = bridge.run_with_cache(
            tokens, names_filter=name, attention_mask=padding_of(mask), stop_at_layer=stop, return_type=None
        )
        values = _chosen(cache[name] if feature is None else feature(cache[name]), tokens, wanted, name)
        counted = mask.bool()
        counted[:, 0] &= not exclude_bos
        counted = counted.to(values.device)
        starts = torch.tensor([part.start for part in parts])
        lengths = mask.sum(1)
        tokens, lengths, starts = (part.to(values.device) for part in (tokens, lengths, starts))
        yield Seen(values, tokens, counted, lengths, [part.text for part in parts], starts)


def _chosen(
    values: Tensor, tokens: Int[Tensor, "batch pos"], wanted: Sequence[int] | None, name: str
) -> Float[Tensor, "batch pos feature"]:
    """Returns the features asked for, in float32."""
    if not isinstance(values, Tensor) or values.ndim not in (2, 3) or values.shape[:2] != tokens.shape:
        batch, pos = tokens.shape
        raise InvalidArgumentError(
            "`feature` did not return one number for each position, or for each position and feature",
            expected=f"[batch={batch}, pos={pos}] or [batch={batch}, pos={pos}, feature]",
            got=str(list(values.shape)) if isinstance(values, Tensor) else type(values).__name__,
            where=name,
        )
    values = (values if values.ndim == 3 else values[..., None]).float()
    if wanted is None:
        return values
    size = values.shape[-1]
    for place in wanted:
        if not 0 <= place < size:
            raise InvalidArgumentError(f"there is no feature {place}", expected=f"0 to {size - 1}", where=name)
    return values[..., list(dict.fromkeys(wanted))]


def _check_axes(point: HookPoint, name: str) -> None:
    """Raises unless a point's value is one number for each feature of a position."""
    if len(point.axes) != 3 or point.axes[:2] != ("batch", "pos"):
        raise InvalidArgumentError(
            f"{name} is not one number for each feature of a position",
            expected="[batch, pos, feature]",
            got=f"[{', '.join(point.axes)}]",
            fix="feature=fn, with a function from this value to [batch, pos] or [batch, pos, feature]",
        )


def _check_sizes(*, k: int, length: int, batch_size: int, before: int, after: int, sample: int) -> None:
    check_positive(k=k, length=length, batch_size=batch_size)
    for name, size in {"context": min(before, after), "sample": sample}.items():
        if size < 0:
            raise InvalidArgumentError(f"{name}={size}", expected=f"{name} >= 0")
