"""Processing: steps that change weights and leave log-probabilities as they were, each where it is exact.

The steps work on a model of their own, whose parameters are at first those of the model that was given: a parameter is
replaced, never written, until it belongs to the new model alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from clearspan.components import (
    BlockBridge,
    EmbeddingBridge,
    GeneralizedComponent,
    HeadAttentionBridge,
    LinearBridge,
    LinearMap,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from clearspan.components.attention import PROJECTIONS, Projection
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import InexactProcessingError
from clearspan.weights.algebra import (
    Refactored,
    centred,
    constant_of_values,
    refactored_OV,
    refactored_QK,
    scale_inputs,
    shifted_output,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Processable(Protocol):
    """What the steps need of a bridge."""

    hf_model: "PreTrainedModel"
    cfg: TransformerBridgeConfig
    blocks: tuple[BlockBridge, ...]
    components: tuple[GeneralizedComponent, ...]
    embed: EmbeddingBridge
    unembed: UnembeddingBridge


@dataclass(frozen=True)
class Step:
    """What one step of processing did.

    Attributes:
        name: Its name, as the argument that asks for it.
        done: What it did, or why it did nothing.
    """

    name: str
    done: str

    def __str__(self) -> str:
        return f"{self.name}: {self.done}"


def replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Puts a new parameter in the place of one of a module, or of none."""
    old = module._parameters.get(name)
    requires_grad = old.requires_grad if old is not None else True
    module._parameters[name] = nn.Parameter(value.detach(), requires_grad=requires_grad)


# --- norms -----------------------------------------------------------------------------------------------------------


def fold_norms(bridge: Processable) -> Step:
    """Moves the weights and biases of norms into the linear maps that read them, and leaves 1 and 0 there.

    It is exact for each norm that nothing but linear maps reads; the others stay as they are.
    """
    pairs = [pair for block in bridge.blocks for pair in block.folds()]
    final = final_norm(bridge)
    if final is not None:
        pairs.append((final, [readout(bridge)[0].map]))
    folded = [norm.path for norm, maps in pairs if _fold(norm, maps)]
    return Step("fold_ln", f"{len(folded)} norms folded" if folded else "nothing to fold")


def _fold(norm: NormalizationBridge, maps: Iterable[LinearMap]) -> bool:
    has_weight = norm.module._parameters.get("weight") is not None
    bias = norm.bias_or_none()
    for each in maps:
        weight = each.module.get_parameter(each.weight).detach()
        if bias is not None:
            _add_bias(each, shifted_output(weight, bias.detach(), each.in_axis))
        if has_weight:
            replace(each.module, each.weight, scale_inputs(weight, norm.w.detach(), each.in_axis))
    if has_weight:
        weight = norm.weight("weight")
        replace(norm.module, "weight", torch.full_like(weight, 1.0 - norm.weight_offset))
    if bias is not None:
        replace(norm.module, "bias", torch.zeros_like(bias))
    return has_weight or bias is not None


def _add_bias(each: LinearMap, added: Tensor) -> None:
    """Adds to a map's bias; a map without one gets it."""
    if not added.any():
        return
    if each.bias is None:
        raise InexactProcessingError(
            "a norm's bias cannot be folded", where=type(each.module).__name__, reason="the map can have no bias"
        )
    old = each.module._parameters.get(each.bias)
    replace(each.module, each.bias, added if old is None else old.detach() + added)


def final_norm(bridge: Processable) -> NormalizationBridge | None:
    """Returns the norm before the unembedding, where there is one."""
    return next((part for part in _after_blocks(bridge) if isinstance(part, NormalizationBridge)), None)


def readout(bridge: Processable) -> list[LinearBridge]:
    """Returns the linear maps from the last norm's output to the logits: the unembedding, and what is before it."""
    return [part for part in _after_blocks(bridge) if isinstance(part, LinearBridge)]


def _after_blocks(bridge: Processable) -> tuple[GeneralizedComponent, ...]:
    return bridge.components[bridge.components.index(bridge.blocks[-1]) + 1 :]


