"""Random tokens that stand twice: text in which nothing but the repetition can be predicted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._forward.readout import exact
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_flags, check_kind, wholes
from clearspan.errors import InputError, InvalidArgumentError
from clearspan.model import check_bridge


@dataclass(frozen=True, eq=False)
class RepeatedTokens:
    """Rows of BOS (where the tokenizer has one) and a block of random tokens, twice.

    Attributes:
        tokens: Token ids, on the CPU; there is no padding.
        period: Length of a block.
        start: Where the first block starts: 1 after a BOS, otherwise 0.
    """

    tokens: Int[Tensor, "row pos"]
    period: int
    start: int

    def rows(self, first: int, end: int) -> "RepeatedTokens":
        """Returns rows `first` to `end`, without `end`."""
        check_counts(0, first=first, end=end)
        return replace(self, tokens=self.tokens[first:end])

    def losses(self, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row copy place"]:
        """Returns the loss on each token of both copies, in nats, without the first token of each.

        Nothing before the second copy says that a repetition starts, so its first token cannot be foreseen. The first
        copy leaves it out too, so that both are about the same tokens.

        Args:
            logits: What a model returns for `tokens`, on any device.

        Returns:
            `[row, copy, place]`: `copy` is 0 or 1, `place` is `period - 1` long and starts at the block's second token.
        """
        predicting = exact(self._predicting(logits))
        return -predicting.log_softmax(-1).gather(-1, self._predicted(predicting.device)[..., None])[..., 0]

    def correct(self, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row copy place"]:
        """Returns 1 where the likeliest next token is the right one and 0 elsewhere; axes as for `losses`."""
        predicting = self._predicting(logits)
        return (predicting.argmax(-1) == self._predicted(logits.device)).float()

    def second_copy_loss(self, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row"]:
        """Returns each row's mean loss on the second copy, in nats: a metric for ablation and patching.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> text = repeated_tokens(bridge, rows=2, period=20)
            >>> bool((text.second_copy_loss(bridge(text.tokens)) < 2).all())
            True
        """
        return self.losses(logits)[:, 1].mean(-1)

    def _predicting(self, logits: Tensor) -> Tensor:
        """Returns the logits `[row, copy, place, d_vocab]` after all tokens of each block but its last."""
        check_kind(Tensor, logits=logits)
        if logits.shape[:-1] != self.tokens.shape:
            raise InvalidArgumentError(
                "these are not the logits of the repeated tokens",
                expected=f"[row={len(self.tokens)}, pos={self.tokens.shape[1]}, d_vocab]",
                got=str(list(logits.shape)),
            )
        blocks = logits[:, self.start : self.start + 2 * self.period].unflatten(1, (2, self.period))
        return blocks[:, :, :-1]

    def _predicted(self, device: torch.device) -> Tensor:
        """Returns the token ids `[row, copy, place]` of each block but its first."""
        return self.tokens[:, self.start :].unflatten(1, (2, self.period))[:, :, 1:].to(device)


def repeated_tokens(
    bridge: TransformerBridge,
    *,
    rows: int = 4,
    period: int = 50,
    seed: int = 0,
    prepend_bos: bool | None = None,
    vocabulary: Sequence[int] | Int[Tensor, "token"] | None = None,
) -> RepeatedTokens:
    """Returns random blocks of tokens, each twice in a row.

    Args:
        bridge: The model.
        rows: How many texts.
        period: Length of a block; half of the context (without the BOS) where that is less.
        seed: Of the random tokens. Torch's own seed is neither read nor changed.
        prepend_bos: Whether a BOS stands first; by default as for any text.
        vocabulary: Token ids to draw from, uniformly; by default all but special ones.

    Raises:
        InputError: `prepend_bos=True`, and there is no BOS.
        InvalidArgumentError: No rows, a period of less than two tokens, or a vocabulary that is empty or has other ids
            than the model's.

    Example:
        >>> import clearspan
        >>> text = repeated_tokens(clearspan.boot("tiny-bigcode"), rows=2, period=3)
        >>> text.tokens.shape, text.start
        (torch.Size([2, 7]), 1)
        >>> bool((text.tokens[:, 1:4] == text.tokens[:, 4:]).all())
        True
    """
    check_bridge(bridge)
    check_counts(0, rows=rows, period=period, seed=seed)
    if prepend_bos is not None:
        check_flags(prepend_bos=prepend_bos)
    bos = _bos(bridge, prepend_bos)
    period = min(period, (bridge.cfg.n_ctx - len(bos)) // 2)
    if rows < 1 or period < 2:
        raise InvalidArgumentError(
            "there is nothing to repeat", expected="rows >= 1, period >= 2", got=f"rows={rows}, period={period}"
        )
    ids = _ordinary(bridge) if vocabulary is None else _given(bridge, vocabulary)
    block = ids[torch.randint(len(ids), (rows, period), generator=torch.Generator().manual_seed(seed))]
    start = torch.tensor(bos, dtype=torch.long).expand(rows, len(bos))
    return RepeatedTokens(torch.cat([start, block, block], dim=1), period, len(bos))


def _bos(bridge: TransformerBridge, prepend_bos: bool | None) -> list[int]:
    bos = None if bridge.tokenizer is None else bridge.tokenizer.bos_token_id
    if prepend_bos and bos is None:
        raise InputError("prepend_bos=True, but there is no BOS token", fix="prepend_bos=False")
    wanted = bridge.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    return [bos] if wanted and isinstance(bos, int) else []


def _given(bridge: TransformerBridge, vocabulary: Sequence[int] | Tensor) -> Int[Tensor, "token"]:
    try:
        ids = torch.as_tensor(vocabulary).cpu()
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0, 0)
    if not ids.numel() and ids.ndim == 1:
        raise InvalidArgumentError(
            "there is no token to draw", expected="a vocabulary of token ids", got="an empty one"
        )
    is_ids = ids.ndim == 1 and not (ids.is_floating_point() or ids.dtype == torch.bool)
    if not is_ids or not 0 <= int(ids.min()) <= int(ids.max()) < bridge.cfg.d_vocab:
        raise InvalidArgumentError(
            "the vocabulary is no list of token ids",
            expected=f"ids from 0 to {bridge.cfg.d_vocab - 1}",
            got=repr(vocabulary)[:80],
        )
    return ids.long()


def _ordinary(bridge: TransformerBridge) -> Int[Tensor, "token"]:
    """Returns the ids of all tokens but special ones: the tokenizer's, or without one those that the config names."""
    tokenizer, d_vocab = bridge.tokenizer, bridge.cfg.d_vocab
    if tokenizer is None:
        named = (wholes(bridge.cfg.hf.get(f"{name}_token_id")) or () for name in ("bos", "eos", "pad"))
        size, special = d_vocab, [token for each in named for token in each]
    else:
        size, special = min(d_vocab, len(tokenizer)), tokenizer.all_special_ids
    ids = torch.arange(size)
    return ids[~torch.isin(ids, torch.tensor(sorted(special), dtype=torch.long))]
