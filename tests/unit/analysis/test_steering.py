"""Steering against plain forwards with hooks that are written here, each row alone and without its padding."""

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import tiny_model
from tests.zoo import build

import clearspan
from clearspan.analysis import SteeringVector, fit_steering_vector, steering_sweep
from clearspan.errors import AbsentPointError, ClearspanError, InvalidArgumentError, NotFiniteError, UnknownPointError
from clearspan.sweep import LogitDifference, NextTokenLoss

VARIANTS = ["gpt_bigcode", "gemma2", "mixtral", "falcon"]
POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module", params=VARIANTS)
def random_bridge(request):
    return clearspan.boot(build(request.param))


def ids(*shape, seed):
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mask():
    """Padding on either side."""
    return padding()


def padding():
    mask = torch.ones(5, 7, dtype=torch.long)
    mask[0, :3] = mask[2, 5:] = mask[4, 1:] = 0
    return mask


def values_alone(bridge, tokens, mask, name):
    """Each row's values, from a run of the row alone without its padding."""
    rows = [row[real] for row, real in zip(tokens, mask.bool(), strict=True)]
    return [bridge.run_with_cache(row[None], names_filter=name)[1][name][0] for row in rows]


def a_vector(bridge, *names, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({name: size * torch.randn(bridge.cfg.d_model, generator=generator) for name in names})


# --- fitting ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "positions", [-1, 0, None, [0, -1], slice(0, None, 2)], ids=["last", "first", "all", "two", "every other"]
)
def test_it_is_the_difference_of_the_means_of_rows_run_alone(random_bridge, mask, positions):
    bridge, positive, negative = random_bridge, ids(5, 7, seed=1), ids(3, 6, seed=2)
    found = fit_steering_vector(
        bridge, positive, negative, layers=[0, 1], positions=positions, positive_mask=mask, batch_size=2
    )
    index = slice(None) if positions is None else [positions] if isinstance(positions, int) else positions
    for name in ("blocks.0.hook_resid_post", POINT):
        means = [torch.zeros(()), torch.zeros(())]
        norms = []
        for side, (tokens, real) in enumerate([(positive, mask), (negative, torch.ones(3, 6))]):
            chosen = [value[index] for value in values_alone(bridge, tokens, real, name)]
            means[side] = torch.stack([value.mean(0) for value in chosen]).mean(0)
            norms += [value.norm(dim=-1) for value in chosen]
        torch.testing.assert_close(found.vectors[name], means[0] - means[1], rtol=1e-3, atol=1e-3)
        assert found.activation_norms[name] == pytest.approx(torch.cat(norms).mean().item(), rel=1e-4)


@torch.no_grad()
def test_texts_are_padded_batch_by_batch(embedded):
    positive, negative = ["import os, sys", "x", "def f(self, x):\n    return x"], ["import os", "y = 1"]
    found = fit_steering_vector(embedded, positive, negative, layers=2, positions=None, batch_size=2)

    def mean(texts):
        cached = (embedded.run_with_cache(text)[1]["resid_post", 2][0].mean(0) for text in texts)
        return torch.stack(list(cached)).mean(0)

    # Values of size 100, padded and alone, in float32.
    expected = mean(positive) - mean(negative)
    torch.testing.assert_close(found.vectors["blocks.2.hook_resid_post"], expected, rtol=1e-4, atol=1e-4)
    assert found.title == (
        "steering vector for tiny-bigcode: mean difference of 3 positive and 2 negative texts, at all positions"
    )
    assert found.model_name == "tiny-bigcode"


