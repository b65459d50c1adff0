"""What a stream is taken through before it is read: functions of stream and depth, fitted lenses, and their checks.

Depth 0 is the embedding, depth `l + 1` the residual stream that leaves block `l`; the model itself reads the last one.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.checks import is_whole, tensor_of
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Batch
from clearspan.model import check_bridge
from clearspan.modes import no_grad
from clearspan.results import Result

Translator = Callable[[Float[Tensor, "place d_model"], int], Float[Tensor, "place d_model"]]
"""Called as `lens(resid, depth)` before a stream is read: a fitted lens, or any function of that form."""


def stream_names(n_layers: int) -> list[str]:
    """Returns the hook point of each depth."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(n_layers))]


def depth_names(n_layers: int) -> tuple[str, ...]:
    """Returns a name for each depth: `embed`, then the layer whose block the stream leaves."""
    return ("embed", *(str(layer) for layer in range(n_layers)))


def kl_divergence(
    final: Float[Tensor, "place d_vocab"], other: Float[Tensor, "place d_vocab"]
) -> Float[Tensor, "place"]:
    """Returns `KL(final || other)` in nats, from log-probabilities."""
    return (final.exp() * (final - other)).sum(-1)


@no_grad
def real_streams(bridge: TransformerBridge, batch: Batch) -> list[Float[Tensor, "place d_model"]]:
    """Returns the stream at every depth of a batch's real tokens, row after row."""
    names, n_layers = stream_names(bridge.cfg.n_layers), bridge.cfg.n_layers
    _, cache = bridge.run_with_cache(batch, names, return_type=None, stop_at_layer=n_layers)
    real = batch.real.bool()
    return [cache[name][real] for name in names]


class FittedLens(Result):
    """A lens that was fitted on a model: it takes the stream of a depth to what would stand at the last one.

    The last depth stays as it is: that stream is what the model itself reads.
    """

    model_name: str
    kind: ClassVar[str]
    """What it is, in words."""
    fitted_by: ClassVar[str]
    """The call that makes one."""

    @property
    @abstractmethod
    def n_layers(self) -> int:
        """Layers of the model; the last depth."""

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the residual stream."""

    @abstractmethod
    def _translated(self, resid: Float[Tensor, "*place d_model"], depth: int) -> Float[Tensor, "*place d_model"]:
        """Returns the stream of a depth before the last one as it would stand at the last."""

    def translate(self, resid: Float[Tensor, "*place d_model"], depth: int) -> Float[Tensor, "*place d_model"]:
        """Returns a stream as it would stand at the last depth, for the model's own norm and unembedding to read.

        Computed in float32 at least, on the stream's device, and returned in its dtype.

        Args:
            resid: The stream at that depth.
            depth: 0 for the embedding, `l + 1` for what leaves block `l`.

        Raises:
            InvalidArgumentError: The lens has no such depth, or another width.

        Example:
            >>> from clearspan.analysis import TunedLens
            >>> lens = TunedLens(torch.zeros(2, 3, 3), torch.tensor([[0, 0, 1.0], [0, 0, 0]]), torch.empty(0, 2), "m")
            >>> lens.translate(torch.tensor([1.0, 2, 3]), 0)
            tensor([1., 2., 4.])
        """
        resid = tensor_of("resid", resid)
        if not is_whole(depth) or not 0 <= depth <= self.n_layers or not resid.ndim or resid.shape[-1] != self.d_model:
            raise InvalidArgumentError(
                f"the {self.kind} of {self.model_name} cannot translate this stream",
                expected=f"a depth from 0 to {self.n_layers}, and [..., d_model={self.d_model}]",
                got=f"depth {depth}, and {list(resid.shape)}",
            )
        return resid if depth == self.n_layers else self._translated(resid, depth)

    def __call__(self, resid: Float[Tensor, "*place d_model"], depth: int) -> Float[Tensor, "*place d_model"]:
        """Same as `translate`."""
        return self.translate(resid, depth)

    def check_fits(self, bridge: TransformerBridge) -> None:
        """Raises unless a model has this lens's width and depth.

        Raises:
            InvalidArgumentError: It has another.
        """
        check_bridge(bridge)
        sizes = (bridge.cfg.n_layers, bridge.cfg.d_model)
        if sizes != (self.n_layers, self.d_model):
            raise InvalidArgumentError(
                f"the {self.kind} of {self.model_name} does not fit {name_of(bridge)}",
                expected=f"a model of {self.n_layers} layers and d_model {self.d_model}",
                got=f"{sizes[0]} layers and d_model {sizes[1]}",
                fix=self.fitted_by,
            )


def name_of(bridge: TransformerBridge) -> str:
    """Returns a model's name, or its architecture's where it has none."""
    return bridge.cfg.model_name or bridge.cfg.architecture


def checked_lens(bridge: TransformerBridge, lens: Translator | None) -> Translator:
    """Returns a function that translates a stream before it is read; without a lens, one that changes nothing.

    Raises:
        InvalidArgumentError: A fitted lens of another width or depth, or no function. Of the function returned: the
            lens gave something else than a stream.
    """
    if lens is None:
        return lambda resid, depth: resid
    if isinstance(lens, FittedLens):
        lens.check_fits(bridge)
    elif not callable(lens):
        raise InvalidArgumentError(
            "cannot read through this lens",
            expected="a fitted lens, or a function lens(resid, depth) that returns a stream",
            got=type(lens).__name__,
        )

    def translate(resid: Float[Tensor, "place d_model"], depth: int) -> Float[Tensor, "place d_model"]:
        found = lens(resid, depth)
        if not isinstance(found, Tensor) or found.shape != resid.shape:
            raise InvalidArgumentError(
                "the lens does not return a stream",
                expected=f"[place, d_model], here {list(resid.shape)}",
                got=str(list(found.shape)) if isinstance(found, Tensor) else type(found).__name__,
            )
        return found

    return translate


def mapped(
    resid: Float[Tensor, "*place d_model"],
    weight: Float[Tensor, "d_model d_model"],
    bias: Float[Tensor, "d_model"] | None = None,
) -> Float[Tensor, "*place d_model"]:
    """Returns `weight @ resid + bias`, computed in the wider dtype on the stream's device, in that wider dtype."""
    wide = resid.to(torch.promote_types(resid.dtype, weight.dtype))
    return torch.nn.functional.linear(wide, weight.to(wide), None if bias is None else bias.to(wide))
