"""Interchange interventions: does the model answer as if a variable had the value that it has in another run?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._run.hooks import sites_of
from clearspan.analysis.activations import Layers, Targets, layers_of, points_of, target_ids_of
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, tensor_of, whole_numbers
from clearspan.effects import Draws, Effects, Label
from clearspan.errors import InvalidArgumentError, NotFiniteError, argument
from clearspan.inputs import Batch, Input, Positions, row_numbers
from clearspan.interventions import Constant, Intervention, Patch, PatchSubspace
from clearspan.model import check_bridge
from clearspan.points import Address
from clearspan.progress import Progress, shown, silent
from clearspan.results import Columns
from clearspan.statistics import Interval, share_interval
from clearspan.sweep import Grid, LogitMetric, Sweep, grid
from clearspan.sweep.metrics import Context, one_place

Places = int | Sequence[int] | None
"""One head or neuron, several, or all (None)."""
Answers = Sequence[str] | Sequence[int]
"""Tokens, as text or ids."""
Basis = Float[Tensor, "d k"]
"""Orthonormal columns."""

SOURCE = "source"
"""Name of the run that values are taken from."""


@dataclass(frozen=True, eq=False, repr=False)
class InterchangeExamples:
    """Pairs of a base and a source, with the answer that a hypothesis expects of the base after the interchange.

    The answer is the likeliest token after a base's last token. `of` makes examples from any inputs, and
    `draw_interchanges` from a causal model.

    Attributes:
        base: The runs that are changed.
        source: The runs that values are taken from; they need not be as long as the bases.
        labels: The token that should come out, for each pair; on the CPU.
        base_positions: Where values are written: one position or several for all pairs, or a list for each pair. They
            are kept as a tuple for each pair, counted from 0.
        source_positions: Where the values for these places are read, in the same order.
        answers: The tokens among which the likeliest is the answer, in order; None for the whole vocabulary.

    Raises:
        InvalidArgumentError: Numbers of rows or places that do not fit each other, a position that a row does not have
            or that is written twice, or a label that is no answer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> InterchangeExamples.of(bridge, ["import re, sys"], ["import os"], [" os"], position=1)
        InterchangeExamples(1 pair of 5 and 3 tokens, values exchanged at 1 place)
    """

    base: Batch
    source: Batch
    labels: Int[Tensor, "example"]
    base_positions: Positions = -1
    source_positions: Positions = -1
    answers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("base", SOURCE):
            batch = getattr(self, name)
            if not isinstance(batch, Batch):
                raise InvalidArgumentError(
                    f"the {name} of examples is a Batch",
                    got=type(batch).__name__,
                    fix="InterchangeExamples.of(bridge, base, source, labels)",
                )
        object.__setattr__(self, SOURCE, replace(self.source.told_by(self.base), is_bare=False))
        for name in ("base", SOURCE):
            own = getattr(self, name).positions(getattr(self, f"{name}_positions"), f"{name} position")
            object.__setattr__(self, f"{name}_positions", tuple(map(tuple, own)))
        labels = tensor_of("labels", self.labels).detach().cpu()
        object.__setattr__(self, "labels", labels)
        rows = (self.base.rows, self.source.rows)
        if labels.is_floating_point() or list(labels.shape) != [rows[0]] or rows[0] != rows[1]:
            raise InvalidArgumentError(
                "examples are pairs with a label each",
                expected="as many bases, sources and whole numbers as labels",
                got=f"{rows[0]} bases, {rows[1]} sources, labels {labels.dtype} {list(labels.shape)}",
            )
        places = {len(own) for own in (*self.written, *self.read)}
        if len(places) > 1:
            raise InvalidArgumentError(
                "an interchange reads as many positions as it writes", expected="as many in each pair", got=str(places)
            )
        for row, own in enumerate(self.written):
            if len(set(own)) < len(own):
                raise InvalidArgumentError(f"a position of base {row} is written twice", got=str(list(own)))
        if self.answers is not None:
            object.__setattr__(self, "answers", tuple(sorted(set(whole_numbers("answers", self.answers)))))
            self.targets()

    @classmethod
    def of(
        cls,
        bridge: TransformerBridge,
        base: Input,
        source: Input,
        labels: Targets,
        *,
        position: Positions = -1,
        source_position: Positions = None,
        answers: Answers | None = None,
        base_mask: Int[Tensor, "example pos"] | None = None,
        source_mask: Int[Tensor, "example source_pos"] | None = None,
    ) -> Self:
        """Returns examples of any two inputs.

        Args:
            bridge: The model that they are for.
            base: Any input.
            source: Another, of as many rows.
            labels: One token for each pair, or for all, as text or ids.
            position: Where values are written: one position or several for all pairs, or a list for each pair; counted
                among real tokens, negative from the last one.
            source_position: Where they are read; by default at `position`.
            answers: The tokens among which the likeliest is the answer, as text or ids; None for the whole vocabulary.
            base_mask: 1 for real tokens, where bare token ids have padding.
            source_mask: The same of the source; its bare ids share the base's padding where they have its ids there.

        Raises:
            NoTokenizerError: Text, and the bridge has no tokenizer.
            InvalidArgumentError: A label that is not one token of the vocabulary, bare ids that do not tell their
                padding, or as above.
        """
        check_bridge(bridge)
        with argument("base" if base_mask is None else "base, or base_mask"):
            first = bridge.to_batch(base, base_mask)
        with argument("source" if source_mask is None else "source, or source_mask"):
            other = bridge.to_batch(source, source_mask)
        among = None
        if answers is not None:
            if not isinstance(answers, Sequence | Tensor) or not len(answers):
                raise InvalidArgumentError(f"answers={answers!r}", expected="tokens, or None for the whole vocabulary")
            among = tuple(target_ids_of(bridge, answers, len(answers), "answers").tolist())
        return cls(
            first,
            other,
            target_ids_of(bridge, labels, first.rows, "labels"),
            position,
            position if source_position is None else source_position,
            among,
        )

    @property
    def written(self) -> tuple[tuple[int, ...], ...]:
        """Where values are written in each base, from 0."""
        return cast("tuple[tuple[int, ...], ...]", self.base_positions)

    @property
    def read(self) -> tuple[tuple[int, ...], ...]:
        """Where they are read in each source, from 0."""
        return cast("tuple[tuple[int, ...], ...]", self.source_positions)

    def __len__(self) -> int:
        return self.base.rows

    def __repr__(self) -> str:
        pairs, places = len(self), len(self.written[0])
        among = "" if self.answers is None else f", {len(self.answers)} answers"
        return (
            f"InterchangeExamples({pairs} pair{'s' * (pairs > 1)} of {self.base.longest} and {self.source.longest} "
            f"tokens, values exchanged at {places} place{'s' * (places > 1)}{among})"
        )

    def intervention(
        self, point: str, basis: Basis | Constant | None = None, *, heads: Places = None, neurons: Places = None
    ) -> Intervention:
        """Returns the interchange at a point, which goes with `sources={"source": examples.source}` into any run.

        Args:
            point: Full name of a point that has a value at each position.
            basis: Orthonormal columns of the subspace whose part is exchanged, in the space of the value's chosen heads
                or neurons, flattened; None for the whole value.
            heads: Which heads are exchanged; by default all.
            neurons: Which neurons, or coordinates of the residual stream; by default all.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> table = " file name list size"
            >>> pairs = InterchangeExamples.of(bridge, table + " file", table + " list", " size")
            >>> swap = pairs.intervention("blocks.4.hook_resid_pre")
            >>> logits = bridge(pairs.base, interventions=[swap], sources={"source": pairs.source})
            >>> bridge.to_single_str_token(logits[0, -1].argmax().item())
            ' size'
        """
        patch = Patch(SOURCE, position=self.read)
        if basis is not None:
            patch = PatchSubspace(SOURCE, position=self.read, basis=Constant.of(basis))
        return Intervention(point, patch, positions=self.written, heads=heads, neurons=neurons)

    def targets(self) -> Int[Tensor, "example"]:
        """Returns each label as its place among the answers; its id where every token is one."""
        if self.answers is None:
            return self.labels
        for row, label in enumerate(self.labels.tolist()):
            if label not in self.answers:
                raise InvalidArgumentError(
                    f"the label {label} of pair {row} is no answer", expected=", ".join(map(str, self.answers))
                )
        return torch.searchsorted(torch.tensor(self.answers), self.labels)

    def hits(self, answered: Float[Tensor, "*cell example"]) -> Float[Tensor, "*cell example"]:
        """Returns 1 where an answer is the label, 0 where it is not, and NaN where there is no answer."""
        answered = tensor_of("answered", answered)
        if answered.shape[-1:] != self.labels.shape:
            raise InvalidArgumentError(
                "there is not one answer for each pair", expected=f"[..., {len(self)}]", got=str(list(answered.shape))
            )
        return (answered == self.labels).float().masked_fill(answered.isnan(), torch.nan)

    def select(self, rows: Tensor | slice | Sequence[int]) -> Self:
        """Returns some of the pairs.

        Args:
            rows: Their numbers, a mask, or a slice.
        """
        numbers = row_numbers(rows, len(self))
        return replace(
            self,
            base=self.base.select(numbers),
            source=self.source.select(numbers),
            labels=self.labels[numbers],
            base_positions=[self.written[row] for row in numbers],
            source_positions=[self.read[row] for row in numbers],
        )

    def split(self, size: int) -> Iterator[Self]:
        """Yields the pairs in their order, at most `size` at a time."""
        check_counts(size=size)
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))

    def relabelled(self, labels: Int[Tensor, "example"]) -> Self:
        """Returns the same pairs with other labels."""
        return replace(self, labels=labels)


@dataclass(frozen=True)
class InterchangeSite:
    """A hook point, or some of its heads or neurons, whose value at a position is taken as one vector.

    Attributes:
        name: The point, a value at each position.
        shape: Of its value at a position.
        heads: Which heads; for keys and values, which key/value heads. None for all.
        neurons: Which neurons of an MLP, or coordinates of the residual stream. None for all.
    """

    name: str
    shape: tuple[int, ...]
    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None

    @classmethod
    def all_of(
        cls, bridge: TransformerBridge, name: str, layers: Layers, heads: Places, neurons: Places
    ) -> tuple[Self, ...]:
        """Returns the site in each layer, or the one site of a full name.

        Raises:
            UnknownPointError: A point or layer that the model does not have.
            InvalidArgumentError: Heads or neurons that it does not have, or a point that is not a value at each
                position.
        """
        return tuple(cls.of(bridge, point, heads, neurons) for point in points_of(bridge, name, layers))

    @classmethod
    def of(cls, bridge: TransformerBridge, name: str, heads: Places = None, neurons: Places = None) -> Self:
        """Returns the site of a point's full name."""
        (site,) = sites_of(bridge, [Intervention(name, Patch(), heads=heads, neurons=neurons)])
        own = site.fixed
        return cls(
            name,
            tuple(site.point.sizes[axis] for axis in site.axes[2:]),
            own.get("head", own.get("kv_head")),
            next((own[axis] for axis in ("d_mlp", "expert", "d_model") if axis in own), None),
        )

    @property
    def width(self) -> int:
        """Length of the vector."""
        sizes = list(self.shape)
        if self.heads is not None:
            sizes[0] = len(self.heads)
        if self.neurons is not None:
            sizes[-1] = len(self.neurons)
        return prod(sizes)

    def __str__(self) -> str:
        chosen = {"heads": self.heads, "neurons": self.neurons}
        said = [f"{name} {', '.join(map(str, places))}" for name, places in chosen.items() if places is not None]
        return f"{self.name} ({'; '.join(said)})" if said else self.name

    def vectors(self, value: Float[Tensor, "*place axes"]) -> Float[Tensor, "*place d"]:
        """Returns the vectors of values `[*place, *shape]`, in float32 at least."""
        value = tensor_of("values", value)
        lead = value.ndim - len(self.shape)
        if list(value.shape[max(lead, 0) :]) != list(self.shape):
            raise InvalidArgumentError(
                "these are no values of the point",
                expected=f"[..., {', '.join(map(str, self.shape))}]",
                got=str(list(value.shape)),
                where=self.name,
            )
        if self.heads is not None:
            value = value.index_select(lead, torch.tensor(self.heads, device=value.device))
        if self.neurons is not None:
            value = value[..., list(self.neurons)]
        return value.to(torch.promote_types(value.dtype, torch.float32)).flatten(lead)

    def checked(self, basis: Basis) -> Basis:
        """Returns the basis of a subspace of the vectors.

        Raises:
            InvalidArgumentError: It is of another width, or its columns are not orthonormal.
        """
        if not isinstance(basis, Tensor) or basis.ndim != 2 or basis.shape[0] != self.width:
            raise InvalidArgumentError(
                "the subspace is of another space than the vectors",
                expected=f"[d={self.width}, k]",
                got=str(list(basis.shape)) if isinstance(basis, Tensor) else type(basis).__name__,
                where=str(self),
            )
        exact = basis.detach().double()
        apart = (exact.T @ exact - torch.eye(basis.shape[1]).to(exact)).abs().max().item() if basis.shape[1] else 0.0
        if not apart < 1e-3:
            raise InvalidArgumentError(
                "the columns of the subspace's basis are not orthonormal",
                expected="basis.T @ basis = 1",
                got=f"another by {apart:.2g}",
                fix="torch.linalg.qr(basis).Q",
            )
        return basis


