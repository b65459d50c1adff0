"""Everything about one text and one model in one frozen value, which the page and the terminal show."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.heads.heads import HeadScores, head_scores
from clearspan.analysis.lenses.lens import LogitLens, logit_lens
from clearspan.analysis.progress import Progress, silent
from clearspan.bridge import TransformerBridge
from clearspan.errors import InputError

from .effect import CausalEffect, causal_effect
from .predictions import Predictions, predictions


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
        text: As given.
        token_ids: As the model reads it, BOS included.
        words: The text of every token id that appears anywhere in the report.
        predictions: Likeliest next tokens.
        lens: Logit lens.
        heads: Induction and previous-token scores, on random tokens rather than this text.
        effect: Causal effect on the last prediction.
        patterns: Attention of every head on this text.
    """

    model: ModelFacts
    text: str
    token_ids: tuple[int, ...]
    words: Mapping[int, str]
    predictions: Predictions
    lens: LogitLens
    heads: HeadScores
    effect: CausalEffect
    patterns: Float[Tensor, "layer head q_pos k_pos"]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The text of each token, by position."""
        return tuple(self.words[i] for i in self.token_ids)

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
                "induction": rounded(self.heads.induction),
                "previous_token": rounded(self.heads.previous_token),
            },
            "causal_effect": {
                "target": {"id": self.effect.target, "text": self.words[self.effect.target]},
                "log_probability": self.effect.log_prob,
                "drop": rounded(self.effect.drop),
            },
            "attention": rounded(self.patterns),
        }

    def _tokens(self) -> Iterator[dict[str, object]]:
        probabilities = [None, *rounded(self.predictions.next_probs)]
        ids, probs = self.predictions.top_ids.tolist(), rounded(self.predictions.top_probs)
        for position, (token, text) in enumerate(zip(self.token_ids, self.tokens, strict=True)):
            yield {
                "position": position,
                "id": token,
                "text": text,
                "probability": probabilities[position],
                "predictions": [
                    {"id": i, "text": self.words[i], "probability": p}
                    for i, p in zip(ids[position], probs[position], strict=True)
                ],
            }

    def _depths(self) -> Iterator[dict[str, object]]:
        lens = self.lens
        for row, depth in enumerate(lens.depths):
            ids = lens.top_ids[row].tolist()
            yield {
                "depth": depth,
                "ids": ids,
                "texts": [self.words[i] for i in ids],
                "probabilities": rounded(lens.top_probs[row]),
                "final_ranks": lens.final_ranks[row].tolist(),
                "final_probabilities": rounded(lens.final_probs[row]),
            }


def rounded(values: Tensor, decimals: int = 6) -> list:
    """Returns a tensor as nested lists with that many decimals."""
    # In float64, where a rounded value prints with no more digits than it was rounded to.
    return values.double().round(decimals=decimals).tolist()


@torch.no_grad()
def report(bridge: TransformerBridge, text: str, *, k: int = 5, progress: Progress = silent) -> Report:
    """Returns everything that the page and the terminal show about one text.

    Args:
        bridge: A model with a tokenizer.
        text: At least one token, and with BOS at most `bridge.cfg.n_ctx`.
        k: Predictions kept for each position.
        progress: Called as `progress(stage, done, total)` after each step.

    Raises:
        InputError: The text is empty, or longer than the model's context.
        NoTokenizerError: The bridge has no tokenizer.
        NotFiniteError: The model returns NaN.

    Example:
        >>> import clearspan
        >>> found = report(clearspan.boot("tiny-bigcode"), "def f(self")
        >>> found.tokens[0], len(found.to_dict()["tokens"])
        ('<|endoftext|>', 5)
    """
    tokens = _encoded(bridge, text)
    found = predictions(bridge, tokens, k=k)
    progress("predictions", 1, 1)
    lens = logit_lens(bridge, tokens)
    progress("logit lens", 1, 1)
    heads = head_scores(bridge)
    progress("head scores", 1, 1)
    patterns = _patterns(bridge, tokens)
    progress("attention patterns", 1, 1)
    effect = causal_effect(bridge, tokens, progress=progress)
    shown = [tokens.cpu(), found.top_ids, lens.top_ids, torch.tensor([effect.target])]
    ids = torch.cat([part.flatten() for part in shown]).unique()
    return Report(
        model=_facts(bridge),
        text=text,
        token_ids=tuple(tokens[0].tolist()),
        words=dict(zip(ids.tolist(), cast("list[str]", bridge.to_str_tokens(ids)), strict=True)),
        predictions=found,
        lens=lens,
        heads=heads,
        effect=effect,
        patterns=patterns,
    )


def _encoded(bridge: TransformerBridge, text: str) -> Int[Tensor, "1 pos"]:
    """Returns the text's token ids, checked against the context."""
    if not text:
        raise InputError("cannot report on an empty text", expected="at least one character")
    tokens = bridge.to_tokens(text)
    count, limit = tokens.shape[1], bridge.cfg.n_ctx
    if count > limit:
        raise InputError(
            f"the text is {count} tokens long, and {bridge.cfg.model_name} reads at most {limit}",
            fix=f"shorten it by {count - limit} tokens (about {1 - limit / count:.0%} of its {len(text)} characters)",
        )
    return tokens


def _patterns(bridge: TransformerBridge, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "layer head q_pos k_pos"]:
    """Returns every head's attention on the text, in float32 on the CPU."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers)]
    _, cache = bridge.run_with_cache(tokens, names_filter=names)
    return torch.stack([cache[name][0].float().cpu() for name in names])


def _facts(bridge: TransformerBridge) -> ModelFacts:
    cfg = bridge.cfg
    return ModelFacts(
        name=cfg.model_name,
        architecture=cfg.architecture,
        parameters=sum(p.numel() for p in bridge.hf_model.parameters()),
        layers=cfg.n_layers,
        heads=cfg.n_heads,
        d_model=cfg.d_model,
        context=cfg.n_ctx,
        vocabulary=cfg.d_vocab,
    )
