"""Dense MLPs beside mixtures of experts: each reads the stream in its own way, and a norm takes the sum of both."""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.components.mlp import ExpertsBridge, MLPBridge, MoEBridge, RouterBridge
from clearspan.components.normalization import NormalizationBridge
from clearspan.components.weights import LinearMap
from clearspan.errors import ConflictingWritesError, InvalidArgumentError
from clearspan.points import Derivation, Place, Side


@dataclass(eq=False, repr=False)
class MLPBesideMixtureBridge(MoEBridge):
    """Adds a dense MLP and a mixture (Gemma 4): its submodules are `shared`, the dense MLP, `router` and `experts`.

    It has no module of its own. The dense MLP reads the stream through the block's norm, the router as it is, and the
    experts through `experts_norm`. `shared_norm_post` and `experts_norm_post` are norms on the two outputs; the block's
    norm on the sublayer's output norms their sum.
    """

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the two MLPs, and the norms around them."""
        norms = ("shared_norm_post", "experts_norm", "experts_norm_post")
        return {
            "router": RouterBridge,
            "experts": ExpertsBridge,
            "shared": MLPBridge,
            **dict.fromkeys((name for name in norms if name in self.submodules), NormalizationBridge),
        }

    @property
    def first(self) -> GeneralizedComponent:
        """The dense MLP, which reads what the block's norm gives."""
        return self.submodules["shared"]

    @property
    def other_inputs(self) -> tuple[Place, ...]:
        """Where the router and the experts' norm read the stream."""
        return tuple(self.submodules[key].place(Side.INPUT) for key in ("router", "experts_norm"))

    @property
    def summands(self) -> tuple[str, str]:
        """Names of the two points whose sum the block's norm reads."""
        shared, experts = (
            self.submodules.get(f"{key}_norm_post", self.submodules[key]).path for key in ("shared", "experts")
        )
        return f"{shared}.hook_out", f"{experts}.hook_out"

    def reads(self) -> Iterator[LinearMap]:
        """Yields the maps of the dense MLP, which alone reads what the block's norm gives."""
        yield from self.submodules["shared"].reads()

    def adds(self) -> Iterator[LinearMap]:
        """Yields nothing: norms lie between the output maps and what is added."""
        return iter(())

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields the points of a dense MLP, which are the dense part's."""
        for name in ("hook_pre", "hook_pre_linear", "hook_post"):
            yield (
                f"{self.path}.{name}",
                f"a dense MLP lies beside a mixture: {self.path}.shared.{name} is the point of the dense MLP",
            )

    def __call__(self, value: Tensor) -> Tensor:
        """Raises: it has no module of its own.

        Raises:
            InvalidArgumentError: Always.
        """
        raise InvalidArgumentError(
            f"{self.path} cannot run alone",
            reason="it has no module of its own: the block calls its parts",
            fix=f"{self.path}.shared(value) for the dense MLP",
        )


class MLPBesideMixtureInput(Derivation):
    """Shows the stream that a dense MLP and the mixture beside it read; a write changes what each of them reads.

    Args:
        part: The two.
        norm: The norm through which the dense MLP reads.
    """

    is_in_series = False
    PART = "input"

    def __init__(self, part: MLPBesideMixtureBridge, norm: NormalizationBridge) -> None:
        self.part, self.norm = weakref.proxy(part), weakref.proxy(norm)
        self.targets: tuple[Place, ...] = (norm.place(Side.OUTPUT), *part.other_inputs)

    def read(self, part: str, source: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns the residual stream."""
        return source

    def weights_to_write(self) -> tuple[Tensor, ...]:
        """Returns the norm's parameters."""
        return tuple(parameter for parameter in self.norm.acting._parameters.values() if parameter is not None)

    def write(self, target: Place, raw: Tensor, source: Tensor, edits: Mapping[str, Tensor], entered: Tensor) -> Tensor:
        """Returns the norm's output for the edited stream, or the edited stream where that is read.

        Raises:
            ConflictingWritesError: One of the inputs was written in the same run.
        """
        if not torch.allclose(entered.reshape(source.shape), source, rtol=0, atol=0, equal_nan=True):
            raise ConflictingWritesError(
                "what the MLPs read was written, and the input of one of them as well",
                where=str(target),
                fix="write hook_mlp_in alone, or the inputs of the parts",
            )
        edited = edits[self.PART]
        if target.side is Side.OUTPUT:
            return self.norm.module.forward(edited)
        return edited.reshape(raw.shape)
