"""AltUp: several streams are predicted, one of them passes the sublayers, and what they made of it corrects all."""

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.components.block import BlockBridge, Identity
from clearspan.components.multi_stream import MultiStreamBlockBridge, StreamsLayout
from clearspan.components.normalization import NormalizationBridge
from clearspan.components.per_layer_input import PerLayerInputBridge
from clearspan.components.sublayer import stream_at
from clearspan.conversions import BaseTensorConversion
from clearspan.points import Converted, HookPoint, InPlace, Place, Side


@dataclass(frozen=True)
class _Added(BaseTensorConversion):
    """What a map gives plus what the model adds to it: one, or the identity of streams.

    Attributes:
        n_streams: Streams, where the map's output is `to_stream` by `stream`; 0 where it is a number for each stream.
    """

    n_streams: int = 0

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the weights as the model uses them."""
        if not self.n_streams:
            return input_value + 1
        shown = input_value.unflatten(-1, (self.n_streams, self.n_streams)).transpose(-1, -2)
        return shown + torch.eye(self.n_streams, dtype=shown.dtype, device=shown.device)

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns what the map gives."""
        if not self.n_streams:
            return input_value - 1
        eye = torch.eye(self.n_streams, dtype=input_value.dtype, device=input_value.device)
        return (input_value - eye).transpose(-1, -2).flatten(-2)


@dataclass(eq=False, repr=False)
class AltUpBridge(GeneralizedComponent):
    """The module that predicts the streams, and corrects them.

    Attributes:
        streams: How the streams lie.
        mix: Its map to the weights by which streams are predicted of each other.
        write: Its map to the weights by which each stream is corrected.
        norm: Its norm, which reads the active stream before, and then what the sublayers made of it.
    """

    _: KW_ONLY
    streams: StreamsLayout = field(default_factory=lambda: StreamsLayout(1))
    mix: str = "prediction_coefs"
    write: str = "correction_coefs"
    norm: str = "router_norm"

    hook_mix: HookPoint = field(init=False)
    hook_write: HookPoint = field(init=False)

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, with how many streams there are."""
        return {**super().sizes(), "stream": self.streams.n_streams, "to_stream": self.streams.n_streams}

    def points(self) -> Iterator[HookPoint]:
        """Yields the weights of the prediction and of the correction."""
        mix, write = (Place(f"{self.module_path}.{name}", Side.OUTPUT) for name in (self.mix, self.write))
        yield self.point("hook_mix", mix, Converted(_Added(self.streams.n_streams)))
        yield self.point("hook_write", write, Converted(_Added()))

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields nothing: the model calls its methods."""
        return iter(())

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields both ends."""
        for name in ("hook_in", "hook_out"):
            yield f"{self.path}.{name}", "the model calls methods of this module, and not the module"

    @property
    def corrects(self) -> Place:
        """Where it reads what the sublayers made of the active stream."""
        return Place(f"{self.module_path}.{self.norm}", Side.INPUT, call=1)


@dataclass(frozen=True)
class _Predicted(Identity):
    """The active stream, predicted of all streams."""

    active: int = 0

    def added(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns the prediction of the active stream."""
        streams, mix = (values[name] for name in self.terms)
        return torch.einsum("bpsd,bps->bpd", streams, mix[..., self.active].to(streams.dtype))

    def __str__(self) -> str:
        streams, mix = self.terms
        return f"stream {self.active} of {streams} mixed by {mix} == {self.total}"


