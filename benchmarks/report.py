"""What benchmarks print: the machine, the versions, and tables in Markdown."""

import argparse
import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

import clearspan


def conditions(options: argparse.Namespace, *packages: str) -> str:
    """Returns what figures were measured on and with: the processor and the card, each in a line, and the versions."""
    threads = torch.get_num_threads()
    machine = f"{processor()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}, {options.clock} clock"
    cards = [card(options.device)] if torch.device(options.device).type == "cuda" else []
    return "\n".join([f"{machine}, {platform.system()}", *cards, versions(*packages)])


def versions(*packages: str) -> str:
    """Returns the versions of Python, CUDA where torch has it, and packages."""
    own = {module.__name__: module.__version__ for module in (torch, transformers, clearspan)}
    cuda = {"CUDA": torch.version.cuda} if torch.version.cuda else {}
    named = {"Python": platform.python_version(), **own, **cuda, **{name: version(name) for name in packages}}
    return ", ".join(f"{name} {number}" for name, number in named.items())


def card(device: str) -> str:
    """Returns the name of the device that a model is on."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()


def processor() -> str:
    """Returns the processor's name."""
    described = Path("/proc/cpuinfo")  # Linux's; elsewhere Python knows more
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown: the first column to the left, the others to the right."""
    return "\n".join(_lines([list(header), *map(list, rows)]))


def _lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "| " + " | ".join([first.strip().ljust(widths[0]), *others]) + " |"
        if number == 0:
            yield "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"


def seconds(value: float) -> str:
    """Returns a time with its unit."""
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"
