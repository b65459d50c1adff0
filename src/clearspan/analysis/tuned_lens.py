"""The tuned lens: for each depth an affine map into what the last layers make of the stream; training, and how near.

Depth 0 is the embedding, depth `l + 1` the residual stream that leaves block `l`; the model itself reads the last one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from clearspan._forward.readout import log_probs
from clearspan.analysis.corpus import Corpus, drawn, pieces
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_positive, is_whole, tensor_of
from clearspan.effects import Effects
from clearspan.errors import InvalidArgumentError
from clearspan.files import read_tensors, write_tensors
from clearspan.inputs import Batch
from clearspan.model import check_bridge
from clearspan.modes import no_grad
from clearspan.plots.charts import lines
from clearspan.progress import Progress, shown
from clearspan.results import Columns, Result, melted

if TYPE_CHECKING:
    import plotly.graph_objects as go

_FORMAT = "clearspan tuned lens 1"
Translator = Callable[[Float[Tensor, "place d_model"], int], Float[Tensor, "place d_model"]]
"""Called as `lens(resid, depth)` before a stream is read: a `TunedLens`, or any function of that form."""


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


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens(Result):
    """One affine translator for each depth but the last, in float32 on the CPU: `h + weight[depth] @ h + bias[depth]`.

    The last depth stays as it is: that stream is what the model itself reads. Printed, a lens shows its losses in
    training.

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
        """Layers of the model, and number of translators."""
        return len(self.weight)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.weight.shape[-1]

    def translate(self, resid: Float[Tensor, "*place d_model"], depth: int) -> Float[Tensor, "*place d_model"]:
        """Returns a stream as it would stand at the last depth, for the model's own norm and unembedding to read.

        Computed in float32 at least, on the stream's device, and returned in its dtype.

        Args:
            resid: The stream at that depth.
            depth: 0 for the embedding, `l + 1` for what leaves block `l`.

        Raises:
            InvalidArgumentError: The lens has no such depth, or another width.

        Example:
            >>> lens = TunedLens(torch.zeros(2, 3, 3), torch.tensor([[0, 0, 1.0], [0, 0, 0]]), torch.empty(0, 2), "m")
            >>> lens.translate(torch.tensor([1.0, 2, 3]), 0)
            tensor([1., 2., 4.])
        """
        resid = tensor_of("resid", resid)
        if not is_whole(depth) or not 0 <= depth <= self.n_layers or not resid.ndim or resid.shape[-1] != self.d_model:
            raise InvalidArgumentError(
                f"the tuned lens of {self.model_name} cannot translate this stream",
                expected=f"a depth from 0 to {self.n_layers}, and [..., d_model={self.d_model}]",
                got=f"depth {depth}, and {list(resid.shape)}",
            )
        if depth == self.n_layers:
            return resid
        return _translated(resid, self.weight[depth].to(resid.device), self.bias[depth].to(resid.device))

    __call__ = translate

    def check_fits(self, bridge: TransformerBridge) -> None:
        """Raises unless a model has this lens's width and depth.

        Raises:
            InvalidArgumentError: It has another.
        """
        check_bridge(bridge)
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

        Width and depth alone tell whether it fits; `model_name` says which model it was trained on.

        Args:
            path: The file.
            bridge: The model that the lens is for.

        Raises:
            InvalidArgumentError: The file holds no tuned lens, or one for a model of another width or depth.
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


