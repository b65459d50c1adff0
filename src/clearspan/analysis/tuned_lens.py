"""The tuned lens: for each depth an affine map into what the last layers make of the stream; training, and how near.

Depth 0 is the embedding, depth `l + 1` the residual stream that leaves block `l`; the model itself reads the last one.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan._forward.readout import log_probs
from clearspan.analysis.corpus import Corpus, drawn, pieces
from clearspan.analysis.translators import (
    FittedLens,
    Translator,
    checked_lens,
    depth_names,
    kl_divergence,
    mapped,
    name_of,
    real_streams,
)
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_positive, is_whole, path_of
from clearspan.effects import Effects
from clearspan.errors import InvalidArgumentError
from clearspan.files import read_published, read_tensors, write_tensors
from clearspan.inputs import Batch
from clearspan.modes import no_grad
from clearspan.plots import LineChart
from clearspan.progress import Progress, shown, told
from clearspan.results import Columns, melted

_FORMAT = "clearspan tuned lens 1"


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens(FittedLens):
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
    kind: ClassVar[str] = "tuned lens"
    fitted_by: ClassVar[str] = "train_tuned_lens(bridge, corpus)"

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

    def _translated(self, resid: Float[Tensor, "*place d_model"], depth: int) -> Float[Tensor, "*place d_model"]:
        return _added(resid, self.weight[depth], self.bias[depth])

    def save(self, path: str | Path) -> None:
        """Writes the lens to one safetensors file, with the model's name in its metadata."""
        tensors = {"weight": self.weight, "bias": self.bias, "losses": self.losses}
        write_tensors(path, _FORMAT, tensors, {"model": self.model_name})

    @classmethod
    def load(cls, path: str | Path, bridge: TransformerBridge) -> Self:
        """Returns the lens of a file that `save` wrote, or of a folder that the package `tuned-lens` wrote.

        Such a folder, as published lenses are, has a `config.json`, and the translators in `params.pt` or
        `params.safetensors`. Of a `.pt` file tensors alone are read, and no code in it runs. Its lens has no losses.
        Width and depth alone tell whether a lens fits; `model_name` says which model it was trained on.

        Args:
            path: The file or folder.
            bridge: The model that the lens is for.

        Raises:
            InvalidArgumentError: There is no tuned lens, or one for a model of another width or depth.
            FileNotFoundError: There is no such file.
        """
        if path_of(path).is_dir():
            lens = cls(**_published(path_of(path)))
        else:
            tensors, metadata = read_tensors(path, _FORMAT, what="tuned lens", written_by="TunedLens.save")
            lens = cls(**tensors, model_name=metadata["model"])
        lens.check_fits(bridge)
        return lens

    def columns(self) -> Columns:
        """Returns one row for each step and depth."""
        steps, depths = self.losses.shape
        return melted(self.losses, "loss", step=range(steps), depth=range(depths))

    def chart(self) -> LineChart:
        """Returns the losses by step, one line for each depth."""
        series = {f"depth {depth}": losses for depth, losses in enumerate(self.losses.T.tolist())}
        x = list(range(len(self.losses)))
        return LineChart(series, x, "step", "KL(final || lens), nats", self.title)


def _published(folder: Path) -> dict[str, Any]:
    """Returns the fields of a lens of the package `tuned-lens`, whose translators are residual as ours are."""
    names = ("params.pt", "params.safetensors")
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files or not (folder / "config.json").is_file():
        raise InvalidArgumentError(
            f"{folder.name} holds no tuned lens",
            expected=f"config.json, and {' or '.join(names)}",
            got=", ".join(sorted(one.name for one in folder.iterdir())) or "an empty folder",
        )
    config = _config(folder / "config.json")
    parts = {str(name).removeprefix("layer_translators."): one for name, one in _tensors(files[-1]).items()}
    layers, width = range(config["num_hidden_layers"]), config["d_model"]
    biases = config.get("bias", True)
    shapes = {f"{layer}.weight": (width, width) for layer in layers}
    shapes |= {f"{layer}.bias": (width,) for layer in layers if biases}
    wrong = [name for name, shape in shapes.items() if name not in parts or parts[name].shape != shape]
    if wrong:
        raise InvalidArgumentError(
            f"{files[-1].name} lacks translators of the lens",
            expected=f"{len(layers)} of d_model {width}, as config.json says",
            got=f"no {', '.join(wrong[:3])} of that shape",
        )
    zero = torch.zeros(width)
    return {
        "weight": torch.stack([parts[f"{layer}.weight"].float() for layer in layers]),
        "bias": torch.stack([parts[f"{layer}.bias"].float() if biases else zero for layer in layers]),
        "losses": torch.empty(0, len(layers)),
        "model_name": str(config.get("base_model_name_or_path", folder.name)),
    }