@dataclass(frozen=True)
class _Corrected(Identity):
    """The streams that leave a block: those predicted, corrected, and with the layer's own input in the others."""

    active: int = 0

    def added(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns the streams that leave the block."""
        streams, mix, before, after, write, own = (values[name] for name in self.terms)
        predicted = torch.einsum("bpsd,bpst->bptd", streams, mix.to(streams.dtype))
        predicted[:, :, self.active] = before
        corrected = predicted + write.to(streams.dtype).unsqueeze(-1) * (after - before).unsqueeze(-2)
        corrected[:, :, 1:] += own.unsqueeze(-2)
        return corrected

    def __str__(self) -> str:
        streams, mix, before, after, write, own = self.terms
        return f"{streams} mixed by {mix} + {write} * ({after} - {before}) + {own} == {self.total}"


@dataclass(eq=False, repr=False)
class AltUpBlockBridge(MultiStreamBlockBridge):
    """A block with several residual streams: AltUp predicts one of them, which the sublayers read and add to.

    `hook_active_pre`, `hook_active_mid`, ... and `hook_active_post` are that one stream, as a residual stream is in
    other models: what the sublayers add is added to it. The part `altup` then corrects all streams, and the part
    `ple`, the layer's own input, is added to all but the first.

    Attributes:
        active: Which stream is predicted for the sublayers.
        added_to_others: Path of the norm on the layer's own input, whose output is added to the other streams.
    """

    _: KW_ONLY
    active: int = 0
    added_to_others: str = "post_per_layer_input_norm"

    def _check_stages(self) -> None:
        """Checks nothing: several sublayers may read the prediction."""

    def _norm_after(self, index: int, name: str) -> str:
        """Returns the name of the norm on a sublayer's output: by its stage, of whose sublayers the first has one."""
        stage = next(number for number, stage in enumerate(self.stages) if name in stage)
        return f"ln{stage + 1}_post" if self.stages[stage][0] == name else ""

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the sublayers, the norms that are there, AltUp, and the layer's own input."""
        own = {"altup": AltUpBridge, "ple": PerLayerInputBridge, "ple_norm": NormalizationBridge}
        return {**BlockBridge.required(self), **own}

    @property
    def altup(self) -> AltUpBridge:
        """The part that predicts and corrects."""
        part = self.submodules["altup"]
        assert isinstance(part, AltUpBridge), "checked when it was bound"
        return part

    def stream_before(self, stage: int) -> str:
        """Returns the name of the point with the active stream that a stage reads; of what the last one leaves."""
        name = "hook_resid_post" if stage == len(self.stages) else stream_at(stage)
        return f"{self.path}.{name.replace('hook_resid_', 'hook_active_')}"

    def points(self) -> Iterator[HookPoint]:
        """Yields the points of the streams, those of the active one, and what each sublayer reads of it and adds."""
        yield self.point("hook_streams_pre", self.place(Side.INPUT))
        yield self.point("hook_streams", self.place(Side.INPUT))
        seen = set[int]()
        for sublayer in self.sublayers:
            if sublayer.stage not in seen:
                seen.add(sublayer.stage)
                name = self.stream_before(sublayer.stage).rpartition(".")[2]
                yield self.point(name, sublayer.reads, InPlace())
            yield from self._inputs(sublayer)
            yield self.point(f"hook_{sublayer.name}_out", sublayer.adds, sublayer.added)
        yield self.point("hook_active_post", self.altup.corrects, InPlace())
        yield self.point("hook_ple_in", self.submodules["ple"].first.place(Side.INPUT))
        yield self.point("hook_ple_out", self.submodules["ple_norm"].place(Side.OUTPUT))
        yield self.point("hook_streams_post", self.place(Side.OUTPUT))

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields the points of one residual stream, and of streams between the sublayers."""
        one = "the sublayers read and add to one predicted stream"
        for name in ("hook_streams_mid", "hook_streams_mid2"):
            yield f"{self.path}.{name}", f"{one}: hook_active_mid"
        for name in ("hook_write", "hook_mix"):
            yield f"{self.path}.attn_connection.{name}", f"{one}; altup.{name} has the weights"
        yield from (pair for pair in super().absences() if not pair[0].endswith(("streams_mid", "streams_mid2")))

    def identities(self) -> Iterator[Identity]:
        """Yields the prediction, the sums that the sublayers make of the active stream, and the correction."""
        before, after, mix = self.stream_before(0), self.stream_before(len(self.stages)), f"{self.altup.path}.hook_mix"
        yield _Predicted((self.enters, mix), before, active=self.active)
        yield from BlockBridge.identities(self)
        write, own = f"{self.altup.path}.hook_write", f"{self.path}.hook_ple_out"
        yield _Corrected((self.enters, mix, before, after, write, own), self.leaves, active=self.active)


@dataclass(eq=False, repr=False)
class StreamMapsBridge(GeneralizedComponent):
    """The maps of the embedding to further streams, or of further streams to the last vector, one each.

    The model scales each map's output to the magnitude of what the first stream is.
    """

    def points(self) -> Iterator[HookPoint]:
        """Yields nothing."""
        return iter(())

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields nothing: it is a list of maps."""
        return iter(())

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields both ends."""
        for name in ("hook_in", "hook_out"):
            yield f"{self.path}.{name}", "it is a list of maps"

    def expanded(self, value: Tensor) -> Tensor:
        """Returns the streams `[batch, pos, stream, d_model]` that are made of an embedding `[batch, pos, d_model]`."""
        return torch.stack([value, *(self._like(value, one(value)) for one in self._maps())], 2)

    def collapsed(self, streams: Tensor) -> Tensor:
        """Returns the vector `[batch, pos, d_model]` that is made of streams."""
        first, *others = streams.unbind(2)
        mapped = (self._like(first, one(other)) for one, other in zip(self._maps(), others, strict=True))
        return torch.stack([first, *mapped]).mean(0)

    def _maps(self) -> Iterator[torch.nn.Module]:
        return iter(self.module.children())

    def _like(self, first: Tensor, value: Tensor) -> Tensor:
        """Returns a value scaled to the root of another's mean square."""
        size = value.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt()
        return value * first.square().mean(-1, keepdim=True).sqrt() / size
