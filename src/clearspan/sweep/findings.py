"""What a sweep has found so far: metrics of the cells that were run, of the base run, and of the sources."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clearspan.errors import InvalidArgumentError

ByMetric = dict[str, Float[Tensor, "row"]]


@dataclass
class Findings:
    """Metrics by name, on the CPU.

    Attributes:
        done: Which cells were run.
        values: Of the cells; NaN in those that were not run.
        base: Of the run that is changed.
        sources: Of source runs, by the run's name.
    """

    done: Bool[Tensor, "cell"]
    values: dict[str, Float[Tensor, "cell row"]] = field(default_factory=dict)
    base: ByMetric = field(default_factory=dict)
    sources: dict[str, ByMetric] = field(default_factory=dict)

    @classmethod
    def none(cls, cells: int) -> Self:
        """Returns empty findings."""
        return cls(torch.zeros(cells, dtype=torch.bool))

    def keep(self, numbers: Sequence[int], values: Mapping[str, Float[Tensor, "cell row"]]) -> None:
        """Keeps the metrics of some cells."""
        for name, found in values.items():
            if name not in self.values:
                self.values[name] = found.new_full((len(self.done), found.shape[1]), torch.nan)
            self.values[name][list(numbers)] = found
        self.done[list(numbers)] = True

    def tensors(self) -> dict[str, Tensor]:
        """Returns all as tensors by one name each."""
        named = {f"values/{name}": values for name, values in self.values.items()}
        named |= {f"base/{name}": values for name, values in self.base.items()}
        named |= {
            f"source/{source}/{name}": values
            for source, found in self.sources.items()
            for name, values in found.items()
        }
        return {name: tensor.clone() for name, tensor in {**named, "done": self.done}.items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], cells: int, metrics: Collection[str]) -> Self:
        """Returns the findings of their tensors.

        Args:
            tensors: By name, as `tensors` gives them.
            cells: How many there are.
            metrics: Their names.

        Raises:
            InvalidArgumentError: They are those of other cells or metrics.
        """
        done = tensors.get("done")
        if done is None or done.dtype != torch.bool or list(done.shape) != [cells]:
            got = "nothing" if done is None else f"{done.dtype} {list(done.shape)}"
            raise InvalidArgumentError("which cells were run is not told", expected=f"torch.bool [{cells}]", got=got)
        found = cls(done)
        for name, tensor in tensors.items():
            kind, _, metric = name.partition("/")
            home = {"values": found.values, "base": found.base}.get(kind)
            if kind == "source":
                source, _, metric = metric.partition("/")
                home = found.sources.setdefault(source, {})
            fits = tensor.ndim == 2 and len(tensor) == cells if kind == "values" else tensor.ndim == 1
            if name == "done":
                continue
            if home is None or metric not in metrics or not fits:
                raise InvalidArgumentError(
                    f"{name!r} is no finding of this sweep",
                    expected=f"metrics {', '.join(metrics)} of {cells} cells",
                    got=str(list(tensor.shape)),
                )
            home[metric] = tensor
        return found
