"""Attribution by autograd: a metric's gradient at points and inputs, and what a change there does to first order."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .changes import AXES
from .paths import Parts, Receiver, Sender, is_before, read_at, receivers_of, senders_of, set_to
from .reference import Edit, Reference, full_name
from .rows import Rows

Total = Callable[[Tensor], Tensor]
"""From logits to a number for each row."""


def slopes(
    reference: Reference, rows: Rows, total: Total, names: Sequence[str], edits: Sequence[Edit] = ()
) -> dict[str, Tensor]:
    """Returns the gradient of a metric with respect to the value at each point, after the edits there.

    Args:
        reference: The model.
        rows: The run.
        total: The metric; each row depends on itself alone.
        names: The points.
        edits: What is changed in the run.
    """
    leaves = {name: torch.zeros_like(value) for name, value in reference.run(rows, edits, names).values.items()}
    with torch.enable_grad():
        for leaf in leaves.values():
            leaf.requires_grad_()
        added = [(name, lambda value, name=name: value + leaves[name]) for name in names]
        found = total(reference.run(rows, [*edits, *added]).logits).sum()
        if not found.requires_grad:  # edits let no gradient through
            return {name: leaf.detach() for name, leaf in leaves.items()}
        gradients = torch.autograd.grad(found, [leaves[name] for name in names], allow_unused=True)
    return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(names, gradients, strict=True)}


def stopped(reference: Reference, layer: int) -> list[Edit]:
    """Returns edits that let no gradient through what a layer's attention and MLP add."""
    return [(full_name(point, layer), lambda value: value.detach()) for point in ("attn_out", "mlp_out")]


# --- attribution patching --------------------------------------------------------------------------------------------


def first_order(base: Tensor, source: Tensor, gradient: Tensor) -> Tensor:
    """Returns `(source - base) * gradient`; 0 where both are the same, as masked scores are."""
    return torch.where(base == source, 0, (source - base) * gradient)


def by_unit(value: Tensor, point: str, rows: Rows, by_position: bool) -> Tensor:
    """Returns effects `[row, *axes]` by unit: positions real, NaN past a row's end, or summed; widths summed."""
    axes, longest = AXES[point].split(), max(rows.lengths)
    units = []
    for row, columns in enumerate(rows.columns):
        own, place = value[row], 0
        for axis in axes:
            if axis in ("width", "model"):
                own = own.sum(place)
            elif axis in ("pos", "q", "k"):
                own = own.index_select(place, torch.tensor(columns))
                if by_position:
                    missing = [size if i != place else longest - len(columns) for i, size in enumerate(own.shape)]
                    own = torch.cat([own, own.new_full(missing, torch.nan)], place)
                    place += 1
                else:
                    own = own.sum(place)
            else:
                place += 1
        units.append(own)
    return torch.stack(units)


def changed_patterns(
    reference: Reference, rows: Rows, point: str, layer: int, source: Tensor, by_position: bool
) -> dict[tuple[int | None, int], Tensor]:
    """Returns the pattern of a layer with one query or key changed at a time, one forward each.

    Args:
        reference: The model.
        rows: The base run.
        point: `"q"` or `"k"`.
        layer: The layer.
        source: Its queries or keys in the source run.
        by_position: Whether one position is changed, or all.

    Returns:
        By position (None for all) and head.
    """
    found: dict[tuple[int | None, int], Tensor] = {}
    name = full_name("pattern", layer)
    for head in range(source.shape[2]):
        for position in range(max(rows.lengths)) if by_position else [None]:

            def write(value: Tensor, head: int = head, position: int | None = position) -> Tensor:
                new = value.clone()
                for row, columns in enumerate(rows.columns):
                    at = columns if position is None else columns[position : position + 1]
                    new[row, at, head] = source[row, at, head]
                return new

            found[position, head] = reference.run(rows, [(full_name(point, layer), write)], [name]).values[name]
    return found


