"""Processing: steps that change weights but not log-probabilities.

The steps work on a model that shares its parameters with another one: a shared parameter is replaced, never written.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from clearspan.components import (
    BlockBridge,
    EmbeddingBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    HeadAttentionBridge,
    LinearBridge,
    LinearMap,
    LogitHeadBridge,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from clearspan.components.attention import PROJECTIONS, Projection
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import InexactProcessingError, InvalidArgumentError
from clearspan.weights.algebra import (
    centred,
    constant_of_values,
    refactored_OV,
    refactored_QK,
    scale_inputs,
    shifted_output,
)
from clearspan.weights.parameters import OwnParameters


class Processable(Protocol):
    """What the steps need of a model."""

    blocks: tuple[BlockBridge, ...]
    components: tuple[GeneralizedComponent, ...]
    embed: EmbeddingBridge
    unembed: UnembeddingBridge

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """The model's sizes."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the model's parameters."""
        ...


@dataclass(frozen=True)
class Step:
    """What one step of processing did.

    Attributes:
        name: Its name, as the argument that asks for it.
        done: What it did, or why it was left out.
    """

    name: str
    done: str

    def __str__(self) -> str:
        return f"{self.name}: {self.done}"


class _Processing:
    """The steps on one model.

    Args:
        model: A model on shared parameters.
    """

    def __init__(self, model: Processable) -> None:
        self.model = model
        self._parameters = OwnParameters(model.parameters())

    def _centre(self, module: nn.Module, name: str, axis: int) -> None:
        weight = self._parameters.own(module, name)
        centred(weight, axis, out=weight)

    def _add_bias(self, each: LinearMap, added: Tensor) -> None:
        """Adds to a map's bias; a map without one gets one."""
        if not added.any():
            return
        if each.bias is None:
            raise InexactProcessingError(
                "a bias cannot be folded", where=type(each.module).__name__, reason="the map can have no bias"
            )
        old = each.bias_holder._parameters.get(each.bias)
        self._parameters.replace(each.bias_holder, each.bias, added if old is None else old.detach() + added)

    def _write(self, attn: HeadAttentionBridge, **values: Tensor | None) -> None:
        """Writes an attention's weights by name, through views of parameters that may be written."""
        for name, value in values.items():
            if value is not None:
                kind, letter = name.split("_")
                part = attn.o if letter == "O" else attn.holder(_PROJECTIONS[letter])
                self._parameters.own(part.module, "weight" if kind == "W" else "bias")
                setattr(attn, name, value.detach())

    # --- steps -------------------------------------------------------------------------------------------------------

    def fold_ln(self) -> str:
        """Moves the weights and biases of norms into the linear maps that read them; the norms keep 1 and 0.

        The maps that read a layer norm, whose output has mean zero, then lose the direction of the mean.
        A norm that something else reads too stays as it is, and so does one whose bias a map cannot take (experts).
        """
        pairs = [pair for block in self.model.blocks for pair in block.folds()]
        final = final_norm(self.model)
        if final is not None and not has_head(self.model):
            pairs.append((final, [readout(self.model)[0].map]))
        folded = sum(self._fold(norm, maps) for norm, maps in pairs if norm.bias_or_none() is None or _take_bias(maps))
        kept = sum(1 for block in self.model.blocks for _ in block.unfolded())
        left = f"; {kept} kept, which parts read that are not known to be linear maps" if kept else ""
        return (f"{folded} norms folded" if folded else "nothing to fold") + left

    def _fold(self, norm: NormalizationBridge, maps: Iterable[LinearMap]) -> bool:
        has_weight = norm.module._parameters.get("weight") is not None
        bias = norm.bias_or_none()
        for each in maps:
            weight = each.module.get_parameter(each.weight).detach()
            if bias is not None:
                self._add_bias(each, shifted_output(weight, bias.detach(), each.in_axis))
            if has_weight:
                self._parameters.replace(each.module, each.weight, scale_inputs(weight, norm.w.detach(), each.in_axis))
            if not norm.uses_rms_norm:
                self._centre(each.module, each.weight, each.in_axis)
        if has_weight:
            ones = torch.full_like(norm.weight("weight"), 1.0 - norm.weight_offset)
            self._parameters.replace(norm.module, "weight", ones)
        if bias is not None:
            self._parameters.replace(norm.module, "bias", torch.zeros_like(bias))
        return has_weight or bias is not None

    def center_writing_weights(self) -> str:
        """Subtracts the mean over `d_model` from everything that is written to the residual stream."""
        writers = list(_writers(self.model))
        for each in writers:
            self._centre(each.module, each.weight, each.out_axis)
            if each.bias is not None and each.bias_holder._parameters.get(each.bias) is not None:
                self._centre(each.bias_holder, each.bias, -1)
        return f"{len(writers)} weights centred"

    def center_unembed(self) -> str:
        """Subtracts from each logit the mean over the vocabulary, which changes no softmax."""
        each = self.model.unembed.map
        self._centre(each.module, "weight", each.out_axis)
        if each.module._parameters.get("bias") is not None:
            self._centre(each.module, "bias", -1)
        return "the unembedding is centred"

    def fold_value_biases(self) -> str:
        """Moves what value biases add to attention's output into the output bias."""
        count = 0
        for attn in _attentions(self.model):
            bias = _value_bias(attn)
            if isinstance(attn, HeadAttentionBridge) and bias is not None and bias.any():
                self._add_bias(attn.o.map, constant_of_values(bias.detach(), attn.W_O.detach()))
                self._write(attn, b_V=torch.zeros_like(bias))
                count += 1
        return f"value biases of {count} layers folded" if count else "no value biases"

    def refactor_factored_attn_matrices(self) -> str:
        """Changes queries and keys (if that is exact), values and outputs to the basis of their singular vectors."""
        does_queries = why_not_refactored(self.model, queries=True) is None
        for attn in _attentions(self.model):
            assert isinstance(attn, HeadAttentionBridge), "others are left out"
            b_Q, b_K, b_V = (getattr(attn, f"b_{key.upper()}") if attn.has_bias(key) else None for key in PROJECTIONS)
            if does_queries:
                new = refactored_QK(attn.W_Q, b_Q, attn.W_K, b_K)
                self._write(attn, W_Q=new.left, b_Q=new.left_bias, W_K=new.right, b_K=new.right_bias)
            new = refactored_OV(attn.W_V, b_V, attn.W_O)
            self._write(attn, W_V=new.left, b_V=new.left_bias, W_O=new.right)
        which = "queries and keys, values and outputs" if does_queries else "values and outputs alone"
        return f"{which}, in the basis of their singular vectors"


