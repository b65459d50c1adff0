"""A ring of buffers: a stream of tensors that leave an accelerator, in order, without filling memory."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from clearspan.checks import check_counts, check_kind
from clearspan.errors import InvalidArgumentError
from clearspan.interrupts import let_through
from clearspan.transfers.side_streams import SIDE_STREAMS, WITH_STREAMS, Sent, SideStreams

Label = TypeVar("Label")


@dataclass(frozen=True, eq=False)
class Parcel(Generic[Label]):
    """A tensor that arrived on the CPU.

    Attributes:
        label: What the sender called it.
        tensor: The tensor. It lies in a buffer of the ring, which is filled anew once the next parcel is asked for.
    """

    label: Label
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class _Shipment(Generic[Label]):
    """A parcel on its way, and the buffer that it lies in."""

    parcel: Parcel[Label]
    sent: Sent
    buffer: Tensor


class Ring(Generic[Label]):
    """Hands tensors to a consumer in another thread, in the order in which they were put in; none is dropped.

    A tensor is copied into a buffer of pinned memory, beside the computation. While all buffers are full, `put` waits
    until the consumer is done with the oldest. Leaving the context waits until the consumer has returned, and drops the
    buffers.

    What the consumer raises, `put` and the end of the context raise. What the context's body raises, the consumer's
    iterator raises after the last parcel that was put in, so that the consumer can tell a whole stream from a part.

    Args:
        consume: Given an iterator of parcels, in a thread of the ring. Asking for a parcel gives back the buffer of the
            one before it.
        slots: How many buffers.
        slot_bytes: Bytes of a buffer.
        streams: What sends the tensors.

    Raises:
        InvalidArgumentError: No buffers, buffers of no bytes, or no function.

    Example:
        >>> import torch
        >>> def add_up(parcels):
        ...     for parcel in parcels:
        ...         sums[parcel.label] = parcel.tensor.sum().item()
        >>> sums = {}
        >>> with Ring(add_up, slots=2, slot_bytes=4096) as ring:
        ...     for layer in range(3):
        ...         ring.put(torch.full((2, 5), layer), label=layer)
        >>> sums
        {0: 0, 1: 10, 2: 20}
    """

    def __init__(
        self,
        consume: Callable[[Iterator[Parcel[Label]]], object],
        slots: int,
        slot_bytes: int,
        streams: SideStreams = SIDE_STREAMS,
    ) -> None:
        check_counts(slots=slots, slot_bytes=slot_bytes)
        if not callable(consume):
            raise InvalidArgumentError(f"consume={consume!r}"[:80], expected="a function of an iterator of parcels")
        self.slot_bytes = slot_bytes
        self._consume = consume
        self._streams = streams
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        pins = accelerator is not None and accelerator.type in WITH_STREAMS
        with torch.inference_mode(False):
            buffers = [torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=pins) for _ in range(slots)]
        self._free: deque[Tensor] = deque(buffers)
        self._shipped: deque[_Shipment[Label]] = deque()
        self._changed = threading.Condition()
        self._is_closed = self._has_ended = False
        self._broken_off: BaseException | None = None
        self._failure: BaseException | None = None
        # A daemon, so that a ring left open does not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._run, name="clearspan-ring", daemon=True)
        self._thread.start()

    def put(self, tensor: Tensor, label: Label) -> None:
        """Sends the values that a tensor has now; waits while all buffers are full.

        Args:
            tensor: The tensor, of at most `slot_bytes`.
            label: Given to the consumer with it.

        Raises:
            InvalidArgumentError: It is no tensor or too large, the ring is closed, or the consumer returned early.
            BaseException: What the consumer raised.
        """
        check_kind(Tensor, tensor=tensor)
        if tensor.nbytes > self.slot_bytes:
            raise InvalidArgumentError(
                "the tensor is larger than a buffer of the ring",
                expected=f"at most {self.slot_bytes} bytes",
                got=f"{tensor.nbytes} bytes, {list(tensor.shape)} of {tensor.dtype}",
                fix=f"Ring(..., slot_bytes={tensor.nbytes})",
            )
        with self._changed:
            let_through(self._changed.wait_for, lambda: self._free or self._has_ended or self._is_closed)
            self._check_goes_on()
            buffer = self._free[0]
            with torch.inference_mode(False):  # else the consumer could not write into it
                there = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            snapshot = tensor.detach().clone(memory_format=torch.contiguous_format)
            sent = self._streams.send(snapshot, there)
            self._free.popleft()
            self._shipped.append(_Shipment(Parcel(label, there), sent, buffer))
            self._changed.notify_all()

    def _check_goes_on(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_closed:
            raise InvalidArgumentError("the ring is closed", fix="put tensors in inside of `with Ring(...) as ring:`")
        if self._has_ended:
            raise _returned_early()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._is_closed, self._broken_off = True, error
            self._changed.notify_all()
        let_through(self._thread.join)
        left, failure = len(self._shipped), self._failure
        self._free.clear()
        self._shipped.clear()
        if error is not None:
            if failure is not None and failure is not error:
                error.add_note(f"The consumer of the ring raised {failure!r}.")
        elif failure is not None:
            raise failure
        elif left:
            raise _returned_early()

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self._consume(self._parcels())
        except BaseException as error:  # noqa: BLE001 - it is raised where tensors are put in
            failure = error
        with self._changed:
            self._failure, self._has_ended = failure, True
            self._changed.notify_all()

    def _parcels(self) -> Iterator[Parcel[Label]]:
        while (arrived := self._next()) is not None:
            parcel, buffer = arrived
            yield parcel
            with self._changed:
                self._free.append(buffer)
                self._changed.notify_all()
        if self._broken_off is not None:
            raise self._broken_off

    def _next(self) -> tuple[Parcel[Label], Tensor] | None:
        """Returns the next parcel when it has arrived, and its buffer; None after the last one."""
        with self._changed:
            self._changed.wait_for(lambda: self._shipped or self._is_closed)
            if not self._shipped:
                return None
            shipment = self._shipped.popleft()
        shipment.sent.wait()
        return shipment.parcel, shipment.buffer


def _returned_early() -> InvalidArgumentError:
    return InvalidArgumentError(
        "the consumer of a ring returned before its last parcel",
        reason="what was put in after that would be lost",
        fix="for parcel in parcels: ..., to the end",
    )
