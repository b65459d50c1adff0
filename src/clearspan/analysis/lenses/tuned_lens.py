"""The tuned lens: for each depth, an affine map into what the model's last layers would have made of the stream."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import lines
from clearspan.results import Columns, Result, melted
from clearspan.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    import plotly.graph_objects as go

_FORMAT = "clearspan tuned lens 1"


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens(Result):
    """One affine translator for each depth but the last, in float32 on the CPU: `h + weight[depth] @ h + bias[depth]`.

    Depth 0 is the embedding, depth `l + 1` the stream that leaves block `l`. At the last depth, `n_layers`, the stream
    is what the model itself reads, and stays as it is. As a result it is a table of its losses in training.

    Attributes:
        weight: Zero in a lens that changes nothing.
        bias: In units of the residual stream.
        losses: KL(final || lens) in nats on each step's batch, before that step.
        model_name: The model that it was trained on.

    References:
        Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv:2303.08112.
    """

    weight: Float[Tensor, "depth d_model d_model"]
    bias: Float[Tensor, "depth d_model"]
    losses: Float[Tensor, "step depth"]
    model_name: str

    ranked_by: ClassVar[str | None] = "step"

    @property
    def title(self) -> str:
        """The model, sizes, and what the losses are."""
        return (
            f"tuned lens of {self.model_name}: {self.n_layers} translators of width {self.d_model}, "
            f"KL(final || lens) in nats by step of training"
        )

    @property
    def n_layers(self) -> int:
        """Layers of the model, which are as many as the translators."""
        return len(self.weight)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.weight.shape[-1]

    def translate(self, resid: Float[Tensor, "*place d_model"], depth: int) -> Float[Tensor, "*place d_model"]:
        """Returns a stream as it would stand at the last depth, to be read by the model's own norm and unembedding.

        Computed in float32 at least, on the stream's device, and returned in its dtype.

        Args:
            resid: The stream at that depth.
            depth: 0 for the embedding, `l + 1` for what leaves block `l`.

        Raises:
            InvalidArgumentError: A depth that the lens does not have, or a stream of another width.

        Example:
            >>> lens = TunedLens(torch.zeros(2, 3, 3), torch.tensor([[0, 0, 1.0], [0, 0, 0]]), torch.empty(0, 2), "m")
            >>> lens.translate(torch.tensor([1.0, 2, 3]), 0)
            tensor([1., 2., 4.])
        """
        if not 0 <= depth <= self.n_layers or resid.shape[-1] != self.d_model:
            raise InvalidArgumentError(
                f"the tuned lens of {self.model_name} cannot translate this stream",
                expected=f"a depth from 0 to {self.n_layers}, and [..., d_model={self.d_model}]",
                got=f"depth {depth}, and {list(resid.shape)}",
            )
        if depth == self.n_layers:
            return resid
        return translated(resid, self.weight[depth].to(resid.device), self.bias[depth].to(resid.device))

    __call__ = translate

    def check_fits(self, bridge: TransformerBridge) -> None:
        """Raises unless a model has this lens's width and depth.

        Raises:
            InvalidArgumentError: It has another.
        """
        sizes = (bridge.cfg.n_layers, bridge.cfg.d_model)
        if sizes != (self.n_layers, self.d_model):
            raise InvalidArgumentError(
                f"the tuned lens of {self.model_name} does not fit {bridge.cfg.model_name or bridge.cfg.architecture}",
                expected=f"a model of {self.n_layers} layers and d_model {self.d_model}",
                got=f"{sizes[0]} layers and d_model {sizes[1]}",
                fix="train_tuned_lens(bridge, corpus)",
            )

    def save(self, path: str | Path) -> None:
        """Writes the lens to one safetensors file, with the model's name in its metadata."""
        tensors = {"weight": self.weight, "bias": self.bias, "losses": self.losses}
        write_tensors(path, _FORMAT, tensors, {"model": self.model_name})

    @classmethod
    def load(cls, path: str | Path, bridge: TransformerBridge) -> Self:
        """Returns the lens of a file that `save` wrote.

        That it fits is known by width and depth alone: `model_name` says which model it was trained on.

        Args:
            path: The file.
            bridge: The model that the lens is for.

        Raises:
            InvalidArgumentError: The file is no tuned lens, or one for a model of another width or depth.
            FileNotFoundError: There is no such file.
        """
        tensors, metadata = read_tensors(path, _FORMAT, what="tuned lens", written_by="TunedLens.save")
        lens = cls(**tensors, model_name=metadata["model"])
        lens.check_fits(bridge)
        return lens

    def columns(self) -> Columns:
        """Returns one row for each step and depth."""
        steps, depths = self.losses.shape
        return melted(self.losses, "loss", step=range(steps), depth=range(depths))

    def plot(self) -> "go.Figure":
        """Returns the losses by step, one line for each depth."""
        series = {f"depth {depth}": losses for depth, losses in enumerate(self.losses.T.tolist())}
        x = list(range(len(self.losses)))
        return lines(series, x=x, x_title="step", value_title="KL(final || lens), nats", title=self.title)


def translated(
    resid: Float[Tensor, "*place d_model"], weight: Float[Tensor, "d_model d_model"], bias: Float[Tensor, "d_model"]
) -> Float[Tensor, "*place d_model"]:
    """Returns `resid + weight @ resid + bias`, computed in the wider dtype and returned in the stream's own."""
    exact = torch.promote_types(resid.dtype, weight.dtype)
    wide = resid.to(exact)
    return (wide + functional.linear(wide, weight.to(exact), bias.to(exact))).to(resid.dtype)
