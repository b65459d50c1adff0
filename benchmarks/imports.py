"""How long imports take, each in a process of its own, alternating: medians, and the ratio to `import torch`.

python benchmarks/imports.py [--rounds 15]
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

from timing import Times, timed

BASE = "import torch"
STATEMENTS = (BASE, "import clearspan", "from clearspan import boot", "import transformers")


def run(statement: str) -> None:
    """Runs a statement in a new interpreter."""
    subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)


def times_of_imports(statements: Sequence[str], rounds: int) -> Times:
    """Returns the wall-clock times of new interpreters that run each statement."""
    return timed({statement: partial(run, statement) for statement in statements}, rounds)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description="Measures imports.")
    parser.add_argument("--rounds", type=int, default=15)
    times = times_of_imports(STATEMENTS, parser.parse_args().rounds)
    for statement in STATEMENTS:
        print(f"{statement:28} {times.median(statement):6.2f} s  {times.ratio(statement, BASE):5.2f} x {BASE}")


if __name__ == "__main__":
    main()
