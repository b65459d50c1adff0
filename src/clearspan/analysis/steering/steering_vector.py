"""Steering vectors: what is added to the values at hook points, in a run, in generation, or for a stretch of code."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from clearspan.analysis.activations import Positions
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import bars
from clearspan.points import Address, HookFunction
from clearspan.results import Columns, Result
from clearspan.tensor_files import read_tensors, write_tensors

from .steering_hooks import ablating, adding, edit_hooks

if TYPE_CHECKING:
    import plotly.graph_objects as go

_FORMAT = "clearspan steering vector 1"


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
        if not self.vectors:
            raise InvalidArgumentError("a steering vector needs a hook point", expected="{name: vector}", got="{}")

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

    def hooks(self, strength: float = 1.0, positions: Positions = None) -> list[tuple[str, HookFunction]]:
        """Returns hooks that add `strength * vector` at every point.

        They go into `bridge.run_with_hooks`, `bridge.hooks`, and `bridge.generate(..., fwd_hooks=...)`. Added in
        float32 at least, and returned in the value's dtype.

        Args:
            strength: Factor; negative for the other way.
            positions: Where: all (None), or positions in the sequence from 0. Padding counts, and so does what a KV
                cache holds: in generation, `slice(prompt_length, None)` is all new tokens (see `HookPoint.position`).

        Raises:
            InvalidArgumentError: A negative position, since generation does not know its end. Of the run: outside
                generation and without a KV cache, a position that the input does not have; a point of another shape.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> vector = SteeringVector({"blocks.2.hook_resid_post": torch.ones(256)})
            >>> steered = bridge.run_with_hooks("import os", fwd_hooks=vector.hooks(2.0))
            >>> text = bridge.generate("import os", fwd_hooks=vector.hooks(2.0), max_new_tokens=3)
        """
        shifts = {name: strength * vector for name, vector in self.vectors.items()}
        return edit_hooks(shifts, adding, positions)

    def ablation_hooks(self, positions: Positions = None) -> list[tuple[str, HookFunction]]:
        """Returns hooks that take away the component along the vector: `value - (value @ u) u`, with `u = v / |v|`.

        Arguments and errors are those of `hooks`; what comes after may write the component anew.

        Raises:
            InvalidArgumentError: A vector is zero.

        References:
            Arditi et al. (2024), arXiv:2406.11717. There one direction is taken away at every layer.
        """
        return edit_hooks(self.with_norm(1.0).vectors, ablating, positions)

    @contextlib.contextmanager
    def apply(
        self, bridge: TransformerBridge, strength: float = 1.0, positions: Positions = None
    ) -> Iterator[TransformerBridge]:
        """Steers every run of the bridge while the context is open.

        Raises:
            UnknownPointError: The model has no such point.
            InvalidArgumentError: It has another width, or as for `hooks`.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> with SteeringVector({"blocks.2.hook_resid_post": torch.ones(256)}).apply(bridge, strength=3):
            ...     steered = bridge("import os")
            >>> bool((steered != bridge("import os")).any())
            True
        """
        self.check_fits(bridge)
        with bridge.hooks(self.hooks(strength, positions)):
            yield bridge

    # --- other vectors -----------------------------------------------------------------------------------------------

    def at(self, where: int | str) -> Self:
        """Returns the vector of one point.

        Args:
            where: The point's name, or its layer.

        Raises:
            InvalidArgumentError: There is none there, or several.
        """
        found = [name for name in self.names if name == where or Address.parse(name).layer == where]
        if len(found) != 1:
            raise InvalidArgumentError(
                f"there is not one vector at {where!r}", expected=f"one of {', '.join(self.names)}", got=str(len(found))
            )
        return replace(self, vectors={found[0]: self.vectors[found[0]]})

    def with_norm(self, norm: float | Mapping[str, float]) -> Self:
        """Returns vectors of the same directions and other norms: one for all, or one by name.

        Raises:
            InvalidArgumentError: A vector is zero, and has no direction.
        """
        wanted = norm if isinstance(norm, Mapping) else dict.fromkeys(self.names, norm)
        scaled = {}
        for name, vector in self.vectors.items():
            if not vector.any():
                raise InvalidArgumentError(f"the vector at {name} is zero, so it has no direction", where=self.title)
            scaled[name] = vector * (wanted[name] / vector.norm())
        return replace(self, vectors=scaled)

    def random_like(self, seed: int = 0) -> Self:
        """Returns a control: a vector in a random direction for each point, each direction as likely, of the same norm.

        Args:
            seed: Of the directions. Torch's own seed is neither read nor changed.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            name: torch.randn(vector.shape, generator=generator).to(vector) for name, vector in self.vectors.items()
        }
        made_by = f"random directions of seed {seed}, of the norms of: {self.made_by}"
        return replace(self, vectors=drawn, made_by=made_by).with_norm(self.norms)

    def cosine_similarity(self, other: "SteeringVector") -> dict[str, float]:
        """Returns the cosine of the angle between two vectors at each point that both have; 0 where one is zero."""
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
        for name, vector in self.vectors.items():
            point = bridge.hook_dict[name]
            shape = [point.sizes[axis] for axis in point.axes[2:]]
            if shape != list(vector.shape):
                model = bridge.cfg.model_name or bridge.cfg.architecture
                raise InvalidArgumentError(
                    f"the steering vector for {self.model_name} does not fit {model}",
                    expected=f"values of shape {list(vector.shape)} at each position",
                    got=str(shape),
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

        That they fit is known by points and shapes alone: `model_name` says which model they were made on.

        Args:
            path: The file.
            bridge: The model that the vectors are for.

        Raises:
            InvalidArgumentError: The file is no steering vector, or one for values of another shape.
            UnknownPointError: The model lacks a point.
            FileNotFoundError: There is no such file.
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

    def plot(self) -> "go.Figure":
        """Returns the norms as bars."""
        return bars(list(self.norms.values()), names=self.names, value_title="norm", title=self.title)