def _take_bias(maps: Iterable[LinearMap]) -> bool:
    """Whether all maps have a bias, or can get one."""
    return all(each.bias is not None for each in maps)


_PROJECTIONS: dict[str, Projection] = {"Q": "q", "K": "k", "V": "v"}


# --- what is where ---------------------------------------------------------------------------------------------------


def final_norm(model: Processable) -> NormalizationBridge | None:
    """Returns the norm before the unembedding, or None."""
    return next((part for part in _after_blocks(model) if isinstance(part, NormalizationBridge)), None)


def readout(model: Processable) -> list[LinearBridge]:
    """Returns the linear maps from the last norm's output to the logits: a projection, if any, and the unembedding.

    Raises:
        InvalidArgumentError: What lies between them is no linear map.
    """
    if has_head(model):
        raise InvalidArgumentError(
            "logits are no linear function of the residual stream on this model",
            where=model.cfg.architecture,
            reason="a map with an activation function lies between the last block and the unembedding",
            fix="run the model: bridge(..., start_at_layer=...) takes a residual stream and gives logits",
        )
    return [part for part in _after_blocks(model) if isinstance(part, LinearBridge)]


def has_head(model: Processable) -> bool:
    """Whether something that is no linear map lies between the last block and the unembedding."""
    return any(isinstance(part, LogitHeadBridge) for part in _after_blocks(model))


def _after_blocks(model: Processable) -> tuple[GeneralizedComponent, ...]:
    return model.components[model.components.index(model.blocks[-1]) + 1 :]


def _writers(model: Processable) -> Iterator[LinearMap]:
    if model.embed.ends_at is None and not model.embed.submodules:  # otherwise a norm or a projection writes
        yield LinearMap(model.embed.module, "weight", None, in_axis=-2, out_axis=-1)
    for part in model.components:
        if isinstance(part, PosEmbedBridge):
            yield from part.writes()
    for block in model.blocks:
        for sublayer in block.sublayers:
            yield from sublayer.part.adds()


