"""Indirect object identification: prompts in which one of two names comes next, and how well a model says which.

A template's gaps are `{first}` and `{second}`, the two people as they are introduced; `{again}`, the one who acts; and
any others, for which words are given. The other of the two people comes next.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.evaluations import Estimate, estimate
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Batch, row_numbers
from clearspan.model import check_bridge
from clearspan.modes import no_grad
from clearspan.plots import HeatMap
from clearspan.progress import Progress, shown, told
from clearspan.results import Columns, Result
from clearspan.sweep.metrics import LogitDifference
from clearspan.text import PaddingSide

Order = Literal["ABBA", "BABA"]
"""Whether the indirect object (A) or the subject (B) is introduced first."""
Role = Literal["io", "s1", "s2", "end"]
"""The indirect object; the subject's first and second mention; the last token, after which the answer comes."""
IOICorruption = Literal["abc", "swapped"]

# fmt: off
NAMES = (
    "Adam", "Alice", "Amy", "Andrew", "Anna", "Ben", "Brian", "Charles", "Daniel", "David", "Edward", "Emily", "Emma",
    "Frank", "George", "Grace", "Helen", "Henry", "Jack", "James", "Jane", "John", "Julia", "Kate", "Kevin", "Laura",
    "Linda", "Lisa", "Luke", "Maria", "Mark", "Martin", "Mary", "Matthew", "Max", "Michael", "Nancy", "Oscar", "Paul",
    "Peter", "Rachel", "Richard", "Robert", "Rose", "Sam", "Sarah", "Simon", "Steven", "Susan", "Thomas", "Tom",
    "William",
)
# fmt: on
WORDS: Mapping[str, Sequence[str]] = {
    "place": ("garden", "kitchen", "library", "market", "museum", "office", "park", "school", "shop", "station"),
    "object": ("ball", "basket", "book", "box", "camera", "key", "lamp", "letter", "map", "ring"),
}
TEMPLATES = (
    "After {first} and {second} had closed the {place}, {again} handed the {object} to",
    "While {first} and {second} were waiting at the {place}, {again} passed a {object} to",
    "On Sunday {first} and {second} met near the {place}, and {again} lent a {object} to",
    "Yesterday {first} and {second} cleaned the {place}. Afterwards {again} gave the {object} to",
    "The neighbours saw {first} and {second} leave the {place}, where {again} had sold a {object} to",
    "Because {first} and {second} shared a desk at the {place}, {again} offered the {object} to",
    "It was late when {first} and {second} found the {place}, so {again} returned the {object} to",
    "In the morning {first} and {second} walked to the {place}, and {again} brought a {object} to",
)

_PEOPLE = ("first", "second", "again")
_NAMED: tuple[Role, ...] = ("io", "s1", "s2")


