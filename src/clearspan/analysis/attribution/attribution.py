"""Direct logit attribution: what each part of the model adds to a token's logit through the residual stream alone."""

from collections.abc import Sequence
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.lenses.streams import words_of
from clearspan.analysis.places import Input, encoded, padding_of, places_of, target_ids_of
from clearspan.bridge import TransformerBridge
from clearspan.cache import ActivationCache
from clearspan.errors import InvalidArgumentError
from clearspan.weights.processing import final_norm

from .attribution_result import REST, AttributionUnit, DirectLogitAttribution
from .readout import directions_of, exact

Answer = str | int | Sequence[str] | Int[Tensor, "row"]
"""One token for all rows, or one for each: texts of a single token, or ids."""

_ALWAYS = ("hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre", "ln_final.hook_scale", "unembed.hook_out")
_KEPT = {
    "component": ("hook_attn_out", "hook_mlp_out"),
    "layer": ("hook_attn_out", "hook_mlp_out"),
    "head": ("hook_z", "ln1_post.hook_scale", "hook_mlp_out"),
    "neuron": ("hook_z", "ln1_post.hook_scale", "hook_post", "ln2_post.hook_scale"),
}
"""What is kept of a run, by the ends of names: for every unit, and for each."""


@torch.no_grad()
def direct_logit_attribution(
    bridge: TransformerBridge,
    input: Input,
    answer_tokens: Answer,
    incorrect_tokens: Answer | None = None,
    *,
    unit: AttributionUnit = "component",
    pos: int = -1,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> DirectLogitAttribution:
    r"""Returns what each part of the model adds to a token's logit, or to the difference of two tokens' logits.

    The last residual stream is the sum of what the parts wrote into it. With the last norm's scale as it was in this
    run, the logit of token `t` before a cap is linear in that stream, so that it is a sum over parts, and a constant:

    `logit(t) = sum over parts (part @ d(t)) / scale + constant(t)`, `d(t) = centred(w * W_U[:, t])`

    with the norm's weight `w`; an RMS norm does not centre. It holds on raw weights, and for every unit. The result has
    the model's own logit beside the sum. Units:

    - `"component"`: embeddings, and each layer's attention and MLP.
    - `"layer"`: embeddings, and each layer.
    - `"head"`: heads, and the rest: embeddings, MLPs and output biases.
    - `"neuron"`: neurons of the MLPs, and the rest: embeddings, heads and output biases.

    A part is what reaches the residual stream: after a norm on a sublayer's output, by that norm's scale in this run,
    and after a multiplier. Neurons are projected onto `d(t)` at once, and no vector of each is formed; but with a norm
    on the MLP's output it is, for one row and layer at a time.

    Args:
        bridge: The model.
        input: A text, texts (padded and masked), or token ids.
        answer_tokens: Whose logit: one token for all rows, or one for each; a text that is a single token, or an id.
        incorrect_tokens: Whose logit is subtracted, in the same forms.
        unit: What the model is divided into.
        pos: The position at which the logit is read, counted among each row's real tokens; negative from the end.
        attention_mask: 1 for real tokens, where token ids have padding.

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
    _check(bridge, unit, pos)
    tokens, mask = encoded(bridge, input, attention_mask)
    mask = torch.ones_like(tokens) if mask is None else mask
    _, columns, places = places_of(mask, pos)
    answers = _ids(bridge, answer_tokens, len(tokens))
    incorrect = None if incorrect_tokens is None else _ids(bridge, incorrect_tokens, len(tokens))
    names = [name for name in bridge.hook_dict if name.endswith((*_ALWAYS, *_KEPT[unit]))]
    labels: list[str] = []
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    # Rows that are read in the same column are run together, and of a run nothing but that column is kept.
    groups = [(column, (columns == column).nonzero()[:, 0]) for column in columns.unique().tolist()]
    for column, rows in groups:
        padding = padding_of(mask[rows])
        _, cache = bridge.run_with_cache(tokens[rows], names, pos_slice=column, attention_mask=padding)
        away = None if incorrect is None else incorrect[rows]
        stack, labels = _parts(cache, unit, _directions(cache, answers[rows], away))
        found.append((stack.T, cache.logit_constant(answers[rows], away), _model(cache, answers[rows], away)))
    order = torch.cat([rows for _, rows in groups]).argsort()
    per_row, constant, model = (exact(torch.cat(column)[order]).cpu() for column in zip(*found, strict=True))
    return DirectLogitAttribution(
        per_row,
        tuple(labels),
        constant,
        model,
        unit,
        tuple(position for _, position in places),
        answers.cpu(),
        None if incorrect is None else incorrect.cpu(),
        words_of(bridge, answers, *([] if incorrect is None else [incorrect])),
        bridge.cfg.output_logits_soft_cap,
    )


def _directions(
    cache: ActivationCache, answers: Int[Tensor, "row"], incorrect: Int[Tensor, "row"] | None
) -> Float[Tensor, "row d_model"]:
    """Returns what a part of the last residual stream is multiplied by to give what it adds to the logit."""
    norm, found = final_norm(cache.bridge), directions_of(cache.bridge, answers)
    if incorrect is not None:
        found = found - directions_of(cache.bridge, incorrect)
    return found if norm is None else found / cache[f"{norm.path}.hook_scale"].to(found)


def _model(
    cache: ActivationCache, answers: Int[Tensor, "row"], incorrect: Int[Tensor, "row"] | None
) -> Float[Tensor, "row"]:
    """Returns the model's own logit before a cap, or the difference of two."""
    logits = exact(cache["unembed.hook_out"]) * cache.bridge.cfg.logit_scale
    found = logits.gather(-1, answers[:, None])[:, 0]
    return found if incorrect is None else found - logits.gather(-1, incorrect[:, None])[:, 0]


def _parts(
    cache: ActivationCache, unit: AttributionUnit, directions: Float[Tensor, "row d_model"]
) -> tuple[Float[Tensor, "part row"], list[str]]:
    """Returns what each part adds, and its name."""
    match unit:
        case "neuron":
            by_row, labels = [], []
            for row, direction in enumerate(directions):
                one = cache.apply_slice_to_batch_dim(slice(row, row + 1))
                values, labels = one.get_full_resid_decomposition(project_output_onto=direction, return_labels=True)
                by_row.append(exact(values))
            return _with_rest(torch.cat(by_row, dim=1), labels, "N")
        case "head":
            stack, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
            return _with_rest(_projected(stack, directions), labels, "H")
    stack, labels = cache.decompose_resid(return_labels=True)
    found = _projected(stack, directions)
    if unit == "component":
        return found, labels
    layers = range(cache.bridge.cfg.n_layers)
    embeddings, sublayers = found.split([len(found) - 2 * len(layers), 2 * len(layers)])
    by_layer = sublayers.unflatten(0, (len(layers), 2)).sum(1)
    return torch.cat([embeddings, by_layer]), [*labels[: len(embeddings)], *(f"L{layer}" for layer in layers)]


def _projected(
    stack: Float[Tensor, "part row d_model"], directions: Float[Tensor, "row d_model"]
) -> Float[Tensor, "part row"]:
    return torch.einsum("prm,rm->pr", exact(stack), directions)


def _with_rest(
    values: Float[Tensor, "part row"], labels: list[str], letter: str
) -> tuple[Float[Tensor, "part row"], list[str]]:
    """Returns the parts whose name has a letter, and the sum of the others."""
    is_unit = torch.tensor([letter in label for label in labels], device=values.device)
    rest = values[~is_unit].sum(0, keepdim=True)
    return torch.cat([values[is_unit], rest]), [*(label for label in labels if letter in label), REST]


def _ids(bridge: TransformerBridge, tokens: Answer, rows: int) -> Int[Tensor, "row"]:
    match tokens:
        case str():
            return target_ids_of(bridge, [tokens] * rows, rows)
        case int():
            return target_ids_of(bridge, torch.tensor([tokens] * rows), rows)
        case Tensor() if tokens.numel() == 1:
            return target_ids_of(bridge, tokens.reshape(1).expand(rows), rows)
    return target_ids_of(bridge, tokens, rows)


def _check(bridge: TransformerBridge, unit: AttributionUnit, pos: int) -> None:
    if unit not in get_args(AttributionUnit):
        raise InvalidArgumentError(f"unknown unit {unit!r}", expected="'component', 'layer', 'head' or 'neuron'")
    if not isinstance(pos, int):
        raise InvalidArgumentError("one position of each row is read", expected="pos=-1, or another", got=repr(pos))
    for layer in range(bridge.cfg.n_layers) if unit == "neuron" else ():
        name = f"blocks.{layer}.mlp.hook_post"
        if name not in bridge.hook_dict:
            raise InvalidArgumentError(
                f"layer {layer} has no neurons to attribute to",
                where=bridge.cfg.architecture,
                reason=bridge.why_absent(name),
                fix="unit='layer', which takes its MLP as a whole",
            )
