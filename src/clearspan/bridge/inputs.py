"""Inputs: what a forward was given, checked and in the form in which the model takes it."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clearspan.bridge.text import PaddingSide
from clearspan.errors import InputError, InvalidArgumentError, TokenRangeError, UnknownArgumentError
from clearspan.points import nearest

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge

Input = str | Sequence[str] | Tensor
"""Text, a list of texts, token ids `[batch, pos]` or `[pos]`, or embeddings or a residual `[batch, pos, d_model]`."""

_INSTEAD = {
    "input_ids": "bridge(tokens)",
    "inputs_embeds": "bridge(embeddings)",
    "use_cache": "past_key_values=transformers.DynamicCache(), which the run extends",
    "labels": "return_type='loss'",
    "return_dict": "bridge.hf_model(...) for the model's own output object",
    "output_attentions": "bridge.run_with_cache(...) and cache['pattern', layer]",
    "output_hidden_states": "bridge.run_with_cache(...) and cache['resid_pre', layer]",
}
"""Keywords of a model's forward that mean something else here, and what to do instead."""


@dataclass(frozen=True)
class ModelInput:
    """What goes into the model.

    Attributes:
        kwargs: Keywords of the model's forward.
        tokens: Token ids `[batch, pos]`, where there are any.
        mask: Padding mask `[batch, pos]` of these tokens, or None.
    """

    kwargs: dict[str, Any]
    tokens: Tensor | None
    mask: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """Rows, and positions with those in a KV cache that it goes on from."""
        value = self.kwargs["input_ids"] if "input_ids" in self.kwargs else self.kwargs["inputs_embeds"]
        past = self.kwargs.get("past_key_values")
        return len(value), value.shape[1] + (0 if past is None else past.get_seq_length())


def prepare(
    bridge: "TransformerBridge",
    input: Input,
    *,
    prepend_bos: bool | None,
    padding_side: PaddingSide | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Any,
    model_kwargs: Mapping[str, Any],
    is_residual: bool = False,
) -> ModelInput:
    """Returns the model's keywords for an input.

    Raises:
        InputError: Too long, empty, of the wrong rank, or ids outside the vocabulary.
        UnknownArgumentError: A keyword that the model's forward does not have.
        InvalidArgumentError: The model is set to return tuples.
    """
    check_keywords(bridge, model_kwargs)
    if not bridge.hf_model.config.return_dict:
        raise InvalidArgumentError(
            "the model is set to return tuples",
            where="bridge.hf_model.config.return_dict",
            fix="bridge.hf_model.config.return_dict = True",
        )
    value, mask = as_tensor(bridge, input, prepend_bos, padding_side)
    if value.is_floating_point():
        _check_width(bridge, value, is_residual)
    mask = mask if attention_mask is None else attention_mask.to(value.device)
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    check_length(bridge, seen + value.shape[1], seen)
    kwargs: dict[str, Any] = dict(model_kwargs)
    kwargs["use_cache"] = past_key_values is not None
    if past_key_values is not None:
        kwargs["past_key_values"] = past_key_values
    if mask is not None:
        _check_mask(mask, len(value), seen + value.shape[1])
        kwargs["attention_mask"] = mask
    if position_ids is not None:
        kwargs["position_ids"] = position_ids.to(value.device)
    elif mask is not None and _needs_positions(bridge, mask):
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen:]
    kwargs["inputs_embeds" if value.is_floating_point() else "input_ids"] = value
    tokens = None if value.is_floating_point() else value
    return ModelInput(kwargs, tokens, None if mask is None or mask.ndim != 2 else mask[:, seen:])


def as_tensor(
    bridge: "TransformerBridge", input: Input, prepend_bos: bool | None, padding_side: PaddingSide | None
) -> tuple[Tensor, Tensor | None]:
    """Returns an input as ids `[batch, pos]` or embeddings `[batch, pos, d_model]`, and the mask of padded text."""
    match input:
        case str() | [str(), *_] | []:
            tokens, mask = bridge.text.encode(input, prepend_bos, padding_side)
            return tokens.to(bridge.device), None if mask is None else mask.to(bridge.device)
        case Tensor():
            return _checked(bridge, input), None
        case _:
            raise InputError(
                "cannot run this input",
                expected="text, a list of texts, or a tensor of token ids [batch, pos]",
                got=type(input).__name__,
                fix="torch.tensor([ids]) for a list of ids, batch['input_ids'] for a tokenizer's output",
            )