# --- prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class IOIPrompts:
    """Prompts whose next token is the indirect object's name, and the corrupted prompt of each.

    Attributes:
        clean: The prompts, an input of any run.
        corrupted: The corrupted prompts, which differ from the clean ones in names alone.
        positions: By role, the position in each prompt, among its real tokens.
        io: Token id of the indirect object's name, the right answer.
        subject: Token id of the subject's name.
        orders: Who is introduced first.
        templates: Numbers of the templates.
        names: The names that were drawn from: those given that are single tokens.
    """

    clean: Batch
    corrupted: Batch
    positions: Mapping[Role, Int[Tensor, "prompt"]]
    io: Int[Tensor, "prompt"]
    subject: Int[Tensor, "prompt"]
    orders: tuple[Order, ...]
    templates: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return self.clean.rows

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts as text."""
        return self.clean.texts or ()

    @property
    def metric(self) -> LogitDifference:
        """How much higher the indirect object's logit is than the subject's after the last token, for sweeps.

        Example:
            >>> import clearspan
            >>> from clearspan.analysis import ioi_prompts
            >>> from clearspan.patching import activation_patching
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> prompts = ioi_prompts(bridge, 3, templates=["if {first} < {second}: {again} ="], names=list("abcdef"))
            >>> activation_patching(bridge, prompts.clean, prompts.corrupted, prompts.metric, by=["layer"]).mean().shape
            torch.Size([5])
        """
        return LogitDifference(tuple(self.io.tolist()), tuple(self.subject.tolist()))

    def select(self, rows: Sequence[int] | slice) -> "IOIPrompts":
        """Returns some of the prompts, without columns at the ends that are padding in all of them."""
        chosen = row_numbers(rows, len(self))
        at = torch.tensor(chosen)
        return replace(
            self,
            clean=self.clean.select(at),
            corrupted=self.corrupted.select(at),
            positions={role: places[at] for role, places in self.positions.items()},
            io=self.io[at],
            subject=self.subject[at],
            orders=tuple(self.orders[row] for row in chosen),
            templates=tuple(self.templates[row] for row in chosen),
        )

    def aligned(self) -> tuple["IOIPrompts", ...]:
        """Returns the prompts in groups of one template, order and length, in which each role has one position.

        Within a group a position means the same in every prompt, so that values may be averaged or patched by position.

        Example:
            >>> import clearspan
            >>> from clearspan.analysis import ioi_prompts
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> prompts = ioi_prompts(bridge, 9, templates=["if {first} < {second}: {again} ="], names=list("abcdef"))
            >>> [(group.orders[0], group.positions["io"].unique().tolist()) for group in prompts.aligned()]
            [('ABBA', [2]), ('BABA', [4])]
        """
        places = torch.stack(list(self.positions.values()), dim=1).tolist()
        groups: dict[tuple[int, Order, tuple[int, ...]], list[int]] = {}
        for row, key in enumerate(zip(self.templates, self.orders, map(tuple, places), strict=True)):
            groups.setdefault(key, []).append(row)
        return tuple(self.select(groups[key]) for key in sorted(groups))


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
        padding_side: Where shorter prompts are filled; by default the tokenizer's side.
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
        >>> bridge.to_string(prompts.clean.ids[0, prompts.positions["s2"][0]]), bridge.to_string(prompts.io[0])
        (' y', ' x')

    References:
        Wang et al. (2022), "Interpretability in the Wild", arXiv:2211.00593, section 2 and appendix A: the task, the
        two orders, and the ABC distribution. Sentences, names and words here are others.
    """
    check_counts(count=count)
    check_counts(0, seed=seed)
    if not isinstance(corruption, str) or corruption not in get_args(IOICorruption):
        raise InvalidArgumentError(f"unknown corruption {corruption!r}", expected="'abc' or 'swapped'")
    if not _are_texts(orders) or not set(orders) <= set(get_args(Order)):
        raise InvalidArgumentError(f"unknown orders {orders!r}", expected="['ABBA'], ['BABA'] or both")
    if not _are_texts(templates):
        raise InvalidArgumentError("there is no template", expected="a list of sentences", got=repr(templates))
    people = 5 if corruption == "abc" else 2
    ids = _single_tokens(bridge, names, least=people)
    others_of = [_gaps(template, words) for template in templates]
    dice, drawn = random.Random(seed), []
    for _ in range(count):
        number, order = dice.randrange(len(templates)), dice.choice(orders)
        io, subject, *others = dice.sample(list(ids), people)
        pair = (io, subject) if order == "ABBA" else (subject, io)
        filled = {gap: dice.choice(words[gap]) for gap in others_of[number]}
        text, other = (
            templates[number].format(**dict(zip(_PEOPLE, named, strict=True)), **filled)
            for named in ((*pair, subject), others or (*pair, io))
        )
        drawn.append((ids[io], ids[subject], order, number, text, other))
    io, subject, drawn_orders, numbers, *texts = zip(*drawn, strict=True)
    clean, corrupted = (bridge.to_batch(own, None, prepend_bos, padding_side) for own in texts)
    places = _positions(clean, corrupted, io, subject)
    return IOIPrompts(
        clean, corrupted, places, torch.tensor(io), torch.tensor(subject), drawn_orders, numbers, tuple(ids)
    )


def _are_texts(given: object) -> bool:
    if not isinstance(given, Sequence) or isinstance(given, str):
        return False
    return len(given) > 0 and all(isinstance(one, str) for one in given)


