"""Distributed alignment search: a subspace is trained so that exchanging it acts as exchanging a variable."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from clearspan._run.continuation import check_undisturbed
from clearspan.analysis.abstraction.interchange import (
    SOURCE,
    Basis,
    InterchangeAccuracy,
    InterchangeExamples,
    InterchangeSite,
    Places,
    answers_of,
    check_answers,
    check_finite,
    interchange_accuracy,
)
from clearspan.analysis.activations import gathered, layers_of
from clearspan.analysis.corpus import drawn
from clearspan.analysis.evaluations import Estimate, estimate
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_positive
from clearspan.errors import InvalidArgumentError
from clearspan.files import read_tensors, write_tensors
from clearspan.inputs import Batch, Positions
from clearspan.interventions import Constant, Intervention, Patch, PatchSubspace, SourcePosition, exchanged
from clearspan.model import check_bridge
from clearspan.plots import Chart, chart_of
from clearspan.points import Address
from clearspan.progress import Progress, shown
from clearspan.results import Columns, Result
from clearspan.statistics import Interval, share_interval

_FORMAT = "clearspan alignment 1"
_LEARNED, _WRONG = "learned subspace", "random labels"


@dataclass(frozen=True, eq=False, repr=False)
class Alignment(Result):
    """A subspace that was trained to carry a variable, and how well it does on pairs that it was not trained on.

    As a result it is a table of accuracies, of the subspace and of its controls.

    Attributes:
        site: The point, or heads or neurons of it, in whose values the subspace is.
        basis: Orthonormal columns, in float32 on the CPU.
        losses: Cross-entropy of the labels in nats on each step's batch, before that step.
        hits: By what was exchanged: 1 where the answer is the label and 0 where it is not, for each draw of a control
            and each pair. What is not marked as training is on held-out pairs.
        model_name: The model that it was found in.

    References:
        Geiger et al. (2023), "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
        Representations", arXiv:2303.02536.
    """

    site: InterchangeSite
    basis: Basis
    losses: Float[Tensor, "step"]
    hits: Mapping[str, Float[Tensor, "draw example"]]
    model_name: str

    @property
    def title(self) -> str:
        """The model, the site, and on how many pairs accuracies are."""
        return (
            f"alignment in {self.model_name}: {self.dimensions} of {self.site.width} dimensions at {self.site}; "
            f"interchange accuracy on {self.hits[_LEARNED].shape[1]} held-out pairs"
        )

    @property
    def dimensions(self) -> int:
        """Dimensions of the subspace."""
        return self.basis.shape[1]

    @property
    def accuracy(self) -> float:
        """Interchange intervention accuracy of the subspace on held-out pairs."""
        return self.estimate().mean

    def estimate(self, exchanged: str = _LEARNED) -> Estimate:
        """Returns the accuracy and its standard error over pairs; of a control, the mean over its draws.

        Args:
            exchanged: A key of `hits`.
        """
        return estimate(self._of(exchanged).mean(0))

    def interval(self, exchanged: str = _LEARNED, level: float = 0.95) -> Interval:
        """Returns the accuracy with Wilson's score interval, which has a width also at 0 and 1."""
        return share_interval(self._of(exchanged).mean(0), level=level)

    # --- use ---------------------------------------------------------------------------------------------------------

    def intervention(
        self, source: str = SOURCE, positions: Positions = None, source_position: SourcePosition = None
    ) -> Intervention:
        """Returns the exchange as an intervention: `base + (source - base) @ basis @ basis.T`.

        It goes into every run: `bridge(...)`, `run_with_cache`, `hooks`, `generate`, a sweep.

        Args:
            source: The name under which the run that values are taken from is given in `sources=`.
            positions: Where values are written; None for all.
            source_position: Where they are read, one position or as many as are written; by default where they are
                written. A list for each row where they differ.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> site = InterchangeSite.of(bridge, "blocks.1.hook_resid_post")
            >>> everything = Alignment(site, torch.eye(256), torch.empty(0), {}, "tiny-bigcode")
            >>> swap = everything.intervention(positions=-1)
            >>> changed = bridge("import re", interventions=[swap], sources={"source": "import os"})
            >>> bool(changed[0, -1].argmax() == bridge("import os")[0, -1].argmax())
            True
        """
        site, basis = self.site, Constant.of(self.basis)
        action = PatchSubspace(source, position=source_position, basis=basis)
        return Intervention(site.name, action, positions=positions, heads=site.heads, neurons=site.neurons)

    def project(self, values: Float[Tensor, "*place axes"]) -> Float[Tensor, "*place k"]:
        """Returns the coordinates in the subspace of values at the site's point, in float32 at least."""
        vectors = self.site.vectors(values)
        return vectors @ self.basis.to(vectors)

    def overlap(self, other: Float[Tensor, "d j"]) -> float:
        """Returns the mean squared cosine of the angles between this subspace and another.

        `|basis.T @ other|² / min(k, j)`: 1 where one lies in the other, on average `max(k, j) / d` by chance.

        Args:
            other: Orthonormal columns.
        """
        squares = (self.basis.T @ self.site.checked(other).to(self.basis)).square().sum()
        return (squares / min(self.dimensions, other.shape[1])).item()

    def test(
        self,
        bridge: TransformerBridge,
        examples: InterchangeExamples,
        *,
        batch_size: int = 64,
        progress: bool | Progress = True,
    ) -> InterchangeAccuracy:
        """Returns the accuracy of the subspace on other examples, whose positions may be others too.

        Args:
            bridge: The model.
            examples: The examples.
            batch_size: Examples run at a time.
            progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`.

        Raises:
            InvalidArgumentError: The model is another.
        """
        self.check_fits(bridge)
        site = self.site
        return interchange_accuracy(
            bridge,
            examples,
            name=site.name,
            heads=site.heads,
            neurons=site.neurons,
            subspace=self.basis,
            batch_size=batch_size,
            progress=progress,
        )

    # --- files -------------------------------------------------------------------------------------------------------

    def check_fits(self, bridge: TransformerBridge) -> None:
        """Raises unless a model has the point, with values of the alignment's shape.

        Raises:
            UnknownPointError: It lacks the point.
            InvalidArgumentError: A value has another shape.
        """
        check_bridge(bridge)
        shape = InterchangeSite.of(bridge, self.site.name).shape
        if shape != self.site.shape:
            raise InvalidArgumentError(
                f"the alignment in {self.model_name} does not fit {bridge.cfg.model_name or bridge.cfg.architecture}",
                expected=f"an alignment for values of shape {list(shape)} at each position",
                got=str(list(self.site.shape)),
                where=self.site.name,
                fix="fit_alignment(bridge, examples, ...)",
            )

    def save(self, path: str | Path) -> None:
        """Writes the alignment to one safetensors file, with its site and the model's name in the metadata."""
        site = self.site
        facts = {"name": site.name, "shape": site.shape, "heads": site.heads, "neurons": site.neurons}
        tensors = {"basis": self.basis, "losses": self.losses}
        tensors |= {f"hits.{exchanged}": hits for exchanged, hits in self.hits.items()}
        metadata = {
            "model": self.model_name,
            "site": json.dumps(facts),
            "exchanged": json.dumps(list(self.hits)),
        }
        write_tensors(path, _FORMAT, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, bridge: TransformerBridge) -> Self:
        """Returns the alignment of a file that `save` wrote.

        Whether it fits is told by the point and its shape alone: `model_name` says in which model it was found.

        Args:
            path: The file.
            bridge: The model that the alignment is for.

        Raises:
            InvalidArgumentError: The file is no alignment, or one for values of another shape.
            UnknownPointError: The model lacks the point.
            FileNotFoundError: The file does not exist.
        """
        tensors, metadata = read_tensors(path, _FORMAT, what="alignment", written_by="Alignment.save")
        facts = json.loads(metadata["site"])
        hits = {name: tensors[f"hits.{name}"] for name in json.loads(metadata["exchanged"])}
        heads, neurons = (None if facts[of] is None else tuple(facts[of]) for of in ("heads", "neurons"))
        site = InterchangeSite(facts["name"], tuple(facts["shape"]), heads, neurons)
        found = cls(site, tensors["basis"], tensors["losses"], hits, metadata["model"])
        found.check_fits(bridge)
        return found

    # --- as a result -------------------------------------------------------------------------------------------------

    def columns(self) -> Columns:
        """Returns one row for each thing exchanged; `low` and `high` are the ends of the 95 % interval."""
        intervals = [self.interval(exchanged) for exchanged in self.hits]
        return {
            "exchanged": list(self.hits),
            "accuracy": [each.mean.item() for each in intervals],
            "low": [each.low.item() for each in intervals],
            "high": [each.high.item() for each in intervals],
            "draws": [len(hits) for hits in self.hits.values()],
        }

    def chart(self) -> Chart:
        """Returns the accuracies as bars."""
        values = torch.tensor([self.estimate(exchanged).mean for exchanged in self.hits])
        unit = "interchange accuracy"
        return chart_of(values, {"exchanged": list(self.hits)}, unit=unit, title=self.title, span=(0, 1))

    def _of(self, exchanged: str) -> Float[Tensor, "draw example"]:
        if not isinstance(exchanged, str) or exchanged not in self.hits:
            raise InvalidArgumentError(f"nothing is known of {exchanged!r}", expected=", ".join(self.hits))
        return self.hits[exchanged]