# --- centring --------------------------------------------------------------------------------------------------------


def why_not_centred(bridge: Processable) -> str | None:
    """Returns why the mean of what is written to the residual stream matters to what reads it, or None."""
    final = final_norm(bridge)
    if all(block.centres for block in bridge.blocks) and final is not None and not final.uses_rms_norm:
        return None
    if bridge.cfg.uses_rms_norm:
        return "RMS norms do not subtract the mean, so that they read it"
    return "the residual stream is read, or normed, without its mean being subtracted first"


def centre_writing(bridge: Processable) -> Step:
    """Takes the mean over `d_model` from everything that is written to the residual stream."""
    count = 0
    for each in _writers(bridge):
        weight = each.module.get_parameter(each.weight).detach()
        replace(each.module, each.weight, centred(weight, each.out_axis))
        bias = None if each.bias is None else each.module._parameters.get(each.bias)
        if bias is not None and each.bias is not None:
            replace(each.module, each.bias, centred(bias.detach(), -1))
        count += 1
    return Step("center_writing_weights", f"{count} weights centred")


def _writers(bridge: Processable) -> Iterator[LinearMap]:
    if bridge.embed.ends_at is None:  # else what the embedding adds is a norm's or a projection's output
        yield LinearMap(bridge.embed.module, "weight", None, in_axis=-2, out_axis=-1)
    for part in bridge.components:
        if isinstance(part, PosEmbedBridge):
            yield LinearMap(part.module, "weight", None, in_axis=-2, out_axis=-1)
    for block in bridge.blocks:
        yield from block.attn.adds()
        yield from block.mlp.adds()


def why_unembedding_not_centred(bridge: Processable) -> str | None:
    """Returns why a number added to all logits changes probabilities, or None."""
    cap = bridge.cfg.output_logits_soft_cap
    return None if cap is None else f"logits are capped at {cap}, so that a number added to all of them changes them"


def centre_unembedding(bridge: Processable) -> Step:
    """Takes from each logit the mean over the vocabulary, which a softmax does not see."""
    each = bridge.unembed.map
    replace(each.module, "weight", centred(each.module.get_parameter("weight").detach(), each.out_axis))
    bias = each.module._parameters.get("bias")
    if bias is not None:
        replace(each.module, "bias", centred(bias.detach(), -1))
    return Step("center_unembed", "the unembedding is centred")


# --- attention -------------------------------------------------------------------------------------------------------


def why_values_not_folded(bridge: Processable) -> str | None:
    """Returns why a value bias adds no constant to attention's output, or None."""
    if any(block.attn.has_sinks and _value_bias(block) is not None for block in bridge.blocks):
        return "sinks take a share of each query's attention, so that patterns do not sum to one"
    return None


def _value_bias(block: BlockBridge) -> Tensor | None:
    attn = block.attn
    return attn.b_V if isinstance(attn, HeadAttentionBridge) and attn.has_bias("v") else None


def fold_value_biases(bridge: Processable) -> Step:
    """Moves what value biases add to attention's output into the output bias."""
    count = 0
    for block in bridge.blocks:
        bias = _value_bias(block)
        if bias is None or not bias.any():
            continue
        out = block.attn.o.map
        assert out.bias is not None, "an output projection can have a bias"
        _add_bias(out, constant_of_values(bias.detach(), block.attn.W_O.detach()))
        _write(block.attn, b_V=torch.zeros_like(bias))
        count += 1
    return Step("fold_value_biases", f"value biases of {count} layers folded" if count else "no value biases")


def why_not_refactored(bridge: Processable, *, queries: bool) -> str | None:
    """Returns why another basis of queries and keys (or of values) changes what heads compute, or None."""
    attentions = [block.attn for block in bridge.blocks]
    if not all(isinstance(attn, HeadAttentionBridge) for attn in attentions):
        return "queries, keys or values are not one linear map each"
    if not queries:
        return None
    if any({"q_norm", "k_norm"} & set(attn.submodules) for attn in attentions):
        return "queries and keys are normed by head, so that another basis changes scores"
    if any(attn.has_rotary for attn in attentions):
        return "queries and keys are rotated by position, so that another basis changes scores"
    return None


