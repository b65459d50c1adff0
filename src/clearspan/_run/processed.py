"""A processed model: a copy on the same tensors, but for those that processing changes."""

from collections.abc import Mapping
from typing import TypeVar

from clearspan.checks import check_flags
from clearspan.components import OpaqueBridge, RemainderBridge, StreamsBridge
from clearspan.errors import UnreadableWeightError
from clearspan.hf.adapted import merge
from clearspan.hf.modules import sharing_copy, untie
from clearspan.model import Model, like
from clearspan.modes import no_grad
from clearspan.weights.processing import process

Own = TypeVar("Own", bound=Model)


@no_grad
def processed(model: Own, steps: Mapping[str, bool | None]) -> Own:
    """Returns a new model with processed weights. The steps are the arguments of `TransformerBridge.processed`."""
    check_flags(**{name: wanted for name, wanted in steps.items() if wanted is not None})
    _check_readable(model)
    hf_model = sharing_copy(model.hf_model)
    merge(hf_model)
    new = like(model, hf_model)
    new.processing = (*model.processing, *process(new, steps))
    if model.tied and not new.tied:
        untie(new.hf_model)
    return new


_OPAQUE = (OpaqueBridge, RemainderBridge, StreamsBridge)
"""Parts whose inside is not known."""


def _check_readable(model: Model) -> None:
    """Raises if a weight is quantised, or a module is inside a wrapper."""
    for component in model.components:
        for part in component.walk():
            if part.is_wrapped:
                raise UnreadableWeightError(
                    "a model with wrapped modules cannot be processed",
                    where=f"{type(part.module).__name__} at {part.module_path}",
                    reason="what the wrapper does to the output is not known, and processed weights may change it",
                    fix="process it before it is wrapped",
                )
            if part.name is None or part.submodules or isinstance(part, _OPAQUE) or not part.has("weight"):
                continue  # nothing in an opaque part is processed
            part.parameter("weight")
            if part.is_quantised:
                raise UnreadableWeightError(
                    "a quantised model cannot be processed",
                    where=part.path,
                    reason="processed weights are other numbers, which would have to be quantised anew",
                    fix="load it without quantisation",
                )