@torch.no_grad()
def test_the_principal_direction_of_pairs_is_that_of_their_second_moment(embedded):
    positive, negative = ["a = 1", "b = 2", "import os", "x = [1]"], ["a + 1", "b + 2", "def f", "x = {1"]
    found = fit_steering_vector(embedded, positive, negative, layers=1, method="paired_pca").at(1).vectors
    last = [
        torch.stack([embedded.run_with_cache(text)[1]["resid_post", 1][0, -1] for text in texts])
        for texts in (positive, negative)
    ]
    differences = (last[0] - last[1]).double()
    direction = torch.linalg.eigh(differences.T @ differences).eigenvectors[:, -1]
    expected = (differences @ direction).mean() * direction
    torch.testing.assert_close(found["blocks.1.hook_resid_post"].double(), expected, rtol=1e-3, atol=1e-3)
    back = fit_steering_vector(embedded, negative, positive, layers=1, method="paired_pca").at(1).vectors
    torch.testing.assert_close(back["blocks.1.hook_resid_post"], -found["blocks.1.hook_resid_post"])


def test_any_point_with_a_value_at_each_position_can_be_steered(random_bridge):
    bridge, tokens = random_bridge, ids(2, 5, seed=3)
    for name, shape in (("attn_out", [48]), ("z", None), ("hook_embed", None), ("embed", None)):
        layers = None if "embed" in name else -1
        vector = fit_steering_vector(bridge, tokens[:1], tokens[1:], layers=layers, name=name)
        (full,) = vector.names
        value = bridge.run_with_cache(tokens, names_filter=full)[1][full][:, -1]
        torch.testing.assert_close(vector.vectors[full], value[0] - value[1], rtol=1e-4, atol=1e-4)
        assert shape is None or list(vector.vectors[full].shape) == shape
        vector.check_fits(bridge)
        assert not torch.equal(bridge(tokens, interventions=vector.interventions()), bridge(tokens))


def test_what_comes_after_the_last_layer_is_not_run(embedded):
    ran = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(embedded.hf_model.transformer.h)
    ]
    fit_steering_vector(embedded, ["x = 1"], ["y", "z"], layers=[2, 0])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2, 0, 1, 2]


def test_values_in_half_precision_are_averaged_in_float32():
    bridge = clearspan.boot(tiny_model().bfloat16())
    vector = fit_steering_vector(bridge, ids(3, 4, seed=1), ids(3, 4, seed=2), layers=1)
    assert vector.vectors[POINT].dtype == torch.float32
    assert vector.vectors[POINT].bfloat16().float().ne(vector.vectors[POINT]).any()


def test_values_that_overflow_raise():
    bridge = clearspan.boot(tiny_model().half())
    with torch.no_grad():
        bridge.hf_model.transformer.wte.weight[5] = 6e4
        bridge.hf_model.transformer.wpe.weight[:] = 6e4
    with pytest.raises(NotFiniteError) as raised:
        fit_steering_vector(bridge, torch.tensor([[5, 5]]), torch.tensor([[4, 4]]), name="hook_embed", layers=None)
        fit_steering_vector(bridge, torch.tensor([[5, 5]]), torch.tensor([[4, 4]]), name="resid_pre", layers=0)
    assert str(raised.value).splitlines() == [
        "the values at blocks.0.hook_resid_pre are not finite",
        "  got: torch.float16",
        "  fix: clearspan.boot(model, dtype=torch.float32), if they overflow",
        "  argument: positive",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "svm"}, "unknown method 'svm'\n  expected: 'mean_difference' or 'paired_pca'"),
        (
            {"method": "paired_pca"},
            "method='paired_pca' takes pairs\n  expected: as many positive as negative texts\n  got: (1, 2)",
        ),
        ({"layers": []}, "there is no layer to read\n  expected: layers=None for all\n  got: none"),
        (
            {"name": "hook_embed", "layers": 1},
            "'hook_embed' is one point, in one place\n  expected: layers=None\n  got: 1",
        ),
        (
            {"name": "pattern"},
            "blocks.0.attn.hook_pattern is not a value at each position\n"
            "  expected: [batch, pos, ...]\n  got: [batch, head, q_pos, k_pos]",
        ),
        ({"positions": 9}, "row 0 has no position 9\n  expected: -2 to 1\n  got: 2 real tokens"),
        (
            {"positions": "a"},
            "positions='a' are no positions\n  expected: a whole number, several, a list for each row, ",
        ),
        ({"positions": 1.5}, "positions=1.5 are no positions"),
        ({"positions": []}, "row 0 has no position in []"),
        ({"layers": "a"}, "layers='a'\n  expected: a whole number, or several"),
        ({"name": 3}, "a hook point is given by its name\n  got: 3"),
        ({"method": ["svm"]}, "unknown method ['svm']"),
        (
            {"positions": slice(4, None)},
            "row 0 has no position in slice(4, None, None)\n  expected: positions=None for all\n  got: 2 real tokens",
        ),
        ({"batch_size": 0}, "batch_size=0\n  expected: a whole number, batch_size >= 1"),
    ],
)
def test_what_cannot_be_fitted_raises(embedded, given, message):
    settings = {"positive": "import os", "negative": ["x = 1", "y"], **given}
    settings["positive"] = torch.tensor([[5, 6]])
    with pytest.raises(InvalidArgumentError) as raised:
        fit_steering_vector(embedded, **settings)
    assert str(raised.value).startswith(message)


