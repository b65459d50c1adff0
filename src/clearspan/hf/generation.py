"""Recordings of a generation: what its forwards kept, joined along positions on look-up."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from clearspan.hf.attention import AttentionCall, least_score
from clearspan.hf.keywords import kv_cache_in
from clearspan.hf.recording import Contents, Recording
from clearspan.hf.sequence import is_empty
from clearspan.hf.storages import Relocation
from clearspan.hf.tensors import as_tokens, primary_input
from clearspan.hf.torch_hooks import before
from clearspan.points import HookPoint, Layout, Place, Side, read


def as_criteria(given: object) -> Any:
    """Returns the stopping criteria of a generation: one alone as a list, anything else as it is."""
    from transformers import StoppingCriteria

    return [given] if isinstance(given, StoppingCriteria) else given


@dataclass(frozen=True)
class _Piece:
    """What one forward kept at one place.

    Attributes:
        tensor: The tensor, with the forward's own positions alone.
        version: Its count of edits when it was kept, or None where nobody else has it.
        end: Positions of the sequence after the forward.
    """

    tensor: Tensor
    version: int | None
    end: int

    def to(self, there: Relocation) -> "_Piece":
        """Returns the piece on another device."""
        new = there(self.tensor)
        return self if new is self.tensor else replace(self, tensor=new, version=None)


@dataclass(frozen=True)
class _Shell:
    """A call of the attention function without its queries, keys and values.

    Attributes:
        call: The call; its tensors are empty.
        n_keys: How many keys it saw: the last ones, up to its own.
    """

    call: AttentionCall
    n_keys: int

    @classmethod
    def of(cls, call: AttentionCall, end: int) -> "_Shell":
        """Returns the shell of a call after which the sequence has `end` positions.

        A KV cache of fixed length has empty keys after the real ones.
        """
        n_keys, none = min(call.key.shape[2], end), call.query.new_empty(0)
        mask = None if call.mask is None else call.mask[..., :n_keys]
        return cls(replace(call, query=none, key=none, value=none, mask=mask, observers=()), n_keys)

    def filled(self, query: Tensor, key: Tensor) -> AttentionCall:
        """Returns the call with its queries and keys, and values that nobody reads."""
        return replace(self.call, query=query, key=key, value=key[..., :1])


class GenerationRecording(Recording):
    """What the forwards of one generation left behind, read as if one forward had run the whole sequence.

    Each forward runs the positions after those of the one before. A forward without a KV cache starts over: what was
    kept before it is dropped. A piece holds its forward's positions alone; if a tensor also shows those in the KV cache
    (keys, and what latent attention projects from them), the new ones are copied out of it.

    Of a call of the attention function, queries and new keys are kept. Scores and pattern are computed from these, by
    the model's own eager function, when they are looked up.

    Args:
        points: What is kept, by name.
        rows: Rows of the input.
    """

    def __init__(self, points: Mapping[str, HookPoint], rows: int) -> None:
        super().__init__(rows)
        self._points = points
        self._places = {point.place.key: point.place for point in points.values()}
        self._places.update({name: point.place for name, point in points.items()})
        self._forwards = 0
        self._start = self._end = self._length = 0
        self._pieces: dict[str, dict[int, _Piece]] = {}
        self._shells: dict[str, dict[int, _Shell]] = {}

    @contextlib.contextmanager
    def following(self, model: nn.Module, is_paused: Callable[[], bool], keywords: Mapping[str, Any]) -> Iterator[None]:
        """While the context is open, keeps the model's forwards apart.

        Args:
            model: The model.
            is_paused: Asked at each forward: True leaves it out, since it belongs to another run.
            keywords: What each forward is given, whatever `generate` gives it: some models set keywords themselves.
        """

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
            if is_paused():
                return None
            ids = primary_input(args, kwargs)
            assert len(ids) == self._rows, "a generation that multiplies rows is refused before it starts"
            past = kv_cache_in(kwargs)  # which a model that keeps no keys and values leaves empty
            self._next_forward(ids.shape[1], starts_over=past is None or is_empty(past))
            return (args, {**kwargs, **keywords}) if keywords else None

        handle = before(model, enter)
        try:
            yield
        finally:
            handle.remove()

    def _next_forward(self, length: int, *, starts_over: bool) -> None:
        self._end_forward()
        self._called.clear()
        if starts_over:
            self._pieces.clear()
            self._shells.clear()
            self._forwards = self._end = 0
        self._start, self._end = self._end, self._end + length
        self._positions = length

    def _end_forward(self) -> None:
        """Makes pieces of what the forward kept."""
        if self._end == self._start:
            return
        for path, call in self._calls.items():
            self._take_apart(path, call)
        for kept in (self._raw, self.values):
            for key, tensor in kept.items():
                own, version = self._own(self._places[key], tensor), self._versions.get(key)
                piece = _Piece(own, version if own is tensor else None, self._end)
                self._pieces.setdefault(key, {})[self._forwards] = piece
            kept.clear()  # in place: the torch hooks hold it
        self._calls.clear()
        self._versions.clear()
        self._forwards += 1

    def _take_apart(self, path: str, call: AttentionCall) -> None:
        """Keeps what was asked for of a call, or what is needed to compute it."""
        has_square = any(f"{path}:{side}" in self._places for side in (Side.SCORES, Side.PATTERN))
        for side, tensor in ((Side.QUERY, call.query), (Side.KEY, call.key)):
            place = Place(path, side, layout=Layout.HEADS_FIRST)
            if has_square or place.key in self._places:
                self._places[place.key] = place
                self._raw[place.key] = as_tokens(tensor, place.layout, self._rows)
        if has_square:
            self._shells.setdefault(path, {})[self._forwards] = _Shell.of(call, self._end)

    def _own(self, place: Place, tensor: Tensor) -> Tensor:
        """Returns a tensor's part for the forward's own positions."""
        if place.layout.is_square:
            # A KV cache of fixed length has empty keys after the real ones.
            return tensor[..., : self._end].clone() if tensor.shape[-1] > self._end else tensor
        length, shown = self._end - self._start, tensor.shape[place.pos_dim]
        if shown == length and place.side not in (Side.KEY, Side.VALUE):
            return tensor
        # Keys of a KV cache of fixed length lie where their positions are, and are overwritten later.
        start = self._start if shown > self._end else shown - length
        return tensor.narrow(place.pos_dim, start, length).clone()

    def close(self, length: int) -> None:
        """Ends the recording.

        Args:
            length: Positions of the sequence. A generation that checks one step late whether it is over has run more.
        """
        self._end_forward()
        self._length = length
        for name in [name for name in self._pieces if name in self._points]:
            self._keep_joined(self.values, name, self._with_unedited(self._points[name]))
            del self._pieces[name]

    def _with_unedited(self, point: HookPoint) -> dict[int, _Piece]:
        """Returns a point's values in all forwards; where none was kept, it is computed from the raw tensor."""
        pieces = self._pieces[point.name]
        for forward, piece in self._pieces.get(point.place.key, {}).items():
            if forward not in pieces:
                with torch.no_grad():
                    value = read(point.access, piece.tensor, self._rows, {})
                pieces[forward] = _Piece(value, None, piece.end)
        return {forward: pieces[forward] for forward in sorted(pieces)}

    def raw(self, place: Place) -> Tensor:
        """Returns the raw tensor of a place, rows and positions first."""
        if place.key not in self._raw:
            pieces = self._pieces.get(place.key) or self._squares(place)
            self._keep_joined(self._raw, place.key, pieces)
            if place.owner not in self._shells:
                self._pieces.pop(place.key, None)
        return self._raw[place.key]

    def _squares(self, place: Place) -> dict[int, _Piece]:
        """Returns a layer's scores or pattern in all forwards."""
        queries, keys = self._pieces[f"{place.owner}:{Side.QUERY}"], self._pieces[f"{place.owner}:{Side.KEY}"]
        all_keys = torch.cat([piece.tensor for piece in keys.values()], 1).transpose(1, 2)
        pieces = {}
        for forward, shell in self._shells[place.owner].items():
            query = queries[forward]
            call = shell.filled(query.tensor.transpose(1, 2), all_keys[:, :, query.end - shell.n_keys : query.end])
            with torch.no_grad():
                scores, pattern = self._computed(call)
            pieces[forward] = _Piece(scores if place.side is Side.SCORES else pattern, None, query.end)
        return pieces

    def _keep_joined(self, kept: dict[str, Tensor], key: str, pieces: Mapping[int, _Piece]) -> None:
        place = self._places[key]
        tensors = [piece.tensor for piece in pieces.values()]
        if place.layout.is_square:
            fill = least_score(tensors[0].dtype) if place.side is Side.SCORES else 0.0
            tensors = [_among_all_keys(piece, self._end, fill)[..., : self._length] for piece in pieces.values()]
        joined = torch.cat(tensors, place.pos_dim)
        self._keep(kept, key, joined.narrow(place.pos_dim, 0, self._length), place.pos_dim)

    def has(self, point: HookPoint) -> bool:
        """Whether every forward kept the point's value, or something to compute it from."""
        place = point.place
        is_square = place.layout.is_square and place.owner in self._shells
        pieces = self._shells[place.owner] if is_square else self._pieces.get(place.key, ())
        return len(pieces) == self._forwards or super().has(point)

    def was_edited(self, key: str) -> bool:
        """Whether the storage of what is kept under a place's key or a point's name was written since."""
        if key in self._raw or key in self.values:
            return super().was_edited(key)
        path = key.rpartition(":")[0]
        keys = [key] if key in self._pieces else [f"{path}:{side}" for side in (Side.QUERY, Side.KEY)]
        pieces = [piece for key in keys for piece in self._pieces[key].values()]
        return any(piece.version is not None and piece.tensor._version != piece.version for piece in pieces)

    def is_deferred(self, place: Place) -> bool:
        """Whether a place's raw tensor has still to be computed."""
        return place.layout.is_square and place.owner in self._shells and place.key not in self._raw

    def length(self, point: HookPoint) -> int:
        """Returns how many positions the sequence has."""
        return self._length

    def n_keys(self, point: HookPoint) -> int:
        """Returns how many keys the sequence has: as many as positions."""
        return self._length

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from super()._named()
        for key, pieces in self._pieces.items():
            yield from ((key, piece.tensor) for piece in pieces.values())
        for path, shells in self._shells.items():
            for shell in shells.values():
                yield from ((f"{path}:{name}", tensor) for name, tensor in shell.call.tensors().items())

    def moved(self, there: Relocation) -> Self:
        """As in a recording of one forward."""
        new = super().moved(there)
        new._pieces = {
            key: {forward: piece.to(there) for forward, piece in pieces.items()} for key, pieces in self._pieces.items()
        }
        new._shells = {
            path: {forward: replace(shell, call=shell.call.to(there)) for forward, shell in shells.items()}
            for path, shells in self._shells.items()
        }
        return new

    def contents(self) -> Contents:
        """Returns what is kept, joined; this computes scores and patterns."""
        shown = [point for name, point in self._points.items() if name not in self.values and self.has(point)]
        return Contents({point.place.key: self.raw(point.place) for point in shown}, self.values, {}, self.autocast)


def _among_all_keys(piece: _Piece, length: int, fill: float) -> Tensor:
    """Returns a forward's scores or pattern over all keys of the sequence; keys that it did not see have `fill`.

    It saw the last keys up to its own: all of them, or those in a sliding window.
    """
    before = piece.end - piece.tensor.shape[-1]
    return pad(piece.tensor, (before, length - piece.end), value=fill)
