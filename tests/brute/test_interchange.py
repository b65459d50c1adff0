"""Interchange interventions: values written at places of a base that are read at other places of a source."""

import pytest
import torch

from clearspan import analysis

from . import ours
from .draws import Draw
from .reference import full_name
from .rows import Rows

EXAMPLES, SWEPT = 18, 8
POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "v", "post")
WITH_HEADS = ("z", "q", "v")
CLEAR = 1e-3
"""An answer is compared where its logit is ahead of the next one by more than this share of the largest."""


class Exchange:
    """What is drawn of an interchange at one point: a part of its value, and a subspace of that.

    Args:
        draw: Where it is drawn from.
        subject: The model.
        may_be_subspace: Whether a subspace may be drawn.
    """

    def __init__(self, draw, subject, *, may_be_subspace=True):
        reference = subject.reference
        self.point = draw.one("point", [one for one in draw.points(subject, ends=False) if one in POINTS])
        name = full_name(self.point, 0)
        shape = reference.run(Rows.unpadded(torch.tensor([[1, 2]])), (), [name]).values[name].shape[2:]
        self.heads = self.neurons = None
        if self.point in WITH_HEADS and draw.chance(0.6):
            self.heads = draw.some(range(-shape[0], 0), 1, 2)
        elif self.point not in WITH_HEADS and draw.chance(0.4):
            self.neurons = draw.some(range(shape[-1]), 2, 5)
        draw.note("heads and neurons", (self.heads, self.neurons))
        self.index = torch.arange(shape.numel()).view(shape)
        if self.heads is not None:
            self.index = self.index[list(self.heads)]
        if self.neurons is not None:
            self.index = self.index[..., list(self.neurons)]
        self.index = self.index.flatten()
        self.basis = None
        if may_be_subspace and draw.note("in a subspace", draw.chance(0.4)):
            width = len(self.index)
            size = draw.random.randint(1, min(3, width))
            self.basis = torch.linalg.qr(torch.randn(width, size, generator=draw.generator)).Q

    def edit(self, layer, rows, source_rows, source_value, written, read):
        """Returns the edit that makes the exchange in a layer."""

        def exchanged(value):
            new = value.clone()
            for row in range(rows.size[0]):
                for place, taken in zip(written[row], read[row], strict=True):
                    column, other = rows.column(row, place), source_rows.column(row, taken)
                    own = new[row, column].flatten()
                    change = source_value[row, other].flatten()[self.index] - own[self.index]
                    if self.basis is not None:
                        basis = self.basis.to(change)
                        change = basis @ (basis.T @ change)
                    own[self.index] += change
                    new[row, column] = own.view(new[row, column].shape)
            return new

        return full_name(self.point, layer), exchanged


def answers_of(logits, rows, among):
    """Returns each row's likeliest last token, and whether it is clearly ahead."""
    last = torch.stack([logits[row, rows.column(row, -1)] for row in range(rows.size[0])])
    chosen = last if among is None else last[:, list(among)]
    best = chosen.topk(2)
    is_clear = best.values[:, 0] - best.values[:, 1] > CLEAR * last.abs().amax(-1)
    answers = best.indices[:, 0] if among is None else torch.tensor(among)[best.indices[:, 0]]
    return answers, is_clear


def drawn_pairs(draw, count):
    """Draws bases and sources, each with a padding of its own."""
    return draw.rows(count=count), draw.rows(count=count)


