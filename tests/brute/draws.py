"""What is drawn, from a seed: models, rows, places, actions, metrics, ways of giving an input.

A draw remembers what it drew, by name, and prints it. A test that fails shows the draw.
"""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from . import changes, metrics
from .changes import AXES, FUNCTIONS, Change, Positions
from .families import FAMILIES, Family
from .models import SINGLE_ONLY, Subject, subject
from .rows import Rows

Option = TypeVar("Option")

EVERY_RUN = int(os.environ.get("SEED") or 0)
"""The seed of all draws: `SEED=7 pytest tests/brute` draws others than continuous integration does."""

STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in")
HEADS = ("q", "k", "v", "z", "result")
INPUTS = ("q_input", "k_input", "v_input")
SQUARES = ("pattern", "attn_scores")
NEURONS = ("pre", "pre_linear", "post")
NORMS = ("ln1.normalized", "ln2.normalized", "ln1.scale", "ln2.scale")
ENDS = ("embed", "pos_embed", "ln_final.normalized", "logits")
VOCABULARY = 97


class Draw:
    """Random choices of one case, each with a name.

    Args:
        kind: What the case is of.
        number: Which case.
    """

    def __init__(self, kind: str, number: int) -> None:
        self.kind = kind
        self.number = number
        self.random = random.Random(f"{EVERY_RUN} {kind} {number}")
        self.facts: dict[str, Any] = {}

    def __str__(self) -> str:
        lines = [f"  {name}: {value}" for name, value in self.facts.items()]
        return "\n".join([f"draw {self.number} of {self.kind}, SEED={EVERY_RUN}", *lines])

    def note(self, name: str, value: Option) -> Option:
        """Remembers what was drawn, and returns it. What has a name that is taken gets a number."""
        taken = sum(known == name or known.startswith(f"{name} (") for known in self.facts)
        self.facts[f"{name} ({taken + 1})" if taken else name] = value
        return value

    def one(self, name: str, options: Sequence[Option]) -> Option:
        """Draws one of some options."""
        return self.note(name, self.random.choice(list(options)))

    def chance(self, probability: float) -> bool:
        """Draws whether something happens."""
        return self.random.random() < probability

    def some(self, options: Sequence[Option], least: int, most: int) -> tuple[Option, ...]:
        """Draws different options in a random order."""
        count = self.random.randint(min(least, len(options)), min(most, len(options)))
        return tuple(self.random.sample(list(options), count))

    @property
    def generator(self) -> torch.Generator:
        """A generator of torch with a seed that is drawn."""
        return torch.Generator().manual_seed(self.random.randrange(2**31))

    # --- models and rows ---------------------------------------------------------------------------------------------

    def subject(
        self, fits: Callable[[Family], bool] = lambda family: True, *, is_padded: bool = False, but: Sequence[str] = ()
    ) -> Subject:
        """Draws a model.

        Args:
            fits: Which families may be drawn.
            is_padded: Whether rows will have padding: a softmax in float32 of a float64 model gives NaN there.
            but: Variants that are not drawn.
        """
        variants = [name for name, family in FAMILIES.items() if fits(family) and name not in but]
        variant = self.one("variant", variants)
        n_layers = self.one("layers", (2, 3))
        may_be_double = not is_padded and variant not in SINGLE_ONLY
        dtype = self.one("dtype", (torch.float64, torch.float64, torch.float32) if may_be_double else (torch.float32,))
        return subject(variant, n_layers, dtype)

    def rows(self, padding: str | None = None, *, count: int | None = None, longest: int = 8, least: int = 3) -> Rows:
        """Draws token ids with a mask.

        Args:
            padding: `"none"`, `"left"`, `"right"`, `"mixed"` (a side for each row) or `"holes"`.
            count: How many rows.
            longest: Most columns.
            least: Fewest real tokens of a row.
        """
        padding = self.padding() if padding is None else padding
        n_rows = self.random.randint(1 if padding == "none" else 2, 3) if count is None else count
        length = self.random.randint(max(least, 4), longest)
        ids = torch.randint(1, VOCABULARY, (n_rows, length), generator=self.generator)
        mask = torch.ones_like(ids)
        if padding != "none":
            for row in range(n_rows):
                real = length if row == 0 else self.random.randint(least, length - 1)
                mask[row] = self._mask(padding, length, real)
            order = list(range(n_rows))
            self.random.shuffle(order)
            mask = mask[order]
        return self.note("rows", Rows(ids, mask))

    def padding(self) -> str:
        """Draws a kind of padding."""
        return self.one("padding", ("none", "none", "left", "left", "right", "mixed", "holes"))

    def _mask(self, padding: str, length: int, real: int) -> torch.Tensor:
        mask = torch.zeros(length, dtype=torch.long)
        side = self.random.choice(("left", "right")) if padding == "mixed" else padding
        match side:
            case "left":
                mask[length - real :] = 1
            case "right":
                mask[:real] = 1
            case "holes":
                first = self.random.randint(0, length - real)
                columns = [first, *self.random.sample(range(first + 1, length), real - 1)] if real < length else []
                mask[columns if columns else slice(None)] = 1
        return mask

    def other_rows(self, rows: Rows, *, relaid: bool = False) -> Rows:
        """Draws other ids for rows of the same lengths.

        Args:
            rows: The rows.
            relaid: Whether the padding lies elsewhere.
        """
        ids = torch.randint(1, VOCABULARY, rows.size, generator=self.generator)
        same = torch.rand(rows.size, generator=self.generator) < 0.3
        ids = torch.where(same, rows.ids, ids)
        for row, columns in enumerate(rows.columns):  # so that all positions differ
            ids[row, columns[0]] = 1 + rows.ids[row, columns[0]] % (VOCABULARY - 1)
        if not relaid:
            return self.note("other rows", Rows(torch.where(rows.mask.bool(), ids, rows.ids), rows.mask))
        length = rows.size[1] + self.random.choice((0, 0, 0, 1, 2))
        masks = [self._mask(self.random.choice(("left", "right")), length, real) for real in rows.lengths]
        if all(real == length for real in rows.lengths):
            masks = [self._mask("left", length, real) for real in rows.lengths]
        wide = torch.randint(1, VOCABULARY, (rows.size[0], length), generator=self.generator)
        mask = torch.stack(masks)
        for row, columns in enumerate(rows.columns):
            wide[row, mask[row].bool()] = ids[row, columns]
        return self.note("other rows", Rows(wide, mask))

    # --- places ------------------------------------------------------------------------------------------------------

    def positions(self, rows: Rows, *, may_be_all: bool = True) -> Positions:
        """Draws positions that every row has: all, one, several, or several for each row."""
        shortest = min(rows.lengths)
        kinds = ["one", "one", "several", "by row", "stretch"] + ["all"] * may_be_all
        match self.random.choice(kinds):
            case "all":
                return None
            case "stretch":
                return self.random.choice(
                    (slice(1, None), slice(-2, None), slice(0, shortest - 1), slice(None, None, 2))
                )
            case "one":
                return self.random.randrange(-shortest, shortest)
            case "several":
                return self._places(shortest, 1, 3)
        return tuple(self._places(length, 1, 3) for length in rows.lengths)

    def _places(self, length: int, least: int, most: int) -> tuple[int, ...]:
        """Draws different places, some of them counted from the end."""
        chosen = self.some(range(length), least, most)
        return tuple(place - length if self.chance(0.4) else place for place in chosen)

    def per_row(self, name: str, rows: Rows, draw: Callable[[int], int], alike: float = 0.5) -> metrics.PerRow:
        """Draws one number for all rows, or one for each."""
        if self.chance(alike):
            return self.note(name, draw(min(rows.lengths)))
        return self.note(name, tuple(draw(length) for length in rows.lengths))

    # --- changes -----------------------------------------------------------------------------------------------------

    def points(self, subject: Subject, *, ends: bool = True, squares: bool = True) -> list[str]:
        """Returns the points of a model that draws may choose, the common ones several times."""
        family, found = subject.family, [*STREAM, *HEADS, *HEADS, *INPUTS, *NORMS]
        if family.pre is not None:
            found += [name for name in NEURONS if name != "pre_linear" or family.pre_linear]
        if squares and family.attention == "eager":
            found += [*SQUARES, *SQUARES, *["attn_scores"] * (6 * family.has_sinks)]
        if ends:
            found += [name for name in ENDS if name != "pos_embed" or family.pos_embed]
        absent = {"resid_mid"} if family.is_parallel else set()
        absent |= {name for name in found if name.startswith("ln1.") and family.ln1 is None}
        absent |= {name for name in found if name.startswith("ln2.") and family.ln2 in (None, family.ln1)}
        return [name for name in found if name not in absent]

    def change(
        self,
        subject: Subject,
        rows: Rows,
        sources: Sequence[str] = (),
        *,
        points: Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
        may_be_columns: bool = True,
    ) -> Change:
        """Draws a change.

        Args:
            subject: The model.
            rows: The input.
            sources: Names of runs that values may be taken from.
            points: Points to choose from.
            kinds: Actions to choose from.
            may_be_columns: Whether columns may stand for positions.
        """
        reference = subject.reference
        point = self.random.choice(list(points or self.points(subject)))
        axes = AXES[point].split()
        layer = None
        if point not in ENDS:
            layer = self.random.randrange(-reference.n_layers, reference.n_layers)
        heads = neurons = keys = None
        n_heads = {"head": reference.n_heads, "group": reference.n_groups}.get(axes[min(1, len(axes) - 1)], 0)
        if axes[0] == "head":
            n_heads = reference.n_heads
        if n_heads and self.chance(0.7):
            heads = self._places(n_heads, 1, 2)
        sizes = {"model": reference.d_model, "neuron": self._d_mlp(subject), "vocab": VOCABULARY}
        if axes[-1] in ("model", "neuron") and self.chance(0.25):
            neurons = self._places(sizes[axes[-1]], 1, 5)
        positions, columns = self.positions(rows), None
        if axes[-1] == "k":
            positions, keys = self._square_places(rows)
        elif may_be_columns and self.chance(0.1):
            positions, columns = None, self._columns(rows)
        width = len(neurons) if neurons else self._width(subject, point, sizes)
        action = self._action(point, width, rows, sources, kinds, keys is None)
        if isinstance(action, changes.Patch) and layer is not None and keys is None and self.chance(0.3):
            action = self._elsewhere(action, point, rows, reference.n_layers)
        return Change(point, action, layer, positions, heads, neurons, keys, columns)

    def _columns(self, rows: Rows) -> tuple[int, ...] | None:
        """Draws columns that are real in every row, some of them counted from the end."""
        real, width = rows.mask.bool().all(0).nonzero()[:, 0].tolist(), rows.size[1]
        return tuple(one - width if self.chance(0.4) else one for one in self.some(real, 1, 2)) or None

    def _elsewhere(self, action: changes.Patch, point: str, rows: Rows, n_layers: int) -> changes.Patch:
        """Draws another layer and position of the source that a patch reads."""
        layer = self.random.choice((None, self.random.randrange(-n_layers, n_layers)))
        shortest = min(rows.lengths)
        position = None if point in SQUARES else self.random.choice((None, self.random.randrange(-shortest, shortest)))
        return changes.Patch(action.source, layer, position)

    def _square_places(self, rows: Rows) -> tuple[Positions, Positions]:
        """Draws queries and keys. Keys leave out the first one, so that each query is left with a key that it sees."""
        queries = self.positions(rows)
        shortest = min(rows.lengths)
        keys = None if self.chance(0.5) or shortest < 3 else self.some(range(1, shortest), 1, 1)
        return queries, keys

    def _d_mlp(self, subject: Subject) -> int:
        family, reference = subject.family, subject.reference
        if family.post is None:
            return 0
        weight = reference.module(0, family.post).weight
        return next(size for size in weight.shape if size != reference.d_model)

    def _width(self, subject: Subject, point: str, sizes: Mapping[str, int]) -> int:
        reference, axis = subject.reference, AXES[point].split()[-1]
        if axis == "width":
            return reference.d_model if point in (*INPUTS, "result") else reference.d_head
        return {"one": 1, "k": 0, **sizes}[axis]

    def _action(
        self,
        point: str,
        width: int,
        rows: Rows,
        sources: Sequence[str],
        kinds: Sequence[str] | None,
        all_keys: bool,
    ) -> changes.Action:
        """Draws an action that says the same of a value whatever padding holds."""
        allowed = ["Zero", "Scale", "Apply", "Add", "Inject"] + ["ProjectOut"] * (width > 1)
        if point.endswith("scale"):
            allowed = ["Scale"]
        elif point == "pattern":
            allowed = ["Zero", "Scale", "Apply"]
        elif point == "attn_scores":
            allowed = ["Scale"] + ["Mask", "Mask", "Zero"] * (not all_keys)
        if sources:
            allowed += ["Patch", "Patch", "Patch"]
            if not point.endswith("scale") and (point not in SQUARES or not rows.is_padded):
                allowed += ["Mean"] if point != "attn_scores" else []
                if not rows.is_padded:
                    allowed += ["Resample"] * (rows.size[0] > 1) + ["Mean by position"] * (point not in SQUARES)
        kind = self.random.choice([each for each in allowed if kinds is None or each in kinds])
        source = self.random.choice(list(sources)) if sources else ""
        match kind:
            case "Scale":
                return changes.Scale(
                    self.random.choice(
                        ((0.5,) if rows.is_padded else (0.5, 1.5, 2.0)) if point in SQUARES else (-1.5, 0.5, 2.0)
                    )
                )
            case "Apply":
                return changes.Apply(self.random.choice(list(FUNCTIONS)))
            case "Add":
                return changes.Add(self.vector(width), self.random.choice((1.0, -0.5, 3.0)))
            case "Inject":
                norm = self.random.choice(("own", "stream"))
                return changes.Inject(self.vector(width), norm, self.random.choice((1.0, 0.5)), self.chance(0.5))
            case "ProjectOut":
                return changes.ProjectOut(self.vector(width))
            case "Patch":
                return changes.Patch(source)
            case "Mean":
                return changes.Mean(source)
            case "Mean by position":
                return changes.Mean(source, by_position=True)
            case "Resample":
                return changes.Resample(source, self.random.randrange(5))
            case "Mask":
                return changes.Mask()
        return changes.Zero()

    def vector(self, width: int) -> tuple[float, ...]:
        """Draws a vector."""
        return tuple(torch.randn(width, generator=self.generator).tolist())

    # --- metrics -----------------------------------------------------------------------------------------------------

    def metric(self, rows: Rows, references: Sequence[str] = ("base",), *, kinds: Sequence[str] = ()) -> metrics.Metric:
        """Draws a metric.

        Args:
            rows: The input.
            references: Runs that a divergence may be from.
            kinds: What may be drawn; by default anything.
        """
        is_whole = all(columns[-1] - columns[0] + 1 == len(columns) for columns in rows.columns)
        every = ["difference", "difference", "probability", "divergence", "plain"] + ["loss"] * is_whole
        position = self.per_row("metric's position", rows, lambda length: self.random.randrange(-length, length))

        def token(length: int) -> int:
            return self.random.randrange(VOCABULARY)

        match self.one("metric's kind", [kind for kind in every if not kinds or kind in kinds]):
            case "difference":
                wrong = None if self.chance(0.3) else self.per_row("incorrect", rows, token)
                found = metrics.LogitDifference(self.per_row("correct", rows, token), wrong, position)
            case "probability":
                found = metrics.Probability(self.per_row("token", rows, token), position, self.chance(0.5))
            case "divergence":
                at = None if self.chance(0.5) else position
                found = metrics.KLDivergence(self.random.choice(list(references)), at)
            case "loss":
                found = metrics.NextTokenLoss()
            case _:
                found = metrics.Plain(token(0))
        return self.note("metric", found)
