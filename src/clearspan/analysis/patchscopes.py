"""Patchscopes: what a model says of a hidden state of one prompt, when the state is put into another prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.activations import depths_of
from clearspan.analysis.translators import depth_names, stream_names
from clearspan.analysis.words import Words, words_of
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts
from clearspan.errors import InvalidArgumentError, argument
from clearspan.inputs import Batch, Input
from clearspan.interventions import Inject, Intervention
from clearspan.model import check_bridge
from clearspan.modes import no_grad
from clearspan.plots import HeatMap
from clearspan.progress import Progress
from clearspan.results import Columns, Result
from clearspan.sweep import Grid, Sweep

StateMap = Callable[[Float[Tensor, "d_model"], int, int], Float[Tensor, "d_model"]]
"""From a hidden state, the depth that it is of, and the depth that it is written at, to what is written there."""


@dataclass(frozen=True, eq=False, repr=False)
class Patchscope(Result):
    """What the model says after a prompt into which a hidden state was put, by the depths of both, on the CPU.

    Attributes:
        source_depths: A name for each depth that was read: `embed`, then the layer whose block the stream leaves.
        target_depths: The same of the depths that were written.
        top_ids: Likeliest next tokens after the target prompt.
        top_probs: Their probabilities.
        unpatched_ids: Likeliest next tokens after the target prompt as it is.
        texts: What the model continues with, by source and target depth; empty where none was generated.
        words: Texts of tokens.
    """

    source_depths: tuple[str, ...]
    target_depths: tuple[str, ...]
    top_ids: Int[Tensor, "source target k"]
    top_probs: Float[Tensor, "source target k"]
    unpatched_ids: Int[Tensor, "k"]
    texts: tuple[tuple[str, ...], ...]
    words: Words

    @property
    def title(self) -> str:
        """What was read, and what the target prompt gives by itself."""
        own = ", ".join(self.words[token] for token in self.unpatched_ids.tolist())
        return f"patchscope: next token by the depth that is read and the depth that is written; unpatched {own}"

    @property
    def predicts(self) -> list[list[str]]:
        """The likeliest next token, by source and target depth."""
        return [[self.words[token] for token in row] for row in self.top_ids[..., 0].tolist()]

    def columns(self) -> Columns:
        """Returns one row for each pair of depths."""
        cells = range(len(self.source_depths) * len(self.target_depths))
        found: Columns = {
            "source": [self.source_depths[cell // len(self.target_depths)] for cell in cells],
            "target": [self.target_depths[cell % len(self.target_depths)] for cell in cells],
            "predicts": [word for row in self.predicts for word in row],
            "probability": self.top_probs[..., 0].flatten().tolist(),
        }
        return {**found, "text": [text for row in self.texts for text in row]} if self.texts else found

    def chart(self) -> HeatMap:
        """Returns a grid: source depths down, target depths from left to right, the likeliest token in each."""
        return HeatMap(
            self.top_probs[..., 0],
            list(map(str, self.target_depths)),
            list(map(str, self.source_depths)),
            "written at depth",
            "read at depth",
            "probability",
            self.title,
            span=(0, 1),
            texts=self.predicts,
        )


@no_grad
def patchscope(
    bridge: TransformerBridge,
    source: Input,
    target: Input,
    *,
    source_position: int = -1,
    target_position: int = -1,
    source_depths: int | Sequence[int] | None = None,
    target_depths: int | Sequence[int] | None = None,
    mapping: StateMap | None = None,
    k: int = 5,
    max_new_tokens: int = 0,
    progress: bool | Progress = True,
) -> Patchscope:
    """Returns what a model says after a target prompt in which a hidden state of a source prompt takes a token's place.

    For each pair of depths the residual stream of the source at one position and depth is written over that of the
    target, at another position and depth, and the model continues. All pairs are one sweep. Written at the target's
    last position and depth, the state is read by the unembedding alone: that is the logit lens.

    Args:
        bridge: The model.
        source: The prompt whose hidden state is in question: any input of one row.
        target: The prompt that asks for it, such as one that repeats what stands before an arrow: of one row.
        source_position: The position that is read, among the real tokens, negative from the last.
        target_position: The position that is written.
        source_depths: Depths that are read, as for `lens_readings`: 0 is the embedding, `n_layers` (and -1) what leaves
            the last block; by default all.
        target_depths: Depths that are written; by default all.
        mapping: What is made of the hidden state `[d_model]` before it is written, such as a linear map that was fitted
            between two depths: `mapping(state, source_depth, target_depth)`, depths from 0. By default the state as it
            is.
        k: Likeliest next tokens to keep.
        max_new_tokens: Tokens that each pair is continued by, the likeliest each time; one generation for each pair.
        progress: As for `Sweep.run`.

    Raises:
        InvalidArgumentError: Several rows, a position, depth or `k` that is not there, or a mapping that returns
            something else than a hidden state.
        NoTokenizerError: Text, or texts to generate, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> found = patchscope(bridge, "import os", "import sys", source_depths=[0], target_depths=[0], k=1)
        >>> found.top_ids.shape, bool((found.top_ids[0, 0] == bridge("import os")[0, -1].argmax()).all())
        (torch.Size([1, 1, 1]), True)

    References:
        Ghandeharioun et al. (2024), "Patchscopes", arXiv:2401.06102, section 3: source and target prompts, positions,
        layers, and the mapping `f`.
    """
    check_bridge(bridge)
    check_counts(k=k)
    check_counts(0, max_new_tokens=max_new_tokens)
    if mapping is not None and not callable(mapping):
        raise InvalidArgumentError(f"mapping={mapping!r}"[:80], expected="a function, or None")
    if k > bridge.cfg.d_vocab:
        raise InvalidArgumentError(f"k={k} tokens cannot be kept", expected=f"1 to {bridge.cfg.d_vocab}")
    given, asks = _one_row(bridge, source, "source"), _one_row(bridge, target, "target")
    with argument("target"):
        _ = asks.ids  # a sweep runs on tokens
    n_layers, names = bridge.cfg.n_layers, stream_names(bridge.cfg.n_layers)
    read, written = depths_of(n_layers, source_depths), depths_of(n_layers, target_depths)
    position = asks.position_of(0, target_position, "target_position")
    column = given.column_of(0, source_position, "source_position")
    _, cache = bridge.run_with_cache(given, [names[depth] for depth in read], return_type=None)
    cells: list[tuple[Intervention, ...]] = []
    for depth in read:
        state = cache[names[depth]][0, column]
        for into in written:
            vector = state if mapping is None else _mapped(mapping, state, depth, into)
            cells.append((Intervention(names[into], Inject.of(vector), positions=position),))
    labels = depth_names(n_layers)
    sides = tuple(labels[depth] for depth in read), tuple(labels[depth] for depth in written)
    metrics = {f"{what} {place}": partial(_nth, place=place, what=what) for place in range(k) for what in ("id", "p")}
    found = Sweep(bridge, asks, Grid((("source", sides[0]), ("target", sides[1])), tuple(cells)), metrics).run(
        progress=progress
    )
    top_ids = torch.stack([found.values[f"id {place}"][..., 0] for place in range(k)], -1).round().long()
    top_probs = torch.stack([found.values[f"p {place}"][..., 0] for place in range(k)], -1)
    texts = [_continued(bridge, asks, cell, max_new_tokens) for cell in cells] if max_new_tokens else []
    rows = tuple(tuple(texts[start : start + len(written)]) for start in range(0, len(texts), len(written)))
    unpatched = bridge(asks)[0, asks.column_of(0, -1)].topk(k).indices.cpu()
    words = words_of(bridge, top_ids, unpatched)
    return Patchscope(*sides, top_ids, top_probs, unpatched, rows, words)


def _one_row(bridge: TransformerBridge, input: Input, name: str) -> Batch:
    with argument(name):
        batch = bridge.to_batch(input)
    if batch.rows != 1:
        raise InvalidArgumentError(f"{name} is one prompt", expected="an input of one row", got=f"{batch.rows} rows")
    return batch


def _mapped(mapping: StateMap, state: Tensor, depth: int, into: int) -> Tensor:
    found = mapping(state.clone(), depth, into)
    if not isinstance(found, Tensor) or found.shape != state.shape:
        raise InvalidArgumentError(
            "the mapping returned no hidden state",
            expected=str(list(state.shape)),
            got=str(list(found.shape)) if isinstance(found, Tensor) else type(found).__name__,
        )
    return found.detach()


def _nth(logits: Float[Tensor, "row pos d_vocab"], *, place: int, what: str) -> Float[Tensor, "row"]:
    """Returns the id, or the probability, of the likeliest token but for `place` others, at the last position."""
    values, ids = logits[:, -1].double().softmax(-1).topk(place + 1)
    return (ids if what == "id" else values)[:, place].double()


def _continued(bridge: TransformerBridge, asks: Batch, cell: Sequence[Intervention], count: int) -> str:
    """Returns the text that the model continues with."""
    whole = bridge.generate(
        asks.ids, attention_mask=asks.mask, interventions=cell, max_new_tokens=count, do_sample=False
    )
    text = bridge.to_string(whole[0, asks.width :])
    assert isinstance(text, str), "one row"
    return text
