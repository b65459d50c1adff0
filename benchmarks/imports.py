"""How long imports take, each in a process of its own, alternating: medians, and the ratio to `import torch`.

python benchmarks/imports.py [--runs 15]
"""

import argparse
import statistics
import subprocess
import sys
import time

STATEMENTS = ("import torch", "import clearspan", "from clearspan import boot", "import transformers")


def seconds(statement: str) -> float:
    """Returns the wall-clock time of a new interpreter that runs the statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description="Measures imports.")
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for _ in range(runs):
        for statement in STATEMENTS:
            times[statement].append(seconds(statement))
    base = times["import torch"]
    for statement, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, base, strict=True))
        print(f"{statement:28} {statistics.median(taken):6.2f} s  {ratio:5.2f} x import torch")


if __name__ == "__main__":
    main()
