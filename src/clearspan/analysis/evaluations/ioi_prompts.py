"""Prompts of indirect object identification as tokens, with the places of their names, and corrupted ones beside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Order = Literal["ABBA", "BABA"]
"""Whether the indirect object (A) or the subject (B) is introduced first."""
Role = Literal["io", "s1", "s2", "end"]
"""The indirect object; the subject's first and second mention; the last token, after which the answer comes."""


@dataclass(frozen=True, eq=False)
class IOIPrompts:
    """Prompts whose next token is the indirect object's name, on the CPU.

    Attributes:
        tokens: Token ids.
        mask: 1 for real tokens, 0 for padding.
        corrupted: Token ids of the corrupted prompts, which differ from `tokens` in names alone.
        positions: By role, the column in `tokens`.
        io: Token id of the indirect object's name, the right answer.
        subject: Token id of the subject's name.
        texts: The prompts.
        corrupted_texts: The corrupted prompts.
        orders: Who is introduced first.
        templates: Numbers of the templates.
        names: The names that were drawn from: those given that are single tokens.
    """

    tokens: Int[Tensor, "prompt pos"]
    mask: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]
    positions: Mapping[Role, Int[Tensor, "prompt"]]
    io: Int[Tensor, "prompt"]
    subject: Int[Tensor, "prompt"]
    texts: tuple[str, ...]
    corrupted_texts: tuple[str, ...]
    orders: tuple[Order, ...]
    templates: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def at_end(self, logits: Float[Tensor, "prompt pos d_vocab"]) -> Float[Tensor, "prompt d_vocab"]:
        """Returns the logits after each prompt's last token, in float32 at least."""
        last = logits[torch.arange(len(self), device=logits.device), self.positions["end"].to(logits.device)]
        return last.to(torch.promote_types(logits.dtype, torch.float32))

    def logit_difference(self, logits: Float[Tensor, "prompt pos d_vocab"]) -> Float[Tensor, "prompt"]:
        """Returns how much higher the indirect object's logit is than the subject's: a metric for patching.

        Args:
            logits: What a model returns for `tokens` or `corrupted`, on any device.

        Example:
            >>> import clearspan
            >>> from clearspan.analysis import ioi_prompts
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> prompts = ioi_prompts(bridge, 3, templates=["if {first} < {second}: {again} ="], names=list("abcdef"))
            >>> prompts.logit_difference(bridge(prompts.tokens, attention_mask=prompts.mask)).shape
            torch.Size([3])
        """
        last = self.at_end(logits)
        pair = torch.stack([self.io, self.subject], dim=1).to(last.device)
        io, subject = last.gather(1, pair).unbind(1)
        return io - subject

    def rows(self, first: int, end: int) -> "IOIPrompts":
        """Returns prompts `first` to `end`, without `end`, and without columns in which all of them are padded."""
        return self._chosen(range(len(self))[first:end])

    def aligned(self) -> tuple["IOIPrompts", ...]:
        """Returns the prompts in groups of one template, order and length, unpadded: there, positions are the same.

        Within a group a position means the same in every prompt, so that values may be averaged or patched by position.

        Example:
            >>> import clearspan
            >>> from clearspan.analysis import ioi_prompts
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> prompts = ioi_prompts(bridge, 9, templates=["if {first} < {second}: {again} ="], names=list("abcdef"))
            >>> [(group.orders[0], group.positions["io"].unique().tolist()) for group in prompts.aligned()]
            [('ABBA', [2]), ('BABA', [4])]
        """
        columns = torch.stack([*self.positions.values(), self.mask.sum(1)], dim=1)
        groups: dict[tuple[int, Order, tuple[int, ...]], list[int]] = {}
        for row, places in enumerate(columns.tolist()):
            groups.setdefault((self.templates[row], self.orders[row], tuple(places)), []).append(row)
        return tuple(self._chosen(groups[key]) for key in sorted(groups))

    def _chosen(self, rows: Sequence[int]) -> "IOIPrompts":
        at = torch.tensor(list(rows), dtype=torch.long)
        kept = self.mask[at].any(0).nonzero()
        first, end = int(kept.min()), int(kept.max()) + 1
        return replace(
            self,
            tokens=self.tokens[at, first:end],
            mask=self.mask[at, first:end],
            corrupted=self.corrupted[at, first:end],
            positions={role: column[at] - first for role, column in self.positions.items()},
            io=self.io[at],
            subject=self.subject[at],
            texts=tuple(self.texts[row] for row in rows),
            corrupted_texts=tuple(self.corrupted_texts[row] for row in rows),
            orders=tuple(self.orders[row] for row in rows),
            templates=tuple(self.templates[row] for row in rows),
        )