def test_a_point_or_layer_that_is_not_there_raises():
    with pytest.raises(UnknownPointError, match="expected: a layer from 0 to 2\n  got: layer 3"):
        fit_steering_vector(clearspan.boot(tiny_model()), torch.tensor([[1]]), torch.tensor([[2]]), layers=3)
    with pytest.raises(AbsentPointError, match="attention and MLP run in parallel"):
        fit_steering_vector(
            clearspan.boot(build("gpt_neox")), torch.tensor([[1]]), torch.tensor([[2]]), name="resid_mid"
        )


# --- steering --------------------------------------------------------------------------------------------------------


def edited(bridge, tokens, mask, edit, name=POINT):
    """Returns each row's last logits, from a run of the row alone, its real values `[pos, *axes]` edited in place."""
    last = []
    for row, real in zip(tokens, mask.bool(), strict=True):

        def write(value, hook):
            edit(value[0])

        last.append(bridge.run_with_hooks(row[real][None], fwd_hooks=[(name, write)])[0, -1])
    return torch.stack(last)


def last_logits(bridge, tokens, mask, **kwargs):
    batch = bridge.to_batch(tokens, mask)
    logits = bridge(batch, **kwargs)
    return torch.stack([logits[row, batch.column_of(row, -1)] for row in range(batch.rows)])


POSITIONS = {
    "all": None,
    "the first": 0,
    "the last": -1,
    "two": [0, -1],
    "a stretch": slice(1, None),
    "the last two": slice(-2, None),
}


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_steering_is_a_hand_written_hook_on_rows_alone(random_bridge, positions):
    bridge, tokens, mask = random_bridge, ids(4, 7, seed=4), padding()[:4]
    vector = a_vector(bridge, POINT, size=3.0)
    index = slice(None) if positions is None else positions

    def edit(value):
        value[index] += -1.5 * vector.vectors[POINT]

    expected = edited(bridge, tokens, mask, edit)
    steer = vector.interventions(-1.5, positions)
    found = last_logits(bridge, tokens, mask, interventions=steer)
    # Logits of size 10 to 100, padded and alone, in float32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-3)
    with vector.apply(bridge, -1.5, positions) as steered:
        assert steered is bridge
        assert torch.equal(last_logits(bridge, tokens, mask), found)
    assert not torch.allclose(last_logits(bridge, tokens, mask), found)


@torch.no_grad()
def test_positions_differ_by_row_and_holes_are_skipped():
    bridge, tokens, mask = clearspan.boot(build("llama")), ids(2, 7, seed=4), torch.ones(2, 7, dtype=torch.long)
    mask[0, 2:4] = mask[1, :2] = 0
    vector = a_vector(bridge, POINT, size=3.0)
    found = last_logits(bridge, tokens, mask, interventions=vector.interventions(2.0, [[2, 3], [-1, 1]]))
    for row, at in enumerate([[2, 3], [4, 1]]):

        def edit(value, at=at):
            value[at] += 2 * vector.vectors[POINT]

        expected = edited(bridge, tokens[row : row + 1], mask[row : row + 1], edit)
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=2e-3)


