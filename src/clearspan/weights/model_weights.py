"""Weights of the whole model by the letters of the field: those of all layers are stacked."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.checks import check_flags, is_whole, tensor_of, whole_numbers
from clearspan.components import BlockBridge, EmbeddingBridge, GeneralizedComponent, PosEmbedBridge, UnembeddingBridge
from clearspan.components.weights import Weight, WeightTensor, check_writable
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import ClearspanError, InvalidArgumentError, MissingPartError, MissingWeightError
from clearspan.weights.composition import Composition, CompositionScores, composition_scores
from clearspan.weights.factored_matrix import FactoredMatrix


class Stacked(Weight[Tensor]):
    """A weight of all layers: a copy that writes through.

    Args:
        part: The part of a block that has it.
        what: What it is, with its axes.
    """

    def __init__(self, part: str, what: str) -> None:
        super().__init__(lambda model: stacked(model.blocks, part, self._name))
        self.part = part
        self.__doc__ = f"{what}: a copy that writes through."


class ModelWeights:
    """A model's weights by letter, and what is computed from weights alone.

    Embeddings and unembedding are live parameters, or views of them. Each layer has its own parameters, so those of all
    layers are stacked copies `[layer, ...]`. They are on the graph of the parameters, and a write into one, or into a
    view of one, reaches the model. `bridge.blocks[l].attn.W_Q` and so on are views, without a copy.

    Example:
        >>> import clearspan, torch
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> with torch.no_grad():
        ...     bridge.W_O[2, 5] = 0
        >>> bool(bridge.blocks[2].attn.W_O[5].any())
        False
    """

    blocks: tuple[BlockBridge, ...]
    components: tuple[GeneralizedComponent, ...]
    embed: EmbeddingBridge
    pos_embed: PosEmbedBridge
    unembed: UnembeddingBridge

    @property
    @abstractmethod
    def cfg(self) -> TransformerBridgeConfig:
        """The model's sizes."""

    W_Q = Stacked("attn", "Query weights `[layer, head, d_model, d_head]`")
    W_K = Stacked("attn", "Key weights `[layer, kv_head, d_model, d_head]`")
    W_V = Stacked("attn", "Value weights `[layer, kv_head, d_model, d_head]`")
    W_O = Stacked("attn", "Output weights `[layer, head, d_head, d_model]`")
    b_Q = Stacked("attn", "Query biases `[layer, head, d_head]`")
    b_K = Stacked("attn", "Key biases `[layer, kv_head, d_head]`")
    b_V = Stacked("attn", "Value biases `[layer, kv_head, d_head]`")
    b_O = Stacked("attn", "Output biases `[layer, d_model]`")
    W_in = Stacked("mlp", "MLP input weights `[layer, d_model, d_mlp]`")
    W_gate = Stacked("mlp", "Weights of the MLP's gate `[layer, d_model, d_mlp]`")
    W_out = Stacked("mlp", "MLP output weights `[layer, d_mlp, d_model]`")
    b_in = Stacked("mlp", "MLP input biases `[layer, d_mlp]`")
    b_gate = Stacked("mlp", "Biases of the MLP's gate `[layer, d_mlp]`")
    b_out = Stacked("mlp", "MLP output biases `[layer, d_model]`")

    def stacked(self, name: str, layers: Iterable[int] | None = None) -> Float[Tensor, "layer ..."]:
        """Returns a weight of some layers, `[layer, ...]`: a copy that writes through.

        Where layers differ, as where some have a mixer in place of attention, `W_Q` of all layers is not there, and
        this gives that of those that have one.

        Args:
            name: Its letters, such as `"W_Q"` or `"b_out"`.
            layers: Which, negative from the end; by default all that have the weight's part.

        Raises:
            MissingWeightError: A layer does not have it, or layers differ in its shape.
            MissingPartError: No layer has the part.
            InvalidArgumentError: No such weight, or no such layer.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> bridge.stacked("W_Q", [0, -1]).shape
            torch.Size([2, 8, 256, 32])
        """
        letters = {key: found.part for key, found in vars(ModelWeights).items() if isinstance(found, Stacked)}
        if not isinstance(name, str) or name not in letters:
            raise InvalidArgumentError(f"no weight {name!r} is of a layer", expected=", ".join(letters))
        part, n_layers = letters[name], len(self.blocks)
        having = self._layers_with(part)
        chosen = whole_numbers("layers", having if layers is None else layers)
        for layer in chosen:
            if not -n_layers <= layer < n_layers:
                raise InvalidArgumentError(f"there is no layer {layer}", expected=f"0 to {n_layers - 1}")
        if not chosen:
            raise MissingPartError(f"no layer has {part!r}", fix="bridge.layer_types() lists what each layer has")
        return stacked([self.blocks[layer] for layer in chosen], part, name)

    @Weight
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding `[d_vocab, d_model]`: the live parameter."""
        return self.embed.W_E

    @Weight
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """Position embedding `[pos, d_model]`: the live parameter, or a view.

        Raises:
            MissingWeightError: Positions are not learned.
        """
        if "pos_embed" not in vars(self):
            reason = "positions come by rotation or as a bias of the scores, not by a learned embedding"
            raise MissingWeightError("the model has no W_pos", reason=reason)
        return self.pos_embed.W_pos

    @Weight
    def W_E_pos(self) -> Float[Tensor, "d_vocab+pos d_model"]:
        """Token embedding, then position embedding `[d_vocab + pos, d_model]`: a copy that writes through.

        Raises:
            MissingWeightError: Positions are not learned, or token embeddings have another width.
        """
        if self.embed.width != self.cfg.d_model:
            reason = f"token embeddings are {self.embed.width} wide, and projected to the residual stream"
            raise MissingWeightError("the model has no W_E_pos", reason=reason)
        return joined([self.W_E, self.W_pos], torch.cat)

    @Weight
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding `[d_model, d_vocab]`: a view."""
        return self.unembed.W_U

    @Weight
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        """Unembedding bias `[d_vocab]`: the live parameter, or without one zeros of stride 0."""
        return self.unembed.b_U

    @property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """Names of tied weights, each with the names of the others that are the same parameter.

        Example:
            >>> import clearspan
            >>> clearspan.boot("tiny-bigcode").tied
            {'W_E': ('W_U',), 'W_U': ('W_E',)}
        """
        return ties(self.components)

    def expand_kv_heads(self, value: Tensor, axis: int = -3, *, by_group: bool = False) -> Tensor:
        """Returns weights or activations of key/value heads for all query heads: see `weights.expand_kv_heads`."""
        return expand_kv_heads(value, self.cfg.n_heads, axis, by_group=by_group)

    @property
    def QK(self) -> FactoredMatrix:
        """Each head's `W_Q W_K^T`, `[layer, head, d_model, d_model]`: what a query position looks for, by key position.

        It leaves out rotation, norms of queries and keys, scale and biases.

        Raises:
            MissingWeightError: Queries or keys are no linear map of the residual stream.
        """
        return FactoredMatrix(self.W_Q, self.expand_kv_heads(self.W_K).mT)

    @property
    def OV(self) -> FactoredMatrix:
        """Each head's `W_V W_O`, `[layer, head, d_model, d_model]`: what it writes for what it reads."""
        return FactoredMatrix(self.expand_kv_heads(self.W_V), self.W_O)

    def QK_for_attn_layers(self) -> tuple[list[int], FactoredMatrix]:
        """Returns the layers with attention, and `QK` of these: for models that have a mixer in the others."""
        queries, keys = self.stacked("W_Q"), self.expand_kv_heads(self.stacked("W_K"))
        return self._layers_with("attn"), FactoredMatrix(queries, keys.mT)

    def OV_for_attn_layers(self) -> tuple[list[int], FactoredMatrix]:
        """Returns the layers with attention, and `OV` of these: for models that have a mixer in the others."""
        values = self.expand_kv_heads(self.stacked("W_V"))
        return self._layers_with("attn"), FactoredMatrix(values, self.stacked("W_O"))

    def _layers_with(self, part: str) -> list[int]:
        return [layer for layer, block in enumerate(self.blocks) if part in block.sublayer_names]

    def composition_scores(self, mode: Composition, *, samples: int = 4, seed: int = 0) -> CompositionScores:
        """Returns how much each head reads of what earlier heads write, with a random baseline.

        Args:
            mode: Whether the reader uses it for its queries `"Q"`, keys `"K"` or values `"V"`.
            samples: Random heads for the baseline, in multiples of all heads.
            seed: Seed of the baseline.

        Example:
            >>> import clearspan
            >>> found = clearspan.boot("tiny-bigcode").composition_scores("K")
            >>> tuple(found.scores.shape)
            (5, 8, 5, 8)
        """
        return composition_scores(self.OV, self.QK, mode, samples=samples, seed=seed)


