"""In which vocabulary a stream is read: the model's own, that of another model, or the columns of a matrix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._forward.readout import exact, last_normed, log_probs
from clearspan.analysis.activations import Targets, target_ids_of
from clearspan.analysis.words import Words, words_of
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_flags, tensor_of, whole_numbers
from clearspan.errors import InvalidArgumentError
from clearspan.points import nearest


@dataclass(frozen=True, eq=False)
class Unembedding:
    """A matrix that reads a residual stream: the logit of column `i` is `normed(resid) @ matrix[:, i] + bias[i]`.

    Such as the directions of concepts, a classifier's weights, or the unembedding of an earlier checkpoint.

    Attributes:
        matrix: `[d_model, n]`.
        labels: A text for each column; by default a column is written as its number, `#3`.
        bias: Of the logits.
        is_normed: Whether the stream goes through the model's last norm first.

    Raises:
        InvalidArgumentError: Labels or a bias that are not one for each column, or labels that occur twice.
    """

    matrix: Float[Tensor, "d_model n"]
    labels: Sequence[str] | None = None
    bias: Float[Tensor, "n"] | None = None
    is_normed: bool = True

    def __post_init__(self) -> None:
        matrix = tensor_of("matrix", self.matrix)
        if matrix.ndim != 2 or not matrix.is_floating_point() or not matrix.numel():
            raise InvalidArgumentError(
                "an unembedding is a matrix", expected="[d_model, n]", got=f"{matrix.dtype} {list(matrix.shape)}"
            )
        object.__setattr__(self, "matrix", matrix.detach())
        count = matrix.shape[1]
        check_flags(is_normed=self.is_normed)
        if self.bias is not None:
            bias = tensor_of("bias", self.bias)
            if bias.shape != (count,):
                raise InvalidArgumentError(
                    "a bias is one for each column", expected=f"[{count}]", got=str(list(bias.shape))
                )
            object.__setattr__(self, "bias", bias.detach())
        if self.labels is not None:
            labels = tuple(self.labels) if isinstance(self.labels, Sequence) else ()
            are_texts = all(isinstance(one, str) for one in labels)
            if isinstance(self.labels, str) or not are_texts or len(labels) != count or len(set(labels)) < count:
                raise InvalidArgumentError(
                    "labels are one text for each column, each another",
                    expected=f"{count}",
                    got=f"{self.labels!r}"[:80],
                )
            object.__setattr__(self, "labels", labels)


Unembed = Unembedding | TransformerBridge | Float[Tensor, "d_model n"]
"""What reads a stream: a matrix, with or without labels, or another model, with its own last norm and unembedding."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a stream is read in.

    Attributes:
        size: How many tokens or columns.
        log_probs: Returns log-probabilities, in nats, of streams `[place, d_model]`.
        words: Returns how tokens are written.
        ids: Returns targets as one id for each row.
    """

    size: int
    log_probs: Callable[[Float[Tensor, "place d_model"]], Float[Tensor, "place n"]]
    words: Callable[..., Words]
    ids: Callable[[Targets, int], Int[Tensor, "row"]]


def vocabulary_of(bridge: TransformerBridge, unembed: Unembed | None) -> Vocabulary:
    """Returns the vocabulary in which a model's streams are read.

    Raises:
        InvalidArgumentError: An unembedding of another width, or something else.
    """
    match unembed:
        case None:
            return _of_model(bridge, lambda resid: log_probs(bridge, resid))
        case TransformerBridge():
            _check_width(bridge, unembed.cfg.d_model)
            own, device, dtype = bridge.device, unembed.device, unembed.hf_model.dtype
            return _of_model(unembed, lambda resid: log_probs(unembed, resid.to(device, dtype)).to(own))
        case Unembedding():
            return _of_matrix(bridge, unembed)
        case Tensor() | np.ndarray():
            return _of_matrix(bridge, Unembedding(tensor_of("unembed", unembed)))
        case _:
            raise InvalidArgumentError(
                "this is no unembedding",
                expected="a matrix [d_model, n], an Unembedding with labels, or another bridge",
                got=repr(unembed)[:80],
            )


def _of_model(bridge: TransformerBridge, read: Callable[[Tensor], Tensor]) -> Vocabulary:
    return Vocabulary(
        bridge.cfg.d_vocab,
        read,
        lambda *ids: words_of(bridge, *ids),
        lambda targets, rows: target_ids_of(bridge, targets, rows),
    )


def _of_matrix(bridge: TransformerBridge, unembed: Unembedding) -> Vocabulary:
    _check_width(bridge, len(unembed.matrix))
    names = dict(enumerate(unembed.labels or ()))

    def read(resid: Float[Tensor, "place d_model"]) -> Float[Tensor, "place n"]:
        value = exact(last_normed(bridge, resid[:, None])[:, 0] if unembed.is_normed else resid)
        logits = value @ unembed.matrix.to(value)
        return (logits if unembed.bias is None else logits + unembed.bias.to(logits)).log_softmax(-1)

    def ids(targets: Targets, rows: int) -> Int[Tensor, "row"]:
        given = [targets] if isinstance(targets, str) else targets
        if isinstance(given, list | tuple):
            found = [_column(one, names) if isinstance(one, str) else whole_numbers("targets", one)[0] for one in given]
        else:
            found = whole_numbers("targets", given)
        count = unembed.matrix.shape[1]
        if len(found) not in (1, rows) or not all(0 <= one < count for one in found):
            raise InvalidArgumentError(
                "targets are one column for each row",
                expected=f"{rows} columns, from 0 to {count - 1}",
                got=f"{len(found)}: {found}",
            )
        return torch.tensor(found, device=bridge.device).expand(rows)

    return Vocabulary(unembed.matrix.shape[1], read, lambda *_: Words(names), ids)


def _column(label: str, names: dict[int, str]) -> int:
    for number, name in names.items():
        if name == label:
            return number
    raise InvalidArgumentError(
        f"no column is labelled {label!r}",
        expected=", ".join(list(names.values())[:8]) or "numbers of columns, since these have no labels",
        nearest=nearest(label, names.values()),
    )


def _check_width(bridge: TransformerBridge, width: int) -> None:
    if width != bridge.cfg.d_model:
        raise InvalidArgumentError(
            "the unembedding reads a stream of another width",
            expected=f"d_model={bridge.cfg.d_model}",
            got=str(width),
        )