@torch.no_grad()
def test_a_vector_of_several_points_steers_at_all(embedded, tokens):
    names = ("blocks.1.hook_resid_post", "blocks.3.hook_attn_out")
    vector = a_vector(embedded, *names, size=5.0)
    hooks = [(name, lambda value, hook: value + 2 * vector.vectors[hook.name]) for name in names]
    expected = embedded.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(embedded(tokens, interventions=vector.interventions(2)), expected)
    for where in (3, "blocks.3.hook_attn_out"):
        one = embedded(tokens, interventions=vector.at(where).interventions(2))
        torch.testing.assert_close(one, embedded.run_with_hooks(tokens, fwd_hooks=hooks[1:]))


@torch.no_grad()
def test_in_half_precision_the_sum_is_rounded_once():
    bridge, tokens = clearspan.boot(tiny_model().bfloat16()), ids(1, 4, seed=1)
    vector = a_vector(bridge, POINT)
    value = bridge.run_with_cache(tokens, names_filter=POINT)[1][POINT]
    seen = bridge.run_with_cache(tokens, POINT, interventions=vector.interventions(0.37))[1][POINT]
    assert seen.dtype == torch.bfloat16
    assert torch.equal(seen, (value.float() + 0.37 * vector.vectors[POINT]).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, slice(1, 3), -1])
def test_ablation_leaves_nothing_along_the_vector_and_all_else(random_bridge, positions):
    bridge, tokens = random_bridge, ids(2, 4, seed=5)
    vector = a_vector(bridge, POINT, size=7.0)
    value = bridge.run_with_cache(tokens, POINT)[1][POINT]
    seen = bridge.run_with_cache(tokens, POINT, interventions=vector.ablation(positions))[1][POINT]
    unit = vector.vectors[POINT] / vector.vectors[POINT].norm()
    index = slice(None) if positions is None else positions
    assert (seen[:, index] @ unit).abs().max() < 1e-3
    removed = value - seen
    torch.testing.assert_close(removed, (removed @ unit)[..., None] * unit, rtol=1e-3, atol=1e-3)
    assert torch.equal(seen[:, 0], value[:, 0]) == (positions is not None)


def test_gradients_reach_what_comes_before():
    bridge, tokens = clearspan.boot(tiny_model()), ids(2, 5, seed=1)
    vector = a_vector(bridge, POINT)
    bridge(tokens, interventions=vector.interventions(2.0), return_type="loss").backward()
    plain = clearspan.boot(tiny_model())
    hook = (POINT, lambda value, hook: value + 2 * vector.vectors[POINT])
    plain.run_with_hooks(tokens, fwd_hooks=[hook], return_type="loss").backward()
    for name, parameter in plain.hf_model.named_parameters():
        torch.testing.assert_close(bridge.hf_model.get_parameter(name).grad, parameter.grad)


# --- generation ------------------------------------------------------------------------------------------------------

GENERATED = {
    "all": (None, lambda known, place: True),
    "one new": (6, lambda known, place: place == 6),
    "two": ([1, 5], lambda known, place: place in (1, 5)),
    "new": (slice(4, None), lambda known, place: place >= 4),
    "the prompt": (slice(0, 4), lambda known, place: place < 4),
    "from the prompt's last on": (slice(-1, None), lambda known, place: place >= known - 1),
    "the prompt's last": (-1, lambda known, place: place == known - 1),
}


