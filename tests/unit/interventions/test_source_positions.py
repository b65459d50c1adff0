"""A patch that reads other positions of its source than it writes, which may differ by row."""

import json

import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Intervention, Patch, PatchSubspace
from clearspan.sweep import LogitDifference, Sweep

NAME = "blocks.1.hook_resid_pre"
BASE = [[5, 6, 7, 8, 9], [11, 12, 13], [21, 22, 23, 24]]
SOURCE = [[31, 32], [41, 42, 43, 44], [51, 52, 53]]
WRITTEN, READ = [[0, -1], [2, 1], [1, 3]], [[1, 0], [-1, -1], [2, 0]]


@pytest.fixture(scope="module")
def llama():
    return clearspan.boot(build("llama"))


def by_rows_alone(bridge, sources, written=WRITTEN, read=READ, basis=None):
    """Last logits of each base row alone, without padding, its values written by a plain hook."""
    found = []
    for base, source, at, taken_at in zip(BASE, sources, written, read, strict=True):
        _, cache = bridge.run_with_cache(source, names_filter=NAME)
        taken = cache[NAME][0, taken_at]

        def write(value, hook, at=at, taken=taken):
            change = taken - value[0, at]
            value[0, at] += change if basis is None else change @ basis @ basis.T

        found.append(bridge.run_with_hooks(base, fwd_hooks=[(NAME, write)])[0, -1])
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given", ["ids", "cache", "one place"])
def test_each_row_reads_its_own_positions(llama, side, given):
    batch = llama.to_batch(BASE, padding_side=side)
    source = llama.to_batch(SOURCE)
    if given == "cache":
        _, source = llama.run_with_cache(source, names_filter=NAME)
    written, read = ([[one[0]] for one in each] if given == "one place" else each for each in (WRITTEN, READ))
    patch = Intervention(NAME, Patch("other", position=read), positions=written)
    logits = llama(batch, interventions=[patch], sources={"other": source})
    last = torch.stack([logits[row, batch.column_of(row, -1)] for row in range(3)])
    expected = by_rows_alone(llama, SOURCE, written, read)
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-3)
    metric = LogitDifference(3, 5)
    swept = Sweep(llama, batch, {"a": patch, "b": patch}, metric, sources={"other": source}).run(progress=False)
    for cell in swept.of():
        torch.testing.assert_close(cell, expected[:, 3] - expected[:, 5], rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_one_source_row_is_read_at_other_positions_for_each_row(llama):
    basis = torch.linalg.qr(torch.randn(48, 3, generator=torch.Generator().manual_seed(0))).Q
    read = [[1, 0], [3, -1], [2, 0]]
    action = PatchSubspace("other", position=read, basis=basis)
    batch = llama.to_batch(BASE)
    logits = llama(
        batch,
        interventions=[Intervention(NAME, action, positions=WRITTEN)],
        sources={"other": torch.tensor([SOURCE[1]])},
    )
    last = torch.stack([logits[row, batch.column_of(row, -1)] for row in range(3)])
    torch.testing.assert_close(
        last, by_rows_alone(llama, [SOURCE[1]] * 3, read=read, basis=basis), rtol=1e-4, atol=1e-3
    )


@torch.no_grad()
def test_one_position_of_a_source_is_read_for_several_that_are_written(llama):
    batch = llama.to_batch(BASE)
    one = Intervention(NAME, Patch("other", position=1), positions=(0, -1))
    several = Intervention(NAME, Patch("other", position=(1, 1)), positions=(0, -1))
    found, expected = (
        llama(batch, interventions=[patch], sources={"other": llama.to_batch(SOURCE)}) for patch in (one, several)
    )
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("read", [(0, 1), 1, None])
@pytest.mark.parametrize("written", [(1, 3), [[1, 3], [0, 4], [0, 1]]])
def test_a_row_of_a_sweep_that_lacks_a_position_is_nan(llama, read, written):
    batch, source = llama.to_batch(BASE), [[31, 32, 33, 34, 35], [41, 42, 43], [51, 52, 53, 54]]
    patch = Intervention(NAME, Patch("other", position=read), positions=written)
    sources = {"other": llama.to_batch(source)}
    swept = Sweep(llama, batch, {"a": patch, "b": patch}, LogitDifference(3, 5), sources=sources).run(progress=False)
    assert swept.of().isnan().tolist() == [[False, True, False]] * 2
    whole = patch.at(positions=written if isinstance(written, tuple) else [written[0], [0, 1], written[2]])
    for row in (0, 2):
        own = whole.at(positions=whole.positions if isinstance(whole.positions, tuple) else whole.positions.rows[row])
        logits = llama([BASE[row]], interventions=[own], sources={"other": [source[row]]})[0, -1]
        torch.testing.assert_close(swept.of()[0, row], logits[3] - logits[5], rtol=1e-4, atol=1e-3)


def test_they_are_data():
    patch = Intervention("z", Patch("other", position=[[1], [2]]), layer=0, positions=[[0], [1]])
    assert patch.action.position == ((1,), (2,))
    assert Intervention.from_json(json.loads(json.dumps(patch.to_json()))) == patch
    assert Patch(position=[3]) == Patch(position=3) == Patch(position=torch.tensor(3))
    assert Patch(position=range(2)).position == (0, 1)


@pytest.mark.parametrize("position", ["a", [], [[]], [[1], [1, 2]], 1.5, True, [1, [2]], [None]])
def test_what_is_no_position_raises(position):
    with pytest.raises(InvalidArgumentError) as raised:
        Patch(position=position)
    assert str(raised.value) == (
        f"position={position!r} tells no positions of a source\n"
        "  expected: a whole number, several, or as many for each row"
    )


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ([[0], [4], [0]], "row 1 has no source position 4\n  expected: -4 to 3\n  got: 4 real tokens"),
        ([[0], [0]], "the positions of a source are not one list for each row\n  expected: 3 lists\n  got: 2"),
        ([[0, 1], [0, 1], [0, 1]], "a patch reads as many positions as it writes\n  expected: 1 positions\n  got: 2"),
    ],
)
def test_positions_that_do_not_fit_raise(llama, read, message):
    patch = Intervention(NAME, Patch("other", position=read), positions=0)
    with pytest.raises(InvalidArgumentError) as raised:
        llama(llama.to_batch(BASE), interventions=[patch], sources={"other": llama.to_batch(SOURCE)})
    assert str(raised.value) == message
