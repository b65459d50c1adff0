"""The planner changes no number: on every architecture, cells in batches equal one forward for each cell."""

import pytest
import torch
from tests.zoo import MODELS, build

import clearspan
from clearspan.interventions import Add, Intervention, Mean, Patch, Resample, Scale, Zero
from clearspan.sweep import Grid, LogitDifference, Sweep, grid

TOLERANCE = 2e-5
"""The largest difference measured on these models, most of which have large logits, is 6e-6 of the largest value."""


@pytest.fixture(scope="module", params=MODELS)
def bridge(request):
    return clearspan.boot(build(request.param))


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, 97, (2, 2, 7), generator=generator)


METRICS = {
    "declared": LogitDifference((3, 4), (5, 6), position=-1),
    "earlier": LogitDifference(7, position=(2, 4)),
    "plain": lambda logits: logits[:, :, 5].sum(-1) - logits[:, 1, 9],
}


def _cells(bridge):
    """Yields one intervention at every point of the second and last layer, and around the blocks."""
    last = bridge.cfg.n_layers - 1
    for point in bridge.index:
        is_shown = not point.name.startswith("blocks.") or point.name.startswith(("blocks.1.", f"blocks.{last}."))
        if is_shown and point.axes[:2] == ("batch", "pos") and len(point.axes) > 2:
            yield point.name


@pytest.mark.parametrize("share", [0.25, pytest.param(1.0, marks=pytest.mark.slow)])
def test_every_point_patched_at_a_position_gives_what_a_forward_of_its_own_gives(bridge, tokens, share):
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens[1])
    names = [name for name in _cells(bridge) if cache[name].is_floating_point()]
    positions = [0, 3, 6]
    cells = {f"{name} {i}": Intervention(name, Patch(), positions=positions[i % 3]) for i, name in enumerate(names)}
    sweep = Sweep(bridge, tokens[0], Grid.of(cells), METRICS, sources={"clean": cache})
    sweep.run(progress=False)
    assert sweep.check(round(share * len(cells))) < TOLERANCE


@pytest.mark.slow
def test_grids_of_layers_positions_and_heads_equal_the_reference(bridge, tokens):
    layers, heads = range(bridge.cfg.n_layers), range(bridge.cfg.n_heads)
    grids = [
        grid("resid_pre", Patch(), layer=layers, position=range(7)),
        grid("z", Patch(), layer=layers, head=heads),
        grid("z", Zero(), layer=layers, position=range(2, 5), head=heads),
        grid("resid_post", Resample("clean", seed=1), layer=layers, position=range(7)),
        grid("mlp_out", Mean(), layer=layers),
        grid("pattern", Patch(), layer=layers, head=heads, position=(5,), key_position=(0, 2)),
    ]
    for cells in grids:
        sweep = Sweep(bridge, tokens[0], cells, METRICS, sources={"clean": tokens[1]})
        result = sweep.run(progress=False)
        assert result.of("plain").shape == (*cells.shape, 2)
        assert sweep.check(12) < TOLERANCE


def test_cells_of_several_interventions_with_a_background(bridge, tokens):
    last = bridge.cfg.n_layers - 1
    background = [
        Intervention("resid_pre", Add(tuple(0.5 * (-1) ** i * (i % 5) for i in range(48))), layer=1, positions=(1, 4))
    ]
    cells = Grid.of(
        {
            "two layers": [
                Intervention("resid_pre", Patch(), layer=0, positions=5),
                Intervention("z", Zero(), layer=last, heads=1),
            ],
            "embedding": [Intervention("hook_embed", Scale(2.0), positions=(2, 3))],
            "stream, twice": [
                Intervention("resid_pre", Scale(0.5), layer=1, positions=(3, 4)),
                Intervention("resid_pre", Patch(), layer=1, positions=4),
            ],
            "logits": [Intervention("hook_logits", Scale(3.0), positions=6)],
            "post": [Intervention("resid_post", Patch(), layer=last, positions=(2, 6))],
        }
    )
    sweep = Sweep(bridge, tokens[0], cells, METRICS, sources={"clean": tokens[1]}, background=background)
    sweep.run(progress=False)
    assert sweep.check(5) < TOLERANCE


def test_rows_with_padding(bridge, tokens):
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    cells = grid("resid_pre", Scale(0.3), layer=range(3), position=range(3, 7))
    metric = LogitDifference(3, 5, position=-1)
    sweep = Sweep(bridge, tokens[0], cells, metric, attention_mask=mask)
    sweep.run(progress=False)
    assert sweep.check(12) < TOLERANCE
