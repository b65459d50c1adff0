"""Prompts of indirect object identification, drawn from templates, names and words."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.analysis.corpus import check_positive
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import PaddingSide

from .ioi_prompts import IOIPrompts, Order
from .ioi_templates import NAMES, TEMPLATES, WORDS, gaps
from .ioi_tokens import check_aligned, positions_of, single_tokens

IOICorruption = Literal["abc", "swapped"]


@dataclass(frozen=True)
class _Drawn:
    """One prompt in words."""

    template: int
    order: Order
    io: str
    subject: str
    text: str
    corrupted: str


def ioi_prompts(
    bridge: TransformerBridge,
    count: int = 100,
    *,
    corruption: IOICorruption = "abc",
    orders: Sequence[Order] = ("ABBA", "BABA"),
    templates: Sequence[str] = TEMPLATES,
    names: Sequence[str] = NAMES,
    words: Mapping[str, Sequence[str]] = WORDS,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    seed: int = 0,
) -> IOIPrompts:
    r"""Returns prompts such as "After Mary and John had closed the shop, John handed the key to".

    Two people are introduced; the one who acts, the subject, is named again, so that the other, the indirect object,
    comes next. Template, order, names and words of each prompt are drawn independently and uniformly, with replacement.

    Args:
        bridge: A model with a tokenizer.
        count: How many prompts.
        corruption: How the second set of prompts differs. `"abc"`: three other names, all different, so that nothing
            says who comes next. `"swapped"`: the one who acts is the indirect object, so that the subject comes next;
            one token differs.
        orders: `"ABBA"`, where the indirect object is introduced first, `"BABA"`, where the subject is, or both.
        templates: Sentences with the gaps `{first}`, `{second}` and `{again}`, each after a space, and any others that
            `words` fills. Braces of the text itself are doubled.
        names: Those that are no single token after a space, or unknown to the tokenizer, are left out.
        words: For every other gap, what may stand there.
        prepend_bos: Whether each prompt starts with a BOS; by default as for any text.
        padding_side: Where shorter prompts are filled; by default the tokenizer's side. `IOIPrompts.aligned` gives
            groups without padding.
        seed: Of what is drawn. Python's and torch's own seeds are neither read nor changed.

    Returns:
        Prompts, corrupted prompts, and where in them the names stand.

    Raises:
        NoTokenizerError: The bridge has no tokenizer.
        InvalidArgumentError: Fewer than five names (for `"swapped"`, two) are single tokens; a template that does not
            fit; an unknown corruption or order; no prompts; or a prompt in which a name is not one token after all.

    Example:
        The embedded model knows code, and no person by name:

        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> code = ["def f(self, {first}, {second}):\n    return {again} +"]
        >>> prompts = ioi_prompts(bridge, 4, templates=code, names=["x", "y", "left", "right"], corruption="swapped")
        >>> print(prompts.texts[0])
        def f(self, y, x):
            return y +
        >>> bridge.to_string(prompts.tokens[0, prompts.positions["s2"][0]]), bridge.to_string(prompts.io[0])
        (' y', ' x')

    References:
        Wang et al. (2022), "Interpretability in the Wild", arXiv:2211.00593, section 2 and appendix A: the task, the
        two orders, and the ABC distribution. Sentences, names and words here are others.
    """
    check_positive(count=count)
    _check_choices(corruption, orders, templates)
    ids = single_tokens(bridge, names, least=_people(corruption))
    prompts = _drawn(count, corruption, orders, templates, list(ids), words, random.Random(seed))
    texts, others = (tuple(prompt.text for prompt in prompts), tuple(prompt.corrupted for prompt in prompts))
    tokens, mask = _encoded(bridge, texts, prepend_bos, padding_side)
    corrupted, corrupted_mask = _encoded(bridge, others, prepend_bos, padding_side)
    io = torch.tensor([ids[prompt.io] for prompt in prompts])
    subject = torch.tensor([ids[prompt.subject] for prompt in prompts])
    positions = positions_of(tokens, mask, io, subject, texts)
    check_aligned((tokens, mask), (corrupted, corrupted_mask), positions, others)
    return IOIPrompts(
        tokens,
        mask,
        corrupted,
        positions,
        io,
        subject,
        texts,
        others,
        tuple(prompt.order for prompt in prompts),
        tuple(prompt.template for prompt in prompts),
        tuple(ids),
    )


def _people(corruption: IOICorruption) -> int:
    """Returns how many names one prompt and its corrupted one take."""
    return 5 if corruption == "abc" else 2


def _drawn(
    count: int,
    corruption: IOICorruption,
    orders: Sequence[Order],
    templates: Sequence[str],
    names: Sequence[str],
    words: Mapping[str, Sequence[str]],
    dice: random.Random,
) -> list[_Drawn]:
    others_of = [gaps(template, words) for template in templates]
    prompts = []
    for _ in range(count):
        number, order = dice.randrange(len(templates)), dice.choice(orders)
        io, subject, *others = dice.sample(names, _people(corruption))
        pair = (io, subject) if order == "ABBA" else (subject, io)
        filled = {gap: dice.choice(words[gap]) for gap in others_of[number]}
        text = _written(templates[number], (*pair, subject), filled)
        corrupted = _written(templates[number], others or (*pair, io), filled)
        prompts.append(_Drawn(number, order, io, subject, text, corrupted))
    return prompts


def _written(template: str, people: Sequence[str], filled: Mapping[str, str]) -> str:
    first, second, again = people
    return template.format(first=first, second=second, again=again, **filled)


def _encoded(
    bridge: TransformerBridge, texts: Sequence[str], prepend_bos: bool | None, padding_side: PaddingSide | None
) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt pos"]]:
    tokens, mask = bridge.text.encode(texts, prepend_bos, padding_side)
    return tokens, torch.ones_like(tokens) if mask is None else mask


def _check_choices(corruption: IOICorruption, orders: Sequence[Order], templates: Sequence[str]) -> None:
    if corruption not in get_args(IOICorruption):
        raise InvalidArgumentError(f"unknown corruption {corruption!r}", expected="'abc' or 'swapped'")
    if isinstance(orders, str) or not orders or not set(orders) <= set(get_args(Order)):
        raise InvalidArgumentError(f"unknown orders {orders!r}", expected="['ABBA'], ['BABA'] or both")
    if isinstance(templates, str) or not templates:
        raise InvalidArgumentError("there is no template", expected="a list of sentences", got=repr(templates))
