import json

import pytest
import torch

from clearspan.errors import InvalidArgumentError, UnknownPointError
from clearspan.interventions import Add, Intervention, Mean, Patch, Scale, Zero


@pytest.fixture
def others():
    return torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(5))


def _hooked(bridge, tokens, name, edit):
    return bridge.run_with_hooks(tokens, fwd_hooks=[(name, edit)])


@torch.no_grad()
def test_parts_of_a_value_are_patched_as_a_hook_would(bridge, tokens, others):
    _, clean = bridge.run_with_cache(others)

    def edit(value, hook):
        for position in (1, 6):
            for head in (0, 3):
                value[:, position, head] = clean["z", 1][:, position, head]

    patch = Intervention("z", Patch("other"), layer=1, positions=(1, -1), heads=(0, 3))
    expected = _hooked(bridge, tokens, "blocks.1.attn.hook_z", edit)
    for source in (others, clean, {"blocks.1.attn.hook_z": clean["z", 1]}):
        found = bridge.run_with_hooks(tokens, interventions=[patch], sources={"other": source})
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@torch.no_grad()
def test_one_row_stands_for_all(bridge, tokens, others):
    patch = Intervention("resid_pre", Patch("one"), layer=2, positions=3)
    found = bridge.run_with_hooks(tokens, interventions=[patch], sources={"one": others[:1]})
    each = bridge.run_with_hooks(tokens, interventions=[patch], sources={"one": others[:1].expand(2, -1)})
    torch.testing.assert_close(found, each, rtol=0, atol=1e-6)


@torch.no_grad()
def test_patterns_are_written_by_query_and_key(bridge, tokens):
    def edit(value, hook):
        value[:, 2, 5, 1] = 0
        value[:, 2, 5, 4] = 0
        value[:, 2, 6, 1] = 0
        value[:, 2, 6, 4] = 0

    zero = Intervention("pattern", Zero(), layer=1, heads=2, positions=(5, 6), key_positions=(1, 4))
    expected = _hooked(bridge, tokens, "blocks.1.attn.hook_pattern", edit)
    assert torch.equal(bridge.run_with_hooks(tokens, interventions=[zero]), expected)


@torch.no_grad()
def test_several_at_one_point_are_made_in_order(bridge, tokens):
    up = Intervention("mlp_out", Scale(2.0), layer=0)
    add = Intervention("mlp_out", Add([1.0] * 48), layer=0, positions=2)

    def edit(value, hook):
        value *= 2
        value[:, 2] += 1

    expected = _hooked(bridge, tokens, "blocks.0.hook_mlp_out", edit)
    assert torch.equal(bridge.run_with_hooks(tokens, interventions=[up, add]), expected)
    assert not torch.equal(bridge.run_with_hooks(tokens, interventions=[add, up]), expected)


@torch.no_grad()
def test_a_padded_source_gives_the_mean_of_its_real_positions(embedded):
    texts = ["import os", "def area(self):\n    return"]
    tokens, mask = embedded.text.encode(texts)
    _, cache = embedded.run_with_cache(tokens, attention_mask=mask)
    mean = cache["mlp_out", 2][mask.bool()].mean(0)

    def edit(value, hook):
        value[:] = mean

    expected = embedded.run_with_hooks(texts, fwd_hooks=[("blocks.2.hook_mlp_out", edit)])
    found = embedded.run_with_hooks(
        texts, interventions=[Intervention("mlp_out", Mean("it"), layer=2)], sources={"it": texts}
    )
    torch.testing.assert_close(found, expected)


def test_gradients_pass(bridge, tokens):
    loss = bridge(tokens, "loss", interventions=[Intervention("z", Scale(0.5), layer=1)])
    (gradient,) = torch.autograd.grad(loss, [bridge.hf_model.transformer.wte.weight])
    assert gradient.abs().sum() > 0


def test_interventions_are_data():
    one = Intervention("pattern", Zero(), layer=1, heads=[2], positions=range(2, 4), key_positions=-1)
    assert one == Intervention("pattern", Zero(), 1, (2, 3), (2,), None, (-1,))
    assert Intervention.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert one.to_json() == {
        "point": "pattern",
        "layer": 1,
        "positions": [2, 3],
        "heads": [2],
        "key_positions": [-1],
        "action": {"kind": "zero"},
    }
    assert {one: 1}[one.at(heads=2)] == 1


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (
            Intervention("resid_pre", Zero(), layer=0, heads=1),
            "blocks.0.hook_resid_pre has no heads\n  expected: places on its axes: pos, d_model",
        ),
        (
            Intervention("z", Zero(), layer=0, positions=7),
            "row 0 has no position 7\n  expected: -7 to 6",
        ),
        (
            Intervention("k", Zero(), layer=0, heads=1),
            "no 1 among the heads of blocks.0.attn.hook_k\n  expected: -1 to 0",
        ),
        (Intervention("z", Zero(), layer=3), "there is no layer 3\n  expected: -3 to 2\n  where: point 'z'"),
        (
            Intervention("z", Patch(), layer=1),
            "an intervention takes values from the run 'clean', which is not given\n  got: 'x'",
        ),
    ],
)
def test_mistakes_are_named(bridge, tokens, intervention, message):
    with pytest.raises(InvalidArgumentError) as error:
        bridge.run_with_hooks(tokens, interventions=[intervention], sources={"x": tokens})
    assert str(error.value).startswith(message)


def test_a_source_of_another_length_does_not_fit(bridge, tokens, others):
    patch = Intervention("z", Patch(), layer=1)
    with pytest.raises(InvalidArgumentError) as error:
        bridge.run_with_hooks(tokens, interventions=[patch], sources={"clean": others[:, :5]})
    assert str(error.value) == (
        "the source run 'clean' does not fit the run that is changed\n"
        "  expected: 2 rows (or one) of 7 positions\n"
        "  got: 2 rows of [5] positions\n"
        "  where: blocks.1.attn.hook_z"
    )


def test_unknown_points_and_things_that_are_no_interventions(bridge, tokens):
    with pytest.raises(UnknownPointError, match="no hook point has the short name 'zz'"):
        bridge.run_with_hooks(tokens, interventions=[Intervention("zz", Zero(), layer=1)])
    with pytest.raises(InvalidArgumentError, match="this is no intervention"):
        bridge.run_with_hooks(tokens, interventions=["z"])
