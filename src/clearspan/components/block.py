"""Transformer blocks: the residual stream, and what each sublayer reads from it and adds to it."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor

from clearspan.components.attention import GeneralAttentionBridge, HeadAttentionBridge, PathInputs
from clearspan.components.base import GeneralizedComponent
from clearspan.components.mlp import MLPBridge, MoEBridge
from clearspan.components.normalization import NormalizationBridge
from clearspan.components.weights import LinearMap
from clearspan.conversions import ScaledConversion
from clearspan.errors import ConflictingWritesError
from clearspan.points import Access, Converted, Derivation, Derived, HookPoint, InPlace, Place, Side, Whole


@dataclass(frozen=True)
class Identity:
    """A sum of points that equals another point, by the model's own arithmetic.

    Attributes:
        terms: Names of the points that are added.
        total: Name of the point that equals their sum.
    """

    terms: tuple[str, ...]
    total: str

    def __str__(self) -> str:
        return f"{' + '.join(self.terms)} == {self.total}"


@dataclass(eq=False, repr=False)
class BlockBridge(GeneralizedComponent):
    """A block: submodules `attn` and `mlp`, and `ln1`, `ln2`, `ln1_post`, `ln2_post` where it has them.

    In a mapping it stands for all blocks, and its name is the path of their list. `ln1` and `ln2` are norms before the
    sublayers, `ln1_post` and `ln2_post` norms on their outputs.

    Attributes:
        is_parallel: Whether attention and MLP read the same residual stream; without `ln2` they share `ln1`.
        attn_out: Path in the block of the module whose output attention adds; by default attention itself.
        mlp_out: Path in the block of the module whose output the MLP adds; by default the MLP itself.
        residual_multiplier: What the block multiplies both contributions by.
        norms_the_sum: Whether `ln1` and `ln2` come after a sublayer, on its sum with the residual stream.
        residual_is_normed: Whether the residual branch takes the norm's output.
    """

    _: KW_ONLY
    is_parallel: bool = False
    attn_out: str | None = None
    mlp_out: str | None = None
    residual_multiplier: float = 1.0
    norms_the_sum: bool = False
    residual_is_normed: bool = False

    ln1: NormalizationBridge = field(init=False)
    attn: HeadAttentionBridge = field(init=False)
    ln2: NormalizationBridge = field(init=False)
    mlp: MLPBridge = field(init=False)
    hook_resid_pre: HookPoint = field(init=False)
    hook_attn_in: HookPoint = field(init=False)
    hook_q_input: HookPoint = field(init=False)
    hook_k_input: HookPoint = field(init=False)
    hook_v_input: HookPoint = field(init=False)
    hook_attn_out: HookPoint = field(init=False)
    hook_resid_mid: HookPoint = field(init=False)
    hook_mlp_in: HookPoint = field(init=False)
    hook_mlp_out: HookPoint = field(init=False)
    hook_resid_post: HookPoint = field(init=False)
    _shown = ("identities", "is_parallel")

    def at_layer(self, layer: int) -> Self:
        """Returns the template of one layer."""
        own = cast("Self", super().at_layer(layer))
        own.name = f"{self.name}.{layer}"
        return own

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, with the key and value heads of this block's attention."""
        return {**super().sizes(), "kv_head": self.attn.n_kv_heads}

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns attention and the MLP, and the norms that are there."""
        norms = {key for key in ("ln1", "ln2", "ln1_post", "ln2_post") if key in self.submodules}
        mlp = self.submodules.get("mlp")
        kind = MoEBridge if isinstance(mlp, MoEBridge) else MLPBridge
        return {"attn": GeneralAttentionBridge, "mlp": kind, **dict.fromkeys(norms, NormalizationBridge)}

    def call_arguments(self, value: Tensor) -> dict[str, Any]:
        """Returns what its attention needs."""
        if self.attn.requires_attention_mask:
            return self.attn.call_arguments(value)
        return self._bound.arguments_of(self.module, value)

    @property
    def _norm_before(self) -> NormalizationBridge | None:
        """The norm before attention, if any."""
        return None if self.norms_the_sum else cast("NormalizationBridge | None", self.submodules.get("ln1"))

    @property
    def _norm_between(self) -> NormalizationBridge | None:
        """The MLP's own norm before it, if any."""
        return None if self.norms_the_sum else cast("NormalizationBridge | None", self.submodules.get("ln2"))

    def points(self) -> Iterator[HookPoint]:
        """Yields the points of the residual stream, and what each sublayer reads from it and adds to it."""
        first = self._norm_before
        read = (first or self.attn).place(Side.INPUT)
        inputs = PathInputs(self.attn, None if first is None else first.module.forward)
        yield self.point("hook_resid_pre", self.place(Side.INPUT))
        for part in inputs.parts:
            yield self.point(f"hook_{part}", read, Derived(inputs, part))
        yield self.point("hook_attn_out", self._attention_adds, self._added)
        if not self.is_parallel:
            yield self.point("hook_resid_mid", self._mlp_reads, InPlace())
        if self.is_parallel and self._norm_between is None:
            yield self.point("hook_mlp_in", read, Derived(MLPInput(self.mlp, first), "mlp_in"))
        else:
            yield self.point("hook_mlp_in", self._mlp_reads)
        yield self.point("hook_mlp_out", self._mlp_adds, self._added)
        yield self.point("hook_resid_post", self.place(Side.OUTPUT))

    def folds(self) -> Iterator[tuple[NormalizationBridge, list[LinearMap]]]:
        """Yields the norms that only linear maps read, each with these maps.

        A norm whose output is the residual stream, or is added to it, is left out.
        """
        if self.residual_is_normed:
            return
        first, second = self._norm_before, self._norm_between
        shared = list(self.mlp.reads()) if second is None and self.is_parallel else []
        if first is not None:
            yield first, [*self.attn.reads(), *shared]
        if second is not None:
            yield second, list(self.mlp.reads())

    @property
    def centres(self) -> bool:
        """Whether every reader of the residual stream in the block subtracts its mean first."""
        if self.residual_is_normed or self.norms_the_sum:
            return False
        second = self._norm_between or (self._norm_before if self.is_parallel else None)
        posts = {"ln1_post", "ln2_post"} & set(self.submodules)
        return not posts and all(norm is not None and not norm.uses_rms_norm for norm in (self._norm_before, second))

    @property
    def _mlp_reads(self) -> Place:
        return (self._norm_between or self.mlp.first).place(Side.INPUT)

    @property
    def _added(self) -> Access:
        multiplier = self.residual_multiplier
        return Whole() if multiplier == 1 else Converted(ScaledConversion(multiplier))

    @property
    def _attention_adds(self) -> Place:
        if "ln1_post" in self.submodules:
            return self.submodules["ln1_post"].place(Side.OUTPUT)
        named = self.attn_out and Place(f"{self.module_path}.{self.attn_out}", Side.OUTPUT)
        return self._known(named) if named else self.attn.place(Side.OUTPUT)

    @property
    def _mlp_adds(self) -> Place:
        if "ln2_post" in self.submodules:
            return self.submodules["ln2_post"].place(Side.OUTPUT)
        named = self.mlp_out and Place(f"{self.module_path}.{self.mlp_out}", Side.OUTPUT)
        return self._known(named) if named else self.mlp.last.place(Side.OUTPUT)

    def _known(self, named: Place) -> Place:
        """Returns the place as the component of that module describes it, if there is one."""
        parts = {part.module_path: part for part in self.walk() if part.name is not None}
        return parts[named.module].place(named.side) if named.module in parts else named

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields the points of `ln2`, if the MLP shares attention's norm."""
        if self.is_parallel and "ln2" not in self.submodules and "ln1" in self.submodules:
            for name in ("hook_scale", "hook_normalized"):
                yield f"{self.path}.ln2.{name}", "attention and MLP share the norm ln1"

    def identities(self) -> Iterator[Identity]:
        """Yields the sums that make up the residual stream in this block."""

        def identity(*terms: str) -> Identity:
            *names, total = (f"{self.path}.{term}" for term in terms)
            return Identity(tuple(names), total)

        yield identity("hook_resid_pre", "attn.hook_in" if self._norm_before is None else "ln1.hook_in")
        yield identity("hook_resid_pre" if self.is_parallel else "hook_resid_mid", "hook_mlp_in")
        if self.is_parallel:
            yield identity("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
        elif self.norms_the_sum:
            yield identity("hook_resid_pre", "hook_attn_out", "ln1.hook_in")
            yield identity("ln1.hook_out", "hook_resid_mid")
            yield identity("hook_resid_mid", "hook_mlp_out", "ln2.hook_in")
            yield identity("ln2.hook_out", "hook_resid_post")
        elif self.residual_is_normed:
            yield identity("ln1.hook_out", "hook_attn_out", "hook_resid_mid")
            yield identity("ln2.hook_out", "hook_mlp_out", "hook_resid_post")
        else:
            yield identity("hook_resid_pre", "hook_attn_out", "hook_resid_mid")
            yield identity("hook_resid_mid", "hook_mlp_out", "hook_resid_post")


class MLPInput(Derivation):
    """The residual stream as read by an MLP that shares attention's norm; a write acts on the MLP's input.

    Args:
        mlp: The MLP.
        norm: The norm, or None.
    """

    is_in_series = False

    def __init__(self, mlp: MLPBridge | MoEBridge, norm: NormalizationBridge | None) -> None:
        self.mlp = weakref.proxy(mlp)  # which has the point that has this
        self.norm: Callable[[Tensor], Tensor] | None = None if norm is None else norm.module.forward
        self.targets: tuple[Place, ...] = (mlp.first.place(Side.INPUT),)

    def read(self, part: str, source: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns the residual stream."""
        return source

    def write(self, target: Place, raw: Tensor, source: Tensor, edits: Mapping[str, Tensor], entered: Tensor) -> Tensor:
        """Returns the MLP's input for the edited residual stream.

        Raises:
            ConflictingWritesError: The shared norm was written in the same run.
        """
        if not torch.allclose(entered, self._normalized(source), rtol=0, atol=0, equal_nan=True):
            raise ConflictingWritesError(
                "the MLP's own input was written, and the output of the norm that it shares with attention as well",
                where=self.mlp.path,
                fix="write the norm's output alone, or mlp.hook_in, which comes after both",
            )
        return self._normalized(edits["mlp_in"])

    def _normalized(self, value: Tensor) -> Tensor:
        return value if self.norm is None else self.norm(value)
