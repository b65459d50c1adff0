"""A linear probe: what it says of activations, and the direction that it reads, to steer along."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.steering import SteeringVector
from clearspan.errors import InvalidArgumentError

Label = str | int


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier of the values at one hook point, in float64 on the CPU: `weight @ value + bias`.

    Attributes:
        name: The point's full name.
        classes: What it tells apart, in the order of its logits.
        weight: For values as they are; of the point's own axes, such as `[class, d_model]`.
        bias: In the unit of the logits, nats.
        means: Mean value of each class.
        activation_norm: Mean norm of the values.
        model_name: The model that it was trained on.
    """

    name: str
    classes: tuple[Label, ...]
    weight: Float[Tensor, "class *axes"]
    bias: Float[Tensor, "class"]
    means: Float[Tensor, "class *axes"]
    activation_norm: float
    model_name: str

    def logits(self, values: Float[Tensor, "*place axes"]) -> Float[Tensor, "*place class"]:
        """Returns unnormalised log-probabilities of the classes, on the values' device, in float64.

        Args:
            values: At the point, such as `cache[probe.name]`.

        Raises:
            InvalidArgumentError: Values of another shape.
        """
        axes = self.weight.ndim - 1
        if values.shape[values.ndim - axes :] != self.weight.shape[1:] or values.ndim < axes:
            raise InvalidArgumentError(
                f"the probe at {self.name} cannot read these values",
                expected=f"[..., {', '.join(map(str, self.weight.shape[1:]))}]",
                got=str(list(values.shape)),
            )
        exact = values.detach().double().flatten(-axes)
        return exact @ self.weight.flatten(1).T.to(exact) + self.bias.to(exact)

    def predict(self, values: Float[Tensor, "*place axes"]) -> Int[Tensor, "*place"]:
        """Returns the likeliest class of each value, as an index into `classes`.

        Raises:
            InvalidArgumentError: Values of another shape.
        """
        return self.logits(values).argmax(-1)

    def direction(self, positive: Label, negative: Label | None = None) -> Float[Tensor, "*axes"]:
        """Returns the direction of norm 1 along which the logit of one class rises most against that of another.

        Args:
            positive: The class that it leads to.
            negative: The class that it leads away from; by default all others, in equal parts.

        Raises:
            InvalidArgumentError: A class that is not there, or twice the same.
        """
        weights = self._difference(self.weight, positive, negative)
        return weights / weights.norm().clamp(min=torch.finfo(weights.dtype).tiny)

    def steering_vector(self, positive: Label, negative: Label | None = None) -> SteeringVector:
        """Returns the direction as a steering vector, as long as the class means differ along it, in float32.

        A direction that tells classes apart need not be one that the model uses: it is tilted away from what varies for
        other reasons. The difference of means (`fit_steering_vector`) is often the better one to steer with.

        Arguments and errors are those of `direction`.
        """
        unit = self.direction(positive, negative)
        length = (self._difference(self.means, positive, negative) * unit).sum()
        against = "the others" if negative is None else repr(negative)
        return SteeringVector(
            {self.name: (unit * length).float()},
            {self.name: self.activation_norm},
            self.model_name,
            f"linear probe for {positive!r} against {against}",
        )

    def _difference(
        self, rows: Float[Tensor, "class *axes"], positive: Label, negative: Label | None
    ) -> Float[Tensor, "*axes"]:
        one = self._index(positive)
        others = [i for i in range(len(rows)) if i != one] if negative is None else [self._index(negative)]
        if others == [one]:
            raise InvalidArgumentError(f"a direction leads from one class to another, and not from {positive!r} itself")
        return rows[one] - rows[others].mean(0)

    def _index(self, label: Label) -> int:
        if label not in self.classes:
            raise InvalidArgumentError(f"the probe knows no class {label!r}", expected=str(self.classes))
        return self.classes.index(label)
