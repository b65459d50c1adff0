"""Addresses: the one parser of hook points' names."""

import re
from dataclasses import dataclass, replace
from typing import Self

_IN_BLOCK = re.compile(r"((?:\w+\.)*?\w*blocks)\.(-?\d+|\{l\})\.(?:(.+)\.)?(\w+)")


@dataclass(frozen=True)
class Address:
    """A hook point's name, taken apart.

    Attributes:
        leaf: The last part of the name, such as `hook_q`.
        component: Path of the component, within its block if it is in one: `attn`, `attn.q`, `ln_final`; empty for the
            block's or the model's own points.
        layer: The block's number, or None outside the blocks.
        stack: Path of the blocks.

    Example:
        >>> Address.parse("blocks.3.attn.hook_q")
        Address(leaf='hook_q', component='attn', layer=3, stack='blocks')
        >>> str(Address.parse("ln_final.hook_scale")), Address.parse("hook_embed").layer
        ('ln_final.hook_scale', None)
    """

    leaf: str
    component: str = ""
    layer: int | None = None
    stack: str = "blocks"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Returns the address of a full name."""
        found = _IN_BLOCK.fullmatch(name)
        if found is None:
            component, _, leaf = name.rpartition(".")
            return cls(leaf, component)
        stack, layer, component, leaf = found.groups()
        return cls(leaf, component or "", None if layer == "{l}" else int(layer), stack)

    def __str__(self) -> str:
        block = [] if self.layer is None else [self.stack, str(self.layer)]
        return ".".join([*block, *([self.component] if self.component else []), self.leaf])

    def at(self, layer: int) -> Self:
        """Returns the same point's address in another layer."""
        return replace(self, layer=layer)

    @property
    def template(self) -> str:
        """The name with `{l}` in place of the layer."""
        return self.within if self.layer is None else f"{self.stack}.{{l}}.{self.within}"

    @property
    def within(self) -> str:
        """The name within its block."""
        return f"{self.component}.{self.leaf}" if self.component else self.leaf

    @property
    def depth(self) -> int | None:
        """The layer that the residual stream enters here, `n_layers` after the last one; None for other points.

        Example:
            >>> Address.parse("blocks.2.hook_resid_pre").depth, Address.parse("blocks.2.hook_resid_post").depth
            (2, 3)
        """
        if self.layer is None or self.component or self.leaf not in ("hook_resid_pre", "hook_resid_post"):
            return None
        return self.layer + (self.leaf == "hook_resid_post")