@dataclass(frozen=True, eq=False, repr=False)
class InterchangeAccuracy(Effects):
    """Interchange intervention accuracy (IIA): shares of pairs that are answered as expected, on the CPU.

    Its one metric is `accuracy`: 1 for a pair that is answered as expected after the interchange, and 0 for another;
    NaN for a pair that lacks the position. `base` has the same without an interchange.
    """

    draws: ClassVar[Draws] = "value"

    @property
    def hits(self) -> Float[Tensor, "*cell example"]:
        """1 where the answer after the interchange is the label, otherwise 0."""
        return self.of()

    @property
    def unchanged(self) -> Float[Tensor, "example"]:
        """The same without an interchange."""
        return self.base["accuracy"]

    @property
    def accuracy(self) -> Float[Tensor, "*cell"]:
        """The share of hits."""
        return self.mean()

    def interval(self, metric: str | None = None, *, level: float = 0.95, seed: int = 0) -> Interval:
        """Returns the accuracies with Wilson's score interval around each, which has a width also at 0 and 1."""
        return share_interval(self.of(metric), level=level)

    def columns(self) -> Columns:
        """Returns one row for each place; `low` and `high` are the ends of the 95 % interval."""
        interval = self.interval()
        ends = {"low": interval.low.flatten().tolist(), "high": interval.high.flatten().tolist()}
        return {**super().columns(), **ends}


