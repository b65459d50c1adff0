import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clearspan.errors import InvalidArgumentError
from clearspan.interventions import (
    Add,
    AddMapped,
    Apply,
    Inject,
    Intervention,
    Mask,
    Mean,
    Patch,
    PatchSubspace,
    ProjectOut,
    Resample,
    Scale,
    Zero,
    derangement,
    parse_action,
    register_function,
)

VALUE = torch.arange(24.0).reshape(2, 3, 4)
AXES = ("batch", "pos", "d_model")


@register_function("tests: halve")
def halve(value):
    return value / 2


def test_what_each_action_makes_of_a_value():
    source = torch.full((2, 3, 4), 7.0)
    assert torch.equal(Patch().new(VALUE, source), source)
    assert not Zero().new(VALUE, None).any()
    assert torch.equal(Scale(3.0).new(VALUE, None), VALUE * 3)
    assert torch.equal(Apply("tests: halve").new(VALUE, None), VALUE / 2)
    assert torch.equal(
        Add((1.0, 0.0, 0.0, -2.0), 0.5).new(VALUE, None) - VALUE, torch.tensor([0.5, 0, 0, -1.0]).expand(2, 3, 4)
    )
    out = ProjectOut((0.0, 2.0, 0.0, 0.0)).new(VALUE, None)
    assert torch.equal(out[..., 1], torch.zeros(2, 3))
    assert torch.equal(out[..., [0, 2, 3]], VALUE[..., [0, 2, 3]])


def test_means_are_over_rows_and_real_positions():
    lengths = torch.tensor([3, 2])
    whole = Mean().prepared(VALUE, AXES, torch.tensor([3, 3]))
    assert torch.equal(whole, VALUE.mean((0, 1), keepdim=True))
    real = torch.cat([VALUE[0], VALUE[1, :2]]).mean(0)
    assert torch.equal(Mean().prepared(VALUE, AXES, lengths), real[None, None])
    by_position = Mean(by_position=True).prepared(VALUE, AXES, torch.tensor([3, 3]))
    assert torch.equal(by_position, VALUE.mean(0, keepdim=True))
    squares = torch.rand(2, 3, 5, 5)
    axes = ("batch", "head", "q_pos", "k_pos")
    assert torch.equal(Mean().prepared(squares, axes, torch.tensor([5, 5])), squares.mean(0, keepdim=True))


def test_a_mean_by_position_wants_rows_of_one_length():
    with pytest.raises(InvalidArgumentError) as error:
        Mean("other", by_position=True).prepared(VALUE, AXES, torch.tensor([3, 2]))
    assert str(error.value) == (
        "mean takes values at the same position\n  expected: rows of one length\n  got: rows of [3, 2] real tokens\n"
        "  where: source 'other'"
    )


def test_resampling_takes_another_row():
    found = Resample(seed=3).prepared(VALUE, AXES, torch.tensor([3, 3]))
    assert torch.equal(found, VALUE[[1, 0]])
    with pytest.raises(InvalidArgumentError, match="resampling takes the values of another row"):
        Resample().prepared(VALUE[:1], AXES, torch.tensor([3]))


def test_an_injected_vector_has_its_own_norm_or_the_streams():
    vector = torch.tensor([3.0, 0.0, 0.0, 4.0])
    assert torch.equal(Inject(vector).new(VALUE, None), vector.expand(2, 3, 4))
    norms = VALUE.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(Inject(vector, "stream", 2.0).new(VALUE, None), vector / 5 * norms * 2)
    torch.testing.assert_close(Inject(vector, "stream", add=True).new(VALUE, None), VALUE + vector / 5 * norms)


def test_a_subspace_is_exchanged():
    basis, source = torch.linalg.qr(torch.randn(4, 2)).Q, torch.randn(2, 3, 4)
    found = PatchSubspace(basis=basis).new(VALUE, source)
    torch.testing.assert_close(found @ basis, source @ basis)
    rest = torch.eye(4) - basis @ basis.T
    torch.testing.assert_close(found @ rest, VALUE @ rest, rtol=1e-4, atol=1e-5)