def _config(path: Path) -> dict[str, Any]:
    """Returns the config of a lens, with whole numbers as sizes."""
    try:
        config = json.loads(path.read_text())
    except ValueError:
        config = None
    sizes = ("d_model", "num_hidden_layers")
    if not isinstance(config, dict) or not all(is_whole(config.get(name)) and config[name] > 0 for name in sizes):
        raise InvalidArgumentError(
            "this is no config.json of a lens", expected=", ".join(sizes), got=f"{config!r}"[:80]
        )
    return config


def _tensors(path: Path) -> dict[Any, Tensor]:
    found = read_published(path, what="tuned lens")
    return {name: one for name, one in found.items() if isinstance(one, Tensor)}


def _added(
    resid: Float[Tensor, "*place d_model"], weight: Float[Tensor, "d_model d_model"], bias: Float[Tensor, "d_model"]
) -> Float[Tensor, "*place d_model"]:
    """Returns `resid + weight @ resid + bias`, computed in the wider dtype and returned in the stream's own."""
    change = mapped(resid, weight, bias)
    return (resid.to(change) + change).to(resid.dtype)


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
    return TunedLens(weight, bias, losses, name_of(bridge))


def _gradients(bridge: TransformerBridge, batch: Batch, affines: list[tuple[Tensor, Tensor]]) -> Float[Tensor, "depth"]:
    """Puts one batch's gradients on the translators, and returns its losses. One depth's graph exists at a time."""
    *streams, last = real_streams(bridge, batch)
    with torch.no_grad():
        final = log_probs(bridge, last)
    losses = []
    for stream, affine in zip(streams, affines, strict=True):
        with torch.enable_grad():
            loss = kl_divergence(final, log_probs(bridge, _added(stream, *affine))).mean()
        # Not `loss.backward()`, which would give the model's parameters gradients too.
        for parameter, gradient in zip(affine, torch.autograd.grad(loss, affine), strict=True):
            parameter.grad = gradient
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


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
        return self.mean()[0]

    @property
    def tuned_lens(self) -> Float[Tensor, "depth"]:
        """Of the stream read through the lens, of whatever kind it is."""
        return self.mean()[1]


@no_grad
def lens_divergence(
    bridge: TransformerBridge,
    corpus: Corpus,
    lens: Translator,
    *,
    batch_size: int = 8,
    length: int = 128,
    progress: bool | Progress = True,
) -> LensDivergence:
    """Returns how far a lens and the logit lens are from the model's predictions, on text it was not fitted on.

    Args:
        bridge: The model.
        corpus: Held-out texts: any input, or any number of them; they are cut into pieces.
        lens: A lens for this model, or a function `lens(resid, depth)`.
        batch_size: Pieces that run at a time.
        length: Tokens in a piece, at most.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`.

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
    with shown(progress) as tell:
        for batch in told(tell, "pieces", rows.split(batch_size)):
            streams = real_streams(bridge, batch)
            final = log_probs(bridge, streams[-1])
            for depth, stream in enumerate(streams):
                for number, seen in enumerate((stream, translate(stream, depth))):
                    totals[number, depth] += float(kl_divergence(final, log_probs(bridge, seen)).sum())
    positions = int(rows.lengths.sum())
    return LensDivergence(
        {"KL(final || lens)": (totals / positions).float()[..., None]},
        {
            "lens": ("logit lens", lens.kind if isinstance(lens, FittedLens) else "tuned lens"),
            "depth": tuple(range(bridge.cfg.n_layers + 1)),
        },
        texts={"depth": depth_names(bridge.cfg.n_layers)},
        what=f"the stream at each depth, mean over {positions} positions",
        units={"KL(final || lens)": "nats"},
        positions=positions,
    )
