"""Gates that a linear map's output becomes by an activation function, and back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clearspan.conversions.layouts import BaseTensorConversion
from clearspan.errors import HookValueError

GateActivation = Literal["sigmoid", "softplus"]
_FUNCTIONS: dict[GateActivation, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": nn.functional.softplus,
}
_MOST: dict[GateActivation, float] = {"sigmoid": 1.0, "softplus": float("inf")}
_TINY = 1e-7
"""How near to its ends a gate's slope is still computed: float32's step at 1."""


@dataclass(frozen=True)
class GateConversion(BaseTensorConversion):
    """A gate as it multiplies, read from the output of the linear map before its activation function.

    A write is taken back through the function's inverse; entries that it left alone keep their numbers. Zero becomes
    minus infinity there, and zero again in the model.

    Attributes:
        n_heads: Heads in the last axis.
        activation: The function.
        is_one_number: Whether a head has one number, not one for each channel.
        is_second_half: Whether the gate is the second half of each head's channels in the map's output.
        width: How many of each head's last channels it is there, where these are not half of them; None for half.
    """

    n_heads: int
    activation: GateActivation
    is_one_number: bool = False
    is_second_half: bool = False
    width: int | None = None

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the gate `[batch, pos, head, d_head]`, or `[batch, pos, head]` where a head has one number."""
        return self.activate(self._before(input_value))

    def activate(self, before: Tensor) -> Tensor:
        """Returns what the function makes of a map's output, computed in float32 at least."""
        exact = before.to(torch.promote_types(before.dtype, torch.float32))
        return _FUNCTIONS[self.activation](exact).to(before.dtype)

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a copy of the map's output with the gate put back.

        Raises:
            HookValueError: The function takes no such value.
        """
        whole = full_context[0]
        most = _MOST[self.activation]
        if not bool(((input_value >= 0) & (input_value <= most)).all()):
            raise HookValueError(
                f"a gate is the result of {self.activation}",
                expected="0 to 1" if most == 1 else "0 or more",
                got=f"{input_value.min().item():.4g} to {input_value.max().item():.4g}",
                fix="write hook_z, or attn.o.hook_in, which take any value",
            )
        before = self._before(whole).detach()
        is_same = input_value == self.handle_conversion(whole).detach()
        inner = input_value.clamp(_TINY, 1 - _TINY if most == 1 else None)
        slope = self._inverse(inner)  # adds nothing, but gradients flow through it
        kept = before + (slope - slope.detach())
        # Where nothing was changed, the inverse is that of a number that has one, for its gradient would not be one.
        new = self._inverse(torch.where(is_same, torch.full_like(input_value, 0.5), input_value))
        restored = torch.where(is_same, kept, new)
        if not self.is_second_half:
            return restored if self.is_one_number else restored.flatten(-2)
        first = whole.unflatten(-1, (self.n_heads, -1))[..., : -restored.shape[-1]]
        return torch.cat([first, restored], dim=-1).flatten(-2)

    def _before(self, output: Tensor) -> Tensor:
        if self.is_one_number:
            return output
        by_head = output.unflatten(-1, (self.n_heads, -1))
        return by_head[..., -(self.width or by_head.shape[-1] // 2) :] if self.is_second_half else by_head

    def _inverse(self, gate: Tensor) -> Tensor:
        exact = gate.to(torch.promote_types(gate.dtype, torch.float32))
        found = torch.logit(exact) if self.activation == "sigmoid" else exact + torch.log(-torch.expm1(-exact))
        return found.to(gate.dtype)
