"""Composition scores: how much of what one head writes is what another one reads."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.checks import check_counts
from clearspan.errors import InvalidArgumentError
from clearspan.modes import no_grad
from clearspan.plots import HeatMap
from clearspan.results import Columns, Result
from clearspan.weights.factored_matrix import FactoredMatrix, triangular

Composition = Literal["Q", "K", "V"]


@dataclass(frozen=True, eq=False, repr=False)
class CompositionScores(Result):
    """How strongly heads read what earlier heads write.

    Attributes:
        scores: `|left right| / (|left| |right|)` in Frobenius norms, from 0 to 1, by writer and reader; 0 where the
            writer is not in an earlier layer. On the CPU.
        baseline: The mean score of as many random heads of the same shapes, Gaussian factors.
        deviation: Standard deviation of the random scores.
        mode: Whether the reader uses it for queries, keys or values.
    """

    scores: Float[Tensor, "layer head layer head"]
    baseline: float
    deviation: float
    mode: Composition

    ranked_by: ClassVar[str | None] = "score"

    @property
    def title(self) -> str:
        """What it is, with the baseline."""
        return f"{self.mode}-composition; random heads have {self.baseline:z.4f} ± {self.deviation:z.4f}"

    @property
    def above_baseline(self) -> Float[Tensor, "layer head layer head"]:
        """Scores minus the baseline; 0 where the writer is not in an earlier layer."""
        return torch.where(self.scores > 0, self.scores - self.baseline, 0)

    def columns(self) -> Columns:
        """Returns one row for each pair of heads whose writer is in an earlier layer."""
        layers, heads = self.scores.shape[:2]
        head = torch.arange(layers * heads)
        writer, reader = (head[:, None] // heads < head // heads).nonzero(as_tuple=True)
        found = self.scores.reshape(layers * heads, -1)[writer, reader]
        name = [f"L{i // heads}H{i % heads}" for i in range(layers * heads)]
        return {
            "writer": [name[i] for i in writer.tolist()],
            "reader": [name[i] for i in reader.tolist()],
            "score": found.tolist(),
            "above_baseline": (found - self.baseline).tolist(),
            "deviations": ((found - self.baseline) / self.deviation).tolist() if self.deviation else [0.0] * len(found),
        }

    def chart(self) -> HeatMap:
        """Returns a heat map of the scores above the baseline, writers down, readers from left to right."""
        layers, heads = self.scores.shape[:2]
        names = [f"L{layer}H{head}" for layer in range(layers) for head in range(heads)]
        values = self.above_baseline.reshape(layers * heads, -1)
        return HeatMap(values, names, names, "reader", "writer", "score", self.title)


@no_grad
def composition_scores(
    OV: FactoredMatrix, QK: FactoredMatrix, mode: Composition, *, samples: int = 4, seed: int = 0
) -> CompositionScores:
    """Returns the composition scores of all pairs of heads, and a random baseline.

    `Q`: `W_OV W_QK`, the writer changes what the reader asks for; `K`: `W_OV W_QK^T`, what it finds; `V`:
    `W_OV W_OV`, what it moves. Weights multiply rows from the right, as everywhere here, so the writer is on the left.
    The scores ignore norms between the heads: `bridge.processed()` folds their weights into the readers.

    Args:
        OV: `[layer, head, d_model, d_model]`.
        QK: The same.
        mode: The kind of composition.
        samples: Random pairs of heads, in multiples of all heads, for the baseline.
        seed: Seed of the baseline.

    Raises:
        InvalidArgumentError: Another mode.

    References:
        Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", transformer-circuits.pub: the scores,
        and the baseline of random matrices.
    """
    if mode not in ("Q", "K", "V"):
        raise InvalidArgumentError(f"no composition {mode!r}", expected="'Q', 'K' or 'V'")
    check_counts(samples=samples)
    check_counts(0, seed=seed)
    right = {"Q": QK, "K": QK.T, "V": OV}[mode]
    layers, heads = OV.shape[:2]
    pairs = _scores(_flat(OV), _flat(right)).reshape(layers, heads, layers, heads).cpu()
    is_earlier = torch.arange(layers)[:, None] < torch.arange(layers)
    generator = torch.Generator().manual_seed(seed)
    random = torch.cat([_scores(_like(OV, generator), _like(right, generator)).flatten() for _ in range(samples)])
    return CompositionScores(pairs * is_earlier[:, None, :, None], random.mean().item(), random.std().item(), mode)


def _flat(matrix: FactoredMatrix) -> FactoredMatrix:
    return FactoredMatrix(matrix.A.flatten(0, 1), matrix.B.flatten(0, 1))


def _like(matrix: FactoredMatrix, generator: torch.Generator) -> FactoredMatrix:
    count = matrix.shape[1]
    A = torch.randn(count, matrix.ldim, matrix.mdim, generator=generator)
    return FactoredMatrix(A, torch.randn(count, matrix.mdim, matrix.rdim, generator=generator))


def _scores(left: FactoredMatrix, right: FactoredMatrix) -> Float[Tensor, "writer reader"]:
    """Returns the scores of all pairs, through matrices no larger than a head."""
    before, after = triangular(left.A), triangular(right.B.mT).mT
    B, A = left.B.to(before.dtype), right.A.to(before.dtype)
    norms = torch.stack([torch.linalg.matrix_norm((b @ A) @ after) for b in before @ B])
    return norms / (left.norm()[:, None] * right.norm())
