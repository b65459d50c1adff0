"""What loading and processing take: the growth of a process' peak, and the time of loading.

    python benchmarks/memory.py      # on Linux

Random-weight GPTBigCode, 12 layers, d_model 768, vocabulary 8,192, saved to a temporary folder. Each way runs in a
process of its own; the imports are made before. A forward follows loading, which reads every weight, so that mapped
files count.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from libraries import Clearspan, Library, Transformers
from reference import build, save

CODE = """
import time
import torch
import transformers
from hand_written import inputs_of
from libraries import Inputs

transformers.logging.disable_progress_bar()

def status(entry):
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith(entry)).split()[1]) / 1024

tokens = torch.ones(1, 4, dtype=torch.long)
given = Inputs(tokens, tokens, 1, tokens, [], [])
"""
LOADING = """
from {module} import {name}
before, start = status("VmHWM"), time.perf_counter()
library = {name}({folder!r})
seconds = time.perf_counter() - start
with torch.inference_mode():
    library.tasks(given)["forward"]()
print(status("VmHWM") - before, seconds)
"""
PROCESSING = """
import clearspan.bridge
bridge = clearspan.bridge.boot({folder!r})
bridge(tokens)
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # has the peak start anew
before = status("VmRSS")
new = bridge.processed({steps})
old = {{id(parameter) for parameter in bridge.hf_model.parameters()}}
changed = sum(parameter.nbytes for parameter in new.hf_model.parameters() if id(parameter) not in old) / 2**20
print(status("VmHWM") - before, changed)
"""
STEPS = {
    "processed()": "",
    "fold_ln alone": "center_writing_weights=False, center_unembed=False, fold_value_biases=False",
    "center_unembed alone": "fold_ln=False, center_writing_weights=False, fold_value_biases=False",
    "refactored too": "refactor_factored_attn_matrices=None",
}


@dataclass(frozen=True)
class Loading:
    """What loading took.

    Attributes:
        mebibytes: By which the peak grew.
        seconds: Until the library had the model.
    """

    mebibytes: float
    seconds: float


def loading(library: type[Library], folder: str) -> Loading:
    """Returns what a library takes to load a model, in a process of its own."""
    code = LOADING.format(module=library.__module__, name=library.__name__, folder=folder)
    return Loading(*measured(code))


def measured(code: str) -> tuple[float, float]:
    """Returns the two numbers that a process prints in its last line."""
    command, where = [sys.executable, "-c", CODE + code], Path(__file__).parent
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=where)
    first, second = map(float, done.stdout.splitlines()[-1].split())
    return first, second


def main() -> None:
    """Prints the growth of each process."""
    with tempfile.TemporaryDirectory() as folder:
        model = build("gpt-bigcode").model
        save(model, folder)
        parameters = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
        for library in (Transformers, Clearspan):
            found = loading(library, folder)
            print(
                f"{library.name:20} {found.mebibytes:7.1f} MiB more at the peak, for {parameters:.1f} MiB of "
                f"parameters, in {found.seconds:.2f} s"
            )
        for name, steps in STEPS.items():
            grown, changed = measured(PROCESSING.format(folder=folder, steps=steps))
            print(f"{name:20} {grown:7.1f} MiB more at the peak, for {changed:.1f} MiB of changed parameters")


if __name__ == "__main__":
    main()
