"""Bytes that are free on a device, and how sizes are written in tables."""

from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path("/")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def free_bytes(device: torch.device) -> int | None:
    """Returns the bytes that tensors on a device can still take, or None where that cannot be known.

    On CUDA it is what the device has free and what torch has set aside there and does not use. On Linux's CPU it is
    what the system has available, with swap, within the memory limits of the process's control groups.
    """
    match device.type:
        case "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        case "cpu":
            return min([*_of_system(ROOT), *_of_control_groups(ROOT)], default=None)
    return None


def _of_system(root: Path) -> Iterator[int]:
    path = root / "proc/meminfo"
    if path.exists():
        sizes = {
            name: int(rest.split()[0])
            for name, _, rest in (line.partition(":") for line in path.read_text().splitlines())
        }
        yield 1024 * (sizes["MemAvailable"] + sizes["SwapFree"])


def _of_control_groups(root: Path) -> Iterator[int]:
    """Yields what the process's control group (version 2) and those around it leave free, where they have a limit."""
    path = root / "proc/self/cgroup"
    lines = path.read_text().splitlines() if path.exists() else []
    tree = root / "sys/fs/cgroup"
    for group in (tree / line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
        for folder in (group, *group.parents):
            limit = folder / "memory.max"
            if limit.exists() and (most := limit.read_text().strip()) != "max":
                used = int((folder / "memory.current").read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                idle = int(stat["inactive_file"])  # of files that were read, and given up when memory is wanted
                yield max(0, int(most) - used + idle)


def bytes_as_text(count: float) -> str:
    """Returns a number of bytes in the unit in which it is easy to read.

    Example:
        >>> bytes_as_text(3 * 2**20)
        '3.0 MiB'
    """
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:z.0f} {unit}" if unit == "B" else f"{count:z.1f} {unit}"
        count /= 1024
    return f"{count:z.1f} {UNITS[-1]}"