@torch.no_grad()
@pytest.mark.parametrize("where", GENERATED)
@pytest.mark.parametrize("variant", ["gpt_bigcode", "gemma2"])
def test_generation_is_steered_at_positions_of_the_sequence(variant, where):
    bridge, tokens, mask = clearspan.boot(build(variant)), ids(2, 4, seed=6), torch.ones(2, 4, dtype=torch.long)
    if where in ("all", "from the prompt's last on", "the prompt's last"):
        mask[0, :2] = 0
    positions, is_steered = GENERATED[where]
    vector = a_vector(bridge, POINT, size=4.0)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    found = bridge.generate(tokens, interventions=vector.interventions(2.0, positions), **settings)
    for row in range(2):
        sequence = tokens[row][mask[row].bool()][None]
        known = sequence.shape[1]

        def write(value, hook, known=known):
            at = [place for place in range(value.shape[1]) if is_steered(known, place)]
            value[:, at] += 2 * vector.vectors[POINT]

        for _ in range(5):  # without a KV cache: the whole sequence anew
            logits = bridge.run_with_hooks(sequence, fwd_hooks=[(POINT, write)])
            sequence = torch.cat([sequence, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(found[row, 4:], sequence[0, known:])
    with vector.apply(bridge, 2.0, positions):
        assert torch.equal(bridge.generate(tokens, **settings), found)


# --- other vectors, files, errors ------------------------------------------------------------------------------------


def test_random_directions_have_the_norms_and_follow_the_seed(embedded):
    vector = a_vector(embedded, "blocks.1.hook_resid_post", "blocks.2.hook_resid_post", size=9.0)
    state = torch.get_rng_state()
    first, again, other = (vector.random_like(seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    for name, norm in vector.norms.items():
        assert first.norms[name] == pytest.approx(norm)
        assert torch.equal(first.vectors[name], again.vectors[name])
        # The cosine of random directions in 256 dimensions has a spread of 1/16.
        assert abs(first.cosine_similarity(vector)[name]) < 0.3
        assert abs(first.cosine_similarity(other)[name]) < 0.3
    assert first.made_by == "random directions of seed 4, of the norms of: given"
    assert list(first.vectors) == list(vector.vectors)


def test_norms_and_angles():
    vector = SteeringVector({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 2.0])})
    other = SteeringVector({"b": torch.tensor([1.0, 1.0]), "c": torch.ones(1)})
    assert vector.with_norm(1.0).norms == pytest.approx({"a": 1, "b": 1})
    assert vector.with_norm({"a": 2.5, "b": 4}).vectors["a"].tolist() == pytest.approx([1.5, 2.0])
    assert vector.cosine_similarity(other) == pytest.approx({"b": 0.5**0.5})
    zero = SteeringVector({"a": torch.zeros(2)})
    assert zero.cosine_similarity(vector) == {"a": 0}
    assert zero.random_like().vectors["a"].tolist() == [0, 0]
    for attempt in (zero.ablation, lambda: zero.with_norm(1.0)):
        with pytest.raises(InvalidArgumentError, match="the vector at a is zero, so it has no direction"):
            attempt()


def test_it_prints_its_norms(embedded):
    vector = fit_steering_vector(embedded, ["x = 1"], ["y = 2"], layers=[0, 1])
    assert list(vector.columns()) == ["point", "norm", "of activations"]
    frame = vector.to_dataframe()
    assert frame["norm"].tolist() == list(vector.norms.values())
    shares = [vector.norms[name] / vector.activation_norms[name] for name in vector.names]
    assert frame["of activations"].tolist() == shares
    assert list(vector.at(1).columns()["point"]) == ["blocks.1.hook_resid_post"]
    assert list(vector.plot().data[0].y) == list(vector.norms.values())
    assert str(SteeringVector({"a": torch.ones(4)})).splitlines() == [
        "steering vector for a model: given",
        "point    norm",
        "a      2.0000",
    ]


def test_it_comes_back_from_a_file(tmp_path, embedded):
    vector = fit_steering_vector(embedded, ["x = 1"], ["y = 2", "import os"], layers=[3, 0], name="resid_mid")
    vector.save(tmp_path / "vector.safetensors")
    loaded = SteeringVector.load(tmp_path / "vector.safetensors", embedded)
    assert loaded.names == vector.names == ("blocks.3.hook_resid_mid", "blocks.0.hook_resid_mid")
    assert all(torch.equal(loaded.vectors[name], vector.vectors[name]) for name in vector.names)
    assert (loaded.title, loaded.model_name) == (vector.title, "tiny-bigcode")
    assert loaded.activation_norms == vector.activation_norms
    assert str(loaded) == str(vector)


def test_a_file_for_another_model_and_a_file_that_is_none_raise(tmp_path, embedded):
    narrow = clearspan.boot(tiny_model())
    vector = fit_steering_vector(embedded, ["x = 1"], ["y = 2"], layers=2)
    vector.save(tmp_path / "vector.safetensors")
    for attempt in (
        lambda: SteeringVector.load(tmp_path / "vector.safetensors", narrow),
        lambda: vector.apply(narrow).__enter__(),
        lambda: steering_sweep(narrow, vector, torch.tensor([[1, 2]])),
    ):
        with pytest.raises(InvalidArgumentError) as raised:
            attempt()
        assert str(raised.value).splitlines() == [
            "the steering vector for tiny-bigcode does not fit GPTBigCodeForCausalLM",
            "  expected: a vector of shape [48], as the value at each position",
            "  got: [256]",
            "  where: blocks.2.hook_resid_post",
            "  fix: fit_steering_vector(bridge, positive, negative)",
        ]
    with pytest.raises(InvalidArgumentError) as raised:
        narrow(torch.tensor([[1, 2]]), interventions=vector.interventions())
    assert str(raised.value).splitlines()[:3] == [
        "the vector does not fit the values",
        "  expected: [48], as the value's last axes",
        "  got: [256]",
    ]
    fit_steering_vector(embedded, ["x = 1"], ["y = 2"], layers=4).save(tmp_path / "deep.safetensors")
    with pytest.raises(UnknownPointError, match="got: layer 4"):
        SteeringVector.load(tmp_path / "deep.safetensors", narrow)
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidArgumentError) as raised:
        SteeringVector.load(tmp_path / "other.safetensors", embedded)
    assert str(raised.value).splitlines() == [
        "other.safetensors is no steering vector",
        "  expected: a file written by SteeringVector.save, of format 'clearspan steering vector 1'",
        "  got: format None",
    ]


@pytest.mark.parametrize("positions", [7, [0, 9], -8, [[0], [7]]])
def test_positions_that_a_row_does_not_have_raise(positions):
    bridge, tokens = clearspan.boot(tiny_model()), ids(2, 7, seed=1)
    steer = SteeringVector({POINT: torch.ones(48)}).interventions(positions=positions)
    with pytest.raises(InvalidArgumentError, match=r"row \d has no position") as raised:
        bridge(tokens, interventions=steer)
    assert "expected: -7 to 6\n  got: 7 real tokens" in str(raised.value)


@pytest.mark.parametrize("positions", ["a", 1.5, [], [[]], True, slice(0, 4, -1), [0, "a"]])
@pytest.mark.parametrize("kind", ["interventions", "ablation"])
def test_what_are_no_positions_raises(kind, positions):
    vector = SteeringVector({POINT: torch.ones(48)})
    with pytest.raises(InvalidArgumentError, match="positions="):
        (vector.interventions if kind == "interventions" else vector.ablation)(positions=positions)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda vector: vector.interventions("a"), "strength='a'\n  expected: a number"),
        (lambda vector: vector.interventions(None), "strength=None\n  expected: a number"),
        (lambda vector: vector.with_norm("a"), f"the norm at {POINT} is no number\n  got: 'a'"),
        (lambda vector: vector.with_norm({}), f"the norm at {POINT} is no number\n  got: None"),
        (lambda vector: SteeringVector({POINT: "a"}), f"the vector at {POINT} is no tensor\n  got: str"),
        (
            lambda vector: SteeringVector({POINT: torch.ones(3).long()}),
            f"the vector at {POINT} is no vector of numbers",
        ),
        (lambda vector: SteeringVector({POINT: torch.tensor(1.0)}), f"the vector at {POINT} is no vector of numbers"),
        (lambda vector: SteeringVector([1.0]), "a steering vector needs a hook point\n  expected: {name: vector}"),
        (lambda vector: SteeringVector({1: torch.ones(2)}), "a hook point is given by its name\n  got: 1"),
        (lambda vector: vector.random_like("a"), "seed='a'\n  expected: a whole number, seed >= 0"),
        (lambda vector: vector.cosine_similarity({}), "this is no SteeringVector\n  got: {}"),
    ],
)
def test_wrong_types_are_named(attempt, message):
    with pytest.raises(InvalidArgumentError) as raised:
        attempt(SteeringVector({POINT: torch.ones(48)}))
    assert str(raised.value).startswith(message)