def _attentions(model: Processable) -> list[GeneralAttentionBridge]:
    return [attention for block in model.blocks for attention in block.attentions]


def _value_bias(attn: GeneralAttentionBridge) -> Tensor | None:
    return attn.b_V if isinstance(attn, HeadAttentionBridge) and attn.has_bias("v") else None


# --- where steps are exact -------------------------------------------------------------------------------------------


def why_not_centred(model: Processable) -> str | None:
    """Returns why the mean of the residual stream matters to what reads it, or None."""
    final = final_norm(model)
    if all(block.centres for block in model.blocks) and final is not None and not final.uses_rms_norm:
        parts = [sublayer.part for block in model.blocks for sublayer in block.sublayers]
        opaque = next((part.path for part in parts if not list(part.adds())), None)
        return opaque and f"what {opaque} writes is not known to come from linear maps, which could be centred"
    if model.cfg.uses_rms_norm:
        return "RMS norms do not subtract the mean, so that they read it"
    return "the residual stream is read, or normed, without its mean being subtracted first"


def why_unembedding_not_centred(model: Processable) -> str | None:
    """Returns why a number added to all logits changes probabilities, or None."""
    cap = model.cfg.output_logits_soft_cap
    if model.unembed.n_logits is not None:
        return "rows after the vocabulary's, which pad it, share its weight"
    return None if cap is None else f"logits are capped at {cap}, so that a number added to all of them changes them"


def why_values_not_folded(model: Processable) -> str | None:
    """Returns why a value bias adds no constant to attention's output, or None."""
    if any(attention.has_sinks and _value_bias(attention) is not None for attention in _attentions(model)):
        return "sinks take a share of each query's attention, so that patterns do not sum to one"
    if any("v_norm" in attention.submodules and _value_bias(attention) is not None for attention in _attentions(model)):
        return "values are normed after their bias is added"
    if any(attention.changes_z and _value_bias(attention) is not None for attention in _attentions(model)):
        return "a gate or norm lies between the values and the output projection"
    return None


def why_not_refactored(model: Processable, *, queries: bool) -> str | None:
    """Returns why another basis of queries and keys (or of values) changes what heads compute, or None."""
    attentions = _attentions(model)
    if not attentions:
        return "no layer has heads"
    if not all(isinstance(attn, HeadAttentionBridge) for attn in attentions):
        return "queries, keys or values are not one linear map each"
    if any("o_norm" in attn.submodules for attn in attentions):
        return "z is normed before the output projection, so that another basis of values changes it"
    if any(attn.gate_activation is not None and not attn.gate_is_of_head for attn in attentions):
        return "a gate multiplies each channel of z, so that another basis of values changes it"
    if any(attn.bounds_values or "v_norm" in attn.submodules for attn in attentions):
        return "values are bounded, or a mask is made of them, so that another basis changes it"
    if queries and any({"q_norm", "k_norm"} & set(attn.submodules) for attn in attentions):
        return "queries and keys are normed by head, so that another basis changes scores"
    if queries and any(attn.has_rotary for attn in attentions):
        return "queries and keys are rotated by position, so that another basis changes scores"
    return None


def process(model: Processable, asked: Mapping[str, bool | None]) -> tuple[Step, ...]:
    """Runs steps on a model and returns what they did.

    Args:
        model: The model; its parameters are replaced.
        asked: For each step, in their order: True (do it), False, or None (do it if it is exact).

    Raises:
        InexactProcessingError: A step that was asked for would change what the model computes. Nothing was done.
    """
    does_queries = bool(asked["refactor_factored_attn_matrices"])  # None is content with values and outputs
    reasons = {
        "fold_ln": None,
        "center_writing_weights": why_not_centred(model),
        "center_unembed": why_unembedding_not_centred(model),
        "fold_value_biases": why_values_not_folded(model),
        "refactor_factored_attn_matrices": why_not_refactored(model, queries=does_queries),
    }
    for name, reason in reasons.items():
        if asked[name] and reason is not None:
            raise InexactProcessingError(
                f"{name}=True would change what the model computes",
                where=model.cfg.architecture,
                reason=reason,
                fix=f"{name}=None, which does what is exact, or {name}=False",
            )
    work = _Processing(model)
    return tuple(
        Step(name, getattr(work, name)() if reason is None else f"left out: {reason}")
        for name, reason in reasons.items()
        if asked[name] is not False
    )
