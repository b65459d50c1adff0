"""Direct logit attribution: what each part of the model adds to a token's logit through the residual stream alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._forward.readout import directions_of, exact
from clearspan.analysis.activations import Targets, target_ids_of
from clearspan.analysis.words import Words, words_of
from clearspan.bridge import TransformerBridge
from clearspan.cache import ActivationCache
from clearspan.checks import check_counts
from clearspan.components import GeneralAttentionBridge, MLPBridge, Sublayer
from clearspan.effects import Draws, Effects, Label
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Input, Positions
from clearspan.model import check_bridge, check_layers
from clearspan.modes import no_grad
from clearspan.plots import Chart, chart_of
from clearspan.results import number

AttributionUnit = Literal["component", "layer", "head", "neuron"]
REST = "rest"
"""The part that holds all that is not of the unit asked for."""
_BARS = 40
_SCALE = "ln_final.hook_scale"
_EMBEDS = ("hook_embed", "hook_pos_embed", "hook_type_embed")
_ALWAYS = (*_EMBEDS, "blocks.0.hook_resid_pre", _SCALE, "unembed.hook_out")
"""What is kept of every run, by the ends of names."""


def _kept(sublayer: Sublayer, unit: AttributionUnit) -> list[str]:
    """Returns the points of a sublayer that are kept for a unit: what it adds, or its parts and a norm's scale."""
    is_mlp = unit == "neuron" and isinstance(sublayer.part, MLPBridge)
    if not is_mlp and (unit not in ("head", "neuron") or sublayer.kind != "attn"):
        return [sublayer.hook_out]
    norm = sublayer.norm_after
    scale = [] if norm is None else [f"{norm.path}.hook_scale"]
    part = sublayer.part
    return [part.joined if isinstance(part, GeneralAttentionBridge) else f"{part.path}.hook_post", *scale]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DirectLogitAttribution(Effects):
    """What each part of the model adds to a token's logit, or to the difference of two, at one place of each row.

    In logits before any cap, on the CPU. Parts and constant sum to the model's own logit, but for rounding: `gap` says
    how closely. Parts are called `3_mlp_out`, `L3`, `L3H5`, `L3N80`, `embed`, `pos_embed`; `rest`, where there is one,
    is the last: all that is not of the unit.

    Attributes:
        constant: What biases of the last norm and of the unembedding add, for each row, whatever the input.
        total: The sum of all parts and the constant, for each row.
        model: The model's own logit (or difference), for each row.
        unit: What the model was divided into.
        positions: The position of each row, counted among its real tokens.
        answers: The tokens whose logits are attributed.
        incorrect: The tokens whose logits are subtracted, if any.
        words: Texts of tokens.
        cap: What the model caps its logits at after all this, or None.
    """

    constant: Float[Tensor, "row"]
    total: Float[Tensor, "row"]
    model: Float[Tensor, "row"]
    unit: AttributionUnit
    positions: tuple[int, ...]
    answers: Int[Tensor, "row"]
    incorrect: Int[Tensor, "row"] | None
    words: Words
    cap: float | None

    @property
    def parts(self) -> tuple[str, ...]:
        """A name for each part."""
        return cast("tuple[str, ...]", self.axes["part"])

    @property
    def per_row(self) -> Float[Tensor, "row part"]:
        """What each part adds, for each row."""
        return self.of().T

    @property
    def attribution(self) -> Float[Tensor, "part"]:
        """Mean over rows."""
        return self.mean()

    @property
    def gap(self) -> Float[Tensor, "row"]:
        """The sum, less the model's own logit, for each row.

        It is rounding, in the precision in which the model runs, unless a hook wrote into the stream between the parts.
        """
        return self.total - self.model

    @property
    def by_head(self) -> Float[Tensor, "layer head"]:
        """Mean over rows, by layer and head; layers without attention are left out.

        Raises:
            InvalidArgumentError: The unit is another one.
        """
        if self.unit != "head":
            raise InvalidArgumentError(
                "this is not divided into heads", got=f"unit={self.unit!r}", fix="direct_logit_attribution(unit='head')"
            )
        return self.attribution[:-1].unflatten(0, (len(self._attentions), -1))

    @property
    def _attentions(self) -> tuple[str, ...]:
        """What labels of heads begin with, for each attention: `L3`, `L3.attn2.`."""
        return tuple(dict.fromkeys(part.rpartition("H")[0] for part in self.parts[:-1]))

    def top(self, k: int = 10, metric: str | None = None) -> Self:
        """Returns the `k` parts that add or take most, largest first; the rest is not among them."""
        check_counts(0, k=k)
        if self.parts[-1:] == (REST,):
            return replace(self, values={"logits": self.of()[:-1]}, axes={"part": self.parts[:-1]}).top(k, metric)
        return super().top(k, metric)

    @property
    def title(self) -> str:
        """What was attributed to what, the sum, and the model's own."""
        rows = len(self.model)
        of = f"direct attribution of the logit of {self._name(self.answers, 'answer')}"
        less = "" if self.incorrect is None else f" less that of {self._name(self.incorrect, 'incorrect token')}"
        cap = "" if self.cap is None else f", before the cap at {self.cap:g}"
        mean = "" if rows == 1 else f"; mean over {rows} rows"
        total, constant, model = (number(one.mean().item()) for one in (self.total, self.constant, self.model))
        sums = f"sum {total} with a constant of {constant}, the model's own {model}"
        return f"{of}{less} to each {self.unit}{cap}: {sums}{mean}"

    def _name(self, tokens: Int[Tensor, "row"], role: str) -> str:
        unique = tokens.unique().tolist()
        return self.words[unique[0]] if len(unique) == 1 else f"each row's {role}"

    def chart(self, metric: str | None = None, *, draws: Draws | None = None, **at: Label | Sequence[Label]) -> Chart:
        """Returns a heat map of heads, layers down; for other units bars, for neurons those of the largest."""
        if self.unit == "head" and not at and REST in self.parts:
            layers = [int(found) if (found := own[1:]).isdigit() else own.rstrip(".") for own in self._attentions]
            heads = range(self.by_head.shape[1])
            return chart_of(self.by_head, {"layer": layers, "head": heads}, unit="logits", title=self.title)
        if self.unit == "neuron" and len(self.parts) > _BARS:
            return self.top(_BARS).chart(metric, draws=draws, **at)
        return super().chart(metric, draws=draws, **at)


