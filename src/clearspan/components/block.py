"""Transformer blocks: the residual stream, and what each sublayer reads from it and adds to it."""

from collections.abc import Iterator

from torch import Tensor

from clearspan.components.attention import JointQKVAttentionBridge, PathInputs
from clearspan.components.base import GeneralizedComponent
from clearspan.components.mlp import MLPBridge
from clearspan.components.normalization import NormalizationBridge
from clearspan.points import Derived, HookPoint, InPlace, Side


class BlockBridge(GeneralizedComponent):
    """A block with a norm before each sublayer: submodules `ln1`, `attn`, `ln2`, `mlp`.

    In a mapping it stands for all blocks, and its name is that of the list which holds them.
    """

    ln1: NormalizationBridge
    attn: JointQKVAttentionBridge
    ln2: NormalizationBridge
    mlp: MLPBridge
    hook_resid_pre: HookPoint
    hook_attn_in: HookPoint
    hook_q_input: HookPoint
    hook_k_input: HookPoint
    hook_v_input: HookPoint
    hook_attn_out: HookPoint
    hook_resid_mid: HookPoint
    hook_mlp_in: HookPoint
    hook_mlp_out: HookPoint
    hook_resid_post: HookPoint

    def at_layer(self, layer: int) -> "BlockBridge":
        """Returns the template of one layer."""
        return BlockBridge(f"{self.name}.{layer}", self.config, self.submodules)

    def call_arguments(self, value: Tensor) -> dict[str, Tensor]:
        """Returns what its attention needs."""
        return self.attn.call_arguments(value)

    def points(self) -> Iterator[HookPoint]:
        """Yields the residual stream's points, and the sublayers' as the residual stream sees them."""
        path, stream = self.path, "batch pos d_model"
        read, between = self.ln1.place(Side.INPUT), self.ln2.place(Side.INPUT)
        inputs = PathInputs(self.attn, self.ln1.module.forward)
        yield self.point("hook_resid_pre", stream, self.place(Side.INPUT), aliases=(f"{path}.hook_in",))
        yield self.ln1.point("hook_in", stream, read)
        yield self.point("hook_attn_in", "batch pos kv_head d_model", read, Derived(inputs, "attn_in"))
        yield self.point("hook_q_input", "batch pos head d_model", read, Derived(inputs, "q_input"))
        yield self.point("hook_k_input", "batch pos kv_head d_model", read, Derived(inputs, "k_input"))
        yield self.point("hook_v_input", "batch pos kv_head d_model", read, Derived(inputs, "v_input"))
        yield self.point("hook_attn_out", stream, self.attn.place(Side.OUTPUT), aliases=(f"{path}.attn.hook_out",))
        yield self.point("hook_resid_mid", stream, between, InPlace())
        yield self.point("hook_mlp_in", stream, between, aliases=(f"{path}.ln2.hook_in",))
        yield self.point("hook_mlp_out", stream, self.mlp.place(Side.OUTPUT), aliases=(f"{path}.mlp.hook_out",))
        yield self.point("hook_resid_post", stream, self.place(Side.OUTPUT), aliases=(f"{path}.hook_out",))
