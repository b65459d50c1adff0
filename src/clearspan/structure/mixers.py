"""Mixers: of which kind one is, by the functions that its code calls, and its sizes, by what it gives them."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from clearspan.architectures import mixers
from clearspan.components import (
    GeneralizedComponent,
    MixerBridge,
    MixerKind,
    OpaqueBridge,
    WeightsBridge,
)
from clearspan.components.mixer_kinds import (
    CHANNEL_DELTA,
    GATED_DELTA,
    GATED_RECURRENCE,
    MATRIX_MEMORY,
    SELECTIVE_BY_HEAD,
    SELECTIVE_SCAN,
    SHORT_CONV,
    STATE_SPACE_HEADS,
    WEIGHTED_AVERAGE,
)
from clearspan.hf.mixers import axis_sizes, mixer_kind
from clearspan.structure.algebra import linear_kind, same
from clearspan.structure.finding import Findings
from clearspan.structure.templates import linear_template
from clearspan.structure.trace import Trace, Visit, fresh_arguments

Dims = Mapping[str, int]


def mixer_template(trace: Trace, block: Visit, whole: Visit, findings: Findings, where: str) -> GeneralizedComponent:
    """Returns the template of a sublayer that mixes positions without a softmax.

    Args:
        trace: The traced forward.
        block: The block's call.
        whole: The call of the mixer's module.
        findings: Where to say what was found.
        where: The block's canonical path.
    """
    name = whole.path.removeprefix(f"{block.path}.")
    kind = mixer_kind(whole.module)
    template = _inline(whole, name) if kind is None else _of_kind(trace, whole, kind, name)
    if template is None:
        findings.add(f"{where}.mixer", f"{whole.path} mixes positions without a softmax, and calls no known function")
        return OpaqueBridge(name, output_is_overwritten=whole.is_overwritten)
    functions = ", ".join(role.functions[0].name for role in template.kind.roles)
    calls = f"calls {functions}" if functions else "calls no function for it"
    findings.add(f"{where}.mixer", f"{whole.path} mixes positions without a softmax, and {calls}")
    template.output_is_overwritten = whole.is_overwritten
    return template


def _of_kind(trace: Trace, whole: Visit, kind: MixerKind, name: str) -> MixerBridge:
    """Returns the template of a mixer of a known kind: as such mixers are laid out, or with what all of them have."""
    dims = _dims(whole, kind)
    builders = _BUILDERS.get(kind)
    usual = builders(whole.module, name, dims) if builders is not None else None
    if usual is not None and _fits(usual, whole.module):
        return usual
    parts: dict[str, GeneralizedComponent] = {}
    for path, module in whole.module.named_children():
        call = next((one for one in trace.inside(whole) if one.path == f"{whole.path}.{path}"), None)
        if call is not None and same(call.left, whole.left) and linear_kind(call):
            parts["out_proj"] = linear_template(call, path)
        elif any(True for _ in module.parameters()):
            parts[path] = WeightsBridge(path)
    return MixerBridge(name, submodules=parts, kind=kind, dims=dims)


def _dims(whole: Visit, kind: MixerKind) -> dict[str, int]:
    """Returns the sizes of a mixer's axes: those of the tensors that its functions are given and return."""
    args, kwargs = fresh_arguments(whole)
    with torch.no_grad():
        found = axis_sizes(whole.module, kind, lambda: whole.module(*args, **kwargs))
    return {axis: size for axis, size in found.items() if axis != "d_model"}


def _fits(template: MixerBridge, module: nn.Module) -> bool:
    """Whether a module has all parts that a template names."""
    paths = {path for path, _ in module.named_modules()}
    return all(part.name in paths for part in template.submodules.values())


Builder = Callable[[nn.Module, str, Dims], MixerBridge | None]


def _selective(module: nn.Module, name: str, dims: Dims) -> MixerBridge:
    has_norms = "dt_layernorm" in module._modules
    return mixers.selective_scan(name, d_inner=dims["d_inner"], state=dims["state"], has_norms=has_norms)


