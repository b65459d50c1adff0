"""What booting takes in memory: the peak of a process that loads a checkpoint, with and without the bridge.

    python benchmarks/memory.py      # on Linux

Random-weight GPTBigCode, 12 layers, d_model 768, vocabulary 8,192, saved to a temporary folder. Each loading runs in a
process of its own; the imports are the same in both.
"""

import subprocess
import sys
import tempfile

from overhead import build

CODE = """
import torch, transformers, clearspan.bridge

def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024

start = peak()
{load}
with torch.inference_mode():
    model(torch.ones(1, 4, dtype=torch.long), use_cache=False)  # reads every weight, so that mapped files count
print(peak() - start, sum(parameter.nbytes for parameter in model.parameters()) / 2**20)
"""
WAYS = {
    "from_pretrained": "model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})",
    "clearspan.boot": "bridge = clearspan.bridge.boot({folder!r}); model = bridge.hf_model",
}


def main() -> None:
    """Prints the growth of each process."""
    with tempfile.TemporaryDirectory() as folder:
        build(768).save_pretrained(folder)
        for name, way in WAYS.items():
            code = CODE.format(load=way.format(folder=folder))
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            grown, parameters = map(float, done.stdout.split())
            print(f"{name:16} {grown:7.1f} MiB more at the peak, for {parameters:.1f} MiB of parameters")


if __name__ == "__main__":
    main()