def checked_lens(bridge: TransformerBridge, lens: Translator | None) -> Translator:
    """Returns a function that translates a stream before it is read; without a lens, one that changes nothing.

    Raises:
        InvalidArgumentError: A tuned lens of another width or depth, or no function. Of the function returned: the lens
            gave something else than a stream.
    """
    if lens is None:
        return lambda resid, depth: resid
    if isinstance(lens, TunedLens):
        lens.check_fits(bridge)
    elif not callable(lens):
        raise InvalidArgumentError(
            "cannot read through this lens",
            expected="a TunedLens, or a function lens(resid, depth) that returns a stream",
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


def _translated(
    resid: Float[Tensor, "*place d_model"], weight: Float[Tensor, "d_model d_model"], bias: Float[Tensor, "d_model"]
) -> Float[Tensor, "*place d_model"]:
    """Returns `resid + weight @ resid + bias`, computed in the wider dtype and returned in the stream's own."""
    wide = resid.to(torch.promote_types(resid.dtype, weight.dtype))
    return (wide + functional.linear(wide, weight.to(wide), bias.to(wide))).to(resid.dtype)


def train_tuned_lens(
    bridge: TransformerBridge,
    corpus: Corpus,
    *,
    steps: int = 250,
    batch_size: int = 8,
    length: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-3,
    seed: int = 0,
    progress: bool | Progress = True,
) -> TunedLens:
    """Returns a tuned lens trained to predict, at every depth, what the model itself predicts.

    Each depth's translator `h + A h + b` starts with `A = 0, b = 0`, which is the logit lens, and goes down the
    gradient of `KL(final || softmax(read(h + A h + b)))` in nats, mean over the batch's real positions. Each step runs
    the model once and keeps its streams on its own device. The model's parameters get no gradient.

    Args:
        bridge: The model, which stays as it is. Set it to `eval()` if it has dropout.
        corpus: Any input, or any number of them; they are cut into pieces.
        steps: Batches.
        batch_size: Pieces in a batch.
        length: Tokens in a piece, at most.
        learning_rate: Of AdamW, in its first step; it falls linearly to 0.
        weight_decay: Of `A` and `b`, which draws the lens towards the logit lens.
        seed: Of the order of pieces. Torch's own seed is neither read nor changed.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)` after each step.

    Raises:
        InvalidArgumentError: No text, or a size or rate that is not positive.
        NoTokenizerError: Texts, and the bridge has no tokenizer.

    Example:
        >>> import inspect, clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> lens = train_tuned_lens(bridge, [inspect.getsource(inspect)], steps=4, batch_size=2, length=64)
        >>> bool((lens.losses[-1] < lens.losses[0]).all())
        True

    References:
        Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv:2303.08112,
        section 3: translators and loss. Its authors' code takes SGD with Nesterov momentum and 262,144 tokens a step;
        here it is AdamW, which needs fewer.
    """
    check_counts(steps=steps, batch_size=batch_size)
    check_counts(0, seed=seed)
    check_positive(learning_rate=learning_rate)
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        check_positive(weight_decay=weight_decay)
    rows = pieces(bridge, corpus, length)
    n_layers, d_model = bridge.cfg.n_layers, bridge.cfg.d_model
    weights, biases = (
        [torch.zeros(*shape, device=bridge.device, requires_grad=True) for _ in range(n_layers)]
        for shape in ((d_model, d_model), (d_model,))
    )
    affines = list(zip(weights, biases, strict=True))
    optimizer = torch.optim.AdamW([*weights, *biases], lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = torch.empty(steps, n_layers)
    with shown(progress) as tell:
        batches = drawn(rows.rows, size=min(batch_size, rows.rows), count=steps, seed=seed)
        for step, numbers in enumerate(batches):
            losses[step] = _gradients(bridge, rows.select(numbers), affines)
            optimizer.step()
            schedule.step()
            tell("tuned lens", step + 1, steps)
    weight, bias = (torch.stack(parts).detach().cpu() for parts in (weights, biases))
    return TunedLens(weight, bias, losses, bridge.cfg.model_name or bridge.cfg.architecture)


def _gradients(bridge: TransformerBridge, batch: Batch, affines: list[tuple[Tensor, Tensor]]) -> Float[Tensor, "depth"]:
    """Puts one batch's gradients on the translators, and returns its losses. One depth's graph exists at a time."""
    *streams, last = _real_streams(bridge, batch)
    with torch.no_grad():
        final = log_probs(bridge, last)
    losses = []
    for stream, affine in zip(streams, affines, strict=True):
        with torch.enable_grad():
            loss = kl_divergence(final, log_probs(bridge, _translated(stream, *affine))).mean()
        # Not `loss.backward()`, which would give the model's parameters gradients too.
        for parameter, gradient in zip(affine, torch.autograd.grad(loss, affine), strict=True):
            parameter.grad = gradient
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@no_grad
def _real_streams(bridge: TransformerBridge, batch: Batch) -> list[Float[Tensor, "place d_model"]]:
    """Returns the stream at every depth of a batch's real tokens, row after row."""
    names, n_layers = stream_names(bridge.cfg.n_layers), bridge.cfg.n_layers
    _, cache = bridge.run_with_cache(batch, names, return_type=None, stop_at_layer=n_layers)
    real = batch.real.bool()
    return [cache[name][real] for name in names]


@dataclass(frozen=True, eq=False, repr=False)
class LensDivergence(Effects):
    """How far two lenses are from the model's own predictions: KL(final || lens) in nats, by lens and depth.

    Attributes:
        positions: How many positions the mean is over.
    """

    positions: int = 0

    @property
    def logit_lens(self) -> Float[Tensor, "depth"]:
        """Of the stream read as it is."""
        return self.select(lens="logit lens").mean()

    @property
    def tuned_lens(self) -> Float[Tensor, "depth"]:
        """Of the stream read through the lens."""
        return self.select(lens="tuned lens").mean()


@no_grad
def lens_divergence(
    bridge: TransformerBridge, corpus: Corpus, lens: Translator, *, batch_size: int = 8, length: int = 128
) -> LensDivergence:
    """Returns how far a tuned lens and the logit lens are from the model's predictions, on text it was not trained on.

    Args:
        bridge: The model.
        corpus: Held-out texts: any input, or any number of them; they are cut into pieces.
        lens: A lens for this model, or a function `lens(resid, depth)`.
        batch_size: Pieces that run at a time.
        length: Tokens in a piece, at most.

    Raises:
        InvalidArgumentError: No text, a size that is not positive, or a lens of another width or depth.
        NoTokenizerError: Texts, and the bridge has no tokenizer.

    Example:
        >>> import inspect, clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> lens = train_tuned_lens(bridge, [inspect.getsource(inspect)], steps=4, batch_size=2, length=64)
        >>> found = lens_divergence(bridge, [inspect.getsource(inspect.cleandoc)], lens)
        >>> bool((found.tuned_lens[:-1] < found.logit_lens[:-1]).all())
        True

    References:
        Belrose et al. (2023), arXiv:2303.08112.
    """
    check_counts(batch_size=batch_size)
    translate = checked_lens(bridge, lens)
    rows = pieces(bridge, corpus, length)
    totals = torch.zeros(2, bridge.cfg.n_layers + 1, dtype=torch.double)
    for batch in rows.split(batch_size):
        streams = _real_streams(bridge, batch)
        final = log_probs(bridge, streams[-1])
        for depth, stream in enumerate(streams):
            for number, seen in enumerate((stream, translate(stream, depth))):
                totals[number, depth] += float(kl_divergence(final, log_probs(bridge, seen)).sum())
    positions = int(rows.lengths.sum())
    return LensDivergence(
        {"KL(final || lens)": (totals / positions).float()[..., None]},
        {"lens": ("logit lens", "tuned lens"), "depth": tuple(range(bridge.cfg.n_layers + 1))},
        texts={"depth": depth_names(bridge.cfg.n_layers)},
        what=f"the stream at each depth, mean over {positions} positions",
        units={"KL(final || lens)": "nats"},
        positions=positions,
    )