def stacked(blocks: Sequence[BlockBridge], part: str, name: str) -> Tensor:
    """Returns a weight of all layers as one copy that writes through to the layers.

    Raises:
        MissingWeightError: A layer does not have it, or has it in another shape.
    """
    live: dict[int, Tensor] = {}
    lacking: dict[int, MissingPartError | MissingWeightError] = {}
    for block in blocks:
        layer = int(block.path.rpartition(".")[2])
        try:
            live[layer] = getattr(getattr(block, part), name)
        except (MissingPartError, MissingWeightError) as error:
            lacking[layer] = error
    if lacking:
        layers = "no layer has it" if not live else f"layers {', '.join(map(str, lacking))} do not have it"
        fix = None
        if live:
            here = ", ".join(map(str, live))
            fix = f"bridge.blocks[{next(iter(live))}].{part}.{name} where there is one"
            if any(isinstance(error, MissingPartError) for error in lacking.values()):
                fix = f"bridge.stacked({name!r}, [{here}]), for the layers that have it"
        raise MissingWeightError(
            f"{name} cannot be stacked: {layers}",
            where=type(blocks[0].module).__name__,
            reason=_why(next(iter(lacking.values()))),
            fix=fix,
        )
    shapes = {tuple(weight.shape): layer for layer, weight in live.items()}
    if len(shapes) > 1:
        found = ", ".join(f"{list(shape)} in layer {layer}" for shape, layer in shapes.items())
        raise MissingWeightError(
            f"{name} cannot be stacked: layers differ in shape", got=found, fix=f"bridge.blocks[layer].{part}.{name}"
        )
    return joined(list(live.values()), torch.stack)


