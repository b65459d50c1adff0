"""What a forward is given: a batch, checked, as the model's own keywords."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.checks import check_kind, is_whole, tensor_of
from clearspan.components import PosEmbedBridge
from clearspan.errors import InputError, InvalidArgumentError, UnknownArgumentError
from clearspan.hf.keywords import KV_CACHE, KV_CACHE_NAMES, kv_cache_in, kv_cache_keyword, takes_position_ids
from clearspan.inputs import Batch, Input, check_has_values
from clearspan.model import Model
from clearspan.points import nearest
from clearspan.text import PaddingSide
from clearspan.transformer_lens import FORWARD_KEYWORDS

if TYPE_CHECKING:
    from clearspan.hf.types import Cache

_INSTEAD = {
    "input_ids": "bridge(tokens)",
    "use_cache": f"{KV_CACHE}=transformers.DynamicCache(), which the run extends",
    **dict.fromkeys(KV_CACHE_NAMES[1:], f"{KV_CACHE}=..., whatever the model's own forward calls it"),
    "labels": "return_type='loss'",
    "return_dict": "bridge.hf_model(...) for the model's own output object",
    "output_attentions": "bridge.run_with_cache(...) and cache['pattern', layer]",
    "output_hidden_states": "bridge.run_with_cache(...) and cache['resid_pre', layer]",
    **FORWARD_KEYWORDS,
}
"""Keywords of a model's forward that mean something else here, and what to do instead."""
_OF_RUNS = ("return_type", "loss_per_token", "start_at_layer", "stop_at_layer", "interventions", "sources")
"""Keywords that every run takes besides those of `prepare`."""


@dataclass(frozen=True)
class ModelInput:
    """What goes into the model.

    Attributes:
        batch: The rows.
        kwargs: Keywords of the model's forward.
    """

    batch: Batch
    kwargs: dict[str, Any]

    @property
    def kv_cache(self) -> "Cache | None":
        """The KV cache that the run extends, or None."""
        return kv_cache_in(self.kwargs)

    @property
    def sequence(self) -> Batch:
        """The whole sequence: the batch, after the tokens in a KV cache."""
        if self.kv_cache is None or not (seen := self._seen):
            return self.batch
        mask, value = self.kwargs.get("attention_mask"), self.batch.value
        nothing = torch.empty(self.batch.rows, seen + self.batch.width, 0, device=value.device)
        return Batch(None, None if mask is None or mask.ndim != 2 else mask, embeds=nothing)

    @property
    def size(self) -> tuple[int, int]:
        """Rows, and positions, those in a KV cache included."""
        return self.batch.rows, self.batch.width + self._seen

    @property
    def _seen(self) -> int:
        """Positions in the KV cache."""
        return 0 if self.kv_cache is None else self.kv_cache.get_seq_length()


def prepare(
    model: Model,
    input: Input | None = None,
    *,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    is_residual: bool = False,
    **model_kwargs: Any,
) -> ModelInput:
    """Returns what the model is given for an input. Most arguments are those of `TransformerBridge.forward`.

    Args:
        model: The model.
        input: The input.
        prepend_bos: Whether text gets one BOS first.
        padding_side: Where shorter texts are filled.
        attention_mask: 1 for real tokens.
        position_ids: `[row, pos]`.
        past_key_values: A KV cache.
        inputs_embeds: Embeddings, in place of an input.
        is_residual: Whether a tensor of numbers is a residual stream.
        **model_kwargs: Further keywords of the model's own forward.

    Raises:
        InputError: Too long, empty, of the wrong rank, or ids outside the vocabulary.
        UnknownArgumentError: A keyword that the model's forward does not have.
        InvalidArgumentError: The model is set to return tuples.
    """
    check_keywords(model, model_kwargs)
    if not object.__getattribute__(model.hf_model.config, "__dict__").get("return_dict", True):  # its own takes longer
        raise InvalidArgumentError(
            "the model is set to return tuples",
            where="bridge.hf_model.config.return_dict",
            fix="bridge.hf_model.config.return_dict = True",
        )
    given = either(input, inputs_embeds)
    seen, past, mask = 0, None, attention_mask
    if past_key_values is not None:
        check_kv_cache(past_key_values)
        seen = past_key_values.get_seq_length()
        past, mask = _split(attention_mask, seen)
    batch = model.to_batch(given, mask, prepend_bos, padding_side)
    if batch.embeds is not None:
        check_width(model, batch.embeds, is_residual)
    if batch.attention is not None:
        _check_square(model, batch, seen)
    check_length(model, seen + batch.width, seen)
    kwargs: dict[str, Any] = dict(model_kwargs)
    kwargs["use_cache"] = past_key_values is not None
    if past_key_values is not None:
        kwargs[kv_cache_keyword(model.hf_model)] = past_key_values
    whole = batch.attention if batch.attention is not None else _joined(past, batch)
    if whole is not None:
        kwargs["attention_mask"] = whole
    if position_ids is not None:
        kwargs["position_ids"] = _checked_positions(model, position_ids, batch)
    else:
        kwargs |= positions(model, batch, None if whole is None or whole.ndim != 2 else whole, seen)
    if batch.embeds is None:
        kwargs["input_ids"] = batch.value
    else:
        kwargs["inputs_embeds"] = batch.embeds.clone() if model.embed.output_is_overwritten else batch.embeds
    return ModelInput(batch, kwargs)


