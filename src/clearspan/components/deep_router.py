"""Routers of mixtures that are networks of their own."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace

from clearspan.components.base import GeneralizedComponent
from clearspan.components.mlp import ExpertsBridge, RouterBridge
from clearspan.components.weights import LinearMap
from clearspan.points import Layout, Place


@dataclass(eq=False, repr=False)
class DeepRouterBridge(RouterBridge):
    """A router that is a network, in which layers may follow one another (ZAYA): no linear map gives its logits.

    `logits` is the path, in the router, of the module that gives them, `[batch, pos, expert]`. Weights and indices of
    the experts chosen have rows and positions as one axis. The norm before the mixture is not folded.

    Attributes:
        n_scores: How many logits a token has.
    """

    _: KW_ONLY
    layout: Layout = Layout.TOKENS
    changes_input: bool = True
    n_scores: int = 1

    def chosen(self, what: int | str, experts: ExpertsBridge) -> Place:
        """Returns where weights or indices are: an output of the router, or an argument of the experts."""
        return replace(super().chosen(what, experts), layout=Layout.FLAT)

    def reads(self) -> Iterator[LinearMap]:
        """Yields nothing: the way to the logits is no linear map."""
        return iter(())

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, with how many experts there are to choose from, and how many are chosen."""
        k = self.setting("top_k") if self.k is None else self.k
        own = {"expert": self.n_scores, **({} if k is None else {"k": k})}
        return {**GeneralizedComponent.sizes(self), **own}