def _checked(bridge: "TransformerBridge", input: Tensor) -> Tensor:
    value = input.to(bridge.device)
    if value.is_floating_point():
        return value
    value = value[None] if value.ndim == 1 else value
    if value.ndim != 2 or not value.numel():
        raise InputError("token ids have two axes", expected="[batch, pos], not empty", got=str(list(input.shape)))
    least, most = (bound.item() for bound in torch.aminmax(value))
    d_vocab = bridge.embed.n_tokens
    if least < 0 or most >= d_vocab:
        raise TokenRangeError(
            "token ids outside the vocabulary", expected=f"0 to {d_vocab - 1}", got=f"{least} to {most}"
        )
    return value


def _check_width(bridge: "TransformerBridge", value: Tensor, is_residual: bool) -> None:
    """Raises unless a tensor of numbers is of the embedding's or, where a run starts at a layer, the stream's width."""
    width = bridge.cfg.d_model if is_residual else bridge.embed.width
    if value.ndim != 3 or value.shape[-1] != width:
        raise InputError(
            "a tensor of numbers is taken as embeddings or a residual stream",
            expected=f"[batch, pos, {'d_model' if width == bridge.cfg.d_model else 'width'}={width}]",
            got=str(list(value.shape)),
        )


def _needs_positions(bridge: "TransformerBridge", mask: Tensor) -> bool:
    """Whether rows have padding, and the model does not number their positions by it."""
    if mask.ndim != 2 or bridge.adapter.makes_positions_from_mask:
        return False
    return not bool(mask.all())


def _check_mask(mask: Tensor, rows: int, length: int) -> None:
    if mask.ndim not in (2, 4) or (mask.ndim == 2 and mask.shape != (rows, length)):
        raise InputError(
            "the attention mask does not fit the input",
            expected=f"[{rows}, {length}], with the tokens in the KV cache; or four axes",
            got=str(list(mask.shape)),
        )


def check_length(bridge: "TransformerBridge", length: int, seen: int = 0) -> None:
    """Raises if a model with learned positions is given more than it has."""
    if bridge.cfg.positional_embedding_type == "standard" and length > bridge.cfg.n_ctx:
        raise InputError(
            "the input is longer than the model's context",
            expected=f"at most {bridge.cfg.n_ctx} tokens",
            got=f"{length}" + (f" ({seen} of them in the KV cache)" if seen else ""),
            fix="bridge.to_tokens(text, truncate=True)",
        )


def check_keywords(bridge: "TransformerBridge", keywords: Mapping[str, object]) -> None:
    """Raises if a keyword is neither ours nor one of the model's forward."""
    if not keywords:
        return
    known = set(inspect.signature(type(bridge.hf_model).forward).parameters) - {*_INSTEAD, "self", "kwargs"}
    ours = set(inspect.signature(type(bridge).forward).parameters) - {"self", "model_kwargs"}
    for keyword in keywords:
        if keyword not in known:
            if keyword in _INSTEAD:
                raise UnknownArgumentError(f"the bridge does not take {keyword!r}", fix=_INSTEAD[keyword])
            raise UnknownArgumentError(
                f"unknown keyword {keyword!r}",
                nearest=nearest(keyword, known | ours),
                where=f"neither TransformerBridge.forward nor {type(bridge.hf_model).__name__}.forward takes it",
            )


def resolve_segment(bridge: "TransformerBridge", start: int | None, stop: int | None) -> tuple[int | None, int | None]:
    """Returns the segment with negative layers counted from the end.

    Raises:
        InvalidArgumentError: A layer that does not exist, or a stop before the start.
    """
    n_layers = bridge.cfg.n_layers

    def resolve(layer: int | None, name: str) -> int | None:
        if layer is None:
            return None
        resolved = layer + n_layers if layer < 0 else layer
        if not 0 <= resolved <= n_layers:
            raise InvalidArgumentError(f"{name}={layer} is no layer", expected=f"0 to {n_layers}, or -{n_layers} to -1")
        return resolved

    start, stop = resolve(start, "start_at_layer"), resolve(stop, "stop_at_layer")
    if start is not None and stop is not None and stop < start:
        raise InvalidArgumentError(f"stop_at_layer={stop} comes before start_at_layer={start}")
    return start, stop