def _heads(module: nn.Module, name: str, dims: Dims) -> MixerBridge:
    norm = module._modules.get("norm")
    return mixers.state_space_heads(
        name,
        heads=dims["head"],
        d_head=dims["d_head"],
        groups=dims["group"],
        state=dims["state"],
        norm=None if norm is None or not norm._parameters else "norm",
    )


_MAPS = {
    "qkvz": ("in_proj_qkvz",),
    "ba": ("in_proj_ba",),
    "qkv": ("in_proj_qkv",),
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "z": ("in_proj_z", "g_proj"),
    "a": ("in_proj_a", "a_proj"),
    "b": ("in_proj_b", "b_proj"),
    "out_proj": ("out_proj", "o_proj"),
    "norm": ("norm", "o_norm"),
}
"""What models call the maps of mixers by the delta rule."""


def _delta(module: nn.Module, name: str, dims: Dims) -> MixerBridge:
    there = {
        key: found for key, names in _MAPS.items() if (found := next((n for n in names if n in module._modules), None))
    }
    qk_heads = _key_heads(module, dims)
    return mixers.gated_delta(
        name,
        heads=dims["head"],
        qk_heads=qk_heads,
        d_head_qk=dims["d_head_qk"],
        d_head_v=dims["d_head_v"],
        submodules=there,
        repeats_keys=dims["qk_head"] > qk_heads,
    )


def _key_heads(module: nn.Module, dims: Dims) -> int:
    """Returns the heads of queries and keys; the function may be given them repeated."""
    own = vars(module).get("num_k_heads")
    return own if isinstance(own, int) else dims.get("qk_head", dims["head"])


def _channel(module: nn.Module, name: str, dims: Dims) -> MixerBridge:
    gate = ["g_a_proj", "g_b_proj"] if "g_a_proj" in module._modules else ["g_proj"]
    forget = module._modules.get("forget_gate")
    decay = [f"forget_gate.{path}" for path, part in (forget or module).named_children() if isinstance(part, nn.Linear)]
    return mixers.channel_delta(name, heads=dims["head"], d_head=dims["d_head_v"], gate=gate, decay=decay)


def _memory(_: nn.Module, name: str, dims: Dims) -> MixerBridge:
    return mixers.matrix_memory(name, heads=dims["head"], d_head_qk=dims["d_head_qk"], d_head_v=dims["d_head_v"])


def _inline(whole: Visit, name: str) -> MixerBridge | None:
    """Returns the template of lightning attention, whose code calls no function; None for another layout."""
    own = vars(whole.module)
    heads, d_head = own.get("num_attention_heads"), own.get("head_dim")
    if not (isinstance(heads, int) and isinstance(d_head, int)):
        return None
    template = mixers.lightning(name, heads=heads, d_head=d_head)
    return template if _fits(template, whole.module) else None


def _narrow(builder: Callable[..., MixerBridge]) -> Builder:
    def build(module: nn.Module, name: str, dims: Dims) -> MixerBridge | None:
        width = _width(module, dims)
        return None if width is None else builder(name, d_inner=width)

    return build


def _width(module: nn.Module, dims: Dims) -> int | None:
    """Returns a mixer's width: the function's, or what the output map reads; None where neither says it."""
    if "d_inner" in dims:
        return dims["d_inner"]
    maps = (module._modules.get(name) for name in ("out_proj", "linear_out", "output"))
    return next((int(one.in_features) for one in maps if isinstance(one, nn.Linear)), None)


_BUILDERS: Mapping[MixerKind, Builder] = {
    SELECTIVE_SCAN: _selective,
    STATE_SPACE_HEADS: _heads,
    GATED_DELTA: _delta,
    CHANNEL_DELTA: _channel,
    SELECTIVE_BY_HEAD: _narrow(mixers.selective_scan_by_head),
    SHORT_CONV: _narrow(mixers.short_conv),
    GATED_RECURRENCE: _narrow(mixers.gated_recurrence),
    WEIGHTED_AVERAGE: _narrow(mixers.weighted_average),
    MATRIX_MEMORY: _memory,
}
"""How mixers of each kind are laid out in the models that are known."""