def _gaps(template: str, words: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Returns the gaps of a template that are filled from `words`.

    Raises:
        InvalidArgumentError: The three people are not there once each, in their order and after a space; another gap
            has no words; or a space stands at the end, where the answer brings its own.

    Example:
        >>> _gaps(TEMPLATES[0], WORDS)
        ('place', 'object')
    """
    if not isinstance(words, Mapping) or not all(map(_are_texts, words.values())):
        raise InvalidArgumentError("words fill gaps by name", expected="{'place': ['garden', ...]}", got=repr(words))
    try:
        parts = [(text, gap) for text, gap, _, _ in Formatter().parse(template) if gap is not None]
    except ValueError as error:
        raise InvalidArgumentError(f"cannot read the template {template!r}", reason=str(error)) from error
    people = [(text, gap) for text, gap in parts if gap in _PEOPLE]
    others = tuple(dict.fromkeys(gap for _, gap in parts if gap not in _PEOPLE))
    faults = {
        "{first}, {second} and {again}, once each and in this order": [gap for _, gap in people] != list(_PEOPLE),
        "a space before each person, as names are single tokens after a space": not all(
            text.endswith(" ") for text, _ in people
        ),
        f"no gaps but the people and {', '.join(words)}": not set(others) <= set(words),
        "no space at the end, where the answer brings its own": template[-1:].isspace(),
    }
    for expected, is_found in faults.items():
        if is_found:
            raise InvalidArgumentError("the template does not fit the task", expected=expected, got=repr(template))
    return others


def _single_tokens(bridge: TransformerBridge, names: Sequence[str], least: int) -> dict[str, int]:
    """Returns the names that are single tokens after a space, and their ids."""
    check_bridge(bridge)
    if not _are_texts(names):
        raise InvalidArgumentError("there is no name", expected="a list of names", got=repr(names))
    unknown = bridge.text.tokenizer.unk_token_id
    found: dict[str, int] = {}
    for name in dict.fromkeys(names):
        ids = bridge.text.continuing(f" {name}")
        if len(ids) == 1 and ids[0] != unknown and ids[0] not in found.values():
            found[name] = ids[0]
    if len(found) < least:
        raise InvalidArgumentError(
            "too few names are single tokens",
            expected=f"at least {least} different names that are one token after a space",
            got=f"{len(found)} of {len(names)}" + (f": {', '.join(found)}" if found else ""),
            where=f"the tokenizer of {bridge.cfg.model_name or bridge.cfg.architecture}",
            fix="ioi_prompts(bridge, names=[...]) with words of its vocabulary",
        )
    return found


def _positions(
    clean: Batch, corrupted: Batch, io: Sequence[int], subject: Sequence[int]
) -> Mapping[Role, Int[Tensor, "prompt"]]:
    """Returns where the names and the last token stand in each prompt.

    Raises:
        InvalidArgumentError: A name is not one token where it stands, or a corrupted prompt differs in other tokens
            than names.
    """
    found: dict[Role, list[int]] = {role: [] for role in get_args(Role)}
    for row in range(clean.rows):
        own, other = (batch.ids[row, list(batch.real_columns[row])].tolist() for batch in (clean, corrupted))
        places = [[at for at, token in enumerate(own) if token == name] for name in (io[row], subject[row])]
        counts = list(map(len, places))
        if counts != [1, 2]:
            raise InvalidArgumentError(
                "the names are not single tokens where they stand in a prompt",
                expected="the indirect object once, the subject twice",
                got=f"{counts[0]} and {counts[1]} times",
                where=repr(clean.texts[row]) if clean.texts else f"row {row}",
            )
        named = [*places[0], *places[1]]
        changed = {at for at, (token, new) in enumerate(zip(own, other, strict=False)) if token != new}
        if len(own) != len(other) or not changed <= set(named):
            raise InvalidArgumentError(
                "a corrupted prompt is not the prompt with other names, token by token",
                expected="names that change no token but their own",
                where=repr(corrupted.texts[row]) if corrupted.texts else f"row {row}",
            )
        for role, at in zip(found, [*named, len(own) - 1], strict=True):
            found[role].append(at)
    return {role: torch.tensor(places) for role, places in found.items()}


# --- evaluation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class IOIEvaluation(Result):
    """What a model says after each prompt, on the CPU.

    Attributes:
        logit_differences: The indirect object's logit minus the subject's.
        io_probs: Probability of the indirect object's name, among all tokens.
        subject_probs: Probability of the subject's name.
        io_ranks: How many tokens are likelier than the indirect object's name: 0 where it is the prediction.
        prompts: What was asked.
    """

    logit_differences: Float[Tensor, "prompt"]
    io_probs: Float[Tensor, "prompt"]
    subject_probs: Float[Tensor, "prompt"]
    io_ranks: Int[Tensor, "prompt"]
    prompts: IOIPrompts

    @property
    def logit_difference(self) -> Estimate:
        """Mean logit difference between indirect object and subject."""
        return estimate(self.logit_differences)

    @property
    def probability_difference(self) -> Estimate:
        """Mean probability of the indirect object minus that of the subject, from -1 to 1."""
        return estimate(self.io_probs - self.subject_probs)

    @property
    def accuracy(self) -> Estimate:
        """Share of prompts in which the indirect object's logit is higher than the subject's."""
        return estimate((self.logit_differences > 0).float())

    @property
    def top_accuracy(self) -> Estimate:
        """Share of prompts in which the indirect object's name is the likeliest of all tokens."""
        return estimate((self.io_ranks == 0).float())

    @property
    def title(self) -> str:
        """The means, with their standard errors."""
        count = len(self.prompts)
        return (
            f"indirect object identification: logit difference {self.logit_difference}, probability difference "
            f"{self.probability_difference}, accuracy {self.accuracy}, likeliest of all {self.top_accuracy}; "
            f"{count} prompt{'s' * (count > 1)}, ± standard error"
        )

    def columns(self) -> Columns:
        """Returns one row for each prompt."""
        return {
            "prompt": [text.replace("\n", "⏎") for text in self.prompts.texts],
            "order": self.prompts.orders,
            "template": self.prompts.templates,
            "logit difference": self.logit_differences.tolist(),
            "p(indirect object)": self.io_probs.tolist(),
            "p(subject)": self.subject_probs.tolist(),
            "rank": self.io_ranks.tolist(),
        }

    def chart(self) -> HeatMap:
        """Returns the mean logit difference by template and order: a model may know one order and not the other."""
        means = self.to_dataframe().pivot_table("logit difference", "template", "order")
        return HeatMap(
            torch.from_numpy(means.to_numpy(copy=True)),
            list(means.columns),
            list(map(str, means.index)),
            "order",
            "template",
            "logit difference",
            "mean logit difference between indirect object and subject",
        )


@no_grad
def evaluate_ioi(
    bridge: TransformerBridge,
    prompts: IOIPrompts | None = None,
    *,
    count: int = 100,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | Progress = True,
) -> IOIEvaluation:
    r"""Returns how much likelier a model holds the indirect object's name to be than the subject's.

    Args:
        bridge: The model. Hooks that are on it count.
        prompts: From `ioi_prompts`, for templates and names of one's own; by default `ioi_prompts(bridge, count)`.
        count: How many prompts, where none are given.
        seed: Of these.
        batch_size: Prompts run at a time.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`.

    Returns:
        Logit differences, probabilities and ranks by prompt; their means with standard errors.

    Raises:
        NoTokenizerError, InvalidArgumentError: As `ioi_prompts`, where none are given; or an empty batch.

    Example:
        The embedded model, which was trained on code, has not learned to name the other of two arguments:

        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> code = ["def f(self, {first}, {second}):\n    return {again} +"]
        >>> found = evaluate_ioi(bridge, ioi_prompts(bridge, templates=code, names=["x", "y", "a", "b", "key"]))
        >>> found.accuracy.mean < 0.8
        True

    References:
        Wang et al. (2022), "Interpretability in the Wild", arXiv:2211.00593, section 2: logit difference and the
        probability of the indirect object. TransformerLens's `ioi_eval` reports the logit difference and this accuracy.
    """
    check_bridge(bridge)
    check_counts(batch_size=batch_size)
    prompts = ioi_prompts(bridge, count, seed=seed) if prompts is None else prompts
    if not isinstance(prompts, IOIPrompts):
        raise InvalidArgumentError(
            "these are no prompts of the task", expected="ioi_prompts(bridge, ...)", got=type(prompts).__name__
        )
    found = []
    with shown(progress) as tell:
        for start in told(tell, "prompts", range(0, len(prompts), batch_size)):
            part = prompts.select(slice(start, start + batch_size))
            rows, columns, _ = part.clean.places(-1)
            logits = bridge(part.clean)[rows, columns]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            names = torch.stack([part.io, part.subject], dim=1).to(logits.device)
            io, subject = logits.gather(1, names).unbind(1)
            io_probs, subject_probs = logits.softmax(-1).gather(1, names).unbind(1)
            found.append((io - subject, io_probs, subject_probs, (logits > io[:, None]).sum(1)))
    differences, io_probs, subject_probs, ranks = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    return IOIEvaluation(differences, io_probs, subject_probs, ranks, prompts)
