"""Random interchange examples for models of the zoo, and what their runs are by plain hooks on rows alone."""

import torch

from clearspan.analysis import InterchangeExamples


def random_pairs(rows=5, places=2, padded=False, answers=None, seed=0):
    """Returns random pairs; with padding on either side of bases and on the right of sources."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(1, 97, (rows, 7), generator=generator)
    source = torch.randint(1, 97, (rows, 6), generator=generator)
    masks = {}
    if padded:
        masks = {"base_mask": torch.ones_like(base), "source_mask": torch.ones_like(source)}
        masks["base_mask"][1, :2] = masks["base_mask"][3, :3] = masks["base_mask"][4, 5:] = 0
        masks["source_mask"][0, 4:] = masks["source_mask"][3, 3:] = 0
    # Three positions are real in every row.
    at = [torch.stack([torch.randperm(3, generator=generator)[:places] for _ in range(rows)]) for _ in range(2)]
    at[0][::2] -= 3  # from the end, in every other row
    among = torch.arange(1, 97) if answers is None else torch.tensor(answers)
    labels = among[torch.randint(len(among), (rows,), generator=generator)]
    return InterchangeExamples(base, source, labels, *at, answers=answers, **masks)


def rows_alone(examples):
    """Yields each pair without its padding: tokens of base and source, and positions from 0."""
    for row in range(len(examples)):
        found = []
        for side in ("base", "source"):
            tokens, mask = getattr(examples, side)[row], getattr(examples, f"{side}_mask")
            real = tokens if mask is None else tokens[mask[row].bool()]
            found += [real[None], getattr(examples, f"{side}_positions")[row] % len(real)]
        yield found


def answer_logits(bridge, examples, name, exchange):
    """Returns the logits after each base's last token, each row a whole run of its own with a plain hook.

    `exchange(base, source)` is given values `[place, *axes]`.
    """
    found = []
    for base, base_at, source, source_at in rows_alone(examples):
        with torch.no_grad():
            _, cache = bridge.run_with_cache(source, names_filter=name)
        taken = cache[name][0, source_at]

        def write(value, hook, base_at=base_at, taken=taken):
            value[0, base_at] = exchange(value[0, base_at], taken).to(value.dtype)

        found.append(bridge.run_with_hooks(base, fwd_hooks=[(name, write)])[0, -1])
    logits = torch.stack(found)
    return logits if examples.answers is None else logits[:, list(examples.answers)]
