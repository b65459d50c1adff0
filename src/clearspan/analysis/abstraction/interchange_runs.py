"""Runs with an interchange: they go on from the base's residual stream, at the layer in which they are changed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from clearspan.analysis.activations import layers_of
from clearspan.analysis.places import padding_of, target_ids_of
from clearspan.analysis.reporting.predictions import NotFiniteError
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.points import Address

from .interchange_examples import InterchangeExamples
from .interchange_site import Exchange, InterchangeSite


@dataclass(frozen=True, eq=False)
class InterchangeRuns:
    """What runs with an interchange at one site go on from.

    Attributes:
        bridge: The model.
        examples: The pairs.
        site: Where values are exchanged: the point at which they are written.
        start: The layer at which the runs start; None for the embedding.
        entering: The base's residual stream entering that layer, `[example, pos, d_model]`, or its tokens.
        source: The source's vectors.
        answered: What the bases answer without an interchange, as a place among the answers.
    """

    bridge: TransformerBridge
    examples: InterchangeExamples
    site: InterchangeSite
    start: int | None
    entering: Tensor
    source: Float[Tensor, "example place d"]
    answered: Int[Tensor, "example"]

    @property
    def unchanged(self) -> Float[Tensor, "example"]:
        """1 where the base's answer is the label without an interchange."""
        return _right(self.answered, self.examples)

    @classmethod
    def of(
        cls, bridge: TransformerBridge, examples: InterchangeExamples, site: InterchangeSite, batch_size: int
    ) -> Self:
        """Returns the runs of all examples at one site."""
        parts = [runs_of(bridge, batch, [site])[0] for batch in examples.split(batch_size)]
        tensors = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in ("entering", "source", "answered")
        }
        return cls(bridge, examples, parts[0].site, parts[0].start, **tensors)

    def select(self, rows: Tensor | slice) -> Self:
        """Returns the runs of some examples."""
        chosen = {name: getattr(self, name)[rows] for name in ("entering", "source", "answered")}
        return replace(self, examples=self.examples.select(rows), **chosen)

    def relabelled(self, labels: Int[Tensor, "example"]) -> Self:
        """Returns the same runs, of which other answers are expected."""
        return replace(self, examples=self.examples.relabelled(labels))

    def logits(self, exchange: Exchange) -> Float[Tensor, "example answer"]:
        """Returns the logits of all answers after an interchange. Gradients reach what the exchange is made of."""
        examples, n_layers = self.examples, self.bridge.cfg.n_layers
        last = self.bridge.run_with_hooks(
            self.entering,
            fwd_hooks=self.site.hooks(self.source, examples.base_columns, exchange),
            attention_mask=_padding(examples.base_mask),
            start_at_layer=self.start,
            stop_at_layer=n_layers,
        )
        return _answer_logits(self.bridge, last, examples)

    def loss(self, exchange: Exchange) -> Float[Tensor, ""]:
        """Returns the mean cross-entropy of the labels among the answers after an interchange, in nats."""
        logits = self.logits(exchange)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(exact, self.examples.targets().to(exact.device))

    @torch.no_grad()
    def hits(self, exchange: Exchange, batch_size: int) -> Float[Tensor, "example"]:
        """Returns 1 where the answer after an interchange is the label, on the CPU."""
        parts = []
        for start in range(0, len(self.examples), batch_size):
            runs = self.select(slice(start, start + batch_size))
            parts.append(_right(runs.logits(exchange).argmax(-1), runs.examples))
        return torch.cat(parts)


@torch.no_grad()
def runs_of(
    bridge: TransformerBridge, examples: InterchangeExamples, sites: Sequence[InterchangeSite]
) -> tuple[InterchangeRuns, ...]:
    """Returns the runs of some examples at several sites, from one run of the bases and one of the sources.

    Raises:
        InvalidArgumentError: The model is in training mode, a label or an answer is no token of its vocabulary, or
            values at a site are integers.
        NotFiniteError: The base's logits are infinite or not numbers.
        PointNotReachedError: A site is after the last block.
    """
    check_runnable(bridge, examples)
    entries = [_entry(bridge, site) for site in sites]
    names = [f"blocks.{start}.hook_resid_pre" for _, start in entries if start is not None]
    last, entering = bridge.run_with_cache(
        examples.base,
        names_filter=names or ["blocks.0.hook_resid_pre"],
        attention_mask=_padding(examples.base_mask),
        stop_at_layer=bridge.cfg.n_layers,
    )
    answered = _answer_logits(bridge, last, examples).argmax(-1).cpu()
    source_names = [site.name for site in sites]
    _, read = bridge.run_with_cache(
        examples.source,
        names_filter=source_names,
        attention_mask=_padding(examples.source_mask),
        stop_at_layer=max(layers_of(source_names), default=-1) + 1,
        return_type=None,
    )
    columns, rows = examples.source_columns, torch.arange(len(examples))[:, None]
    runs = []
    for site, (written, start) in zip(sites, entries, strict=True):
        value = read[site.name]
        if not value.is_floating_point():
            raise InvalidArgumentError(
                "values at this point are no activations",
                expected="floating point",
                got=str(value.dtype),
                where=site.name,
            )
        state = examples.base if start is None else entering[f"blocks.{start}.hook_resid_pre"]
        source = site.vectors(value[rows, columns])
        runs.append(InterchangeRuns(bridge, examples, written, start, state, source, answered))
    return tuple(runs)


def _entry(bridge: TransformerBridge, site: InterchangeSite) -> tuple[InterchangeSite, int | None]:
    """Returns where the values of a site are written, and the layer at which runs start.

    What leaves a block is written as what enters the next one, so that the block need not be run.
    """
    start = Address.parse(site.name).depth
    if start is not None and start < bridge.cfg.n_layers and site.name.endswith("_post"):
        return replace(site, name=f"blocks.{start}.hook_resid_pre"), start
    layers = layers_of([site.name])
    return site, layers[0] if layers else None


def check_runnable(bridge: TransformerBridge, examples: InterchangeExamples) -> None:
    """Raises unless the model is in evaluation mode, and labels and answers are tokens of its vocabulary."""
    if bridge.hf_model.training:
        raise InvalidArgumentError(
            "interchanges are run on a model in evaluation mode", got="training mode", fix="bridge.hf_model.eval()"
        )
    target_ids_of(bridge, examples.labels, len(examples))
    if examples.answers is not None:
        target_ids_of(bridge, torch.tensor(examples.answers), len(examples.answers))


def _padding(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else padding_of(mask)


def _answer_logits(
    bridge: TransformerBridge, last: Float[Tensor, "example pos d_model"], examples: InterchangeExamples
) -> Float[Tensor, "example answer"]:
    """Returns the logits of the answers after each base's last token."""
    at_last = last[torch.arange(len(last)), examples.last_columns]
    logits = bridge.read_out(at_last[:, None], examples.answers)[:, 0]
    if not logits.detach().amax(-1).isfinite().all():
        raise NotFiniteError(
            "the logits of the answers are not finite",
            got=str(logits.dtype),
            fix="clearspan.boot(model, dtype=torch.float32), if they overflow",
        )
    return logits


def _right(answered: Int[Tensor, "example"], examples: InterchangeExamples) -> Float[Tensor, "example"]:
    return (answered.cpu() == examples.targets()).float()
