import itertools

import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan import patching
from clearspan.errors import AbsentPointError, InvalidArgumentError
from clearspan.patching import activation_patching
from clearspan.sweep import LogitDifference


@pytest.fixture(params=["gpt_bigcode", "gpt_bigcode multi-head", "llama"], scope="module")
def bridge(request):
    return clearspan.boot(build(request.param))


@pytest.fixture(scope="module")
def runs():
    return torch.randint(1, 97, (2, 2, 6), generator=torch.Generator().manual_seed(4))


def _metric(logits):
    return (logits[:, -1, 3] - logits[:, -1, 8]).mean() + logits[:, 2, 5].mean()


SETTERS = {
    "resid_pre": ("resid_pre", ("layer", "pos")),
    "resid_mid": ("resid_mid", ("layer", "pos")),
    "attn_out": ("attn_out", ("layer", "pos")),
    "mlp_out": ("mlp_out", ("layer", "pos")),
    "attn_head_out_by_pos": ("z", ("layer", "pos", "head")),
    "attn_head_q_by_pos": ("q", ("layer", "pos", "head")),
    "attn_head_k_by_pos": ("k", ("layer", "pos", "head")),
    "attn_head_v_by_pos": ("v", ("layer", "pos", "head")),
    "attn_head_pattern_by_pos": ("pattern", ("layer", "head", "dest")),
    "attn_head_pattern_dest_src_pos": ("pattern", ("layer", "head", "dest", "src")),
    "attn_head_out_all_pos": ("z", ("layer", "head")),
    "attn_head_q_all_pos": ("q", ("layer", "head")),
    "attn_head_k_all_pos": ("k", ("layer", "head")),
    "attn_head_v_all_pos": ("v", ("layer", "head")),
    "attn_head_pattern_all_pos": ("pattern", ("layer", "head")),
}
SAMPLE = 12