def positions(model: Model, batch: Batch, mask: Tensor | None, seen: int = 0) -> dict[str, Tensor]:
    """Returns `position_ids` that give rows the positions they have alone; nothing if the model makes these itself.

    Args:
        model: The model.
        batch: The rows.
        mask: 1 for real tokens, those in a KV cache included, `[row, pos]`; None where nothing is padded.
        seen: Positions in the KV cache.
    """
    embedding = counting(model)
    if embedding is None:
        if mask is None or model.adapter.makes_positions_from_mask:
            return {}
        return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, seen:]}
    before = seen if mask is None else mask[:, :seen].sum(-1, keepdim=True)
    real = batch.real if mask is None else mask[:, seen:]
    if batch.tokens is not None:
        real = real * (batch.tokens != embedding.padding_id)
    return {"position_ids": (real.cumsum(-1) + before) * real + embedding.offset - 1}


def counting(model: Model) -> PosEmbedBridge | None:
    """Returns the position embedding of a model that counts the tokens of other ids than padding's, or None."""
    if "counting" not in model.remembered:
        embeddings = (part for part in model.components if isinstance(part, PosEmbedBridge))
        model.remembered["counting"] = next((part for part in embeddings if part.padding_id is not None), None)
    return model.remembered["counting"]


def _checked_positions(model: Model, given: object, batch: Batch) -> Int[Tensor, "row pos"]:
    """Returns position ids on a batch's device; one row is for all."""
    if not takes_position_ids(model.hf_model):
        raise InvalidArgumentError(
            "position_ids have no effect on this model",
            where=type(model.hf_model).__name__,
            reason="its positions follow from the order of the tokens and the mask",
            fix="leave position_ids out",
        )
    ids = tensor_of("position_ids", given)
    check_has_values("position_ids", ids)
    if (
        ids.is_floating_point()
        or ids.dtype == torch.bool
        or ids.ndim != 2
        or ids.shape[1] != batch.width
        or len(ids) not in (1, batch.rows)
    ):
        raise InvalidArgumentError(
            "position_ids do not fit the input",
            expected=f"whole numbers [{batch.rows}, {batch.width}]",
            got=f"{ids.dtype} {list(ids.shape)}",
        )
    embedding = counting(model)
    least = 0 if embedding is None else embedding.offset - 1
    most = model.cfg.n_ctx - 1 + (0 if embedding is None else embedding.offset)
    if model.cfg.is_limited and not least <= int(ids.min()) <= int(ids.max()) <= most:
        raise InvalidArgumentError(
            "position_ids are not in the model's table of positions",
            expected=f"{least} to {most}",
            got=f"{int(ids.min())} to {int(ids.max())}",
        )
    return ids.to(batch.device)


def _check_square(model: Model, batch: Batch, seen: int) -> None:
    """Raises unless a mask of four axes is one that the model's attention takes as it is."""
    mask = batch.attention
    assert mask is not None, "the caller has one"
    rows, heads, queries, keys = mask.shape
    fits = rows in (1, batch.rows) and heads in (1, model.cfg.n_heads) and queries == batch.width
    # A KV cache of fixed length, or of a sliding window, has keys of its own number.
    if not (fits and (seen or keys == batch.width)):
        raise InputError(
            "the attention mask does not fit the input",
            expected=f"[{batch.rows}, 1 or {model.cfg.n_heads}, {batch.width}, {seen + batch.width}]",
            got=str(list(mask.shape)),
        )
    is_added = model.hf_model.config._attn_implementation == "eager"
    kinds = {dtype for dtype in (model.hf_model.dtype, None if is_added else torch.bool) if dtype is not None}
    if mask.dtype not in kinds and not (mask.is_floating_point() and torch.is_autocast_enabled(mask.device.type)):
        raise InputError(
            "an attention mask of four axes goes to attention as it is",
            expected=" or ".join(sorted(map(str, kinds))) + (": 0, or the least number where it hides" * is_added),
            got=str(mask.dtype),
        )
    if bool(mask.isnan().any()):
        raise InputError("the attention mask has values that are no numbers", got="NaN")


def check_kv_cache(past_key_values: object) -> None:
    """Raises unless something is a Hugging Face cache, or None."""
    if not (past_key_values is None or isinstance(past_key_values, _KVCache)):
        raise InvalidArgumentError(
            "past_key_values= is a KV cache", expected="transformers.DynamicCache()", got=repr(past_key_values)[:80]
        )


@runtime_checkable
class _KVCache(Protocol):
    """What of a Hugging Face cache is asked for."""

    def get_seq_length(self) -> int: ...