def _why(error: ClearspanError) -> str | None:
    """Returns why a layer lacks a weight, in one line."""
    return error.reason if isinstance(error, MissingPartError) else error.message.replace("\n  ", "; ")


def joined(parts: Sequence[Tensor], join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Returns weights joined along the first axis in one copy that writes through to each.

    Args:
        parts: Live weights.
        join: `torch.stack` or `torch.cat`.
    """
    copy = join(list(parts))

    def before() -> None:
        for part in parts:
            check_writable(part)

    def after() -> None:
        pieces = copy.detach().split([1 if join is torch.stack else len(part) for part in parts])
        with torch.no_grad():
            for part, piece in zip(parts, pieces, strict=True):
                part.copy_(piece.reshape(part.shape))

    return WeightTensor.of(copy, before=before, after=after)


def expand_kv_heads(value: Tensor, n_heads: int, axis: int = -3, *, by_group: bool = False) -> Tensor:
    """Returns weights or activations of key/value heads for all query heads.

    Args:
        value: Has an axis of key/value heads, such as `W_K` `[layer, kv_head, d_model, d_head]`.
        n_heads: Query heads.
        axis: The axis of key/value heads: -3 for weights; -2 for biases and activations.
        by_group: Whether the axis becomes two, `kv_head, group`: this never copies.

    Returns:
        With one key/value head (MQA) a view in which the axis has stride 0; with one for each query head (MHA) the
        value itself; with several (GQA) a copy, or by group a view in which the `group` axis has stride 0.

    Raises:
        InvalidArgumentError: The axis does not divide the heads.

    Example:
        >>> import torch
        >>> expand_kv_heads(torch.zeros(5, 1, 256, 32), n_heads=8).stride(1)
        0
        >>> expand_kv_heads(torch.zeros(2, 256, 32), n_heads=8, by_group=True).shape
        torch.Size([2, 4, 256, 32])
    """
    check_flags(by_group=by_group)
    value = tensor_of("value", value)
    if not is_whole(axis) or not -value.ndim <= axis < value.ndim:
        raise InvalidArgumentError(
            f"axis={axis!r}"[:80], expected="an axis of the value", got=f"a value of shape {list(value.shape)}"
        )
    at = axis % value.ndim
    kv_heads = value.shape[at]
    if not kv_heads or n_heads % kv_heads:
        raise InvalidArgumentError(
            "these are no key/value heads",
            expected=f"a size that divides {n_heads} query heads at axis {axis}",
            got=str(list(value.shape)),
            fix="axis=-2 for biases and activations, -3 for weights",
        )
    group = n_heads // kv_heads
    grouped = value.unsqueeze(at + 1).expand(*value.shape[: at + 1], group, *value.shape[at + 1 :])
    if by_group:
        return grouped
    return grouped.squeeze(at) if kv_heads == 1 else grouped.flatten(at, at + 1) if group > 1 else value


_LETTERS = {"embed.weight": "W_E", "pos_embed.weight": "W_pos", "unembed.weight": "W_U", "unembed.bias": "b_U"}


def weights_of(components: Iterable[GeneralizedComponent]) -> dict[int, list[str]]:
    """Returns the canonical names of each parameter, by its `id`."""
    names: dict[int, dict[str, None]] = {}
    for component in components:
        for part in component.walk():
            if part.name is not None:
                for key, parameter in part.acting._parameters.items():
                    if parameter is not None:
                        name = f"{part.path}.{key}"
                        names.setdefault(id(parameter), {})[_LETTERS.get(name, name)] = None
    return {key: list(found) for key, found in names.items()}


def ties(components: Iterable[GeneralizedComponent]) -> dict[str, tuple[str, ...]]:
    """Returns each tied weight's name with the names of the others that are the same parameter."""
    groups = [names for names in weights_of(components).values() if len(names) > 1]
    return {name: tuple(other for other in names if other != name) for names in groups for name in names}


def sharing(components: Iterable[GeneralizedComponent], parameter: Tensor) -> list[str]:
    """Returns the canonical names of the weights that are this parameter."""
    return weights_of(components).get(id(parameter), [])