def test_a_list_of_numbers_is_a_vector():
    assert torch.equal(SteeringVector({POINT: [1, 2]}).vectors[POINT], torch.tensor([1.0, 2.0]))


def test_no_vector_and_no_single_vector_raise():
    with pytest.raises(InvalidArgumentError, match="a steering vector needs a hook point"):
        SteeringVector({})
    vector = SteeringVector({"blocks.1.hook_resid_pre": torch.ones(2), "blocks.1.hook_resid_post": torch.ones(2)})
    for where, count in ((1, 2), (0, 0), ("resid_pre", 0)):
        with pytest.raises(InvalidArgumentError) as raised:
            vector.at(where)
        assert str(raised.value).splitlines() == [
            f"there is not one vector at {where!r}",
            "  expected: one of blocks.1.hook_resid_pre, blocks.1.hook_resid_post",
            f"  got: {count}",
        ]


# --- sweeping --------------------------------------------------------------------------------------------------------

COST = "loss on other text"
LAST = LogitDifference(3)


@torch.no_grad()
def test_a_sweep_is_one_whole_run_of_rows_alone_for_each_cell(random_bridge, mask):
    bridge, tokens, other = random_bridge, ids(5, 7, seed=7)[:4], ids(4, 7, seed=8)
    mask, other_mask = mask[:4], mask[:4].flip(1)
    names = ("blocks.2.hook_resid_pre", "blocks.0.hook_attn_out")
    vector, strengths = a_vector(bridge, *names, size=3.0), [-1, 0.5]
    found = steering_sweep(
        bridge, vector, tokens, LAST, strengths=strengths, controls=2, seed=3, positions=slice(-2, None),
        unrelated=other, attention_mask=mask, unrelated_mask=other_mask,
    )  # fmt: skip
    assert found.axes == {
        "point": names, "direction": ("vector", "random 0", "random 1"), "strength": (-1.0, 0.5)
    }  # fmt: skip
    close = {"rtol": 1e-4, "atol": 2e-3}
    nothing = edited(bridge, tokens, mask, lambda value: None)[:, 3]
    torch.testing.assert_close(found.base["logit_difference"], nothing, **close)
    for point, name in enumerate(names):
        for number, direction in enumerate([vector.at(name), *(vector.at(name).random_like(seed) for seed in (3, 4))]):
            for at, strength in enumerate(strengths):
                shift = strength * direction.vectors[name]

                def write(value, shift=shift):
                    value[-2:] += shift

                expected = edited(bridge, tokens, mask, write, name)[:, 3]
                torch.testing.assert_close(found.of()[point, number, at], expected, **close)
                losses = [
                    bridge.run_with_hooks(
                        row[real][None],
                        fwd_hooks=[(name, lambda value, hook, shift=shift: value + shift)],
                        return_type="loss",
                    )
                    for row, real in zip(other, other_mask.bool(), strict=True)
                ]
                torch.testing.assert_close(found.of(COST)[point, number, at], torch.stack(losses), **close)


