"""Sites written in one go: what each of them writes alone."""

import pytest
import torch
from tests.conftest import tiny_model

import clearspan
from clearspan._run.hooks import sites_of
from clearspan._run.sources import gathered
from clearspan.interventions import (
    Add,
    AddMapped,
    Apply,
    Inject,
    Intervention,
    Mean,
    Patch,
    PatchSubspace,
    ProjectOut,
    Resample,
    Scale,
    Zero,
    register_function,
)
from clearspan.interventions.joint import write_all


@register_function("tests: centred over rows")
def centred_over_rows(value):
    return value - value.mean(0, keepdim=True)


VECTOR = tuple(0.1 * (-1) ** i * i for i in range(48))
BASIS = torch.linalg.qr(torch.randn(48, 3, generator=torch.Generator().manual_seed(3))).Q
STREAM = {
    "patch": Patch(),
    "patch of a position": Patch(position=2),
    "patch of a layer": Patch(layer=0),
    "subspace": PatchSubspace(basis=BASIS),
    "zero": Zero(),
    "mean": Mean(),
    "mean by position": Mean(by_position=True),
    "resample": Resample(),
    "add": Add.of(VECTOR, 2.0),
    "inject": Inject.of(VECTOR, norm="stream", add=True),
    "scale": Scale(0.5),
    "project": ProjectOut.of(VECTOR),
    "map": AddMapped.of(BASIS, -BASIS.T),
}
CELLS = {
    **{
        name: [Intervention("resid_pre", action, layer=1, positions=position) for position in (6, 0, 3, 3)]
        for name, action in STREAM.items()
    },
    "heads": [Intervention("z", Patch(), layer=1, heads=head) for head in (0, 2, 3)],
    "two heads each": [Intervention("z", Patch(), layer=1, heads=heads) for heads in ((0, 2), (3, 1))],
    "heads at positions": [
        Intervention("z", Zero(), layer=1, heads=head, positions=position) for head in (1, 3) for position in (2, 5)
    ],
    "coordinates": [Intervention("resid_pre", Patch(), layer=1, neurons=(one, one + 7)) for one in (3, 1, 40)],
    "head and coordinates": [
        Intervention("result", Scale(2.0), layer=1, heads=head, neurons=(4, 1)) for head in (0, 2)
    ],
    "several positions": [Intervention("resid_pre", Patch(), layer=1, positions=at) for at in ((1, 2), (6, 4), (0, 5))],
    "from the end": [Intervention("resid_pre", Patch(), layer=1, positions=at) for at in (-1, -2, -3)],
    "other counts": [Intervention("resid_pre", Patch(), layer=1, positions=at) for at in (1, (2, 3), 4, (5, 6))],
    "other actions": [
        Intervention("resid_pre", a, layer=1, positions=2) for a in (Patch(), Zero(), Zero(), Scale(2.0))
    ],
    "all positions": [Intervention("mlp_out", action, layer=1) for action in (Zero(), Zero(), Patch(), Patch())],
    "registered": [
        Intervention("resid_pre", Apply("tests: centred over rows"), layer=1, positions=at) for at in (1, 2)
    ],
    "patterns": [Intervention("pattern", Patch(), layer=1, heads=h, positions=5, key_positions=(0, 2)) for h in (0, 1)],
}


@pytest.fixture(scope="module")
def bridge():
    return clearspan.boot(tiny_model())


ONE_LENGTH = {"mean by position", "resample"}
"""Actions that take rows of one length."""
CASES = [(name, is_padded) for name in CELLS for is_padded in (False, True) if not (is_padded and name in ONE_LENGTH)]


@pytest.mark.parametrize(("name", "is_padded"), CASES)
def test_cells_in_one_go_are_what_they_are_alone(bridge, name, is_padded):
    tokens = torch.randint(1, 97, (2, 2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 1 - is_padded
    batch, clean = bridge.to_batch(tokens[0], mask), bridge.to_batch(tokens[1], mask)
    sites = [site.on(batch, where_possible=True) for site in sites_of(bridge, CELLS[name])]
    sources = gathered(bridge, [one.site for one in sites], {"clean": clean}, batch)
    _, cache = bridge.run_with_cache(batch)
    value = cache[sites[0].site.name].repeat(len(sites), *[1] * (len(sites[0].site.axes) - 1)).detach()
    placed = [(one, slice(2 * number, 2 * number + 2)) for number, one in enumerate(sites)]
    together, alone = value.clone(), value.clone()
    write_all(together, placed, sources.of)
    for one, rows in placed:
        one.write(alone, sources.of(one), rows)
    assert not torch.equal(alone, value)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("before", [2, 4])
def test_the_last_columns_of_a_value_are_written_at_their_positions(bridge, before):
    tokens = torch.randint(1, 97, (2, 2, 7), generator=torch.Generator().manual_seed(1))
    batch = bridge.to_batch(tokens[0])
    several = [Intervention("resid_pre", Patch(), layer=1, positions=at) for at in (4, 6, 5)]
    sites = [site.on(batch) for site in sites_of(bridge, several)]
    sources = gathered(bridge, [one.site for one in sites], {"clean": tokens[1]}, batch)
    value = torch.zeros(6, 7 - before, 48)
    write_all(value, [(one, slice(2 * at, 2 * at + 2)) for at, one in enumerate(sites)], sources.of)
    _, clean = bridge.run_with_cache(tokens[1])
    for at, position in enumerate((4, 6, 5)):
        torch.testing.assert_close(value[2 * at : 2 * at + 2, position - before], clean["resid_pre", 1][:, position])
    assert (value != 0).any(-1).sum() == 6