def either(input: Input | None, inputs_embeds: Tensor | None) -> Input:
    """Returns an input, or the embeddings given in its place.

    Raises:
        InputError: Both are given, or neither.
    """
    if (input is None) == (inputs_embeds is None):
        raise InputError(
            "a run has one input", expected="an input, or inputs_embeds=", got="none" if input is None else "both"
        )
    if inputs_embeds is None:
        assert input is not None, "checked above"
        return input
    check_kind(Tensor, inputs_embeds=inputs_embeds)
    if not inputs_embeds.is_floating_point():
        raise InputError("inputs_embeds are numbers", expected="[row, pos, d_model]", got=str(inputs_embeds.dtype))
    return inputs_embeds


def _split(mask: Tensor | None, seen: int) -> tuple[Tensor | None, Tensor | None]:
    """Returns a mask's part for the tokens in a KV cache, and that for the input."""
    if mask is None or not seen:
        return None, mask
    whole = tensor_of("attention_mask", mask)
    check_has_values("attention_mask", whole)
    return (None, whole) if whole.ndim != 2 else (whole[:, :seen], whole[:, seen:])


def _joined(past: Tensor | None, batch: Batch) -> Tensor | None:
    """Returns the padding mask of the tokens in a KV cache and of a batch, or None where nothing is padded."""
    if past is None or (batch.mask is None and bool(past.all())):
        return batch.mask
    return torch.cat([past.to(batch.device).long(), batch.real], 1)


def check_width(model: Model, value: Tensor, is_residual: bool) -> None:
    """Raises unless a tensor of numbers is of the embedding's or, where a run starts at a layer, the stream's width."""
    d_model = model.adapter.cfg.d_model
    width = d_model if is_residual else model.embed.width
    behind = model.blocks[0].stream_shape if is_residual else (width,)
    if value.ndim != 2 + len(behind) or value.shape[2:] != behind:
        streams = "".join(f"stream={size}, " for size in behind[:-1])
        raise InputError(
            "a tensor of numbers is taken as embeddings or a residual stream",
            expected=f"[batch, pos, {streams}{'d_model' if width == d_model else 'width'}={width}]",
            got=str(list(value.shape)),
        )
    dtype = (model.blocks[0].stream_dtype if is_residual else None) or model.hf_model.dtype
    if value.dtype != dtype and not (
        torch.is_autocast_enabled(value.device.type) or any(value.dtype == one.dtype for one in model.parameters())
    ):
        raise InputError(
            "a tensor of numbers is taken as embeddings or a residual stream",
            expected=f"the {'model' if dtype == model.hf_model.dtype else 'stream'}'s dtype, {dtype}",
            got=str(value.dtype),
            fix=f"value.to({dtype})",
        )


def check_length(model: Model, length: int, seen: int = 0) -> None:
    """Raises if a model with a table of positions is given more than it has."""
    cfg = model.adapter.cfg
    if cfg.is_limited and length > cfg.n_ctx:
        raise InputError(
            "the input is longer than the model's context",
            expected=f"at most {cfg.n_ctx} tokens",
            got=f"{length}" + (f" ({seen} of them in the KV cache)" if seen else ""),
            fix="bridge.to_tokens(text, truncate=True)",
        )


def check_keywords(model: Model, keywords: Mapping[str, object]) -> None:
    """Raises if a keyword is neither ours nor one of the model's forward."""
    if not keywords:
        return
    known = set(inspect.signature(type(model.hf_model).forward).parameters) - {*_INSTEAD, "self", "kwargs"}
    ours = {*inspect.signature(prepare).parameters, *_OF_RUNS} - {"model", "model_kwargs", "is_residual"}
    for keyword in keywords:
        if keyword not in known:
            if keyword in _INSTEAD:
                raise UnknownArgumentError(f"the bridge does not take {keyword!r}", fix=_INSTEAD[keyword])
            raise UnknownArgumentError(
                f"unknown keyword {keyword!r}",
                nearest=nearest(keyword, known | ours),
                where=f"neither TransformerBridge.forward nor {type(model.hf_model).__name__}.forward takes it",
            )


def resolve_segment(model: Model, start: int | None, stop: int | None) -> tuple[int | None, int | None]:
    """Returns the segment with negative layers counted from the end.

    Raises:
        InvalidArgumentError: A layer that does not exist, or a stop before the start.
    """
    if start is None and stop is None:
        return None, None
    n_layers = len(model.blocks)

    def resolve(layer: int | None, name: str) -> int | None:
        if layer is None:
            return None
        if not is_whole(layer):
            raise InvalidArgumentError(f"{name}={layer!r} is no layer"[:80], expected="a whole number, or None")
        resolved = layer + n_layers if layer < 0 else layer
        if not 0 <= resolved <= n_layers:
            raise InvalidArgumentError(f"{name}={layer} is no layer", expected=f"0 to {n_layers}, or -{n_layers} to -1")
        return resolved

    start, stop = resolve(start, "start_at_layer"), resolve(stop, "stop_at_layer")
    if start is not None and stop is not None and stop < start:
        raise InvalidArgumentError(f"stop_at_layer={stop} comes before start_at_layer={start}")
    return start, stop
