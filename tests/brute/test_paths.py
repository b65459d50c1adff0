"""Path patching, edges and circuits: against forwards in which every other part is frozen."""

import pytest
import torch

from clearspan import analysis
from clearspan.analysis import Circuit
from clearspan.errors import ClearspanError

from . import ours, paths
from .draws import Draw
from .paths import Parts, Sender
from .test_patching import WRONG_DIRECTIONS

PATHS, EDGES, CIRCUITS = 24, 16, 12


class Pair:
    """Two inputs of one length, both runs' parts, and a metric.

    Args:
        kind: What the draw is of.
        number: Which.
        longest: Most columns.
    """

    def __init__(self, kind, number, *, longest=6):
        self.draw = draw = Draw(kind, number)
        padding = draw.padding()
        relaid = draw.note("padding differs", draw.chance(0.3) and padding != "none")
        has_norm = draw.chance(0.3)  # on what attention adds
        self.subject = draw.subject(
            lambda family: (family.attn_out is not None) >= has_norm,
            is_padded=padding != "none",
            but=("mixtral", "gpt_oss"),
        )
        self.reference, self.bridge = self.subject.reference, ours.bridge_to(self.subject)
        self.clean = draw.rows(padding, longest=longest)
        self.given = self.clean, draw.other_rows(self.clean, relaid=relaid)
        self.corrupted = self.given[1].laid_out_as(self.clean)
        self.metric = draw.metric(self.clean, kinds=("difference", "probability", "loss", "plain"))
        self.direction = draw.one("direction", ("denoising", "noising"))
        is_denoising = self.direction == "denoising"
        self.base = self.corrupted if is_denoising else self.clean
        self.source = self.clean if is_denoising else self.corrupted

    def arguments(self):
        """Returns the arguments that all functions of pairs begin with."""
        inputs = [ours.given(self.bridge, rows, self.draw.one("form", ours.form_of(rows)))[0] for rows in self.given]
        return self.bridge, *inputs, ours.metric_of(self.metric, self.clean.mask)

    def measured(self, logits):
        """Returns the metric of logits of the run that is changed."""
        return self.metric.of(logits, self.base, {})


def drawn_senders(draw, reference, count=3):
    """Draws senders, among them neurons."""
    found = list(draw.some(paths.senders_of(reference), 1, count))
    if reference.family.post is not None and draw.chance(0.3):
        found.append(Sender("neuron", draw.random.randrange(reference.n_layers), draw.random.randrange(64)))
    return draw.note("senders", found)


def drawn_receivers(draw, reference):
    """Draws receivers by the names that path patching takes: each a name or several, with the receivers meant."""
    every, found = paths.receivers_of(reference), []
    for _ in range(draw.random.randint(1, 3)):
        names, meant = [], []
        for receiver in draw.some(every, 1, 2):
            if receiver.kind in "kv" and draw.chance(0.5):
                names.append(f"L{receiver.layer}H{draw.random.choice(receiver.heads)}.{receiver.kind}")
                meant.append(receiver)
            elif receiver.kind == "q" and draw.chance(0.3):  # the whole head
                names.append(f"L{receiver.layer}H{receiver.place}")
                meant += [one for one in every if one.layer == receiver.layer and receiver.place in one.heads]
            else:
                names.append(str(receiver))
                meant.append(receiver)
        found.append((names[0] if len(names) == 1 else names, list(dict.fromkeys(meant))))
    draw.note("receivers", [name for name, _ in found])
    return found


@pytest.mark.parametrize("number", range(PATHS))
def test_paths_carry_what_the_sender_writes_with_all_else_frozen(number):
    pair = Pair("paths", number)
    draw, reference = pair.draw, pair.reference
    freeze = draw.one("freeze", ("all", "all", "attention"))
    senders, receivers = drawn_senders(draw, reference), drawn_receivers(draw, reference)
    if draw.chance(0.1):
        with pytest.raises(ClearspanError, match="direction"):
            analysis.path_patching(
                *pair.arguments(),
                [str(one) for one in senders],
                [name for name, _ in receivers],
                direction=draw.one("direction", WRONG_DIRECTIONS),
            )
        return
    base, source = Parts.of(reference, pair.base), Parts.of(reference, pair.source)
    expected = []
    for sender in senders:
        streams = paths.carried(reference, pair.base, base, pair.source, source, sender, freeze)
        expected += [
            pair.measured(paths.path_logits(reference, pair.base, sender, meant, streams)) for _, meant in receivers
        ]
    found = analysis.path_patching(
        *pair.arguments(),
        [str(sender) for sender in senders],
        [name for name, _ in receivers],
        freeze=freeze,
        direction=pair.direction,
        progress=False,
    )
    ours.agree(draw, found.of().flatten(0, 1), torch.stack(expected), "the metric of paths")


@pytest.mark.parametrize("number", range(EDGES))
def test_edges_carry_what_their_senders_write(number):
    pair = Pair("edges", number)
    draw, reference = pair.draw, pair.reference
    every = paths.edges_of(reference)
    cells = [list(draw.some(every, 1, 4)) for _ in range(draw.random.randint(1, 5))]
    if draw.chance(0.5):  # several senders of one receiver
        receiver = draw.random.choice(paths.receivers_of(reference)[reference.n_heads :])
        cells.append([edge for edge in every if edge[1] == receiver and draw.chance(0.5)] or cells[0])
    names = [[f"{sender}->{receiver}" for sender, receiver in cell] for cell in cells]
    draw.note("edges", names)
    base, source = Parts.of(reference, pair.base), Parts.of(reference, pair.source)
    expected = [pair.measured(paths.edge_logits(reference, pair.base, base, source, cell)) for cell in cells]
    found = analysis.patch_edges(
        *pair.arguments(), {f"cell {i}": cell for i, cell in enumerate(names)}, direction=pair.direction
    )
    ours.agree(draw, found.of(), torch.stack(expected), "the metric of edges")


@pytest.mark.parametrize("number", range(CIRCUITS))
def test_circuits_carry_their_own_run_inside_and_the_corrupted_run_outside(number):
    pair = Pair("circuits", number, longest=5)
    draw, reference = pair.draw, pair.reference
    every = paths.edges_of(reference)
    share = draw.one("share of edges", (0.0, 0.1, 0.5, 0.8, 0.95, 1.0))
    circuit = [edge for edge in every if draw.chance(share)]
    rest = [edge for edge in every if edge not in circuit]
    clean, corrupted = Parts.of(reference, pair.clean), Parts.of(reference, pair.corrupted)
    own, other = (
        pair.metric.of(paths.circuit_logits(reference, pair.clean, clean, corrupted, edges), pair.clean, {})
        for edges in (circuit, rest)
    )
    given = Circuit.of(pair.bridge, [f"{sender}->{receiver}" for sender, receiver in circuit])
    assert given.n_edges + given.complement().n_edges == len(every)
    found = analysis.evaluate_circuits(*pair.arguments(), {"drawn": given})
    ours.agree(draw, found.of()[0, 0], own, "the circuit's metric")
    ours.agree(draw, found.of()[1, 0], other, "the metric of all other edges")
