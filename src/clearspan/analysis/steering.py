"""Steering: a vector added to values of a run, made of two sides of texts, and what it does at which strength."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from clearspan.analysis.activations import Activations, Layers, gathered, points_of
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_flags, check_kind
from clearspan.effects import Effects
from clearspan.errors import InvalidArgumentError, argument
from clearspan.files import read_tensors, write_tensors
from clearspan.inputs import Input, Positions
from clearspan.interventions import Add, Constant, Intervention, ProjectOut
from clearspan.model import check_bridge
from clearspan.plots import Chart, chart_of
from clearspan.points import Address
from clearspan.progress import Progress, shown
from clearspan.results import Columns, Result
from clearspan.sweep import Grid, Metric, NextTokenLoss, Sweep

SteeringMethod = Literal["mean_difference", "paired_pca"]

_FORMAT = "clearspan steering vector 1"
COST = "loss on other text"
"""The metric of a steering sweep that says what steering costs."""


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector(Result):
    """One vector for each of some hook points, on the CPU. Printed, it is a table of their norms.

    Attributes:
        vectors: By the point's full name; of the shape that the point has at one position, such as `[d_model]`.
        activation_norms: By name: the mean norm of the values from which the vector was made, where it is known.
        model_name: The model that it was made on.
        made_by: How it was made.

    Example:
        >>> given = SteeringVector({"blocks.2.hook_resid_post": torch.tensor([3.0, 4.0])})
        >>> given.norms
        {'blocks.2.hook_resid_post': 5.0}
    """

    vectors: Mapping[str, Float[Tensor, "*axes"]]
    activation_norms: Mapping[str, float] = field(default_factory=dict)
    model_name: str = "a model"
    made_by: str = "given"

    def __post_init__(self) -> None:
        if not isinstance(self.vectors, Mapping) or not self.vectors:
            raise InvalidArgumentError(
                "a steering vector needs a hook point", expected="{name: vector}", got=f"{self.vectors!r}"[:80]
            )
        object.__setattr__(self, "vectors", {name: _as_vector(one, name) for name, one in self.vectors.items()})

    @property
    def title(self) -> str:
        """The model, and how the vectors were made."""
        return f"steering vector for {self.model_name}: {self.made_by}"

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the points."""
        return tuple(self.vectors)

    @property
    def norms(self) -> dict[str, float]:
        """Euclidean norm of each vector, in units of the value at its point."""
        return {name: vector.norm().item() for name, vector in self.vectors.items()}

    # --- steering ----------------------------------------------------------------------------------------------------

    def interventions(self, strength: float = 1.0, positions: Positions = None) -> list[Intervention]:
        """Returns the interventions that add `strength * vector` at every point.

        They go into every run: `bridge(..., interventions=...)`, `run_with_cache`, `run_with_hooks`, `hooks`,
        `generate`, a sweep, or the background of one.

        Args:
            strength: Factor; negative for the other way.
            positions: Where: None for all; otherwise counted among each row's real tokens, negative from its last one.
                In generation they count in the whole sequence, and negative ones from the prompt's last token:
                `slice(-1, None)` is that and all new tokens.

        Raises:
            InvalidArgumentError: A strength that is no number, or positions that are none. In the run: a position that
                a row does not have, or values of another shape.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> vector = SteeringVector({"blocks.2.hook_resid_post": torch.ones(256)})
            >>> steered = bridge("import os", interventions=vector.interventions(2.0))
            >>> text = bridge.generate("import os", interventions=vector.interventions(2.0), max_new_tokens=3)
        """
        if not isinstance(strength, int | float):
            raise InvalidArgumentError(f"strength={strength!r}", expected="a number")
        return [
            Intervention(name, Add.of(vector, strength), positions=positions) for name, vector in self.vectors.items()
        ]

    def ablation(self, positions: Positions = None) -> list[Intervention]:
        """Returns the interventions that take away what lies along the vector: `value - (value @ u) u`, `u = v / |v|`.

        What comes after a point may write the component anew.

        Args:
            positions: As for `interventions`.

        Raises:
            InvalidArgumentError: A vector is zero, or as for `interventions`.

        References:
            Arditi et al. (2024), arXiv:2406.11717. There one direction is taken away at every layer.
        """
        return [
            Intervention(name, ProjectOut.of(unit), positions=positions)
            for name, unit in self.with_norm(1.0).vectors.items()
        ]

    @contextlib.contextmanager
    def apply(
        self, bridge: TransformerBridge, strength: float = 1.0, positions: Positions = None
    ) -> Iterator[TransformerBridge]:
        """Steers every run of the bridge while the context is open.

        Raises:
            UnknownPointError: The model has no such point.
            InvalidArgumentError: The values there have another shape, or as for `interventions`.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> with SteeringVector({"blocks.2.hook_resid_post": torch.ones(256)}).apply(bridge, strength=3):
            ...     steered = bridge("import os")
            >>> bool((steered != bridge("import os")).any())
            True
        """
        self.check_fits(bridge)
        with bridge.hooks(interventions=self.interventions(strength, positions)):
            yield bridge

    # --- other vectors -----------------------------------------------------------------------------------------------

    def at(self, where: int | str) -> Self:
        """Returns the vector of one point.

        Args:
            where: The point's name, or its layer.

        Raises:
            InvalidArgumentError: No point is there, or several are.
        """
        check_kind(str, int, np.integer, where=where)
        found = [name for name in self.names if name == where or Address.parse(name).layer == where]
        if len(found) != 1:
            raise InvalidArgumentError(
                f"there is not one vector at {where!r}", expected=f"one of {', '.join(self.names)}", got=str(len(found))
            )
        return replace(self, vectors={found[0]: self.vectors[found[0]]})

    def with_norm(self, norm: float | Mapping[str, float]) -> Self:
        """Returns vectors of the same directions and other norms: one for all, or one by name.

        Raises:
            InvalidArgumentError: A vector is zero, and has no direction; or a norm is missing.
        """
        wanted = norm if isinstance(norm, Mapping) else dict.fromkeys(self.names, norm)
        scaled = {}
        for name, vector in self.vectors.items():
            if not vector.any():
                raise InvalidArgumentError(f"the vector at {name} is zero, so it has no direction", where=self.title)
            if not isinstance(wanted.get(name), int | float):
                raise InvalidArgumentError(f"the norm at {name} is no number", got=repr(wanted.get(name)))
            scaled[name] = vector * (wanted[name] / vector.norm())
        return replace(self, vectors=scaled)

    def random_like(self, seed: int = 0) -> Self:
        """Returns a control: a vector in a random direction for each point, each direction as likely, of the same norm.

        Args:
            seed: Of the directions. Torch's own seed is neither read nor changed.
        """
        check_counts(0, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for name, vector in self.vectors.items():
            direction = torch.randn(vector.shape, generator=generator).to(vector)
            drawn[name] = direction * (vector.norm() / direction.norm())
        return replace(
            self, vectors=drawn, made_by=f"random directions of seed {seed}, of the norms of: {self.made_by}"
        )

    def cosine_similarity(self, other: "SteeringVector") -> dict[str, float]:
        """Returns the cosine of the angle between two vectors at each point that both have; 0 where one is zero."""
        _check_vector(other)
        shared = [name for name in self.names if name in other.vectors]
        return {
            name: functional.cosine_similarity(self.vectors[name].flatten(), other.vectors[name].flatten(), 0).item()
            for name in shared
        }

    # --- files -------------------------------------------------------------------------------------------------------

    def check_fits(self, bridge: TransformerBridge) -> None:
        """Raises unless a model has the points, with values of the vectors' shapes.

        Raises:
            UnknownPointError: It lacks a point.
            InvalidArgumentError: A value has another shape.
        """
        check_bridge(bridge)
        for name, vector in self.vectors.items():
            point = bridge.index.find(name)
            shape = [point.sizes[axis] for axis in point.axes[2:]]
            if shape != list(vector.shape):
                model = bridge.cfg.model_name or bridge.cfg.architecture
                raise InvalidArgumentError(
                    f"the steering vector for {self.model_name} does not fit {model}",
                    expected=f"a vector of shape {shape}, as the value at each position",
                    got=str(list(vector.shape)),
                    where=name,
                    fix="fit_steering_vector(bridge, positive, negative)",
                )

    def save(self, path: str | Path) -> None:
        """Writes the vectors to one safetensors file, each under its point's name."""
        facts = {"names": self.names, "activation_norms": dict(self.activation_norms), "made_by": self.made_by}
        write_tensors(path, _FORMAT, self.vectors, {"model": self.model_name, "facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path, bridge: TransformerBridge) -> Self:
        """Returns the vectors of a file that `save` wrote.

        Whether they fit is told by points and shapes alone: `model_name` says which model they were made on.

        Args:
            path: The file.
            bridge: The model that the vectors are for.

        Raises:
            InvalidArgumentError: The file is no steering vector, or one for values of another shape.
            UnknownPointError: The model lacks a point.
            FileNotFoundError: The file does not exist.
        """
        tensors, metadata = read_tensors(path, _FORMAT, what="steering vector", written_by="SteeringVector.save")
        facts = json.loads(metadata["facts"])
        vectors = {name: tensors[name] for name in facts["names"]}
        vector = cls(vectors, facts["activation_norms"], metadata["model"], facts["made_by"])
        vector.check_fits(bridge)
        return vector

    # --- as a result -------------------------------------------------------------------------------------------------

    def columns(self) -> Columns:
        """Returns one row for each point: its norm, and that as a share of the activations' norm, where it is known."""
        norms = self.norms
        shares = {name: norms[name] / norm for name, norm in self.activation_norms.items() if name in norms}
        known = len(shares) == len(norms)
        return {
            "point": list(norms),
            "norm": list(norms.values()),
            **({"of activations": [shares[name] for name in norms]} if known else {}),
        }

    def chart(self) -> Chart:
        """Returns the norms as bars."""
        return chart_of(torch.tensor(list(self.norms.values())), {"point": self.names}, unit="norm", title=self.title)


def _check_vector(given: object) -> None:
    if not isinstance(given, SteeringVector):
        raise InvalidArgumentError("this is no SteeringVector", got=repr(given)[:80])


def _as_vector(given: object, name: str) -> Float[Tensor, "*axes"]:
    if not isinstance(name, str):
        raise InvalidArgumentError("a hook point is given by its name", got=repr(name))
    if not isinstance(given, Tensor | list | tuple):
        raise InvalidArgumentError(f"the vector at {name} is no tensor", got=type(given).__name__)
    vector = given.detach().cpu() if isinstance(given, Tensor) else Constant.of(given).tensor.float()
    if not vector.is_floating_point() or not vector.ndim:
        raise InvalidArgumentError(
            f"the vector at {name} is no vector of numbers", got=f"{vector.dtype} {list(vector.shape)}"
        )
    return vector


# --- fitting ---------------------------------------------------------------------------------------------------------


def fit_steering_vector(
    bridge: TransformerBridge,
    positive: Input,
    negative: Input,
    *,
    layers: Layers = None,
    name: str = "resid_post",
    positions: Positions = -1,
    method: SteeringMethod = "mean_difference",
    positive_mask: Int[Tensor, "row pos"] | None = None,
    negative_mask: Int[Tensor, "row pos"] | None = None,
    batch_size: int = 32,
    progress: bool | Progress = True,
) -> SteeringVector:
    """Returns a vector at each point that leads from what the model makes of `negative` to what it makes of `positive`.

    Each text is the mean of its values at `positions`, so that a long text counts no more than a short one.

    - `"mean_difference"`: the mean of the positive texts minus that of the negative ones.
    - `"paired_pca"`: text `i` of one side is paired with text `i` of the other. The direction is the first right
      singular vector `u` of the pairs' differences `D`, not centred, and the vector is `mean(D @ u) u`.

    Either way, a strength of 1 moves a value by the mean difference along the vector.

    Args:
        bridge: The model.
        positive: Any input.
        negative: The other side. The two should differ in nothing but what is looked for.
        layers: One or several, negative from the end, each with its own vector; by default all. A vector with several
            points adds at all of them.
        name: Short name of a point in each layer (`"resid_post"`, `"attn_out"`, `"z"`), or the full name of one point.
        positions: Where to read; None for all. The first position is very large in many models, and does not cancel
            where the sides differ in length: `slice(1, None)` leaves it out.
        method: How.
        positive_mask: 1 for real tokens, where bare token ids have padding.
        negative_mask: The same of the other side.
        batch_size: Texts run at a time.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`.

    Raises:
        UnknownPointError: A point or layer that the model does not have.
        InvalidArgumentError: A position that a text does not have, a point without positions, an unknown method; for
            `"paired_pca"`, sides of different sizes.
        NotFiniteError: A value is infinite or not a number.
        NoTokenizerError: Text, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> vector = fit_steering_vector(bridge, ['f("a")', 'x = "b"'], ["f('a')", "x = 'b'"], layers=2, positions=None)
        >>> vector.names, vector.made_by
        (('blocks.2.hook_resid_post',), 'mean difference of 2 positive and 2 negative texts, at all positions')
        >>> double, single = bridge.to_single_token('"'), bridge.to_single_token("'")
        >>> def preference(logits):
        ...     return (logits[0, -1, double] - logits[0, -1, single]).item()
        >>> steered = bridge("print(", interventions=vector.interventions())
        >>> preference(steered) > preference(bridge("print(")) + 1
        True

    References:
        Marks and Tegmark (2023), arXiv:2310.06824, and Rimsky et al. (2023), arXiv:2312.06681, for the difference of
        means. Zou et al. (2023), arXiv:2310.01405, for the principal direction of paired differences; there differences
        are normalised, here they are not, and the length is that of the mean difference along it.
    """
    if method not in get_args(SteeringMethod):
        raise InvalidArgumentError(f"unknown method {method!r}", expected="'mean_difference' or 'paired_pca'")
    names = points_of(bridge, name, layers)
    with shown(progress) as tell:
        with argument("positive" if positive_mask is None else "positive, or positive_mask"):
            more = gathered(
                bridge, positive, names, positions=positions, mask=positive_mask, batch_size=batch_size, tell=tell
            )
        with argument("negative" if negative_mask is None else "negative, or negative_mask"):
            less = gathered(
                bridge, negative, names, positions=positions, mask=negative_mask, batch_size=batch_size, tell=tell
            )
    counts = (len(more.texts), len(less.texts))
    if method == "paired_pca" and counts[0] != counts[1]:
        raise InvalidArgumentError(
            "method='paired_pca' takes pairs", expected="as many positive as negative texts", got=f"{counts}"
        )
    return SteeringVector(
        {each: _vector(more.means(each), less.means(each), method) for each in names},
        {each: _mean_norm(more, less, each) for each in names},
        bridge.cfg.model_name or bridge.cfg.architecture,
        f"{method.replace('_', ' ')} of {counts[0]} positive and {counts[1]} negative texts, at {_written(positions)}",
    )


def _vector(
    positive: Float[Tensor, "text *axes"], negative: Float[Tensor, "text *axes"], method: SteeringMethod
) -> Float[Tensor, "*axes"]:
    if method == "mean_difference":
        return positive.mean(0) - negative.mean(0)
    differences = (positive - negative).flatten(1)
    direction = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return ((differences @ direction).mean() * direction).view(positive.shape[1:])


def _mean_norm(more: Activations, less: Activations, name: str) -> float:
    return torch.cat([side.values[name].flatten(1).norm(dim=1) for side in (more, less)]).mean().item()


def _written(positions: Positions) -> str:
    match positions:
        case None:
            return "all positions"
        case int():
            return f"position {positions}"
        case slice():
            return f"positions {positions.start or 0} to {'the end' if positions.stop is None else positions.stop}"
        case _:
            return f"positions {', '.join(map(str, positions))}"


# --- sweeping --------------------------------------------------------------------------------------------------------


def steering_sweep(
    bridge: TransformerBridge,
    vector: SteeringVector,
    input: Input,
    metric: Metric | Mapping[str, Metric] | None = None,
    *,
    strengths: Sequence[float] = (-2.0, -1.0, 0.0, 1.0, 2.0),
    positions: Positions = None,
    unrelated: Input | None = None,
    controls: int = 3,
    jointly: bool = False,
    seed: int = 0,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    unrelated_mask: Int[Tensor, "row pos"] | None = None,
    progress: bool | Progress = True,
) -> Effects:
    """Returns a metric under steering at each strength, with that of random directions of the same norm, and the cost.

    The cost is the next-token loss on other text, steered at every position: it tells at which strength the model no
    longer predicts anything well. Each point is steered on its own, so that layers can be compared.

    Every point, direction and strength is a cell of a sweep (`clearspan.sweep.Sweep`), which runs few batches, each
    from the layer that it changes; the unrelated text is a second sweep.

    Args:
        bridge: The model, in evaluation mode, with no hooks on it.
        vector: With one point or several.
        input: Any input. Not the texts that the vector was made of, which it fits better than others.
        metric: What is measured, or several by name; see `clearspan.sweep.Sweep`. By default each row's mean next-token
            loss in nats.
        strengths: Factors of the vector.
        positions: Where the input is steered, as in `SteeringVector.interventions`.
        unrelated: An input on which the cost is measured; by default none.
        controls: Random directions of the same norm.
        jointly: Whether all points of the vector are steered at once.
        seed: Of the first random direction; the next ones have the seeds after it.
        attention_mask: 1 for real tokens, where bare token ids have padding.
        unrelated_mask: The same of the unrelated text.
        progress: Whether a bar is shown, or a function that is told how far it is.

    Returns:
        The metric by point, direction, strength and row. The first direction is `"vector"`, and the others are
        `"random 0"` and so on. A second metric, `"loss on other text"`, is the cost, where it was measured.

    Raises:
        UnknownPointError, InvalidArgumentError: The vector does not fit the model; no strength; a negative number of
            controls; a position that no row has; a metric that is not a number for each row; hooks on the model.
        NoTokenizerError: Text, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> vector = SteeringVector({"blocks.2.hook_resid_post": torch.ones(256)})
        >>> found = steering_sweep(bridge, vector, ["import os", "x = 1"], strengths=[0, 4], unrelated="def f(self):")
        >>> found.axes["direction"], found.of().shape, found.of("loss on other text").shape
        (('vector', 'random 0', 'random 1', 'random 2'), torch.Size([1, 4, 2, 2]), torch.Size([1, 4, 2, 1]))
        >>> found.select(point="blocks.2.hook_resid_post", direction="vector").mean().shape
        torch.Size([2])
    """
    _check_vector(vector)
    vector.check_fits(bridge)
    check_counts(0, controls=controls, seed=seed)
    check_flags(jointly=jointly)
    given = strengths.tolist() if isinstance(strengths, Tensor | np.ndarray) else strengths
    factors = tuple(given) if isinstance(given, Sequence) else (given,)
    if not factors or not all(isinstance(one, int | float) for one in factors):
        raise InvalidArgumentError(f"strengths={strengths!r}", expected="numbers, one or more")
    units = [vector] if jointly else [vector.at(name) for name in vector.names]
    directions = [[unit, *(unit.random_like(seed + number) for number in range(controls))] for unit in units]
    axes = (
        ("point", vector.names if len(units) == len(vector.names) else (f"all {len(vector.names)} points",)),
        ("direction", ("vector", *(f"random {number}" for number in range(controls)))),
        ("strength", tuple(map(float, factors))),
    )
    every = list(itertools.product(itertools.chain(*directions), factors))

    def swept(input: Input, metric: Metric | Mapping[str, Metric], mask: Tensor | None, at: Positions) -> Effects:
        cells = tuple(tuple(direction.interventions(strength, at)) for direction, strength in every)
        return Sweep(bridge, input, Grid(axes, cells), metric, attention_mask=mask).run(progress=progress)

    loss = NextTokenLoss()
    found = swept(input, {"next-token loss": loss} if metric is None else metric, attention_mask, positions)
    if unrelated is not None:
        with argument("unrelated" if unrelated_mask is None else "unrelated, or unrelated_mask"):
            cost = swept(unrelated, {COST: loss}, unrelated_mask, None)
        found = replace(
            found,
            values={**found.values, **cost.values},
            base={**found.base, **cost.base},
            units={**found.units, **cost.units},
        )
    return replace(found, what="steering")
