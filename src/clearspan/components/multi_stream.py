"""Blocks whose residual is several streams: hyper-connections mix what a sublayer reads, and write what it gives."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.components.block import BlockBridge, Identity
from clearspan.components.sublayer import Sublayer
from clearspan.conversions import HeadsConversion
from clearspan.errors import AdapterError
from clearspan.points import Access, Converted, HookPoint, InPlace, Layout, Place, Side

STREAMS = "batch pos stream d_model"
"""Axes of a residual of several streams."""
SEVERAL = "the residual is several streams, and no one of them is what the parts of the model read and add to"
"""Why points of one residual stream are absent, and why it cannot be taken apart."""


@dataclass(frozen=True)
class StreamsLayout:
    """How the streams of a residual lie in a tensor.

    Attributes:
        n_streams: How many there are.
        layout: How rows and positions lie; `STREAMS_FIRST` where streams are the first axis.
        is_joined: Whether they share the last axis with `d_model`, the streams outside.
    """

    n_streams: int
    layout: Layout = Layout.TOKENS
    is_joined: bool = False

    @property
    def conversion(self) -> HeadsConversion | None:
        """What shows the streams in an axis of their own; None where they have one."""
        return HeadsConversion(self.n_streams) if self.is_joined else None

    def raw(self, streams: Tensor) -> Tensor:
        """Returns streams `[batch, pos, stream, d_model]` as the model has them."""
        if self.layout is Layout.STREAMS_FIRST:
            return streams.permute(2, 0, 1, 3)
        return streams.flatten(-2) if self.is_joined else streams

    def shown(self, raw: Tensor) -> Tensor:
        """Returns streams as the model has them as `[batch, pos, stream, d_model]`, a view."""
        if self.layout is Layout.STREAMS_FIRST:
            return raw.permute(1, 2, 0, 3)
        return raw.unflatten(-1, (self.n_streams, -1)) if self.is_joined else raw


@dataclass(eq=False, repr=False)
class StreamsBridge(GeneralizedComponent):
    """A part that takes or gives several streams, or both: the last collapse, or what a block adds to all streams.

    Attributes:
        streams: How they lie in its input and output.
        takes_streams: Whether its input is streams, or one vector for each position.
        gives_streams: Whether its output is.
    """

    _: KW_ONLY
    streams: StreamsLayout = field(default_factory=lambda: StreamsLayout(1))
    takes_streams: bool = True
    gives_streams: bool = False

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, with how many streams there are."""
        return {**super().sizes(), "stream": self.streams.n_streams, "to_stream": self.streams.n_streams}

    def place(self, side: Side, item: int = 0) -> Place:
        """Returns a place at the part's module."""
        has_streams = self.takes_streams if side is Side.INPUT else self.gives_streams
        own = super().place(side, item)
        return replace(own, layout=self.streams.layout) if has_streams else own

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields the input and the output of its module."""
        for name, side, has_streams in (
            ("hook_in", Side.INPUT, self.takes_streams),
            ("hook_out", Side.OUTPUT, self.gives_streams),
        ):
            yield self._end(name, self.place(side), has_streams)

    def _end(self, name: str, place: Place, has_streams: bool) -> HookPoint:
        conversion = self.streams.conversion if has_streams else None
        access = None if conversion is None else Converted(conversion)
        return self.point(name, place, access, dimensions=STREAMS if has_streams else "batch pos d_model")

    def call_arguments(self, value: Tensor) -> dict[str, Any]:
        """Returns what the model itself would pass."""
        return self._bound.arguments_of(self.module, value)

    def __call__(self, value: Tensor) -> Tensor:
        """Runs the part's module alone; its listeners fire.

        Args:
            value: `[batch, pos, stream, d_model]`, or `[batch, pos, d_model]` where it takes one vector.

        Returns:
            Likewise.
        """
        self.refuse_alone()
        self._bound.follow()
        own = self.streams.raw(value).clone() if self.takes_streams else value.clone()
        output = self._chosen(self.module(own, **self.call_arguments(value)))
        return self.streams.shown(output) if self.gives_streams else output

    def _chosen(self, output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple | list) else output


@dataclass(eq=False, repr=False)
class HyperConnectionBridge(StreamsBridge):
    """A hyper-connection: makes what one sublayer reads of the streams, and how its output is written to them.

    Attributes:
        collapse: Which of the module's outputs a sublayer reads.
        write: Which has how much of the sublayer's output each stream gets `[batch, pos, stream]`.
        mix: Which has how the streams go on `[batch, pos, stream, to_stream]`; None where they go on as they are.
        mix_is_transposed: Whether it has the stream that is written to first.
        hands_on: Whether the streams go on as the module gives them back, so that a write to its input stays in them.
    """

    _: KW_ONLY
    collapse: int = 0
    write: int = 1
    mix: int | None = None
    mix_is_transposed: bool = False
    hands_on: bool = False

    hook_write: HookPoint = field(init=False)

    def points(self) -> Iterator[HookPoint]:
        """Yields the weights by which the sublayer's output is written, and by which the streams are mixed."""
        yield self.point("hook_write", self.place(Side.OUTPUT, self.write))
        if self.mix is not None:
            access = Converted(_Transposed()) if self.mix_is_transposed else None
            yield self.point("hook_mix", self.place(Side.OUTPUT, self.mix), access)

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields the streams that it reads, and what the sublayer reads."""
        yield self._end("hook_in", self.place(Side.INPUT), True)
        yield self._end("hook_out", self.place(Side.OUTPUT, self.collapse), False)

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields the mixing weights, where there are none."""
        if self.mix is None:
            yield f"{self.path}.hook_mix", "the streams go on as they are, unmixed"

    def _chosen(self, output: Any) -> Tensor:
        return output[self.collapse]