@no_grad
def direct_logit_attribution(
    bridge: TransformerBridge,
    input: Input,
    answer_tokens: Targets,
    incorrect_tokens: Targets | None = None,
    *,
    unit: AttributionUnit = "component",
    pos: Positions = -1,
    attention_mask: Int[Tensor, "row pos"] | None = None,
) -> DirectLogitAttribution:
    r"""Returns what each part of the model adds to a token's logit, or to the difference of two tokens' logits.

    The last residual stream is the sum of what the parts wrote into it. With the last norm's scale as it was in this
    run, the logit of token `t` before a cap is linear in that stream, so that it is a sum over parts, and a constant:

    `logit(t) = sum over parts (part @ d(t)) / scale + constant(t)`, `d(t) = centred(w * W_U[:, t])`

    with the norm's weight `w`; an RMS norm does not centre. It holds on raw weights, and for every unit. The result
    puts the model's own logit next to the sum. Units:

    - `"component"`: embeddings, and each layer's attention, mixer and MLP.
    - `"layer"`: embeddings, and each layer.
    - `"head"`: heads, and the rest: embeddings, mixers, MLPs and output biases.
    - `"neuron"`: neurons of the MLPs, and the rest: embeddings, heads and output biases.

    A part is what reaches the residual stream: after a norm on a sublayer's output, by that norm's scale in this run,
    and after a multiplier. Neurons are projected onto `d(t)` at once, so no vector of each is formed; only a norm on
    the MLP's output needs one, for one row and layer at a time.

    Args:
        bridge: The model.
        input: Any input: text, texts, token ids, a tokenizer's output, a `Batch`, ...
        answer_tokens: Whose logit: one token for all rows, or one for each; a text that is a single token, or an id.
        incorrect_tokens: Whose logit is subtracted, in the same forms.
        unit: What the model is divided into.
        pos: The position at which the logit is read, counted among each row's real tokens; negative from the last one.
            `[[2], [5]]` gives each row its own.
        attention_mask: 1 for real tokens, where bare token ids have padding.

    Returns:
        Logits by row and part, on the CPU.

    Raises:
        InvalidArgumentError: An unknown unit; a position that a row does not have, or several; answers that are neither
            one token nor one for each row; a model whose residual stream is no sum of what was added to it; for
            `"neuron"`, a layer that is a mixture of experts.
        InputError: A text that is not a single token.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> found = direct_logit_attribution(bridge, "def f(self, name):\n    self.", "name", unit="head")
        >>> found.by_head.shape, bool(found.gap.abs().max() < 1e-3)
        (torch.Size([5, 8]), True)

    References:
        Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", transformer-circuits.pub. Wang et al.
        (2022), arXiv:2211.00593, for the difference of two logits. Norms' weights are often folded into the unembedding
        first; here they need not be.
    """
    check_bridge(bridge)
    _check_unit(bridge, unit)
    batch = bridge.to_batch(input, attention_mask)
    chosen = batch.positions(pos)
    if any(len(own) != 1 for own in chosen):
        raise InvalidArgumentError("one position of each row is read", expected="pos=-1, or another", got=repr(pos))
    positions = tuple(own[0] for own in chosen)
    answers = target_ids_of(bridge, answer_tokens, batch.rows, "answer_tokens")
    incorrect = None
    directions = directions_of(bridge, answers)
    if incorrect_tokens is not None:
        incorrect = target_ids_of(bridge, incorrect_tokens, batch.rows, "incorrect_tokens")
        directions = directions - directions_of(bridge, incorrect)
    every = (sublayer for block in bridge.blocks for sublayer in block.sublayers)
    wanted = {name for sublayer in every for name in _kept(sublayer, unit)}
    names = [name for name in bridge.hook_dict if name.endswith(_ALWAYS) or name in wanted]
    if batch.embeds is not None:  # the model's own embedding does not run
        names.remove("hook_embed")
    labels: list[str] = []
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    # Rows that are read in the same column run together, and the run keeps that column alone.
    columns = torch.tensor([batch.column_of(row, position) for row, position in enumerate(positions)])
    groups = [(columns == column).nonzero()[:, 0] for column in columns.unique()]
    for rows in groups:
        part = batch.select(rows)
        column = part.column_of(0, positions[int(rows[0])])
        _, kept = bridge.run_with_cache(part, names, pos_slice=column, return_type=None)
        cache = kept.apply_slice_to_pos_dim(0)
        own, away = answers[rows], None if incorrect is None else incorrect[rows]
        towards = directions[rows]
        if _SCALE in cache:
            towards = towards / cache[_SCALE].to(towards)
        stack, labels = _parts(cache, unit, towards)
        found.append((stack.T, cache.logit_constant(own, away), _logit(cache, own, away)))
    order = torch.cat(groups).argsort()
    per_row, constant, model = (exact(torch.cat(each).cpu()[order]) for each in zip(*found, strict=True))
    return DirectLogitAttribution(
        {"logits": per_row.T},
        {"part": tuple(labels)},
        constant=constant,
        total=per_row.sum(-1) + constant,
        model=model,
        unit=unit,
        positions=positions,
        answers=answers.cpu(),
        incorrect=None if incorrect is None else incorrect.cpu(),
        words=words_of(bridge, answers, *([] if incorrect is None else [incorrect])),
        cap=bridge.cfg.output_logits_soft_cap,
    )


