"""What a model does with one text: its predictions, the effect of each position, and all that the report shows."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._forward.readout import exact
from clearspan.analysis.heads import HeadScores, head_scores
from clearspan.analysis.lenses import LogitLens, logit_lens
from clearspan.analysis.words import Words, words_of
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts
from clearspan.effects import Effects
from clearspan.errors import InvalidArgumentError, NotFiniteError
from clearspan.inputs import Batch, Input, Place
from clearspan.interventions import Patch
from clearspan.model import check_bridge
from clearspan.modes import no_grad
from clearspan.plots import heatmap, plotly_text, positions
from clearspan.progress import Progress, shown
from clearspan.results import Columns, Result, counted
from clearspan.sweep import Probability, Sweep, grid

if TYPE_CHECKING:
    import plotly.graph_objects as go


# --- predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Predictions(Result):
    """The `k` likeliest next tokens after each token of an input, on the CPU.

    Attributes:
        places: Rows, and positions among their real tokens.
        tokens: The token at each place.
        token_probs: The probability that it was given by the tokens before it; NaN for the first token of a row.
        top_ids: The tokens that are expected next, likeliest first.
        top_probs: Their probabilities.
        words: Texts of tokens.
    """

    places: tuple[Place, ...]
    tokens: Int[Tensor, "place"]
    token_probs: Float[Tensor, "place"]
    top_ids: Int[Tensor, "place k"]
    top_probs: Float[Tensor, "place k"]
    words: Words

    @property
    def title(self) -> str:
        """What the rows are."""
        return f"probability of each token, and the likeliest next ones, of {counted(self.places[-1][0] + 1, 'row')}"

    def columns(self) -> Columns:
        """Returns one row for each place."""
        rows, places = zip(*self.places, strict=True)
        columns: dict[str, list[object]] = {
            "row": list(rows),
            "position": list(places),
            "token": [self.words[token] for token in self.tokens.tolist()],
            "probability": self.token_probs.tolist(),
        }
        for rank, (ids, probs) in enumerate(zip(self.top_ids.T.tolist(), self.top_probs.T.tolist(), strict=True), 1):
            columns |= {f"next {rank}": [self.words[token] for token in ids], f"p {rank}": probs}
        return columns

    def plot(self) -> "go.Figure":
        """Returns a grid: places down, the likeliest next tokens from left to right, coloured by their probability."""
        figure = heatmap(
            self.top_probs,
            x=[str(rank) for rank in range(1, self.top_ids.shape[1] + 1)],
            y=positions([self.words[token] for token in self.tokens.tolist()]),
            x_title="rank",
            y_title="token",
            name="probability",
            title=self.title,
            span=(0, 1),
        )
        text = [[plotly_text(self.words[token], 11) for token in row] for row in self.top_ids.tolist()]
        return figure.update_traces(text=text, texttemplate="%{text}")


@no_grad
def predictions(
    bridge: TransformerBridge,
    input: Input,
    *,
    k: int = 5,
    logits: Float[Tensor, "row pos d_vocab"] | None = None,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    batch_size: int = 8,
) -> Predictions:
    r"""Returns the `k` likeliest next tokens after each real token of an input.

    Probabilities are the softmax, in float32 at least, of the logits.

    Args:
        bridge: The model.
        input: Any input of tokens.
        k: Predictions of each place.
        logits: What a run of the input returned, such as one with interventions; by default the model is run.
        attention_mask: 1 for real tokens, where bare token ids have padding.
        batch_size: Rows run at a time.

    Raises:
        InputError: Nothing that can be run, or embeddings.
        InvalidArgumentError: A size that is not positive, or logits of another input.
        NotFiniteError: The logits are NaN.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> found = predictions(bridge, "def f(self):\n    return self", k=1)
        >>> found.words[int(found.top_ids[-1, 0])]
        '.'
    """
    check_bridge(bridge)
    check_counts(k=k, batch_size=batch_size)
    batch = bridge.to_batch(input, attention_mask)
    if logits is None:
        runs = ((part, bridge(part)) for part in batch.split(batch_size))
    else:
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != (batch.rows, batch.width):
            raise InvalidArgumentError(
                "`logits` are not those of the input",
                expected=f"[row={batch.rows}, pos={batch.width}, d_vocab]",
                got=str(list(logits.shape)) if isinstance(logits, Tensor) else type(logits).__name__,
            )
        runs = iter([(batch, logits)])
    places: list[Place] = []
    parts = []
    for part, found in runs:
        rows, columns, own = part.places(None)
        probs = exact(found[rows.to(found.device), columns.to(found.device)]).softmax(-1)
        if probs.isnan().any():
            raise NotFiniteError(
                "the model's logits are not numbers (NaN), so it predicts nothing",
                where=f"{bridge.cfg.model_name}, weights in {bridge.cfg.dtype}",
                fix="clearspan.boot(model, dtype=torch.float32), if they overflow",
            )
        tokens = part.ids[rows, columns].to(probs.device)
        before = probs.roll(1, 0).gather(-1, tokens[:, None])[:, 0]
        is_first = torch.tensor([position == 0 for _, position in own], device=probs.device)
        top = probs.topk(min(k, probs.shape[-1]), dim=-1)
        parts.append((tokens, before.masked_fill(is_first, torch.nan), top.indices, top.values))
        start = places[-1][0] + 1 if places else 0
        places += [(start + row, position) for row, position in own]
    tokens, token_probs, top_ids, top_probs = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Predictions(tuple(places), tokens, token_probs, top_ids, top_probs, words_of(bridge, tokens, top_ids))


# --- effect ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class CausalEffect(Effects):
    """The log-probability of the last prediction with one position of one layer's input replaced, in nats.

    Attributes:
        targets: Each row's likeliest token after its last position.
    """

    targets: tuple[int, ...] = ()

    @property
    def log_prob(self) -> float:
        """The log-probability with nothing replaced, mean over rows."""
        return next(iter(self.base.values())).mean().item()

    @property
    def drop(self) -> Float[Tensor, "layer position"]:
        """How many nats the log-probability falls by, mean over rows; negative where it rises."""
        return -self.change().nanmean(-1)

    @property
    def bound(self) -> float:
        """The drop, in nats, that has the full colour.

        It is the largest at any position before the last, since what enters at the last position nearly always matters
        most and would pale all else; but no less than a tenth of the largest anywhere, so that noise stays pale.
        """
        sizes = self.drop.abs().nan_to_num()
        before_last = sizes[:, :-1].max().item() if sizes.shape[1] > 1 else 0.0
        return max(before_last, sizes.max().item() / 10, 1e-4)


@no_grad
def causal_effect(
    bridge: TransformerBridge,
    input: Input,
    *,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    memory: int | None = None,
    progress: bool | Progress = True,
) -> CausalEffect:
    """Returns the effect of mean-ablating the stream that enters each block, one position at a time.

    `log P(target | resid_pre[l][p] := mean)`, where the mean is that layer's own over the row's positions without the
    first. The first is left out (of a longer text) because it is BOS or stands in for one: models park attention there,
    and its stream can be hundreds of times larger than the others.

    Args:
        bridge: A model whose attention is causal, without hooks on it.
        input: Any input of tokens.
        attention_mask: 1 for real tokens, where bare token ids have padding.
        memory: Bytes that a batch may take; by default half of what is free.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`.

    Returns:
        Log-probabilities by layer, position and row; NaN past a row's end.

    Raises:
        InputError: Nothing that can be run.
        InvalidArgumentError: The model is in training mode, or hooks are on it.
        NotFiniteError: The logits are NaN.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> causal_effect(bridge, "def f(self").drop.shape == (bridge.cfg.n_layers, 5)
        True

    References:
        Meng et al. (2022), "Locating and Editing Factual Associations in GPT", arXiv:2202.05262, section 2.1: the
        grid of layer and position. Wang et al. (2022), arXiv:2211.00593, section 2.1: replacing by the mean. Here
        the mean is the text's own, so that no other text is needed.
        Sun et al. (2024), "Massive Activations in Large Language Models", arXiv:2402.17762: the first position.
    """
    check_bridge(bridge)
    batch = bridge.to_batch(input, attention_mask)
    targets = tuple(predictions(bridge, batch, k=1).top_ids[batch.lengths.cumsum(0) - 1, 0].tolist())
    layers = range(bridge.cfg.n_layers)
    _, cache = bridge.run_with_cache(batch, [f"blocks.{layer}.hook_resid_pre" for layer in layers], return_type=None)
    found = Sweep(
        bridge,
        batch,
        grid("resid_pre", Patch("mean"), layer=layers, position=range(batch.longest)),
        {"log probability": Probability(targets, is_log=True)},
        sources={"mean": {name: _own_mean(cache[name], batch) for name in cache}},
    ).run(memory, progress=progress)
    own = {one.name: getattr(found, one.name) for one in fields(found)}
    return CausalEffect(**{**own, "what": "the stream replaced by its mean"}, targets=targets)


def _own_mean(resid: Float[Tensor, "row pos d_model"], batch: Batch) -> Float[Tensor, "row pos d_model"]:
    """Returns the mean of a stream over each row's positions but the first, at all positions."""
    means = [resid[row, list(real[1:] or real)].mean(0, keepdim=True) for row, real in enumerate(batch.real_columns)]
    return torch.stack(means).expand_as(resid)


# --- report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """The model's name and sizes."""

    name: str
    architecture: str
    parameters: int
    layers: int
    heads: int
    d_model: int
    context: int
    vocabulary: int


@dataclass(frozen=True, eq=False)
class Report:
    """What a model does with one text.

    Attributes:
        model: Name and sizes.
        text: As given, or that of the token ids given; empty where a model without a tokenizer reads ids.
        token_ids: As the model reads it, BOS included.
        words: The text of every token id that appears anywhere in the report, or its id (`#5`) where it has none.
        predictions: Likeliest next tokens.
        lens: Logit lens.
        heads: Induction and previous-token scores, on random tokens rather than this text.
        effect: Causal effect on the last prediction.
        patterns: Attention of every head on this text; NaN in layers without attention.
    """

    model: ModelFacts
    text: str
    token_ids: tuple[int, ...]
    words: Words
    predictions: Predictions
    lens: LogitLens
    heads: HeadScores
    effect: CausalEffect
    patterns: Float[Tensor, "layer head q_pos k_pos"]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The text of each token, by position."""
        return tuple(self.words[i] for i in self.token_ids)

    @property
    def depths(self) -> tuple[str, ...]:
        """A name for each depth of the logit lens: the embedding, then each layer that the stream leaves."""
        return tuple(depth if depth == "embed" else f"layer {depth}" for depth in self.lens.depths)

    @property
    def target(self) -> str:
        """The text of the model's last prediction."""
        return self.words[self.effect.targets[0]]

    # The page is drawn by an upper layer, which is loaded by name when a page is asked for.

    def to_html(self) -> str:
        """Returns the report as one page of HTML, which needs no network."""
        return import_module("clearspan.view").html_page(self)

    def save(self, path: str | Path) -> None:
        """Writes the report as one page of HTML, which needs no network.

        Raises:
            InvalidArgumentError: There is no such folder, or the path is one.

        Example:
            >>> import clearspan, os, tempfile
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> found = clearspan.analysis.report(bridge, "def area(self): return self", progress=False)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     found.save(f"{folder}/report.html")
            ...     os.path.getsize(f"{folder}/report.html") < 250_000
            True
        """
        import_module("clearspan.view").save_report(self, path)

    def show(self) -> Path:
        """Opens the report's page in the browser; returns the path of the temporary file that it is in."""
        return import_module("clearspan.view").open_report(self)

    def to_dict(self) -> dict[str, object]:
        """Returns the report as plain data for JSON; probabilities and attention are rounded to 6 decimals.

        - `model`: `name`, `architecture`, `parameters`, `layers`, `heads`, `d_model`, `context`, `vocabulary`
        - `text`
        - `tokens`, one object a position: `position`, `id`, `text`, `probability` (of this token after the ones
          before it; null at position 0), `predictions` (of the next token, likeliest first: `id`, `text`,
          `probability`)
        - `logit_lens`, one object a depth: `depth` (`"embed"`, then the layer whose block the stream leaves), and by
          position `ids`, `texts`, `probabilities` (of the likeliest token at that depth), `final_ranks`,
          `final_probabilities` (of the token that the model itself predicts; rank 0 is the likeliest)
        - `head_scores`: `induction` and `previous_token`, each `[layer][head]`
        - `causal_effect`: `target` (`id`, `text`), `log_probability` in nats, `drop` in nats, `[layer][position]`
        - `attention`: `[layer][head][query position][key position]`
        """
        return {
            "model": asdict(self.model),
            "text": self.text,
            "tokens": list(self._tokens()),
            "logit_lens": list(self._depths()),
            "head_scores": {
                "induction": _plain(self.heads.induction),
                "previous_token": _plain(self.heads.previous_token),
            },
            "causal_effect": {
                "target": {"id": self.effect.targets[0], "text": self.target},
                "log_probability": self.effect.log_prob,
                "drop": _plain(self.effect.drop),
            },
            "attention": _plain(self.patterns),
        }

    def _tokens(self) -> Iterator[dict[str, object]]:
        found = self.predictions
        columns = (self.token_ids, _plain(found.token_probs), found.top_ids.tolist(), _plain(found.top_probs))
        for position, (token, probability, ids, probs) in enumerate(zip(*columns, strict=True)):
            guesses = [{"id": i, "text": self.words[i], "probability": p} for i, p in zip(ids, probs, strict=True)]
            yield {
                "position": position,
                "id": token,
                "text": self.words[token],
                "probability": probability,
                "predictions": guesses,
            }

    def _depths(self) -> Iterator[dict[str, object]]:
        lens = self.lens
        for row, depth in enumerate(lens.depths):
            ids = lens.top_ids[row].tolist()
            yield {
                "depth": depth,
                "ids": ids,
                "texts": [self.words[i] for i in ids],
                "probabilities": _plain(lens.top_probs[row]),
                "final_ranks": lens.final_ranks[row].tolist(),
                "final_probabilities": _plain(lens.final_probs[row]),
            }


