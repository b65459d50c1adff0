"""Which of torch's kernels of attention a run may use."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_LOCK = threading.Lock()
_BEFORE: list[bool] = []
"""For each run under way that goes without planned kernels, whether they were allowed before the first of them."""


@contextlib.contextmanager
def unplanned(device: torch.device) -> Iterator[None]:
    """While the context is open, attention on a device is computed by kernels that need no plan for each shape.

    cuDNN makes a plan for each shape that it has not met, which takes longer than many runs of that shape, and the
    batches of a sweep have a new shape at each layer. The setting is the process's: meanwhile other threads get another
    fused kernel too, whose numbers differ by rounding. To be opened within a run, where no interrupt can come between.

    Args:
        device: Where the run is.
    """
    if device.type != "cuda":
        yield
        return
    with _LOCK:
        _BEFORE.append(_BEFORE[0] if _BEFORE else torch.backends.cuda.cudnn_sdp_enabled())
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        with _LOCK:
            before = _BEFORE.pop()
            if not _BEFORE:
                torch.backends.cuda.enable_cudnn_sdp(before)
