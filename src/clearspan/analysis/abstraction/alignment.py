"""Distributed alignment search: a subspace is trained so that exchanging it acts as exchanging a variable."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.corpus import check_positive, drawn
from clearspan.analysis.progress import Progress, silent
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError

from .alignment_result import LEARNED, Alignment
from .interchange_examples import InterchangeExamples
from .interchange_runs import InterchangeRuns
from .interchange_site import InterchangeSite, Places, whole, within


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
    progress: Progress = silent,
) -> Alignment:
    """Returns a subspace trained so that exchanging what lies in it makes the model answer as the examples expect.

    The vector at a base's position becomes `base + (source - base) @ R @ R.T`, and `R` goes down the gradient of the
    labels' cross-entropy among the answers. `R` is the orthonormal factor of a free matrix, whose entries start as
    standard normal, so that the rate at which Adam changes them means the same for any width. Where values are
    exchanged at several places, the subspace is the same at each. Runs start at the site's layer; the bases' residual
    streams there are kept, `[example, pos, d_model]` on the model's device. The model is not trained, and its
    parameters get no gradient.

    What a subspace of so many dimensions can be trained to do is not yet a finding. Beside the subspace stand, on
    held-out pairs:

    - `whole vector`: everything at the site is exchanged. A subspace may do better, by leaving other variables alone.
    - `random subspace`: of as many dimensions, each as likely.
    - `random labels`: a subspace trained in the same way on the training pairs with their labels shuffled.
    - `random labels, as shuffled`: the same against shuffled labels. More than chance is the answers' frequencies.
    - `nothing`: the base's own answers.

    The rows `learned subspace, in training` and `random labels, in training` are about the pairs trained on, the latter
    with their shuffled labels: how much the search can fit whatever is asked.

    Args:
        bridge: The model, in evaluation mode, which stays as it is.
        examples: Pairs, positions, and the answers that are expected.
        dimensions: Of the subspace.
        name: Short name of a point, or its full name: a value at each position.
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
        progress: Called after each step.

    Raises:
        UnknownPointError: There is no such point, or no such layer.
        InvalidArgumentError: More dimensions than there are or none, several layers, heads or neurons that the point
            does not have, too few examples to hold some out, a token outside the vocabulary, a model in training mode,
            or a size that is not positive.
        NotFiniteError: Logits are infinite or not numbers.
        PointNotReachedError: The point is after the last block, or somebody else's hook is on a layer that is not run.

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
    check_positive(dimensions=dimensions, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    site = _site(bridge, name, layer, heads, neurons, dimensions)
    trained_on, tested_on = _split(examples, held_out, seed)
    training, testing = (InterchangeRuns.of(bridge, part, site, batch_size) for part in (trained_on, tested_on))
    search = Search(dimensions, steps, batch_size, learning_rate, progress)
    basis, losses = search.run(training, seed, "alignment")
    hits = {
        LEARNED: testing.hits(within(basis), batch_size)[None],
        f"{LEARNED}, in training": training.hits(within(basis), batch_size)[None],
        "whole vector": testing.hits(whole, batch_size)[None],
        "nothing": testing.unchanged[None],
    }
    if random_subspaces:
        bases = [random_basis(site.width, dimensions, seed + draw) for draw in range(random_subspaces)]
        hits["random subspace"] = torch.stack([testing.hits(within(each), batch_size) for each in bases])
    if random_labels:
        hits |= _with_random_labels(search, training, testing, random_labels, seed)
    model_name = bridge.cfg.model_name or bridge.cfg.architecture
    return Alignment(site, basis.float().cpu(), losses, hits, model_name)


@dataclass(frozen=True)
class Search:
    """How a subspace is searched for.

    Attributes:
        dimensions: Of the subspace.
        steps: Batches.
        batch_size: Pairs in a batch.
        learning_rate: In the first step.
        progress: Called after each step.
    """

    dimensions: int
    steps: int
    batch_size: int
    learning_rate: float
    progress: Progress

    def run(self, runs: InterchangeRuns, seed: int, stage: str) -> tuple[Float[Tensor, "d k"], Float[Tensor, "step"]]:
        """Returns the basis of a subspace trained on pairs, and the loss before each step."""
        free = _normal(runs.source.shape[-1], self.dimensions, seed).to(runs.source).requires_grad_()
        optimizer = torch.optim.Adam([free], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        losses = torch.empty(self.steps)
        rows = list(torch.arange(len(runs.examples)))
        for step, batch in enumerate(drawn(rows, size=self.batch_size, count=self.steps, seed=seed)):
            with torch.enable_grad():
                loss = runs.select(torch.stack(batch)).loss(within(_orthonormal(free)))
            # Not `loss.backward()`, which would give the model's parameters gradients too.
            (free.grad,) = torch.autograd.grad(loss, [free])
            optimizer.step()
            schedule.step()
            losses[step] = loss.detach()
            self.progress(stage, step + 1, self.steps)
        return _orthonormal(free).detach(), losses


def random_basis(width: int, dimensions: int, seed: int) -> Float[Tensor, "d k"]:
    """Returns an orthonormal basis of a random subspace, each as likely, in float64.

    Args:
        width: Of the space.
        dimensions: Of the subspace.
        seed: Torch's own seed is neither read nor changed.
    """
    return _orthonormal(_normal(width, dimensions, seed))


def _normal(width: int, dimensions: int, seed: int) -> Float[Tensor, "d k"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, dimensions, generator=generator, dtype=torch.float64)


def _orthonormal(free: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    return torch.linalg.qr(free).Q


def _with_random_labels(
    search: Search, training: InterchangeRuns, testing: InterchangeRuns, draws: int, seed: int
) -> dict[str, Float[Tensor, "draw example"]]:
    """Returns what subspaces that were trained on shuffled labels are right about."""
    found: dict[str, list[Tensor]] = {}
    for draw in range(draws):
        generator = torch.Generator().manual_seed(seed + draw)
        shuffled, other = (_shuffled(runs, generator) for runs in (training, testing))
        basis, _ = search.run(shuffled, seed + draw, f"random labels {draw + 1} of {draws}")
        for name, runs in {"": testing, ", as shuffled": other, ", in training": shuffled}.items():
            found.setdefault(f"random labels{name}", []).append(runs.hits(within(basis), search.batch_size))
    return {name: torch.stack(hits) for name, hits in found.items()}


def _shuffled(runs: InterchangeRuns, generator: torch.Generator) -> InterchangeRuns:
    labels = runs.examples.labels
    order = torch.randperm(len(labels), generator=generator)
    return runs.relabelled(labels[order])


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
    parts = [examples.base, examples.source, examples.base_columns, examples.source_columns]
    masks = [mask for mask in (examples.base_mask, examples.source_mask) if mask is not None]
    return torch.cat([*parts, *masks], dim=1).unique(dim=0, return_inverse=True)[1]