def _plain(values: Tensor) -> Any:
    """Returns a tensor as nested lists, rounded to 6 decimals, with None for what is no finite number."""

    def finite(one: Any) -> Any:
        if isinstance(one, list):
            return [finite(each) for each in one]
        return one if abs(one) < float("inf") else None

    # In float64, where a rounded value prints with no more digits than it was rounded to.
    return finite(values.double().round(decimals=6).tolist())


@no_grad
def report(
    bridge: TransformerBridge,
    input: Input,
    *,
    k: int = 5,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    progress: bool | Progress = True,
) -> Report:
    """Returns everything that the page and the terminal show about one text.

    Args:
        bridge: A model, without hooks on it. Without a tokenizer, tokens are shown as their ids, `#5`.
        input: Any input of one row of tokens.
        k: Predictions kept for each position.
        attention_mask: 1 for real tokens, where bare token ids have padding.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`.

    Raises:
        InputError: The text is empty, or longer than the model's context.
        InvalidArgumentError: Several rows.
        NoTokenizerError: Text, and the bridge has no tokenizer.
        NotFiniteError: The model returns NaN.

    Example:
        >>> import clearspan
        >>> found = report(clearspan.boot("tiny-bigcode"), "def f(self")
        >>> found.tokens[0], len(found.to_dict()["tokens"])
        ('<|endoftext|>', 5)
    """
    check_bridge(bridge)
    batch = bridge.to_batch(input, attention_mask)
    if batch.rows > 1:
        raise InvalidArgumentError("a report is about one text", expected="an input of one row", got=f"{batch.rows}")
    tokens, layers = batch.ids[:, list(batch.real_columns[0])], bridge.cfg.n_layers
    with shown(progress) as tell:
        found = predictions(bridge, tokens, k=k)
        tell("predictions", 1, 1)
        lens = logit_lens(bridge, tokens)
        tell("logit lens", 1, 1)
        heads = head_scores(bridge)
        tell("head scores", 1, 1)
        names = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in bridge.layers_with("attn")}
        _, cache = bridge.run_with_cache(tokens, list(names.values()), return_type=None)
        patterns = torch.full((layers, bridge.cfg.n_heads, *[tokens.shape[1]] * 2), torch.nan)
        for layer, name in names.items():
            patterns[layer] = cache[name][0].float().cpu()
        tell("attention patterns", 1, 1)
        effect = causal_effect(bridge, tokens, progress=lambda _, done, total: tell("causal effect", done, total))
    ids = torch.cat([part.flatten() for part in (found.tokens, found.top_ids, lens.top_ids)]).unique().tolist()
    words = Words({token: word for token in ids if (word := bridge.text.word(token))})
    text = batch.texts[0] if batch.texts else "" if bridge.tokenizer is None else str(bridge.to_string(tokens[0]))
    cfg, parameters = bridge.cfg, sum(one.numel() for one in bridge.parameters())
    facts = ModelFacts(
        cfg.model_name, cfg.architecture, parameters, layers, cfg.n_heads, cfg.d_model, cfg.n_ctx, cfg.d_vocab
    )
    return Report(facts, text, tuple(tokens[0].tolist()), words, found, lens, heads, effect, patterns)