@torch.no_grad()
def test_all_points_are_steered_at_once_where_asked(embedded, tokens):
    vector = a_vector(embedded, "blocks.1.hook_resid_post", "hook_embed", size=4.0)
    found = steering_sweep(embedded, vector, tokens, LAST, strengths=[2], controls=1, jointly=True)
    for number, direction in enumerate((vector, vector.random_like(0))):
        expected = embedded(tokens, interventions=direction.interventions(2))[:, -1, 3]
        torch.testing.assert_close(found.of()[0, number, 0], expected)
    assert found.axes["point"] == ("all 2 points",)


@torch.no_grad()
def test_the_loss_is_what_is_measured_by_default(embedded):
    texts = ["import os, sys", "def f(self, x):\n    return x"]
    vector = a_vector(embedded, "blocks.2.hook_resid_post", size=4.0)
    both = steering_sweep(embedded, vector, texts, unrelated=texts, strengths=[1.0, 3.0])
    assert torch.equal(both.of(), both.of(COST))
    for row, text in enumerate(texts):
        alone = steering_sweep(embedded, vector, text, NextTokenLoss(), strengths=[1.0, 3.0])
        torch.testing.assert_close(both.of()[..., row], alone.of()[..., 0], rtol=1e-4, atol=1e-4)
    assert both.title.startswith("next-token loss in nats and loss on other text in nats with steering; ")