def refactor(bridge: Processable) -> Step:
    """Puts queries and keys (where that is exact), and values and outputs, in the basis of their singular vectors."""
    does_queries = why_not_refactored(bridge, queries=True) is None
    for block in bridge.blocks:
        attn = block.attn
        assert isinstance(attn, HeadAttentionBridge), "refused otherwise"
        b_Q, b_K, b_V = (getattr(attn, f"b_{key.upper()}") if attn.has_bias(key) else None for key in PROJECTIONS)
        if does_queries:
            new = refactored_QK(attn.W_Q, b_Q, attn.W_K, b_K)
            _write(attn, **_named(new, "Q", "K"))
        new = refactored_OV(attn.W_V, b_V, attn.W_O)
        _write(attn, **_named(new, "V", "O"))
    which = "queries and keys, values and outputs" if does_queries else "values and outputs alone"
    return Step("refactor_factored_attn_matrices", f"{which}, in the basis of their singular vectors")


def _named(new: Refactored, left: str, right: str) -> dict[str, Tensor]:
    names = {f"W_{left}": new.left, f"b_{left}": new.left_bias, f"W_{right}": new.right, f"b_{right}": new.right_bias}
    return {name: value for name, value in names.items() if value is not None}


def _write(attn: HeadAttentionBridge, **values: Tensor) -> None:
    """Writes an attention's weights, each by a view of a copy that is put in its parameter's place."""
    for name, value in values.items():
        kind, letter = name.split("_")
        part = attn.o if letter == "O" else attn.holder(_PROJECTIONS[letter])
        key = "weight" if kind == "W" else "bias"
        replace(part.module, key, part.weight(key).detach().clone())
        setattr(attn, name, value.detach())


_PROJECTIONS: dict[str, Projection] = {"Q": "q", "K": "k", "V": "v"}


# --- all of it -------------------------------------------------------------------------------------------------------


def _why_not_refactored(bridge: Processable, asked: bool | None) -> str | None:
    # Asked for, it must do both halves; left open, it does the one that is exact.
    return why_not_refactored(bridge, queries=bool(asked))


_STEPS: tuple[tuple[str, Callable[[Processable, bool | None], str | None], Callable[[Processable], Step]], ...] = (
    ("fold_ln", lambda bridge, asked: None, fold_norms),
    ("center_writing_weights", lambda bridge, asked: why_not_centred(bridge), centre_writing),
    ("center_unembed", lambda bridge, asked: why_unembedding_not_centred(bridge), centre_unembedding),
    ("fold_value_biases", lambda bridge, asked: why_values_not_folded(bridge), fold_value_biases),
    ("refactor_factored_attn_matrices", _why_not_refactored, refactor),
)
"""Each step's name, what says why it would not be exact, and what does it; in the order in which they are done."""


def process(bridge: Processable, asked: Mapping[str, bool | None]) -> tuple[Step, ...]:
    """Runs the steps asked for on a model of their own, and returns what they did.

    Args:
        bridge: The model, whose parameters are replaced.
        asked: For each step True, False, or None for where it is exact.

    Raises:
        InexactProcessingError: A step that was asked for would change what the model computes. Nothing was done.
    """
    reasons = {name: why(bridge, asked[name]) for name, why, _ in _STEPS}
    for name, reason in reasons.items():
        if asked[name] and reason is not None:
            raise InexactProcessingError(
                f"{name}=True would change what the model computes",
                where=bridge.cfg.architecture,
                reason=reason,
                fix=f"{name}=None, which does what is exact, or {name}=False",
            )
    return tuple(
        run(bridge) if reasons[name] is None else Step(name, f"left out: {reasons[name]}")
        for name, _, run in _STEPS
        if asked[name] is not False
    )
