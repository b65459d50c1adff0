"""Transfers: tensors leave an accelerator on streams beside those that compute, and the computation does not wait.

A cache on the CPU is made of copies that belong to the user, and all of them are complete when the run returns
(`Outbound`). They lie in `PINNED` memory, as far as its limit allows. A `Ring` hands a stream of tensors through a
fixed number of buffers to a consumer in another thread.

What follows what, for each tensor, on the device that it is on (each device has a side stream of its own):

1. The stream that computes has made the tensor. On the same stream a snapshot is made of it, so that what the model
   writes into the tensor later is not copied.
2. The side stream waits, on the device, for what the computing stream was given until now.
3. The side stream copies the snapshot into memory of the CPU. Memory that is pinned is filled while the computation
   goes on; for ordinary memory this call waits until the copy is complete.
4. An event is recorded on the side stream, behind the copy.
5. The snapshot is kept until the CPU has seen the event pass. So its memory cannot be given to another tensor earlier,
   and `Tensor.record_stream`, which would hold it back until all later copies are done too, is not needed.
6. The CPU waits for the event before anyone may read the copy.

If a run is broken off, nothing is waited for: snapshots and copies are dropped, and torch gives a pinned block out
again only when the side stream is past it.
"""

from clearspan.transfers.host_memory import PINNED, PINNED_BYTES, HostMemory
from clearspan.transfers.inbound import numbers_on as numbers_on
from clearspan.transfers.inbound import on_device as on_device
from clearspan.transfers.outbound import IN_FLIGHT_BYTES as IN_FLIGHT_BYTES
from clearspan.transfers.outbound import Outbound as Outbound
from clearspan.transfers.outbound import on_cpu as on_cpu
from clearspan.transfers.ring import Parcel, Ring
from clearspan.transfers.side_streams import SIDE_STREAMS as SIDE_STREAMS
from clearspan.transfers.side_streams import WITH_STREAMS as WITH_STREAMS
from clearspan.transfers.side_streams import Sent as Sent
from clearspan.transfers.side_streams import SideStreams as SideStreams

__all__ = ["PINNED", "PINNED_BYTES", "HostMemory", "Parcel", "Ring"]