def fit_alignment(
    bridge: TransformerBridge,
    examples: InterchangeExamples,
    *,
    dimensions: int,
    name: str = "resid_post",
    layer: int | None = None,
    heads: Places = None,
    neurons: Places = None,
    held_out: float | InterchangeExamples = 0.25,
    steps: int = 200,
    batch_size: int = 32,
    learning_rate: float = 0.1,
    random_subspaces: int = 5,
    random_labels: int = 1,
    seed: int = 0,
    progress: bool | Progress = True,
) -> Alignment:
    """Returns a subspace trained so that exchanging what lies in it makes the model answer as the examples expect.

    The vector at a base's position becomes `base + (source - base) @ R @ R.T`, and training `R` lowers the labels'
    cross-entropy among the answers. `R` is the orthonormal factor of a free matrix, whose entries start as standard
    normal, so that the rate at which Adam changes them means the same for any width. Where values are exchanged at
    several places, the subspace is the same at each. Training starts at the site's layer; the bases' residual streams
    there are kept, `[example, pos, d_model]` on the model's device. The model is not trained, and its parameters get no
    gradient.

    What a subspace of so many dimensions can be trained to do is not yet a finding. So these controls are measured on
    the same held-out pairs:

    - `whole vector`: everything at the site is exchanged. A subspace may do better, by leaving other variables alone.
    - `random subspace`: of as many dimensions, each as likely.
    - `random labels`: a subspace trained in the same way on the training pairs with their labels shuffled.
    - `random labels, as shuffled`: the same against shuffled labels. More than chance is the answers' frequencies.
    - `nothing`: the base's own answers.

    The rows `learned subspace, in training` and `random labels, in training` are about the pairs trained on, the latter
    with their shuffled labels: how much the search can fit whatever is asked.

    Args:
        bridge: The model, in evaluation mode, with no hooks on it. It stays as it is.
        examples: Pairs, positions, and the answers that are expected.
        dimensions: Of the subspace.
        name: Short name of a point, or its full name: a value at each position, before the end of the last block.
        layer: For a short name; negative from the end.
        heads: In whose values the subspace is; by default all.
        neurons: The same of neurons, or of coordinates of the residual stream.
        held_out: Share of the examples that is not trained on, pairs that are alike being together; or other examples.
            An input may be in pairs of both parts: to test on inputs that are new, give pairs of others.
        steps: Batches.
        batch_size: Pairs in a batch.
        learning_rate: Of Adam, in its first step; it falls linearly to 0.
        random_subspaces: Draws of that control.
        random_labels: Draws of the labels' order; each is a training of its own.
        seed: Of the split, the start, the batches and the controls. Torch's own seed is neither read nor changed.
        progress: Whether a bar is shown, or a function that is told how far it is.

    Raises:
        UnknownPointError: A point or layer that the model does not have.
        InvalidArgumentError: More dimensions than the site has, several layers, heads or neurons that the point does
            not have, too few examples to hold some out, a token outside the vocabulary, a model in training mode or
            with hooks on it, or a size that is no number above 0.
        NotFiniteError: Logits are infinite or not numbers.
        PointNotReachedError: The point is after the last block.

    Example:
        >>> import clearspan, itertools
        >>> from clearspan.analysis import CausalModel, draw_interchanges
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> model = CausalModel({"answer": lambda table, asked: dict(table)[asked]}, output="answer")
        >>> words = [" name", " size", " path", " data"]
        >>> inputs = [
        ...     {"table": ((" os", first), (" re", second)), "asked": key}
        ...     for first, second in itertools.permutations(words, 2)
        ...     for key in (" os", " re")
        ... ]
        >>> def prompt(given):
        ...     return "".join(key + value for key, value in given["table"]) + given["asked"]
        >>> pairs = draw_interchanges(
        ...     bridge, model, inputs, "asked", prompt=prompt, answers=words, count=64, changing=True
        ... )
        >>> found = fit_alignment(
        ...     bridge, pairs, dimensions=1, name="resid_pre", layer=4, steps=20, learning_rate=0.3, random_labels=0
        ... )
        >>> found.basis.shape, found.accuracy > 0.9, found.estimate("random subspace").mean < 0.1
        (torch.Size([256, 1]), True, True)

    References:
        Geiger et al. (2023), "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
        Representations", arXiv:2303.02536: there a rotation of the whole space is trained, for several variables at a
        time; here it is the columns of one variable, by a QR factorisation. Makelov, Lange and Nanda (2023),
        arXiv:2311.17030, on what a subspace that is found so does not show.
    """
    check_counts(dimensions=dimensions, steps=steps, batch_size=batch_size)
    check_counts(0, random_subspaces=random_subspaces, random_labels=random_labels, seed=seed)
    check_positive(learning_rate=learning_rate)
    check_undisturbed(bridge)
    check_answers(bridge, examples)
    site = _site(bridge, name, layer, heads, neurons, dimensions)
    training, testing = _split(examples, held_out, seed)
    check_answers(bridge, testing)
    runs = _Runs.of(bridge, training, site, batch_size)
    shuffled = [_shuffled(training, testing, seed + draw) for draw in range(random_labels)]
    settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    with shown(progress) as tell:

        def trained(targets: Int[Tensor, "example"], draw: int, stage: str) -> tuple[Basis, Float[Tensor, "step"]]:
            free = _normal(site.width, dimensions, seed + draw)
            return _trained(runs, targets, free, seed=seed + draw, tell=partial(tell, stage), **settings)

        basis, losses = trained(training.targets(), 0, "alignment")
        wrong = [
            trained(part.targets(), draw, f"random labels {draw + 1} of {random_labels}")[0]
            for draw, (part, _) in enumerate(shuffled)
        ]
    random = [_orthonormal(_normal(site.width, dimensions, seed + draw)) for draw in range(random_subspaces)]
    bases = {_LEARNED: [basis], "whole vector": [None], "random subspace": random, _WRONG: wrong}
    tested = _answers(bridge, testing, site, bases, batch_size)
    in_training = _answers(bridge, training, site, {_LEARNED: [basis], _WRONG: wrong}, batch_size)
    hits = {_LEARNED: testing.hits(tested[_LEARNED])}
    hits[f"{_LEARNED}, in training"] = training.hits(in_training[_LEARNED])
    hits |= {name: testing.hits(answers) for name, answers in tested.items() if name != _LEARNED}
    for what, side, answers in ((", as shuffled", 1, tested), (", in training", 0, in_training)):
        each = [parts[side].hits(own) for parts, own in zip(shuffled, answers.get(_WRONG, ()), strict=True)]
        if each:
            hits[f"{_WRONG}{what}"] = torch.stack(each)
    model_name = bridge.cfg.model_name or bridge.cfg.architecture
    return Alignment(site, basis.float().cpu(), losses, hits, model_name)