@torch.no_grad()
@pytest.mark.parametrize("sweep", SETTERS)
def test_each_sweep_is_what_one_forward_with_a_hook_gives(bridge, runs, sweep):
    clean, corrupted = runs
    _, cache = bridge.run_with_cache(clean)
    found = getattr(patching, f"get_act_patch_{sweep}")(bridge, corrupted, cache, _metric)
    point, axes = SETTERS[sweep]
    value = cache[point, 0]
    n_heads = value.shape[1] if point == "pattern" else value.shape[2]
    sizes = {"layer": 3, "pos": 6, "dest": 6, "src": 6, "head": n_heads}
    assert found.shape == tuple(sizes[axis] for axis in axes)
    cells = list(itertools.product(*(range(sizes[axis]) for axis in axes)))
    for cell in cells[:: max(1, len(cells) // SAMPLE)]:
        at = dict(zip(axes, cell, strict=True))

        def edit(value, hook, at=at):
            every = slice(None)
            if point == "pattern":
                index = (every, at["head"], at.get("dest", every), at.get("src", every))
            elif "head" in at:
                index = (every, at.get("pos", every), at["head"])
            else:
                index = (every, at["pos"])
            value[index] = cache[point, at["layer"]][index]

        name = clearspan.get_act_name(point, at["layer"])
        expected = _metric(bridge.run_with_hooks(corrupted, fwd_hooks=[(name, edit)]))
        torch.testing.assert_close(found[cell], expected, rtol=2e-5, atol=2e-5)


def test_the_stacked_sweeps_have_no_head_that_does_not_exist(bridge, runs):
    clean, corrupted = runs
    _, cache = bridge.run_with_cache(clean)
    n_heads, kv_heads = bridge.cfg.n_heads, cache["k", 0].shape[2]
    every = patching.get_act_patch_attn_head_all_pos_every(bridge, corrupted, cache, _metric)
    assert every.shape == (5, 3, n_heads)
    torch.testing.assert_close(
        every[2, :, :kv_heads], patching.get_act_patch_attn_head_k_all_pos(bridge, corrupted, cache, _metric)
    )
    assert every[2:4, :, kv_heads:].isnan().all()
    assert not every[[0, 1, 4]].isnan().any()
    by_pos = patching.get_act_patch_attn_head_by_pos_every(bridge, corrupted, cache, _metric)
    assert by_pos.shape == (5, 3, 6, n_heads)
    pattern = patching.get_act_patch_attn_head_pattern_by_pos(bridge, corrupted, cache, _metric)
    torch.testing.assert_close(by_pos[4], pattern.transpose(1, 2))
    blocks = patching.get_act_patch_block_every(bridge, corrupted, cache, _metric)
    assert blocks.shape == (3, 3, 6)
    torch.testing.assert_close(blocks[2], patching.get_act_patch_mlp_out(bridge, corrupted, cache, _metric))


def test_both_directions_with_errors_and_several_metrics(bridge, runs):
    clean, corrupted = runs
    metrics = {"difference": LogitDifference((3, 4), 8), "mine": lambda logits: logits[:, -1, 2]}
    denoised = activation_patching(bridge, clean, corrupted, metrics, "z", ("head", "layer"), progress=False)
    noised = activation_patching(
        bridge, clean, corrupted, metrics, "z", ("head", "layer"), direction="noising", progress=False
    )
    assert denoised.of("mine").shape == (bridge.cfg.n_heads, 3, 2)
    torch.testing.assert_close(denoised.base["mine"], bridge(corrupted)[:, -1, 2].detach())
    torch.testing.assert_close(noised.base["mine"], bridge(clean)[:, -1, 2].detach())
    torch.testing.assert_close(noised.sources["corrupted"]["mine"], denoised.base["mine"])
    assert denoised.standard_error("difference").shape == (bridge.cfg.n_heads, 3)
    some = activation_patching(
        bridge, clean, corrupted, metrics, "z", ("head", "layer"), head=[2], layer=[0, 2], progress=False
    )
    torch.testing.assert_close(some.of("mine")[0], denoised.of("mine")[2, [0, 2]], rtol=1e-4, atol=1e-4)


def test_mistakes_are_named(bridge, runs):
    clean, corrupted = runs
    with pytest.raises(InvalidArgumentError) as error:
        activation_patching(bridge, clean, corrupted[:, :4], _metric)
    assert str(error.value) == (
        "the two inputs do not lie position on position\n"
        "  expected: as many rows, and as many real tokens in each\n  got: [4, 4] and [6, 6] real tokens\n"
        "  argument: corrupted"
    )
    with pytest.raises(InvalidArgumentError, match="'resid_pre' cannot be patched by head"):
        activation_patching(bridge, clean, corrupted, _metric, by=("layer", "head"))
    with pytest.raises(InvalidArgumentError, match="places on axes that no cell has: head"):
        activation_patching(bridge, clean, corrupted, _metric, head=[1])
    with pytest.raises(InvalidArgumentError, match="unknown direction 'up'"):
        activation_patching(bridge, clean, corrupted, _metric, direction="up")


def test_a_point_that_the_architecture_lacks(runs):
    parallel = clearspan.boot(build("gptj"))
    _, cache = parallel.run_with_cache(runs[0])
    with pytest.raises(AbsentPointError, match="GPTJForCausalLM has no hook point"):
        patching.get_act_patch_resid_mid(parallel, runs[1], cache, _metric)


def test_several_points_are_an_axis_in_front(bridge, runs):
    clean, corrupted = runs
    points = ["resid_pre", "mlp_out"]
    together = activation_patching(bridge, clean, corrupted, LogitDifference(3, 8), points, progress=False)
    assert list(together.axes) == ["point", "layer", "position"]
    for point in points:
        alone = activation_patching(bridge, clean, corrupted, LogitDifference(3, 8), point, progress=False)
        torch.testing.assert_close(together.select(point=point).of(), alone.of(), atol=1e-4, rtol=1e-4)


def test_points_that_are_none(bridge, runs):
    for points in ([], ["z", 3], 5):
        with pytest.raises(InvalidArgumentError, match="expected: a hook point's short name, or a list of several"):
            activation_patching(bridge, *runs, LogitDifference(3, 8), points)  # pyright: ignore[reportArgumentType]
