"""An alignment: the subspace of a model's values that was found to carry a variable, with its controls."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.evaluations.estimate import Estimate, estimate
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import bars
from clearspan.points import HookFunction
from clearspan.results import Columns, Result
from clearspan.statistics import Interval, share_interval
from clearspan.tensor_files import read_tensors, write_tensors

from .interchange import interchange_accuracy
from .interchange_examples import InterchangeExamples
from .interchange_result import InterchangeAccuracy
from .interchange_site import InterchangeSite, within

if TYPE_CHECKING:
    import plotly.graph_objects as go

_FORMAT = "clearspan alignment 1"

LEARNED = "learned subspace"


@dataclass(frozen=True, eq=False, repr=False)
class Alignment(Result):
    """A subspace that was trained to carry a variable, and how well it does on pairs that it was not trained on.

    As a result it is a table of accuracies, the controls beside the subspace.

    Attributes:
        site: The point, or heads or neurons of it, in whose values the subspace is.
        basis: Orthonormal columns, in float32 on the CPU.
        losses: Cross-entropy of the labels in nats on each step's batch, before that step.
        hits: By what was exchanged: 1 where the answer is the label and 0 where it is not, for each draw of a control
            and each pair. What is not marked as training is on held-out pairs.
        model_name: The model that it was found in.

    References:
        Geiger et al. (2023), "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
        Representations", arXiv:2303.02536.
    """

    site: InterchangeSite
    basis: Float[Tensor, "d k"]
    losses: Float[Tensor, "step"]
    hits: Mapping[str, Float[Tensor, "draw example"]]
    model_name: str

    @property
    def title(self) -> str:
        """The model, the site, and on how many pairs accuracies are."""
        return (
            f"alignment in {self.model_name}: {self.dimensions} of {self.site.width} dimensions at {self.site}; "
            f"interchange accuracy on {self.hits[LEARNED].shape[1]} held-out pairs"
        )

    @property
    def dimensions(self) -> int:
        """Dimensions of the subspace."""
        return self.basis.shape[1]

    @property
    def accuracy(self) -> float:
        """Interchange intervention accuracy of the subspace on held-out pairs."""
        return self.estimate().mean

    def estimate(self, exchanged: str = LEARNED) -> Estimate:
        """Returns the accuracy and its standard error over pairs; of a control, the mean over its draws.

        Args:
            exchanged: A key of `hits`.
        """
        return estimate(self._of(exchanged).mean(0))

    def interval(self, exchanged: str = LEARNED, level: float = 0.95) -> Interval:
        """Returns the accuracy with Wilson's score interval, which has a width also at 0 and 1."""
        return share_interval(self._of(exchanged).mean(0), level=level)

    # --- use ---------------------------------------------------------------------------------------------------------

    def hooks(
        self, source: Float[Tensor, "batch *place axes"], positions: int | Int[Tensor, "batch *place"]
    ) -> list[tuple[str, HookFunction]]:
        """Returns hooks that put a source's values into the subspace: `base + (source - base) @ basis @ basis.T`.

        They go into `bridge.run_with_hooks`, `bridge.hooks`, and `bridge.generate(..., fwd_hooks=...)`.

        Args:
            source: Values at the site's point, such as `cache[name][:, 3]`: one for each row, or one for each row and
                place.
            positions: Where they go, in the sequence, from 0: one for all rows, one for each, or `[batch, place]`.

        Raises:
            InvalidArgumentError: Values of another shape, or positions that are not one for each of them. Of the run:
                other rows, or positions that it does not have.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> site = InterchangeSite.of(bridge, "blocks.1.hook_resid_post", None, None)
            >>> everything = Alignment(site, torch.eye(256), torch.empty(0), {}, "tiny-bigcode")
            >>> logits, cache = bridge.run_with_cache("import os")
            >>> hooks = everything.hooks(cache[site.name][:, 2], positions=2)
            >>> changed = bridge.run_with_hooks("import re", fwd_hooks=hooks)
            >>> bool(changed[0, -1].argmax() == logits[0, -1].argmax())
            True
        """
        axes = len(self.site.shape)
        at = torch.as_tensor(positions).cpu()
        lead = source.shape[: source.ndim - axes]
        if list(source.shape[len(lead) :]) != list(self.site.shape) or len(lead) not in (1, 2):
            raise InvalidArgumentError(
                "these are no values of the alignment's point",
                expected=f"[batch, {', '.join(map(str, self.site.shape))}], or [batch, place, ...]",
                got=str(list(source.shape)),
                where=self.site.name,
            )
        at = at.expand(lead) if at.ndim == 0 else at
        if at.shape != lead or (at < 0).any():
            raise InvalidArgumentError(
                "positions are not one for each value", expected=f"{list(lead)}, from 0", got=f"{at.tolist()}"
            )
        places = (len(source), -1)
        vectors = self.site.vectors(source).reshape(*places, self.site.width)
        return self.site.hooks(vectors, at.reshape(places), within(self.basis))

    def project(self, values: Float[Tensor, "*place axes"]) -> Float[Tensor, "*place k"]:
        """Returns the coordinates in the subspace of values at the site's point, in float32 at least."""
        vectors = self.site.vectors(values)
        return vectors @ self.basis.to(vectors)

    def overlap(self, other: Float[Tensor, "d j"]) -> float:
        """Returns the mean squared cosine of the angles between this subspace and another.

        `|basis.T @ other|² / min(k, j)`: 1 where one lies in the other, on average `max(k, j) / d` by chance.

        Args:
            other: Orthonormal columns.
        """
        squares = (self.basis.T @ other.to(self.basis)).square().sum()
        return (squares / min(self.dimensions, other.shape[1])).item()

    def test(
        self, bridge: TransformerBridge, examples: InterchangeExamples, *, batch_size: int = 64
    ) -> InterchangeAccuracy:
        """Returns the accuracy of the subspace on other examples, of which positions may be others too.

        Raises:
            InvalidArgumentError: The model is another.
        """
        self.check_fits(bridge)
        site = self.site
        return interchange_accuracy(
            bridge,
            examples,
            name=site.name,
            heads=site.heads,
            neurons=site.neurons,
            subspace=self.basis,
            batch_size=batch_size,
        )

    # --- files -------------------------------------------------------------------------------------------------------

    def check_fits(self, bridge: TransformerBridge) -> None:
        """Raises unless a model has the point, with values of the alignment's shape.

        Raises:
            UnknownPointError: It lacks the point.
            InvalidArgumentError: A value has another shape.
        """
        point = bridge.hook_dict[self.site.name]
        shape = tuple(point.sizes[axis] for axis in point.axes[2:])
        if shape != self.site.shape:
            raise InvalidArgumentError(
                f"the alignment in {self.model_name} does not fit {bridge.cfg.model_name or bridge.cfg.architecture}",
                expected=f"values of shape {list(self.site.shape)} at each position",
                got=str(list(shape)),
                where=self.site.name,
                fix="fit_alignment(bridge, examples, ...)",
            )

    def save(self, path: str | Path) -> None:
        """Writes the alignment to one safetensors file, with its site and the model's name in the metadata."""
        site = self.site
        facts = {"name": site.name, "shape": site.shape, "heads": site.heads, "neurons": site.neurons}
        tensors = {"basis": self.basis, "losses": self.losses}
        tensors |= {f"hits.{exchanged}": hits for exchanged, hits in self.hits.items()}
        metadata = {
            "model": self.model_name,
            "site": json.dumps(facts),
            "exchanged": json.dumps(list(self.hits)),
        }
        write_tensors(path, _FORMAT, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, bridge: TransformerBridge) -> Self:
        """Returns the alignment of a file that `save` wrote.

        That it fits is known by the point and its shape alone: `model_name` says in which model it was found.

        Args:
            path: The file.
            bridge: The model that the alignment is for.

        Raises:
            InvalidArgumentError: The file is no alignment, or one for values of another shape.
            UnknownPointError: The model lacks the point.
            FileNotFoundError: There is no such file.
        """
        tensors, metadata = read_tensors(path, _FORMAT, what="alignment", written_by="Alignment.save")
        facts = json.loads(metadata["site"])
        hits = {name: tensors[f"hits.{name}"] for name in json.loads(metadata["exchanged"])}
        heads, neurons = (None if facts[of] is None else tuple(facts[of]) for of in ("heads", "neurons"))
        site = InterchangeSite(facts["name"], tuple(facts["shape"]), heads, neurons)
        found = cls(site, tensors["basis"], tensors["losses"], hits, metadata["model"])
        found.check_fits(bridge)
        return found

    # --- as a result -------------------------------------------------------------------------------------------------

    def columns(self) -> Columns:
        """Returns one row for each thing exchanged; `low` and `high` are the ends of the 95 % interval."""
        intervals = [self.interval(exchanged) for exchanged in self.hits]
        return {
            "exchanged": list(self.hits),
            "accuracy": [each.mean.item() for each in intervals],
            "low": [each.low.item() for each in intervals],
            "high": [each.high.item() for each in intervals],
            "draws": [len(hits) for hits in self.hits.values()],
        }

    def plot(self) -> "go.Figure":
        """Returns the accuracies as bars."""
        values = [self.estimate(exchanged).mean for exchanged in self.hits]
        figure = bars(values, names=list(self.hits), value_title="interchange accuracy", title=self.title)
        return figure.update_layout(yaxis_range=[0, 1.03])

    def _of(self, exchanged: str) -> Float[Tensor, "draw example"]:
        if exchanged not in self.hits:
            raise InvalidArgumentError(f"nothing is known of {exchanged!r}", expected=", ".join(self.hits))
        return self.hits[exchanged]