def _answers(
    bridge: TransformerBridge,
    examples: InterchangeExamples,
    site: InterchangeSite,
    bases: Mapping[str, Sequence[Basis | None]],
    batch_size: int,
) -> dict[str, Float[Tensor, "draw example"]]:
    """Returns the answers after the exchange of each subspace, by name and draw, and those without one."""
    exchanges = {f"{name} {draw}": (site, one) for name, own in bases.items() for draw, one in enumerate(own)}
    found, unchanged = answers_of(bridge, examples, exchanges, batch_size)
    by_name = {name: [found[f"{name} {draw}"] for draw in range(len(own))] for name, own in bases.items()}
    return {name: torch.stack(own) for name, own in by_name.items() if own} | {"nothing": unchanged[None]}


@dataclass(frozen=True, eq=False)
class _LiveSubspace(Patch):
    """`PatchSubspace` with a basis that is being trained: gradients reach it."""

    basis: Basis = field(kw_only=True)

    kind: ClassVar[str] = "live_subspace"
    needs_numbers: ClassVar[bool] = True

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the value with the source's part in the subspace."""
        assert source is not None, "an exchange has a source"
        return exchanged(value, source, self.basis)


@dataclass(frozen=True, eq=False)
class _Runs:
    """What the runs of a training go on from.

    Attributes:
        bridge: The model.
        examples: The pairs that are trained on.
        site: The point at which values are written: the input of the layer at which runs start, where it can be.
        start: That layer; None for the embedding.
        entering: What the bases' runs start from: the residual streams entering that layer, or their tokens.
        source: The source's values.
    """

    bridge: TransformerBridge
    examples: InterchangeExamples
    site: InterchangeSite
    start: int | None
    entering: Batch
    source: Float[Tensor, "example place *axes"]

    @classmethod
    def of(
        cls, bridge: TransformerBridge, examples: InterchangeExamples, site: InterchangeSite, batch_size: int
    ) -> Self:
        """Returns the runs of examples at a site; their sources and bases are run here, once."""
        written, start = site.name, next(iter(layers_of([site.name])), None)
        depth = Address.parse(site.name).depth
        if depth is not None and depth < bridge.cfg.n_layers:  # what leaves a block is written as it enters the next
            written, start = f"blocks.{depth}.hook_resid_pre", depth
        base, read = examples.base, [site.name]
        source = gathered(bridge, examples.source, read, positions=examples.read, batch_size=batch_size)
        if start is not None:
            name = f"blocks.{start}.hook_resid_pre"
            values = gathered(bridge, base, [name], positions=None, batch_size=batch_size).values[name]
            rows, columns, _ = base.places(None)
            stream = torch.zeros(*base.value.shape[:2], values.shape[-1], dtype=bridge.cfg.dtype, device=base.device)
            stream[rows, columns] = values.to(stream)
            base = base.entering(stream)
        values = source.values[site.name].to(bridge.device).unflatten(0, (len(examples), -1))
        return cls(bridge, examples, replace(site, name=written), start, base, values)

    def logits(self, rows: Int[Tensor, "row"], basis: Basis) -> Float[Tensor, "row answer"]:
        """Returns the logits of all answers after an interchange in some pairs. Gradients reach the basis."""
        numbers, site, bridge = rows.tolist(), self.site, self.bridge
        batch = self.entering.select(numbers)
        action = _LiveSubspace(SOURCE, position=range(self.source.shape[1]), basis=basis)
        at = [self.examples.written[row] for row in numbers]
        last = bridge(
            batch,
            interventions=[Intervention(site.name, action, positions=at, heads=site.heads, neurons=site.neurons)],
            sources={SOURCE: {site.name: self.source[rows]}},
            start_at_layer=self.start,
            stop_at_layer=bridge.cfg.n_layers,
        )
        ends = [batch.column_of(row, -1) for row in range(batch.rows)]
        logits = bridge.read_out(last[torch.arange(batch.rows), ends][:, None], self.examples.answers)[:, 0]
        check_finite(bridge, logits.detach().amax(-1))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _trained(
    runs: _Runs,
    targets: Int[Tensor, "example"],
    free: Float[Tensor, "d k"],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    tell: Callable[[int, int], None],
) -> tuple[Basis, Float[Tensor, "step"]]:
    """Returns the basis of a trained subspace, and the loss before each step.

    Args:
        runs: The runs of the pairs.
        targets: What should come out of each pair, as its place among the answers.
        free: The matrix whose orthonormal factor is the basis, as it is at the start.
        steps: Batches.
        batch_size: Pairs in a batch.
        learning_rate: In the first step.
        seed: Of the batches.
        tell: Told each step, and how many there are.
    """
    free = free.to(runs.source).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = torch.empty(steps)
    for step, rows in enumerate(drawn(len(targets), size=batch_size, count=steps, seed=seed)):
        with torch.enable_grad():
            logits = runs.logits(rows, _orthonormal(free))
            loss = functional.cross_entropy(logits, targets[rows].to(logits.device))
        # Not `loss.backward()`, which would give the model's parameters gradients too.
        (free.grad,) = torch.autograd.grad(loss, [free])
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
        tell(step + 1, steps)
    return _orthonormal(free).detach(), losses


