"""Templates of norms, linear maps and other modules whose calls were traced."""

from clearspan.components import GeneralizedComponent, LinearBridge, NormalizationBridge, TransposedLinearBridge
from clearspan.points import Layout
from clearspan.structure.algebra import linear_kind, norm_kind
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.trace import Trace, Visit


def norm_template(
    visit: Visit, name: str, layout: Layout = Layout.TOKENS, d_model: int | None = None
) -> NormalizationBridge:
    """Returns the template of a norm of the stream, or of vectors of another width than `d_model`.

    Raises:
        MissingStructureError: The module is no norm.
    """
    kind = norm_kind(visit)
    if kind is None:
        raise MissingStructureError(f"{visit.path} is no norm that is known")
    is_narrow = d_model is not None and visit.left is not None and visit.left.shape[-1] != d_model
    axes = "batch pos width" if is_narrow else "batch pos d_model"
    return NormalizationBridge(
        name=name, uses_rms_norm=kind.is_rms, weight_offset=kind.offset, axes=axes, layout=layout
    )


def linear_template(visit: Visit, name: str, layout: Layout = Layout.TOKENS) -> LinearBridge:
    """Returns the template of a linear map.

    Raises:
        MissingStructureError: The module is none.
    """
    kind = linear_kind(visit)
    if kind is None:
        raise MissingStructureError(f"{visit.path} is no linear map")
    return (TransposedLinearBridge if kind.is_transposed else LinearBridge)(name=name, layout=layout)


def opaque(visit: Visit, name: str, d_model: int) -> GeneralizedComponent:
    """Returns a template that gives a module ends, and says no more of it."""
    if norm_kind(visit) is not None:
        return norm_template(visit, name, d_model=d_model)
    return linear_template(visit, name) if linear_kind(visit) else GeneralizedComponent(name=name)


def call_number(trace: Trace, visit: Visit) -> int | None:
    """Returns which call of its module a call is, where the forward makes several; None where it makes one."""
    calls = trace.at(visit.path)
    return calls.index(visit) if len(calls) > 1 else None
