"""Names as single tokens: which are, where they stand in prompts, and whether others stand in the same places."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.analysis.corpus import Batch
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError

from .ioi_prompts import Role


def single_tokens(bridge: TransformerBridge, names: Sequence[str], least: int) -> dict[str, int]:
    """Returns the names that are single tokens after a space, and their ids."""

    def ids_of(text: str) -> list[int]:
        return bridge.text.encode(text, prepend_bos=False)[0][0].tolist()

    # After a word, and not " Mary" alone: some tokenizers put a space of their own before a text.
    before, unknown = ids_of("and"), bridge.text.tokenizer.unk_token_id
    found: dict[str, int] = {}
    for name in dict.fromkeys(names):
        *rest, last = ids_of(f"and {name}")
        if rest == before and last != unknown and last not in found.values():
            found[name] = last
    if len(found) < least:
        raise InvalidArgumentError(
            "too few names are single tokens",
            expected=f"at least {least} different names that are one token after a space",
            got=f"{len(found)} of {len(names)}" + (f": {', '.join(found)}" if found else ""),
            where=f"the tokenizer of {bridge.cfg.model_name or bridge.cfg.architecture}",
            fix="ioi_prompts(bridge, names=[...]) with words of its vocabulary",
        )
    return found


def positions_of(
    tokens: Int[Tensor, "prompt pos"],
    mask: Int[Tensor, "prompt pos"],
    io: Int[Tensor, "prompt"],
    subject: Int[Tensor, "prompt"],
    texts: Sequence[str],
) -> Mapping[Role, Int[Tensor, "prompt"]]:
    """Returns the columns of the names and of the last token."""
    is_io, is_subject = ((tokens == name[:, None]) & mask.bool() for name in (io, subject))
    counts = torch.stack([is_io.sum(1), is_subject.sum(1)], dim=1).tolist()
    for text, count in zip(texts, counts, strict=True):
        if count != [1, 2]:
            raise InvalidArgumentError(
                "the names are not single tokens where they stand in a prompt",
                expected="the indirect object once, the subject twice",
                got=f"{count[0]} and {count[1]} times",
                where=repr(text),
            )
    s1, s2 = is_subject.nonzero()[:, 1].view(-1, 2).unbind(1)
    end = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return {"io": is_io.int().argmax(1), "s1": s1, "s2": s2, "end": end}


def check_aligned(
    clean: Batch, other: Batch, positions: Mapping[Role, Int[Tensor, "prompt"]], texts: Sequence[str]
) -> None:
    """Raises unless the corrupted prompts `other`, whose texts are `texts`, differ from the prompts in names alone."""
    (tokens, mask), (corrupted, corrupted_mask) = clean, other
    is_name = torch.zeros_like(mask, dtype=torch.bool)
    for role in ("io", "s1", "s2"):
        is_name.scatter_(1, positions[role][:, None], True)
    if tokens.shape == corrupted.shape and torch.equal(mask, corrupted_mask):
        differs = ((tokens != corrupted) & ~is_name).any(1)
        if not differs.any():
            return
        where = repr(texts[int(differs.int().argmax())])
    else:
        where = "their lengths"
    raise InvalidArgumentError(
        "a corrupted prompt is not the prompt with other names, token by token",
        expected="names that change no token but their own",
        where=where,
    )
