"""Trains `tiny-bigcode`, the model embedded in clearspan, on the Python standard library's own source.

    python training/train.py --out training/runs/tiny-bigcode

The seed fixes the tokenizer, the batches and the initial weights. Progress goes to `progress.jsonl` in the output
folder. `make train` sets the allocator so that freed blocks are kept, which makes a step on a CPU faster.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM, PreTrainedTokenizerFast

from corpus import Source, standard_library
from evaluate import bits_per_byte, induction_scores

BOS = "<|endoftext|>"
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 0
    vocab_size: int = 4096
    n_positions: int = 512
    d_model: int = 256
    n_layers: int = 5
    n_heads: int = 8
    tokens: int = 36_000_000
    batch: int = 16
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.02
    decay_share: float = 0.45
    repeat_share: float = 0.1

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // (self.batch * self.n_positions)

    def rate(self, step: int) -> float:
        """Factor on the learning rate: linear warm-up, constant, linear decay to zero."""
        progress = (step + 1) / self.steps
        return min(1.0, progress / self.warmup_share, (1 - progress) / self.decay_share + 1e-3)


def train_tokenizer(sources: list[Source], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer with single digits and `BOS` as id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[BOS], initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator((source.text for source in sources), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, sources: list[Source]) -> Tensor:
    """Returns all files as one row of ids, each after a `BOS`."""
    rows = tokenizer.encode_batch([source.text for source in sources])
    return torch.cat([torch.tensor([tokenizer.token_to_id(BOS), *row.ids]) for row in rows])


def batches(ids: Tensor, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields inputs and targets, `[batch, pos]`, at random offsets of the corpus.

    A share of the rows is a block of uniformly random tokens, repeated. What comes for the first time cannot be
    predicted there, so its targets are ignored.
    """
    generator = torch.Generator().manual_seed(recipe.seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    width = recipe.n_positions + 1
    for _ in range(recipe.steps):
        starts = torch.randint(0, len(ids) - width, (recipe.batch,), generator=generator)
        rows = torch.stack([ids[start : start + width] for start in starts])
        targets = rows.clone()
        for row in range(recipe.batch):
            if torch.rand((), generator=generator) < recipe.repeat_share:
                period = integer(8, width // 2)
                block = torch.randint(1, recipe.vocab_size, (period,), generator=generator)
                rows[row] = block.repeat(width // period + 1)[:width]
                rows[row, 0] = 0
                targets[row] = rows[row]
                targets[row, : period + 1] = IGNORED
        yield rows[:, :-1], targets[:, 1:]


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adam]


def new_model(recipe: Recipe) -> GPTBigCodeForCausalLM:
    """Returns the model with its initial weights."""
    torch.manual_seed(recipe.seed)
    config = GPTBigCodeConfig(
        vocab_size=recipe.vocab_size,
        n_positions=recipe.n_positions,
        n_embd=recipe.d_model,
        n_layer=recipe.n_layers,
        n_head=recipe.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPTBigCodeForCausalLM(config)


def train(model: GPTBigCodeForCausalLM, ids: Tensor, recipe: Recipe, out: Path, device: str) -> None:
    """Trains in place; writes progress, and a checkpoint every 500 steps."""
    nn.Module.to(model, device)
    model.train()
    steppers = optimizers(model, recipe)
    start, running = time.time(), 0.0
    with (out / "progress.jsonl").open("w") as log:
        for step, (inputs, targets) in enumerate(batches(ids, recipe)):
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = recipe.learning_rate * recipe.rate(step)
            with torch.autocast(device, torch.bfloat16):
                logits = model(inputs.to(device), use_cache=False).logits
            loss = nn.functional.cross_entropy(
                logits.float().flatten(0, 1), targets.to(device).flatten(), ignore_index=IGNORED
            )
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad()
            running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
            if step % 20 == 0 or step == recipe.steps - 1:
                seen = (step + 1) * inputs.numel()
                line = {"step": step, "tokens": seen, "loss": round(running, 4), "seconds": round(time.time() - start)}
                log.write(json.dumps(line) + "\n")
                log.flush()
            if step and step % 500 == 0:
                model.save_pretrained(out / "checkpoint")
    nn.Module.to(model, "cpu")
    model.eval()


def report(model: GPTBigCodeForCausalLM, tokenizer: Tokenizer, held_out: list[Source]) -> dict[str, float | str]:
    """Returns the figures of the model card."""
    scores = induction_scores(model)
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    return {
        "bits_per_byte": bits_per_byte(model, tokenizer, held_out, bos=0),
        "bits_per_byte_library": bits_per_byte(model, tokenizer, [s for s in held_out if not s.is_test], bos=0),
        "bits_per_byte_tests": bits_per_byte(model, tokenizer, [s for s in held_out if s.is_test], bos=0),
        "induction_score": scores.max().item(),
        "induction_head": f"{layer}.{head}",
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(s.text.encode()) for s in held_out),
    }


def save(model: GPTBigCodeForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes weights rounded to half precision (the config says float32, so they load as such) and the tokenizer."""
    model.half().save_pretrained(out)
    model.float()
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        model_max_length=model.config.n_positions,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)


def main() -> None:
    """Runs the recipe from the corpus to the saved model and its figures."""
    parser = argparse.ArgumentParser(description="Trains tiny-bigcode.")
    parser.add_argument("--out", type=Path, default=Path("training/runs/tiny-bigcode"))
    parser.add_argument("--tokens", type=int, default=Recipe.tokens)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    recipe, out = Recipe(tokens=arguments.tokens), arguments.out
    out.mkdir(parents=True, exist_ok=True)

    sources = standard_library()
    training = [source for source in sources if not source.held_out]
    held_out = [source for source in sources if source.held_out]
    tokenizer = train_tokenizer(training, recipe.vocab_size)
    ids = encode(tokenizer, training)
    print(f"{len(training)} training files, {len(ids):,} tokens; {len(held_out)} files held out", flush=True)

    model, start = new_model(recipe), time.time()
    train(model, ids, recipe, out, arguments.device)
    hours = (time.time() - start) / 3600
    save(model, tokenizer, out)
    figures = report(GPTBigCodeForCausalLM.from_pretrained(out), tokenizer, held_out)
    figures |= {
        "parameters": model.num_parameters(),
        "training_files": len(training),
        "training_tokens": len(ids),
        "epochs": recipe.tokens / len(ids),
        "hours": hours,
        "device": arguments.device,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    (out / "figures.json").write_text(json.dumps({"recipe": asdict(recipe), "figures": figures}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
