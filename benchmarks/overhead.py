"""What the bridge costs: each task as a ratio to the plain Hugging Face forward, paired in one run.

    python benchmarks/overhead.py [--pairs 151] [--threads 2]

Random-weight GPTBigCode, 12 layers: d_model 64 on 1x16 tokens, where Python costs most, and d_model 768 on 4x128. Each
figure is the median of the ratios of alternating runs. "Plain hooks" is a hand-written loop of torch hooks that keeps
the same raw tensors as the cache does; "with patterns" runs it under eager attention, whose outputs hold the patterns.
The cache computes scores and patterns when they are looked up, which the last rows time for one layer and for all.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

import clearspan

SIZES = {64: (1, 16), 768: (4, 128)}
LAYERS = 12


def build(d_model: int) -> GPTBigCodeForCausalLM:
    """Returns a random-weight model."""
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=8192,
        n_positions=512,
        n_embd=d_model,
        n_layer=LAYERS,
        n_head=max(1, d_model // 64) if d_model > 64 else 4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTBigCodeForCausalLM(config).eval()


def plain_hooks(model: GPTBigCodeForCausalLM, tokens: torch.Tensor) -> dict[Any, Any]:
    """Keeps the input and output of every module that the cache keeps, and attention's patterns, by torch hooks."""
    kept: dict[Any, Any] = {}

    def both(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept[name, 0] = args[0]
            kept[name, 1] = output

        return hook

    handles = []
    for name, module in model.named_modules():
        is_leaf = isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding)
        if is_leaf or name.endswith((".attn", ".mlp")) or type(module).__name__ == "GPTBigCodeBlock":
            handles.append(module.register_forward_hook(both(name)))
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def residual_hooks(model: GPTBigCodeForCausalLM, tokens: torch.Tensor) -> dict[int, Any]:
    """Keeps every block's output by torch hooks."""
    kept: dict[int, Any] = {}
    handles = [
        block.register_forward_hook(lambda _, __, output, layer=layer: kept.__setitem__(layer, output))
        for layer, block in enumerate(model.transformer.h)
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def ratio(task: Callable[[], object], base: Callable[[], object], pairs: int) -> tuple[float, float]:
    """Returns the median of paired ratios, and the base's median in milliseconds."""
    for _ in range(5):
        task()
        base()
    ratios, times = [], []
    for index in range(pairs):
        first, second = (task, base) if index % 2 else (base, task)
        start = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        end = time.perf_counter()
        a, b = middle - start, end - middle
        ratios.append(a / b if index % 2 else b / a)
        times.append(b if index % 2 else a)
    return statistics.median(ratios), statistics.median(times) * 1e3


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description="Measures what the bridge costs.")
    parser.add_argument("--pairs", type=int, default=151)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", type=int, choices=SIZES, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, clearspan {clearspan.__version__}")
    for d_model, (batch, length) in SIZES.items():
        if arguments.only in (None, d_model):
            pairs = arguments.pairs if d_model == 64 else max(15, arguments.pairs // 5)
            measure(d_model, batch, length, pairs)


def measure(d_model: int, batch: int, length: int, pairs: int) -> None:
    """Prints one size's rows."""
    model = build(d_model)
    bridge = clearspan.boot(model)
    eager = build(d_model)
    eager.set_attn_implementation("eager")
    tokens = torch.randint(1, 8192, (batch, length))
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    prompt = tokens[:, :16]
    generator: Any = model
    one_pattern = [("blocks.5.attn.hook_pattern", lambda value, hook: None)]
    mask = torch.ones_like(prompt)

    def base() -> object:
        return model(tokens, use_cache=False)

    def everything() -> clearspan.ActivationCache:
        return bridge.run_with_cache(tokens)[1]

    def all_patterns() -> object:
        cache = everything()
        return [cache["pattern", layer] for layer in range(LAYERS)]

    rows: list[tuple[str, Callable[[], object], Callable[[], object], int]] = [
        ("hf_model again (noise)", base, base, pairs),
        ("forward, nothing listening", lambda: bridge(tokens), base, pairs),
        ("listen to one pattern", lambda: bridge.run_with_hooks(tokens, fwd_hooks=one_pattern), base, pairs),
        ("cache all hook_resid_post", lambda: bridge.run_with_cache(tokens, names), base, pairs),
        ("  plain hooks, the same", lambda: residual_hooks(model, tokens), base, pairs),
        ("cache everything", everything, base, pairs),
        ("  plain hooks, the same", lambda: plain_hooks(model, tokens), base, pairs),
        ("  cache everything / plain hooks", everything, lambda: plain_hooks(model, tokens), pairs),
        ("cache everything, look up a pattern", lambda: everything()["pattern", 5], base, pairs),
        ("cache everything, look up all patterns", all_patterns, base, pairs),
        ("  plain hooks with patterns", lambda: plain_hooks(eager, tokens), base, pairs),
        (
            "generate 16 tokens, greedy",
            lambda: bridge.generate(prompt, **options),
            lambda: generator.generate(prompt, attention_mask=mask, **options),
            max(15, pairs // 5),
        ),
    ]  # fmt: skip
    print(f"\nd_model {d_model}, {batch}x{length} tokens, {pairs} pairs")
    with torch.inference_mode():
        for label, task, against, count in rows:
            value, milliseconds = ratio(task, against, count)
            print(f"  {label:36} {value:6.3f} x   of {milliseconds:8.2f} ms", flush=True)


if __name__ == "__main__":
    main()