def through_patterns(
    rows: Rows, base: Tensor, changed: Mapping[tuple[int | None, int], Tensor], gradient: Tensor
) -> Tensor:
    """Returns effects of queries or keys through the patterns that changed ones give: `[row, (position,) head]`.

    Padded queries, which no real token reads, count for nothing.
    """
    real = rows.mask.bool()[:, None, :, None]
    effects = {
        key: ((pattern - base) * gradient).masked_fill(~real, 0).sum((1, 2, 3)) for key, pattern in changed.items()
    }
    heads = sorted({head for _, head in changed})
    if (None, 0) in changed:
        return torch.stack([effects[None, head] for head in heads], 1)
    positions = range(max(rows.lengths))
    table = torch.stack([torch.stack([effects[at, head] for head in heads], 1) for at in positions], 1)
    lacking = torch.arange(len(positions)) >= torch.tensor(rows.lengths)[:, None]
    return table.masked_fill(lacking[..., None], torch.nan)


# --- edges -----------------------------------------------------------------------------------------------------------


def edge_scores(
    reference: Reference, base_rows: Rows, source_rows: Rows, total: Total, alphas: Sequence[float] | None
) -> Tensor:
    """Returns `sum of (sender(source) - sender(base)) . gradient at the receiver's input`: `[row, sender, receiver]`.

    Args:
        reference: The model.
        base_rows: The run that is patched.
        source_rows: The run that gives values.
        total: The metric.
        alphas: Where on the way of the embeddings from the base to the source gradients are taken, and averaged; None
            for the base itself.
    """
    base, source = Parts.of(reference, base_rows), Parts.of(reference, source_rows)
    changes = sender_changes(reference, base_rows, base, source)
    senders, receivers = senders_of(reference), receivers_of(reference)
    gradients: dict[Receiver, Tensor] = {}
    for alpha in [None] if alphas is None else alphas:
        entering = base.entering if alpha is None else base.entering + alpha * (source.entering - base.entering)
        edits = [("blocks.0.hook_resid_pre", set_to(entering))]
        found = input_slopes(reference, base_rows, total, edits)
        for receiver, gradient in found.items():
            gradients[receiver] = gradients.get(receiver, 0) + gradient / (1 if alphas is None else len(alphas))
    table = base.entering.new_full((len(base_rows.ids), len(senders), len(receivers)), torch.nan)
    for column, receiver in enumerate(receivers):
        for line, sender in enumerate(senders):
            if is_before(reference, sender, receiver):
                product = changes[sender] * gradients[receiver]
                table[:, line, column] = product.masked_fill(base_rows.mask[..., None] == 0, 0).sum((1, 2))
    return table


def input_slopes(reference: Reference, rows: Rows, total: Total, edits: Sequence[Edit]) -> dict[Receiver, Tensor]:
    """Returns the gradient of a metric with respect to what each receiver reads."""
    receivers, layers = receivers_of(reference), range(reference.n_layers)
    names = [full_name(f"{letter}_input", layer) for layer in layers for letter in "qkv"]
    names += [full_name("mlp_in", layer) for layer in layers]
    names.append(full_name("resid_post", reference.n_layers - 1))
    found = slopes(reference, rows, total, names, edits)
    gradients = {}
    for receiver in receivers:
        if receiver.kind in "qkv":
            name = full_name(f"{receiver.kind}_input", receiver.layer)
            gradients[receiver] = found[name][:, :, receiver.place]
        else:
            gradients[receiver] = found[read_at(reference, receiver)]
    return gradients


def sender_changes(reference: Reference, rows: Rows, base: Parts, source: Parts) -> dict[Sender, Tensor]:
    """Returns how much more each sender adds to the stream in the source run.

    Where a norm comes after attention, a head's change goes through the derivative of that norm at the base run.
    """
    found = {Sender("embed"): source.entering - base.entering}
    for layer in range(reference.n_layers):
        change = source.z[layer] - base.z[layer]
        by_head = torch.einsum("bphd,hdm->hbpm", change, reference.output_weight(layer)) * reference.multiplier
        if reference.family.attn_out is not None:
            norm = reference.module(layer, reference.family.attn_out)
            projected = reference.module(layer, reference.family.o).forward(base.z[layer].flatten(-2))
            by_head = torch.stack([torch.autograd.functional.jvp(norm.forward, projected, one)[1] for one in by_head])
        for head, one in enumerate(by_head):
            found[Sender("head", layer, head)] = one
        found[Sender("mlp", layer)] = source.mlp[layer] - base.mlp[layer]
    return found