@pytest.mark.parametrize("number", range(EXAMPLES))
def test_values_go_from_places_of_a_source_to_places_of_a_base(number):
    draw = Draw("interchange", number)
    subject = draw.subject(is_padded=True)
    reference, bridge = subject.reference, ours.bridge_to(subject)
    rows, other = drawn_pairs(draw, draw.random.randint(2, 3))
    exchange = Exchange(draw, subject)
    places = draw.one("places", (1, 1, 2, 3))
    written = [draw.some(range(-length, length), 1, 1) for length in rows.lengths]
    if places > 1:
        written = [tuple(draw.random.sample(range(length), places)) for length in rows.lengths]
    read = [tuple(draw.random.randrange(-length, length) for _ in range(places)) for length in other.lengths]
    draw.note("written and read", (written, read))
    among = draw.one("answers", (None, draw.some(range(97), 3, 6)))
    among = None if among is None else tuple(sorted(among))
    layers = draw.one("chosen layers", (None, -1, draw.some(range(reference.n_layers), 1, 2)))
    chosen = list(range(reference.n_layers)) if layers is None else [layers] if isinstance(layers, int) else layers
    names = [full_name(exchange.point, layer % reference.n_layers) for layer in chosen]
    values = reference.run(other, (), names).values
    plain = answers_of(reference.run(rows).logits, rows, among)
    changed, logits = [], []
    for layer, name in zip(chosen, names, strict=True):
        edit = exchange.edit(layer % reference.n_layers, rows, other, values[name], written, read)
        logits.append(reference.run(rows, [edit]).logits)
        changed.append(answers_of(logits[-1], rows, among))
    labels = changed[0][0] if draw.chance(0.5) else plain[0]
    pairs = analysis.InterchangeExamples.of(
        bridge,
        ours.given(bridge, rows, draw.one("form", ours.form_of(rows)))[0],
        ours.source_of(draw, bridge, other, (), rows, may_be_cache=False),
        labels.tolist(),
        position=written,
        source_position=read,
        answers=None if among is None else list(among),
    )
    found = analysis.interchange_accuracy(
        bridge,
        pairs,
        name=exchange.point,
        layers=layers,
        heads=exchange.heads,
        neurons=exchange.neurons,
        subspace=exchange.basis,
        batch_size=draw.one("batch size", (1, 2, 64)),
        progress=False,
    )
    for answer, hits in zip([plain, *changed], [found.unchanged, *found.hits], strict=True):
        assert torch.equal(hits[answer[1]] == 1, (answer[0] == labels)[answer[1]]), str(draw)
    swap = pairs.intervention(names[-1], exchange.basis, heads=exchange.heads, neurons=exchange.neurons)
    ran = bridge(pairs.base, interventions=[swap], sources={"source": pairs.source})
    ours.agree(draw, rows.real(ran), rows.real(logits[-1]), "logits")


@pytest.mark.parametrize("number", range(SWEPT))
def test_a_sweep_exchanges_at_one_position_after_another(number):
    draw = Draw("interchange sweep", number)
    subject = draw.subject(is_padded=True)
    reference, bridge = subject.reference, ours.bridge_to(subject)
    rows = draw.rows()
    other = draw.other_rows(rows, relaid=draw.chance(0.5))
    exchange = Exchange(draw, subject, may_be_subspace=False)
    longest = max(rows.lengths)
    positions = draw.one("positions", (None, draw.some(range(-longest, longest), 1, 3)))
    layer = draw.random.randrange(reference.n_layers)
    name = full_name(exchange.point, layer)
    value = reference.run(other, (), [name]).values[name]
    labels = answers_of(reference.run(other).logits, other, None)[0]
    pairs = analysis.InterchangeExamples.of(
        bridge, *(ours.given(bridge, one, "batch")[0] for one in (rows, other)), labels.tolist()
    )
    found = analysis.interchange_sweep(
        bridge,
        pairs,
        name=exchange.point,
        layers=draw.note("layer", layer),
        positions=positions,
        heads=exchange.heads,
        neurons=exchange.neurons,
        batch_size=draw.one("batch size", (1, 64)),
        progress=False,
    )
    for at, position in enumerate(range(longest) if positions is None else positions):
        has = torch.tensor([-length <= position < length for length in rows.lengths])
        written = [(position,) if there else () for there in has.tolist()]
        edit = exchange.edit(layer, rows, other, value, written, written)
        answers, is_clear = answers_of(reference.run(rows, [edit]).logits, rows, None)
        hits = found.hits[0, at]
        assert hits[~has].isnan().all(), str(draw)
        assert torch.equal(hits[has & is_clear] == 1, (answers == labels)[has & is_clear]), str(draw)