def test_a_map_of_the_value_is_added():
    reads, writes = torch.randn(4, 2), torch.randn(2, 4)
    torch.testing.assert_close(AddMapped.of(reads, writes).new(VALUE, None), VALUE + VALUE @ reads @ writes)
    basis = torch.linalg.qr(torch.randn(4, 2)).Q
    left = AddMapped.of(basis, -basis.T).new(VALUE, None)
    torch.testing.assert_close(left @ basis, torch.zeros(2, 3, 2), rtol=0, atol=1e-5)
    half = AddMapped.of(reads, writes).new(VALUE.half(), None)
    assert half.dtype == torch.float16
    with pytest.raises(InvalidArgumentError) as error:
        AddMapped.of(torch.ones(4, 2), torch.ones(4, 2))
    assert str(error.value) == (
        "the two sides of a map do not fit\n  expected: reads [d, k] and writes [k, d]\n  got: [4, 2] and [4, 2]"
    )
    with pytest.raises(InvalidArgumentError, match="the vector does not fit the values"):
        AddMapped.of(torch.ones(3, 2), torch.ones(2, 3)).new(VALUE, None)


@given(st.integers(2, 30), st.integers(0, 1000))
def test_a_derangement_keeps_nothing_in_place(size, seed):
    order = derangement(size, seed)
    assert sorted(order.tolist()) == list(range(size))
    assert not (order == torch.arange(size)).any()


ACTIONS = [
    Patch("other"),
    Zero(),
    Mean("other", by_position=True),
    Resample("other", seed=4),
    Add((0.1, -2.5), 3.0),
    Scale(0.5),
    ProjectOut((1.0, 0.3)),
    AddMapped([[1.0], [0.5]], [[0.2, -3.0]]),
    Apply("tests: halve"),
    Patch("other", layer=-2, position=(0, -1)),
    PatchSubspace("other", basis=[[1.0], [0.0]]),
    Inject([[1.0, 2.0], [0.5, 0.1]], "stream", 2.0, add=True),
    Mask(),
]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.kind)
def test_actions_are_data(action):
    assert parse_action(action.to_json()) == action
    assert hash(parse_action(action.to_json())) == hash(action)
    assert len({action, Zero()}) == (1 if action == Zero() else 2)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5))
def test_vectors_survive_json_exactly(values):
    vector = torch.tensor(values)
    back = parse_action(json.loads(json.dumps(Add.of(vector).to_json())))
    assert torch.equal(back.vector.tensor.float(), vector)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: parse_action({"kind": "pach"}),
            "unknown action 'pach'\n  expected: patch, patch_subspace, zero, mean, resample, add,",
        ),
        (
            lambda: parse_action({"kind": "zero", "by": 1}),
            "unknown fields of the action 'zero': by\n  expected: none",
        ),
        (lambda: ProjectOut((0.0, 0.0)), "a direction of length 0 cannot be projected out"),
        (
            lambda: Add((1.0,)).new(VALUE, None),
            "the vector does not fit the values\n  expected: [4], as the value's last axes\n  got: [1]",
        ),
        (
            lambda: Apply("tests: halv").new(VALUE, None),
            "no function is registered as 'tests: halv'\n  nearest: tests: halve",
        ),
        (
            lambda: register_function("tests: halve")(lambda value: value),
            "the name 'tests: halve' is taken",
        ),
        (lambda: Intervention("z", Zero(), positions=()), "positions=() chooses no places"),
        (lambda: Intervention("z", Zero(), heads=True), "heads=True chooses no places"),
        (
            lambda: Intervention("z", "zero"),
            "an intervention has an action\n  expected: such as clearspan.interventions.Zero()",
        ),
        (
            lambda: Intervention.from_json({"point": "z"}),
            "this is no intervention\n  expected: point, action, and any of",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(InvalidArgumentError) as error:
        make()
    assert str(error.value).startswith(message)


def test_a_function_of_another_shape_is_refused():
    @register_function("tests: first")
    def first(value):
        return value[:, 0]

    with pytest.raises(InvalidArgumentError, match="'tests: first' returned something of another shape"):
        Apply("tests: first").new(VALUE, None)
