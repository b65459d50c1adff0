"""Attention whose product is seen, and whose maps are not known."""

from clearspan.components import OpaqueAttentionBridge
from clearspan.structure.finding import Findings
from clearspan.structure.trace import Attended, Trace, Visit


def opaque_attention_template(
    trace: Trace, block: Visit, whole: Visit, findings: Findings, where: str
) -> OpaqueAttentionBridge | None:
    """Returns the template of attention of which only the product is seen; None where not one product is.

    Args:
        trace: The traced forward.
        block: The block's call.
        whole: The call of the module that adds what attention gives.
        findings: Where to say what was found.
        where: The block's canonical path.
    """
    seen = [one for one in trace.attended if whole.order <= one.order < whole.end]
    if len(seen) != 1 or not seen[0].uses_interface:
        return None
    (one,) = seen
    findings.add(f"{where}.attn", f"{one.path} multiplies queries and keys whose maps are not known")
    return OpaqueAttentionBridge(
        whole.path.removeprefix(f"{block.path}."),
        core=one.path.removeprefix(whole.path).removeprefix("."),
        n_heads=one.query.shape[1],
        n_kv_heads=one.key.shape[1],
        d_head=one.query.shape[-1],
        d_head_v=one.result.shape[-1],
        keys_are_positions=one.key.shape[2] == one.query.shape[2],
        has_sinks=_has_sinks(one),
        output_is_overwritten=whole.is_overwritten,
    )


def _has_sinks(attended: Attended) -> bool:
    """Whether a row of the pattern does not sum to one: the first position sees itself alone."""
    if attended.call is None or attended.key.shape[2] != attended.query.shape[2]:
        return False
    pattern = attended.call.inside()[1]
    return bool((pattern.sum(-1) < 1 - 1e-4).any())
