"""Which adapter serves which architecture."""

from clearspan.architectures.base import ArchitectureAdapter
from clearspan.architectures.gpt_bigcode import GPTBigCodeArchitectureAdapter
from clearspan.errors import UnsupportedArchitectureError
from clearspan.points import nearest

ADAPTERS: dict[str, type[ArchitectureAdapter]] = {
    "GPTBigCodeForCausalLM": GPTBigCodeArchitectureAdapter,
}


def adapter_class(architecture: str) -> type[ArchitectureAdapter]:
    """Returns the adapter of a Hugging Face model class.

    Raises:
        UnsupportedArchitectureError: There is none.
    """
    if architecture not in ADAPTERS:
        raise UnsupportedArchitectureError(
            f"no adapter for {architecture}",
            expected=", ".join(sorted(ADAPTERS)),
            nearest=nearest(architecture, ADAPTERS),
            fix="write an adapter: CONTRIBUTING.md shows how, step by step",
        )
    return ADAPTERS[architecture]