@dataclass(frozen=True)
class _Transposed(HeadsConversion):
    """The last two axes the other way round."""

    n_heads: int = 1

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a view with the last two axes swapped."""
        return input_value.transpose(-1, -2)

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns them swapped back."""
        return input_value.transpose(-1, -2)


@dataclass(frozen=True)
class Mixing(Identity):
    """The streams after a sublayer: what its hyper-connection makes of those before, and of the sublayer's output.

    Attributes:
        out: Name of the point with what the sublayer gives.
        write: Name of the point with the weights by which each stream gets it.
        mix: Name of the point with the weights by which streams are mixed, or None.
    """

    out: str = ""
    write: str = ""
    mix: str | None = None

    def added(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns the streams after the sublayer, from those before."""
        before = sum(values[name] for name in self.terms if name not in (self.out, self.write, self.mix))
        assert isinstance(before, Tensor), "streams are among the terms"
        if self.mix is not None:
            before = torch.einsum("bpsd,bpst->bptd", before, values[self.mix].to(before.dtype))
        return before + values[self.write].to(before.dtype).unsqueeze(-1) * values[self.out].unsqueeze(-2)

    def __str__(self) -> str:
        before = " + ".join(name for name in self.terms if name not in (self.out, self.write, self.mix))
        mixed = before if self.mix is None else f"({before}) mixed by {self.mix}"
        return f"{mixed} + {self.write} * {self.out} == {self.total}"


def connection_of(sublayer: str) -> str:
    """Returns the name of the hyper-connection of a sublayer.

    Example:
        >>> connection_of("attn")
        'attn_connection'
    """
    return f"{sublayer}_connection"


@dataclass(eq=False, repr=False)
class MultiStreamBlockBridge(BlockBridge):
    """A block whose residual is several streams `[batch, pos, stream, d_model]`.

    Each sublayer `x` has a hyper-connection, the submodule `x_connection`. It makes one vector of the streams, which
    the sublayer reads, through its norm if it has one. And it makes the weights by which the sublayer's output is
    written to each stream. `hook_streams_pre`, `hook_streams_mid`, ... and `hook_streams_post` take the place of the
    residual stream; `hook_x_out` is what the sublayer gives, before it is written.

    Attributes:
        streams: How the streams lie.
        adds_first: Whether a submodule `streams_added` adds to all streams before the first sublayer's connection.
    """

    _: KW_ONLY
    streams: StreamsLayout = field(default_factory=lambda: StreamsLayout(1))
    adds_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layout = self.streams.layout
        self._check_stages()

    def _check_stages(self) -> None:
        """Raises AdapterError unless each sublayer is a stage: each reads the streams by weights of its own."""
        if any(len(stage) != 1 for stage in self.stages):
            raise AdapterError(
                f"no block of several streams has the stages {self.stages!r}", expected="one sublayer a stage"
            )

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the sublayers, the norms that are there, and each sublayer's connection."""
        connections: dict[str, type[GeneralizedComponent]] = {
            connection_of(name): HyperConnectionBridge for name in self.sublayer_names
        }
        added: dict[str, type[GeneralizedComponent]] = {"streams_added": StreamsBridge} if self.adds_first else {}
        return {**super().required(), **connections, **added}

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, with how many streams there are."""
        return {**super().sizes(), "stream": self.streams.n_streams, "to_stream": self.streams.n_streams}

    def connection(self, sublayer: Sublayer) -> HyperConnectionBridge:
        """Returns the hyper-connection of a sublayer."""
        part = self.submodules[connection_of(sublayer.name)]
        assert isinstance(part, HyperConnectionBridge), "checked when it was bound"
        return part

    def stream_before(self, stage: int) -> str:
        """Returns the name of the point with the streams that a stage reads; of those that leave the last one."""
        return super().stream_before(stage).replace("hook_resid_", "hook_streams_")

    @property
    def enters(self) -> str:
        """Name of the point with the streams that enter the block."""
        return f"{self.path}.hook_streams_pre"

    @property
    def leaves(self) -> str:
        """Name of the point with the streams that leave the block."""
        return f"{self.path}.hook_streams_post"

    @property
    def is_sum(self) -> bool:
        """It is not."""
        return False

    @property
    def keeps_directions(self) -> bool:
        """It is not one stream."""
        return False

    @property
    def centres(self) -> bool:
        """A connection reads the mean too."""
        return False

    # --- running it --------------------------------------------------------------------------------------------------

    def call_arguments(self, value: Tensor) -> dict[str, Any]:
        """Returns what the model itself would pass."""
        return self._bound.arguments_of(self.module, value)

    def __call__(self, value: Tensor) -> Tensor:
        """Runs the block alone; its listeners fire.

        Args:
            value: `[batch, pos, stream, d_model]`.

        Returns:
            The streams that leave it, `[batch, pos, stream, d_model]`.
        """
        self.refuse_alone()
        self._bound.follow()
        output = self.module(self.streams.raw(value).clone(), **self.call_arguments(value))
        return self.streams.shown(output[0] if isinstance(output, tuple | list) else output)

    @property
    def raw_stream(self) -> Callable[[Tensor], Tensor]:
        """Makes of streams `[batch, pos, stream, d_model]` what the block takes."""
        return self.streams.raw

    @property
    def shown_stream(self) -> Callable[[Tensor], Tensor]:
        """Makes of what the block gives streams `[batch, pos, stream, d_model]`."""
        return self.streams.shown

    @property
    def stream_shape(self) -> tuple[int, ...]:
        """The sizes of a residual behind rows and positions."""
        return self.streams.n_streams, self._fixed.d_model

    # --- points ------------------------------------------------------------------------------------------------------

    def points(self) -> Iterator[HookPoint]:
        """Yields the points of the streams, and what each sublayer reads of them and gives."""
        conversion = self.streams.conversion
        whole: Access | None = None if conversion is None else Converted(conversion)
        yield self.point("hook_streams_pre", self.place(Side.INPUT), whole)
        yield self.point("hook_streams", self.place(Side.INPUT), whole)
        if self.adds_first:
            yield self.point("hook_streams_added", self._added.place(Side.OUTPUT), whole)
        for stage, here in itertools.groupby(self.sublayers, lambda sublayer: sublayer.stage):
            for sublayer in here:
                if stage:
                    name = self.stream_before(stage).rpartition(".")[2]
                    yield self.point(name, self.connection(sublayer).place(Side.INPUT), InPlace(conversion))
                yield from self._inputs(sublayer)
                yield self.point(f"hook_{sublayer.name}_out", sublayer.adds, sublayer.added)
        yield self.point("hook_streams_post", self.place(Side.OUTPUT), whole)

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields the streams at its ends, which are `hook_streams_pre` and `hook_streams_post`."""
        conversion = self.streams.conversion
        access = None if conversion is None else Converted(conversion)
        yield self.point("hook_in", self.place(Side.INPUT), access, dimensions=STREAMS)
        yield self.point("hook_out", self.place(Side.OUTPUT), access, dimensions=STREAMS)

    @property
    def _added(self) -> StreamsBridge:
        part = self.submodules["streams_added"]
        assert isinstance(part, StreamsBridge), "checked when it was bound"
        return part

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields the points of one residual stream, and those of sublayers and norms that other blocks have."""
        for name in ("hook_resid_pre", "hook_resid_mid", "hook_resid_mid2", "hook_resid_post"):
            yield f"{self.path}.{name}", SEVERAL
        yield from ((name, why) for name, why in super().absences() if not name.endswith("hook_resid_mid"))
        if not self.adds_first:
            yield (
                f"{self.path}.hook_streams_added",
                "nothing is added to the streams before the first sublayer reads them",
            )
        if len(self.stages) < 3:
            yield f"{self.path}.hook_streams_mid2", "the block has no more than two stages"
        if "attn" not in self.sublayer_names:
            for name in ("hook_write", "hook_mix"):
                yield f"{self.path}.attn_connection.{name}", str(self.why_without("attn"))

    def identities(self) -> Iterator[Identity]:
        """Yields what connections read, what sublayers read of them, and how their outputs are written."""
        for sublayer in self.sublayers:
            connection = self.connection(sublayer)
            before, after = self.stream_before(sublayer.stage), self.stream_before(sublayer.stage + 1)
            added = (f"{self.path}.hook_streams_added",) if self.adds_first and not sublayer.stage else ()
            yield Identity((before, *added), f"{connection.path}.hook_in")
            yield Identity((f"{connection.path}.hook_out",), sublayer.reads_at)
            streams = (f"{connection.path}.hook_in",) if connection.hands_on else (before, *added)
            write, mix = f"{connection.path}.hook_write", f"{connection.path}.hook_mix"
            mixed = (mix,) if connection.mix is not None else ()
            yield Mixing(
                (*streams, sublayer.hook_out, write, *mixed),
                after,
                out=sublayer.hook_out,
                write=write,
                mix=mix if mixed else None,
            )