@dataclass(frozen=True)
class Answer(LogitMetric):
    """The likeliest token after a row's last one, as its id; NaN where the logits are not finite.

    Attributes:
        answers: The tokens among which the likeliest counts, in order; None for the whole vocabulary.
    """

    answers: tuple[int, ...] | None = None

    kind: ClassVar[str] = "answer"

    @property
    def unit(self) -> str:
        """None: it is a token."""
        return ""

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """The answers."""
        return self.answers

    def places(self, batch: Batch) -> Int[Tensor, "row 1"]:
        """Returns the column of each row's last token."""
        return one_place(-1, batch)

    def of(self, logits: Float[Tensor, "*cell row 1 token"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns the token."""
        value, likeliest = logits[..., 0, :].max(-1)
        if self.answers is not None:
            likeliest = torch.tensor(self.answers, device=likeliest.device)[likeliest]
        return likeliest.double().masked_fill(~value.isfinite(), torch.nan)


# --- accuracy --------------------------------------------------------------------------------------------------------


def interchange_accuracy(
    bridge: TransformerBridge,
    examples: InterchangeExamples,
    *,
    name: str = "resid_post",
    layers: Layers = None,
    heads: Places = None,
    neurons: Places = None,
    subspace: Basis | None = None,
    batch_size: int = 64,
    progress: bool | Progress = True,
) -> InterchangeAccuracy:
    """Returns how often the answer is the expected one when values at the examples' positions are exchanged, by layer.

    The value at a base's position becomes that of its source: whole, in some heads or neurons, or in a subspace,
    `base + (source - base) @ subspace @ subspace.T`. Layers are cells of a sweep (`clearspan.sweep.Sweep`), each run
    from the layer that it changes.

    Args:
        bridge: The model, in evaluation mode, with no hooks on it.
        examples: Pairs, positions, and the answers that are expected.
        name: Short name of a point in each layer, or the full name of one point: a value at each position.
        layers: One or several, negative from the end; by default all.
        heads: Which heads are exchanged, together; by default all.
        neurons: Which neurons, or coordinates of the residual stream, are exchanged, together; by default all.
        subspace: Orthonormal columns, in the space of what is chosen of the value, flattened; by default all of it.
        batch_size: Pairs in one sweep.
        progress: Whether a bar is shown, or a function that is told how far it is.

    Returns:
        Hits by layer and pair, with the accuracy without an interchange as the base.

    Raises:
        UnknownPointError: A point or layer that the model does not have.
        InvalidArgumentError: Heads or neurons that the point does not have, a subspace of another space or without an
            orthonormal basis, a token outside the vocabulary, a model in training mode, or hooks on it.
        NotFiniteError: Logits are infinite or not numbers.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> table = " file name list size"
        >>> pairs = InterchangeExamples.of(bridge, [table + " file"], [table + " list"], [" size"])
        >>> found = interchange_accuracy(bridge, pairs, name="resid_pre", layers=[0, -1])
        >>> found.accuracy, found.unchanged
        (tensor([1., 1.]), tensor([0.]))

    References:
        Geiger, Lu, Icard and Potts (2021), "Causal Abstractions of Neural Networks", arXiv:2106.02997, for
        interchange interventions and their accuracy.
    """
    sites = InterchangeSite.all_of(bridge, name, layers, heads, neurons)
    exchanges = {str(site): (site, None if subspace is None else site.checked(subspace)) for site in sites}
    with shown(progress) as tell:
        answered, unchanged = answers_of(bridge, examples, exchanges, batch_size, tell)
    what = "whole vectors" if subspace is None else f"a subspace of {subspace.shape[1]} dimensions"
    every = torch.stack(list(answered.values()))
    return _accuracy(examples, every, unchanged, _axes(sites), f"{what} of {_said(sites)}")


def answers_of(
    bridge: TransformerBridge,
    examples: InterchangeExamples,
    exchanges: Mapping[str, tuple[InterchangeSite, Basis | None]],
    batch_size: int,
    tell: Progress = silent,
) -> tuple[dict[str, Float[Tensor, "example"]], Float[Tensor, "example"]]:
    """Returns the model's answers after each exchange, by its name, and without one.

    Args:
        bridge: The model.
        examples: The pairs.
        exchanges: By name: where, and the basis of the subspace that is exchanged, or None for all.
        batch_size: Pairs in one sweep.
        tell: Told how many pairs are done.

    Raises:
        NotFiniteError: Logits are infinite or not numbers.
    """
    check_answers(bridge, examples)
    check_counts(batch_size=batch_size)
    constants = {name: (site, None if one is None else Constant.of(one)) for name, (site, one) in exchanges.items()}
    answered, unchanged = [], []
    for part in examples.split(batch_size):
        cells = {
            name: part.intervention(site.name, basis, heads=site.heads, neurons=site.neurons)
            for name, (site, basis) in constants.items()
        }
        sweep = Sweep(bridge, part.base, Grid.of(cells), Answer(part.answers), sources={SOURCE: part.source})
        found = sweep.run(progress=False)
        check_finite(bridge, found.of())
        answered.append(found.of())
        unchanged.append(found.base[Answer.kind])
        tell("interchanges", sum(map(len, unchanged)), len(examples))
    return dict(zip(constants, torch.cat(answered, 1), strict=True)), torch.cat(unchanged)


def interchange_sweep(
    bridge: TransformerBridge,
    examples: InterchangeExamples,
    *,
    name: str = "resid_pre",
    layers: Layers = None,
    positions: Sequence[int] | None = None,
    heads: Places = None,
    neurons: Places = None,
    batch_size: int = 64,
    progress: bool | Progress = True,
) -> InterchangeAccuracy:
    """Returns how often the answer is the expected one, by layer and position, when values are exchanged there alone.

    Each cell writes at one position and reads at the same position of the source; the examples' own positions do not
    count.

    Args:
        bridge: The model, in evaluation mode, with no hooks on it.
        examples: Pairs, each of a base and a source of one length.
        name: Short name of a point in each layer, or the full name of one point: a value at each position.
        layers: One or several, negative from the end; by default all.
        positions: Which, negative from a row's last token; by default all.
        heads: Which heads are exchanged, together; by default all.
        neurons: Which neurons, or coordinates of the residual stream, are exchanged, together; by default all.
        batch_size: Pairs in one sweep.
        progress: Whether a bar is shown, or a function that is told how far it is.

    Returns:
        Hits by layer, position and pair, NaN where a pair lacks the position.

    Raises:
        UnknownPointError: A point or layer that the model does not have.
        InvalidArgumentError: A base and a source that differ in length, a position that no pair has, or as for
            `interchange_accuracy`.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> table = " file name list size"
        >>> pairs = InterchangeExamples.of(bridge, [table + " file"], [table + " list"], [" size"])
        >>> interchange_sweep(bridge, pairs, layers=[0, 4], positions=[-2, -1]).accuracy
        tensor([[0., 1.],
                [0., 1.]])
    """
    check_counts(batch_size=batch_size)
    check_answers(bridge, examples)
    examples.source.check_alike(examples.base)
    sites = InterchangeSite.all_of(bridge, name, layers, heads, neurons)
    longest, unchanged = examples.base.longest, []
    at = whole_numbers("positions", range(longest) if positions is None else positions)
    if not at:
        raise InvalidArgumentError("positions=[] chooses none", expected="positions=None for all")
    for position in at:
        if not -longest <= position < longest:
            raise InvalidArgumentError(f"no base has the position {position}", expected=f"-{longest} to {longest - 1}")
    answered = torch.full((len(sites), len(at), len(examples)), torch.nan, dtype=torch.float64)
    with shown(progress) as tell:
        for part in examples.split(batch_size):
            lengths, done = part.base.lengths.tolist(), sum(map(len, unchanged))
            has = torch.tensor([[-length <= position < length for length in lengths] for position in at])
            own = has.any(1).nonzero()[:, 0]
            cells = {
                site.name: grid(
                    Intervention(site.name, Patch(SOURCE), heads=heads, neurons=neurons),
                    position=[at[place] for place in own.tolist()] or [0],  # which is for the base alone
                )
                for site in sites
            }
            sweep = Sweep(bridge, part.base, Grid.stacked(cells), Answer(part.answers), sources={SOURCE: part.source})
            found = sweep.run(progress=False)
            exchanged = found.of()[:, : len(own)]
            check_finite(bridge, exchanged[:, has[own]])
            answered[:, own, done : done + len(part)] = exchanged
            unchanged.append(found.base[Answer.kind])
            tell("interchanges", done + len(part), len(examples))
    axes = {**_axes(sites), "position": tuple(at)}
    return _accuracy(examples, answered, torch.cat(unchanged), axes, f"whole vectors of {_said(sites)}")


def _accuracy(
    examples: InterchangeExamples,
    answered: Float[Tensor, "*cell example"],
    unchanged: Float[Tensor, "example"],
    axes: Mapping[str, tuple[Label, ...]],
    exchanged: str,
) -> InterchangeAccuracy:
    hits = [{"accuracy": examples.hits(each)} for each in (answered, unchanged)]
    return InterchangeAccuracy(hits[0], axes, hits[1], what=f"{exchanged} exchanged", span=(0, 1), row="pair")


def _axes(sites: Sequence[InterchangeSite]) -> dict[str, tuple[Label, ...]]:
    numbers = layers_of([site.name for site in sites])
    return {"layer": tuple(numbers)} if numbers else {"point": (sites[0].name,)}


def _said(sites: Sequence[InterchangeSite]) -> str:
    """Returns the sites in words, without the layer where there are several."""
    return str(sites[0]) if len(sites) == 1 else str(replace(sites[0], name=Address.parse(sites[0].name).within))


def check_finite(bridge: TransformerBridge, values: Float[Tensor, "*value"]) -> None:
    """Raises NotFiniteError if an answer, or a logit, is not finite."""
    if not values.isfinite().all():
        raise NotFiniteError(
            "the logits of the answers are not finite",
            got=str(bridge.cfg.dtype),
            fix="clearspan.boot(model, dtype=torch.float32), if they overflow",
        )


def check_answers(bridge: TransformerBridge, examples: InterchangeExamples) -> None:
    """Raises unless labels and answers are tokens of the model's vocabulary."""
    check_bridge(bridge)
    if not isinstance(examples, InterchangeExamples):
        raise InvalidArgumentError("these are no InterchangeExamples", got=f"examples={examples!r}"[:80])
    for name, tokens in (("label", examples.labels.tolist()), ("answer", examples.answers or ())):
        for token in tokens:
            if not 0 <= token < bridge.cfg.d_vocab:
                raise InvalidArgumentError(
                    f"the {name} {token} is no token of the model", expected=f"0 to {bridge.cfg.d_vocab - 1}"
                )