def _logit(
    cache: ActivationCache, answers: Int[Tensor, "row"], incorrect: Int[Tensor, "row"] | None
) -> Float[Tensor, "row"]:
    """Returns the model's own logit before a cap, or the difference of two."""
    logits = exact(cache["unembed.hook_out"]) * cache.model.cfg.logit_scale
    found = logits.gather(-1, answers[:, None])[:, 0]
    return found if incorrect is None else found - logits.gather(-1, incorrect[:, None])[:, 0]


def _parts(
    cache: ActivationCache, unit: AttributionUnit, directions: Float[Tensor, "row d_model"]
) -> tuple[Float[Tensor, "part row"], list[str]]:
    """Returns what each part adds, and its name."""
    if unit == "neuron":
        by_row, labels = [], []
        for row, direction in enumerate(directions):
            one = cache.apply_slice_to_batch_dim(slice(row, row + 1))
            values, labels = one.get_full_resid_decomposition(project_output_onto=direction, return_labels=True)
            by_row.append(exact(values))
        return _with_rest(torch.cat(by_row, dim=1), labels, "N")
    if unit == "head":
        stack, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    else:
        stack, labels = cache.decompose_resid(return_labels=True)
    found = torch.einsum("prm,rm->pr", exact(stack), directions)
    if unit == "head":
        return _with_rest(found, labels, "H")
    if unit == "component":
        return found, labels
    sizes = [len(block.sublayers) for block in cache.model.blocks]
    embeddings = len(found) - sum(sizes)
    by_layer = torch.stack([own.sum(0) for own in found[embeddings:].split(sizes)])
    names = [*labels[:embeddings], *(f"L{layer}" for layer in range(len(sizes)))]
    return torch.cat([found[:embeddings], by_layer]), names


def _with_rest(
    values: Float[Tensor, "part row"], labels: list[str], letter: str
) -> tuple[Float[Tensor, "part row"], list[str]]:
    """Returns the parts whose name has a letter, and the sum of the others."""
    is_unit = torch.tensor([letter in label for label in labels], device=values.device)
    rest = values[~is_unit].sum(0, keepdim=True)
    return torch.cat([values[is_unit], rest]), [*(label for label in labels if letter in label), REST]


def _check_unit(bridge: TransformerBridge, unit: AttributionUnit) -> None:
    if unit not in get_args(AttributionUnit):
        raise InvalidArgumentError(f"unknown unit {unit!r}", expected="'component', 'layer', 'head' or 'neuron'")
    if unit == "head":
        check_layers(bridge, "attn", [])
    mlps = [sublayer for block in bridge.blocks for sublayer in block.of_kind("mlp")] if unit == "neuron" else []
    for sublayer in mlps:
        name = f"{sublayer.part.path}.hook_post"
        if name not in bridge.hook_dict:
            raise InvalidArgumentError(
                f"layer {sublayer.layer} has no neurons to attribute to",
                where=bridge.cfg.architecture,
                reason=bridge.index.why_absent(name) or f"only the ends of {sublayer.part.path} are known",
                fix="unit='layer', which takes its MLP as a whole",
            )
