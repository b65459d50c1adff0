"""The bridge's attributes about weights: named here, done in this package's modules."""

from typing import TYPE_CHECKING

from torch import Tensor

from clearspan.config import TransformerBridgeConfig
from clearspan.weights.composition import Composition, CompositionScores, composition_scores
from clearspan.weights.factored_matrix import FactoredMatrix
from clearspan.weights.heads import expand_kv_heads
from clearspan.weights.stacked import StackedWeights
from clearspan.weights.ties import ties

if TYPE_CHECKING:
    from clearspan.components import GeneralizedComponent


class WeightMethods(StackedWeights):
    """Weights, and what is computed from weights alone."""

    cfg: TransformerBridgeConfig
    components: "tuple[GeneralizedComponent, ...]"

    @property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """Each weight that is one parameter with others, with their names; empty where none is tied.

        Example:
            >>> import clearspan
            >>> clearspan.boot("tiny-bigcode").tied
            {'W_E': ('W_U',), 'W_U': ('W_E',)}
        """
        return ties(self.components)

    def expand_kv_heads(self, value: Tensor, axis: int = -3, *, by_group: bool = False) -> Tensor:
        """Returns weights or activations of key/value heads for all query heads: a view where one can be.

        The arguments are those of `clearspan.weights.expand_kv_heads`.
        """
        return expand_kv_heads(value, self.cfg.n_heads, axis, by_group=by_group)

    @property
    def QK(self) -> FactoredMatrix:
        """Each head's `W_Q W_K^T`, `[layer, head, d_model, d_model]`: what a query position looks for, by key position.

        Rotation, norms of queries and keys, scale and biases are not in it.

        Raises:
            MissingWeightError: Queries or keys are no linear map of the residual stream.
        """
        return FactoredMatrix(self.W_Q, self.expand_kv_heads(self.W_K).mT)

    @property
    def OV(self) -> FactoredMatrix:
        """Each head's `W_V W_O`, `[layer, head, d_model, d_model]`: what it writes for what it reads. Biases apart."""
        return FactoredMatrix(self.expand_kv_heads(self.W_V), self.W_O)

    def composition_scores(self, mode: Composition, *, samples: int = 4, seed: int = 0) -> CompositionScores:
        """Returns how much each head reads of what earlier heads write, with a random baseline.

        Args:
            mode: What the reader uses it for: `"Q"`, `"K"` or `"V"`.
            samples: Random heads for the baseline, in multiples of all heads.
            seed: Of the baseline.

        Example:
            >>> import clearspan
            >>> found = clearspan.boot("tiny-bigcode").composition_scores("K")
            >>> tuple(found.scores.shape)
            (5, 8, 5, 8)
        """
        return composition_scores(self.OV, self.QK, mode, samples=samples, seed=seed)