def _normal(width: int, dimensions: int, seed: int) -> Float[Tensor, "d k"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, dimensions, generator=generator, dtype=torch.float64)


def _orthonormal(free: Float[Tensor, "d k"]) -> Basis:
    return torch.linalg.qr(free).Q


def _shuffled(
    training: InterchangeExamples, testing: InterchangeExamples, seed: int
) -> tuple[InterchangeExamples, InterchangeExamples]:
    """Returns both parts, the labels of each in a random order."""
    generator = torch.Generator().manual_seed(seed)
    first, other = (
        part.relabelled(part.labels[torch.randperm(len(part), generator=generator)]) for part in (training, testing)
    )
    return first, other


def _site(
    bridge: TransformerBridge, name: str, layer: int | None, heads: Places, neurons: Places, dimensions: int
) -> InterchangeSite:
    sites = InterchangeSite.all_of(bridge, name, layer, heads, neurons)
    if len(sites) != 1:
        raise InvalidArgumentError(f"{name!r} is in {len(sites)} layers", fix="layer=0, or another")
    (site,) = sites
    if dimensions > site.width:
        raise InvalidArgumentError(
            f"dimensions={dimensions}", expected=f"1 to {site.width}, the width of a value", where=str(site)
        )
    return site


def _split(
    examples: InterchangeExamples, held_out: float | InterchangeExamples, seed: int
) -> tuple[InterchangeExamples, InterchangeExamples]:
    """Returns the examples trained on and those held out."""
    if isinstance(held_out, InterchangeExamples):
        return examples, held_out
    if not isinstance(held_out, int | float) or held_out != held_out:
        raise InvalidArgumentError(f"held_out={held_out!r}", expected="a share between 0 and 1, or other examples")
    groups = _alike(examples)
    count = int(groups.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    is_held_out = torch.isin(groups, order[: math.ceil(held_out * count)])
    if not 0 < held_out < 1 or bool(is_held_out.all()):
        raise InvalidArgumentError(
            f"held_out={held_out} of {count} different pairs leaves nothing for one of the parts",
            expected="a share between 0 and 1, of two pairs or more",
            fix="held_out= other examples",
        )
    return examples.select(~is_held_out), examples.select(is_held_out)


def _alike(examples: InterchangeExamples) -> Int[Tensor, "example"]:
    """Returns the number of each pair's group: pairs of the same tokens and places are in one."""
    parts: list[Sequence[tuple[int, ...]]] = []
    for batch, places in ((examples.base, examples.written), (examples.source, examples.read)):
        rows = zip(batch.ids.tolist(), batch.real_columns, strict=True)
        parts += [[tuple(row[column] for column in real) for row, real in rows], places]
    known: dict[tuple[tuple[int, ...], ...], int] = {}
    return torch.tensor([known.setdefault(pair, len(known)) for pair in zip(*parts, strict=True)])
