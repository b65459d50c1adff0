"""What booting and processing take in memory: the growth of a process' peak.

    python benchmarks/memory.py      # on Linux

Random-weight GPTBigCode, 12 layers, d_model 768, vocabulary 8,192, saved to a temporary folder. Each way runs in a
process of its own; the imports are the same in all.
"""

import subprocess
import sys
import tempfile

from overhead import build

CODE = """
import torch, transformers, clearspan.bridge

def status(entry):
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith(entry)).split()[1]) / 1024

def run(model):
    with torch.inference_mode():
        model(torch.ones(1, 4, dtype=torch.long), use_cache=False)  # reads every weight, so that mapped files count

"""
LOADING = """
start = status("VmHWM")
{load}
run(model)
print(status("VmHWM") - start, sum(parameter.nbytes for parameter in model.parameters()) / 2**20)
"""
PROCESSING = """
bridge = clearspan.bridge.boot({folder!r})
run(bridge.hf_model)
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # has the peak start anew
start = status("VmRSS")
new = bridge.processed({steps})
old = {{id(parameter) for parameter in bridge.hf_model.parameters()}}
changed = sum(parameter.nbytes for parameter in new.hf_model.parameters() if id(parameter) not in old) / 2**20
print(status("VmHWM") - start, changed)
"""
LOADS = {
    "from_pretrained": "model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})",
    "clearspan.boot": "bridge = clearspan.bridge.boot({folder!r}); model = bridge.hf_model",
}
STEPS = {
    "processed()": "",
    "fold_ln alone": "center_writing_weights=False, center_unembed=False, fold_value_biases=False",
    "center_unembed alone": "fold_ln=False, center_writing_weights=False, fold_value_biases=False",
    "refactored too": "refactor_factored_attn_matrices=None",
}


def measured(code: str) -> tuple[float, float]:
    """Returns the two numbers that a process prints."""
    done = subprocess.run([sys.executable, "-c", CODE + code], check=True, capture_output=True, text=True)
    grown, size = map(float, done.stdout.split())
    return grown, size


def main() -> None:
    """Prints the growth of each process."""
    with tempfile.TemporaryDirectory() as folder:
        build(768).save_pretrained(folder)
        for name, load in LOADS.items():
            grown, parameters = measured(LOADING.format(load=load.format(folder=folder)))
            print(f"{name:20} {grown:7.1f} MiB more at the peak, for {parameters:.1f} MiB of parameters")
        for name, steps in STEPS.items():
            grown, changed = measured(PROCESSING.format(folder=folder, steps=steps))
            print(f"{name:20} {grown:7.1f} MiB more at the peak, for {changed:.1f} MiB of changed parameters")


if __name__ == "__main__":
    main()
