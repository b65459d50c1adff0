"""Random interchange examples for models of the zoo, and what their runs are by plain hooks on rows alone."""

import torch

from clearspan.analysis import InterchangeExamples
from clearspan.inputs import Batch


def random_pairs(rows=5, places=2, padded=False, answers=None, seed=0, hole=False):
    """Returns random pairs; with padding on either side of bases and on the right of sources, and a hole in one."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(1, 97, (rows, 7), generator=generator)
    source = torch.randint(1, 97, (rows, 6), generator=generator)
    masks = [None, None]
    if padded:
        masks = [torch.ones_like(base), torch.ones_like(source)]
        masks[0][1, :2] = masks[0][3, :3] = masks[0][4, 5:] = 0
        masks[1][0, 4:] = masks[1][3, 3:] = 0
        if hole:
            masks[0][2, 3] = masks[1][1, 2:4] = 0
    # Three positions are real in every row.
    at = [torch.stack([torch.randperm(3, generator=generator)[:places] for _ in range(rows)]) for _ in range(2)]
    at[0][::2] -= 3  # from the end, in every other row
    among = torch.arange(1, 97) if answers is None else torch.tensor(answers)
    labels = among[torch.randint(len(among), (rows,), generator=generator)]
    batches = [Batch(tokens, mask) for tokens, mask in zip((base, source), masks, strict=True)]
    return InterchangeExamples(*batches, labels, *(one.tolist() for one in at), answers)


def rows_alone(examples):
    """Yields each pair without its padding: tokens of base and source, and positions from 0."""
    for row in range(len(examples)):
        found = []
        for batch, places in ((examples.base, examples.written), (examples.source, examples.read)):
            tokens = batch.ids[row]
            real = tokens if batch.mask is None else tokens[batch.mask[row].bool()]
            found += [real[None], list(places[row])]
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


def within(basis):
    """Returns the exchange of what lies in a subspace of values `[place, *axes]`, flattened."""

    def exchange(base, source):
        change = (source - base).flatten(1)
        return base + (change @ basis @ basis.T).view_as(base)

    return exchange


def whole(base, source):
    """Returns the source's values."""
    return source


def random_basis(width, dimensions, seed=0, dtype=torch.float32):
    free = torch.randn(width, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(free).Q.to(dtype)