@torch.no_grad()
def test_a_row_that_lacks_a_position_is_nan(bridge):
    vector = a_vector(bridge, POINT, size=3.0)
    found = steering_sweep(bridge, vector, [[1, 2, 3], [4, 5]], LAST, strengths=[1.0], controls=0, positions=2)
    assert found.of().isnan().tolist() == [[[[False, True]]]]
    with pytest.raises(InvalidArgumentError, match="row 0 has no position 3"):
        steering_sweep(bridge, vector, [[1, 2, 3], [4, 5]], LAST, strengths=[1.0], positions=3)


def test_cells_run_in_few_batches_from_the_point_on(embedded, tokens):
    """Ten cells that start at block 4 are one forward of it."""
    vector, ran = a_vector(embedded, "blocks.3.hook_resid_post"), []
    handles = [
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(embedded.hf_model.transformer.h)
    ]
    steps = []
    steering_sweep(
        embedded, vector, tokens[:, :8], strengths=[1, 2], controls=4, progress=lambda *step: steps.append(step)
    )
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2, 3, 4, 4]
    assert steps == [("sweep", 10, 10)]


def test_a_sweep_is_drawn_by_strength(embedded, tokens):
    vector = a_vector(embedded, "blocks.1.hook_resid_post", "blocks.2.hook_resid_post", size=4.0)
    found = steering_sweep(embedded, vector, tokens, LAST, strengths=[0, 2], controls=1, unrelated=tokens)
    assert list(found.to_dataframe()) == ["point", "direction", "strength", "logit_difference", COST, "change"]
    assert found.select(direction="vector", strength=0).change().abs().max() < 1e-5
    assert [line.name for line in found.plot(direction="vector").data] == list(vector.names)
    costs = found.plot(COST, point="blocks.1.hook_resid_post")
    assert [line.name for line in costs.data] == ["vector", "random 0"]
    assert list(costs.data[0].x) == [0.0, 2.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strengths": []}, "strengths=[]\n  expected: numbers, one or more"),
        ({"strengths": "a"}, "strengths='a'\n  expected: numbers, one or more"),
        ({"strengths": ["a"]}, "strengths=['a']\n  expected: numbers, one or more"),
        ({"controls": -1}, "controls=-1\n  expected: a whole number, controls >= 0"),
        ({"seed": 0.5}, "seed=0.5\n  expected: a whole number, seed >= 0"),
        ({"vector": torch.ones(256)}, "this is no SteeringVector\n  got: "),
        ({"metric": 3}, "a sweep measures a metric"),
        ({"positions": "a"}, "positions='a' chooses no places"),
        ({"unrelated": []}, "an empty list has no rows"),
        ({"unrelated": torch.tensor([[5]])}, "there is no next token to predict"),
    ],
)
def test_what_cannot_be_swept_raises(embedded, tokens, given, message):
    vector = a_vector(embedded, "blocks.2.hook_resid_post")
    with pytest.raises(ClearspanError) as raised:
        steering_sweep(**{"bridge": embedded, "vector": vector, "input": tokens, **given})
    assert str(raised.value).startswith(message)


def test_other_hooks_in_the_way_raise(embedded, tokens):
    with (
        embedded.hooks([("blocks.0.hook_attn_out", lambda value, hook: None)]),
        pytest.raises(InvalidArgumentError, match="hooks are on the model"),
    ):
        steering_sweep(embedded, a_vector(embedded, "blocks.2.hook_resid_post"), tokens)
