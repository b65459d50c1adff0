import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import tiny_model
from tests.zoo import build

import clearspan
from clearspan.analysis import NotFiniteError, SteeringVector, fit_steering_vector, next_token_loss, steering_sweep
from clearspan.errors import AbsentPointError, InvalidArgumentError, PointNotReachedError, UnknownPointError

VARIANTS = ["gpt_bigcode", "gemma2", "mixtral", "opt post-norm", "falcon"]
POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module", params=VARIANTS)
def random_bridge(request):
    return clearspan.boot(build(request.param))


def ids(*shape, seed):
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mask():
    """Padding on either side."""
    mask = torch.ones(5, 7, dtype=torch.long)
    mask[0, :3] = mask[2, 5:] = mask[4, 1:] = 0
    return mask


def values_alone(bridge, tokens, mask, name):
    """Each row's values, from a run of the row alone without its padding."""
    rows = [row[real] for row, real in zip(tokens, mask.bool(), strict=True)]
    return [bridge.run_with_cache(row[None], names_filter=name)[1][name][0] for row in rows]


def a_vector(bridge, *names, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: bridge(torch.tensor([[1]]), stop_at_layer=0).shape[2:] for name in names}
    return SteeringVector({name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()})


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
        assert not torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=vector.hooks()), bridge(tokens))


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
        ({"positions": 9}, "row 0 has no position 9\n  expected: -2 to 1\n  got: 9"),
        ({"positions": slice(4, None)}, "row 0 has no position in slice(4, None, None)\n  got: 2 real tokens"),
        ({"batch_size": 0}, "batch_size=0\n  expected: batch_size > 0"),
        ({"negative": []}, "there is nothing to read\n  expected: at least one text\n  got: none"),
    ],
)
def test_what_cannot_be_fitted_raises(embedded, given, message):
    settings = {"positive": "import os", "negative": ["x = 1", "y"], **given}
    settings["positive"] = torch.tensor([[5, 6]])
    with pytest.raises(InvalidArgumentError) as raised:
        fit_steering_vector(embedded, **settings)
    assert str(raised.value) == message


def test_a_point_or_layer_that_is_not_there_raises():
    with pytest.raises(UnknownPointError, match="expected: a layer from 0 to 2\n  got: layer 3"):
        fit_steering_vector(clearspan.boot(tiny_model()), torch.tensor([[1]]), torch.tensor([[2]]), layers=3)
    with pytest.raises(AbsentPointError, match="attention and MLP run in parallel"):
        fit_steering_vector(
            clearspan.boot(build("gpt_neox")), torch.tensor([[1]]), torch.tensor([[2]]), name="resid_mid"
        )


# --- steering --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, 2, [0, 3], slice(2, None)], ids=["all", "one", "two", "a stretch"])
def test_steering_is_a_hand_written_hook(random_bridge, positions):
    bridge, tokens = random_bridge, ids(3, 5, seed=4)
    vector = a_vector(bridge, POINT, size=3.0)
    index = slice(None) if positions is None else positions

    def write(value, hook):
        value[:, index] += -1.5 * vector.vectors[POINT]

    expected = bridge.run_with_hooks(tokens, fwd_hooks=[(POINT, write)])
    found = bridge.run_with_hooks(tokens, fwd_hooks=vector.hooks(-1.5, positions))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, bridge(tokens))
    with vector.apply(bridge, -1.5, positions) as steered:
        assert steered is bridge
        assert torch.equal(bridge(tokens), found)
    assert not torch.allclose(bridge(tokens), found)


@torch.no_grad()
def test_a_vector_of_several_points_steers_at_all(embedded, tokens):
    names = ("blocks.1.hook_resid_post", "blocks.3.hook_attn_out")
    vector = a_vector(embedded, *names, size=5.0)
    hooks = [(name, lambda value, hook: value + 2 * vector.vectors[hook.name]) for name in names]
    expected = embedded.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(embedded.run_with_hooks(tokens, fwd_hooks=vector.hooks(2)), expected)
    for where in (3, "blocks.3.hook_attn_out"):
        one = embedded.run_with_hooks(tokens, fwd_hooks=vector.at(where).hooks(2))
        torch.testing.assert_close(one, embedded.run_with_hooks(tokens, fwd_hooks=hooks[1:]))


@torch.no_grad()
def test_in_half_precision_the_sum_is_rounded_once():
    bridge, tokens = clearspan.boot(tiny_model().bfloat16()), ids(1, 4, seed=1)
    vector, seen = a_vector(bridge, POINT), []
    value = bridge.run_with_cache(tokens, names_filter=POINT)[1][POINT]
    hooks = [*vector.hooks(0.37), (POINT, lambda value, hook: seen.append(value.clone()))]
    bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0], (value.float() + 0.37 * vector.vectors[POINT]).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, slice(1, 3)])
def test_ablation_leaves_nothing_along_the_vector_and_all_else(random_bridge, positions):
    bridge, tokens, seen = random_bridge, ids(2, 4, seed=5), []
    vector = a_vector(bridge, POINT, size=7.0)
    value = bridge.run_with_cache(tokens, names_filter=POINT)[1][POINT]
    hooks = [*vector.ablation_hooks(positions), (POINT, lambda value, hook: seen.append(value.clone()))]
    bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    unit = vector.vectors[POINT] / vector.vectors[POINT].norm()
    index = slice(None) if positions is None else positions
    torch.testing.assert_close((seen[0][:, index] @ unit), torch.zeros(()).expand(2, 4)[:, index], rtol=0, atol=1e-3)
    removed = value - seen[0]
    torch.testing.assert_close(removed, (removed @ unit)[..., None] * unit, rtol=1e-3, atol=1e-3)
    assert torch.equal(seen[0][:, 3:], value[:, 3:]) == (positions is not None)


def test_gradients_reach_what_comes_before_and_the_vector():
    bridge, tokens = clearspan.boot(tiny_model()), ids(2, 5, seed=1)
    shift = torch.zeros(48, requires_grad=True)
    vector = SteeringVector({POINT: shift})
    loss = bridge.run_with_hooks(tokens, fwd_hooks=vector.hooks(2.0), return_type="loss")
    loss.backward()
    _, cache = bridge.run_with_cache(tokens, names_filter=POINT, return_type="loss", incl_bwd=True)
    torch.testing.assert_close(shift.grad, 2 * cache[f"{POINT}_grad"].sum((0, 1)), rtol=1e-4, atol=1e-6)
    assert bridge.hf_model.transformer.wte.weight.grad.abs().sum() > 0


# --- generation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "positions", [None, 6, [1, 5], slice(4, None), slice(0, 4)], ids=["all", "one new", "two", "new", "prompt"]
)
@pytest.mark.parametrize("variant", ["gpt_bigcode", "gemma2", "falcon"])
def test_generation_is_steered_at_positions_of_the_sequence(variant, positions):
    bridge, tokens = clearspan.boot(build(variant)), ids(2, 4, seed=6)
    vector = a_vector(bridge, POINT, size=4.0)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    found = bridge.generate(tokens, fwd_hooks=vector.hooks(2.0, positions), **settings)

    def write(value, hook):
        chosen = [positions] if isinstance(positions, int) else positions
        at = range(value.shape[1]) if chosen is None else chosen
        at = range(value.shape[1])[at] if isinstance(at, slice) else [i for i in at if i < value.shape[1]]
        value[:, list(at)] += 2 * vector.vectors[POINT]

    sequence = tokens
    for _ in range(5):  # without a KV cache: the whole sequence anew
        logits = bridge.run_with_hooks(sequence, fwd_hooks=[(POINT, write)])
        sequence = torch.cat([sequence, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, sequence)
    with vector.apply(bridge, 2.0, positions):
        assert torch.equal(bridge.generate(tokens, **settings), sequence)


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
    for attempt in (zero.ablation_hooks, lambda: zero.with_norm(1.0)):
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
            "  expected: values of shape [256] at each position",
            "  got: [48]",
            "  where: blocks.2.hook_resid_post",
            "  fix: fit_steering_vector(bridge, positive, negative)",
        ]
    with pytest.raises(InvalidArgumentError) as raised:
        narrow.run_with_hooks(torch.tensor([[1, 2]]), fwd_hooks=vector.hooks())
    assert str(raised.value).splitlines() == [
        "the vector does not fit the values",
        "  expected: [256] at each position",
        "  got: [48]",
        "  where: blocks.2.hook_resid_post",
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


@pytest.mark.parametrize("positions", [-1, [0, -2], slice(-3, None)])
def test_positions_from_the_end_raise(positions):
    with pytest.raises(InvalidArgumentError) as raised:
        SteeringVector({POINT: torch.ones(48)}).hooks(positions=positions)
    assert str(raised.value).splitlines() == [
        f"positions={positions} counts from the end, which generation does not know",
        "  expected: positions in the sequence, from 0",
        "  fix: positions=tokens.shape[1] - 1 for the last of the input",
    ]


@pytest.mark.parametrize("positions", [7, [0, 9], slice(7, None), []])
def test_positions_that_a_run_does_not_have_raise(positions):
    bridge, tokens = clearspan.boot(tiny_model()), ids(2, 7, seed=1)
    hooks = SteeringVector({POINT: torch.ones(48)}).hooks(positions=positions)
    with pytest.raises(InvalidArgumentError) as raised:
        bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    assert str(raised.value).splitlines() == [
        f"positions={positions} is not in this run",
        "  expected: 0 to 6",
        f"  where: {POINT}",
    ]


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


def last_logit(logits):
    return logits[:, -1, 3]


@torch.no_grad()
def test_a_sweep_is_one_whole_run_for_each_point_strength_and_direction(random_bridge):
    bridge, tokens, other = random_bridge, ids(3, 5, seed=7), ids(2, 6, seed=8)
    names = ("blocks.2.hook_resid_pre", "blocks.0.hook_attn_out")
    vector, strengths = a_vector(bridge, *names, size=3.0), [-1, 0.5]
    found = steering_sweep(
        bridge, vector, tokens, last_logit, strengths=strengths, controls=2, seed=3, positions=slice(1, None),
        unrelated=other,
    )  # fmt: skip
    assert found.points == names
    close = {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(found.clean, last_logit(bridge(tokens)), **close)
    assert found.clean_cost == pytest.approx(bridge(other, return_type="loss").item(), rel=1e-5)
    for point, name in enumerate(names):
        for at, strength in enumerate(strengths):
            directions = [vector.at(name), *(vector.at(name).random_like(seed) for seed in (3, 4))]
            every = [found.per_row, *found.random_per_row]
            costs = [found.cost, *found.random_cost]
            for direction, values, cost in zip(directions, every, costs, strict=True):

                def write(value, hook, direction=direction, strength=strength):
                    value[:, 1:] += strength * direction.vectors[hook.name]

                def write_all(value, hook, direction=direction, strength=strength):
                    value += strength * direction.vectors[hook.name]

                expected = last_logit(bridge.run_with_hooks(tokens, fwd_hooks=[(name, write)]))
                torch.testing.assert_close(values[:, point, at], expected, **close)
                loss = bridge.run_with_hooks(other, fwd_hooks=[(name, write_all)], return_type="loss")
                torch.testing.assert_close(cost[point, at], loss, **close)


@torch.no_grad()
def test_all_points_are_steered_at_once_where_asked(embedded, tokens):
    vector = a_vector(embedded, "blocks.1.hook_resid_post", "hook_embed", size=4.0)
    found = steering_sweep(embedded, vector, tokens, last_logit, strengths=[2], controls=1, jointly=True)
    expected = last_logit(embedded.run_with_hooks(tokens, fwd_hooks=vector.hooks(2)))
    torch.testing.assert_close(found.per_row[:, 0, 0], expected)
    control = last_logit(embedded.run_with_hooks(tokens, fwd_hooks=vector.random_like(0).hooks(2)))
    torch.testing.assert_close(found.random_per_row[0, :, 0, 0], control)
    assert found.points == ("all 2 points",)


@torch.no_grad()
def test_padded_texts_are_each_alone_and_the_loss_is_what_is_measured_by_default(embedded):
    texts = ["import os, sys", "def f(self, x):\n    return x"]
    vector = a_vector(embedded, "blocks.2.hook_resid_post", size=4.0)
    both = steering_sweep(embedded, vector, texts, unrelated=texts, strengths=[1.0, 3.0])
    for row, text in enumerate(texts):
        tokens = embedded.to_tokens(text)
        alone = steering_sweep(embedded, vector, text, next_token_loss(tokens), strengths=[1.0, 3.0])
        torch.testing.assert_close(both.per_row[row], alone.per_row[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.cost, both.per_row.mean(0))
    assert both.metric == "next-token loss in nats"


@torch.no_grad()
def test_padding_on_the_left_is_not_seen(random_bridge):
    bridge, tokens = random_bridge, ids(2, 6, seed=9)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    vector = a_vector(bridge, POINT, size=3.0)
    both = steering_sweep(bridge, vector, tokens, last_logit, strengths=[1.0], controls=0, attention_mask=mask)
    alone = steering_sweep(bridge, vector, tokens[:1, 2:], last_logit, strengths=[1.0], controls=0)
    torch.testing.assert_close(both.per_row[0], alone.per_row[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(both.clean[0], alone.clean[0], rtol=1e-4, atol=1e-3)


def test_what_comes_before_the_point_is_not_run_again(embedded, tokens):
    vector, ran = a_vector(embedded, "blocks.3.hook_resid_post"), []
    handles = [
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(embedded.hf_model.transformer.h)
    ]
    steps = []
    steering_sweep(embedded, vector, tokens, strengths=[1], controls=1, progress=lambda *step: steps.append(step))
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2, 3, 4, 3, 4, 3, 4]
    assert steps == [("steering", 1, 2), ("steering", 2, 2)]


def test_a_sweep_prints_and_plots(embedded, tokens):
    vector = a_vector(embedded, "blocks.1.hook_resid_post", "blocks.2.hook_resid_post", size=4.0)
    found = steering_sweep(embedded, vector, tokens, last_logit, strengths=[0, 2], unrelated=tokens)
    frame = found.to_dataframe()
    assert list(frame) == ["point", "strength", "value", "random low", "random high", "cost", "random cost"]
    assert frame["point"].tolist() == [name for name in vector.names for _ in range(2)]
    assert frame["strength"].tolist() == [0, 2, 0, 2]
    assert frame["value"].tolist() == found.value.flatten().tolist()
    assert frame["random low"].tolist() == found.random_value.min(0).values.flatten().tolist()
    assert frame["random cost"].tolist() == found.random_cost.mean(0).flatten().tolist()
    assert frame["value"][0] == pytest.approx(found.clean.mean().item(), rel=1e-5)
    assert found.title == (
        f"the metric by strength of steering, mean over 1 row; {found.clean.mean():.4f} without; "
        f"loss on other text {found.clean_cost:.4f} nats without"
    )
    assert [line.name for line in found.plot().data] == list(vector.names)
    assert list(found.plot_cost().data[1].y) == found.cost[1].tolist()
    bare = steering_sweep(embedded, vector.at(1), tokens, last_logit, strengths=[1], controls=0)
    assert list(bare.columns()) == ["point", "strength", "value"]
    with pytest.raises(InvalidArgumentError, match="no cost was measured"):
        bare.plot_cost()
    one = steering_sweep(embedded, vector.at(1), tokens, last_logit, strengths=[1, 2], controls=2)
    assert [line.name for line in one.plot().data] == ["blocks.1.hook_resid_post", "random 0", "random 1"]
    names = [f"blocks.{layer}.hook_{point}" for layer in range(4) for point in ("resid_pre", "resid_post")]
    many = steering_sweep(embedded, a_vector(embedded, *names), tokens, last_logit, strengths=[1, 2], controls=0)
    assert list(many.plot().data[0].y) == names
    assert many.plot().data[0].z[0][1] == pytest.approx((many.value[0, 1] - many.clean.mean()).item(), abs=1e-4)


def test_a_sweep_over_nothing_and_other_hooks_in_the_way_raise(embedded, tokens):
    vector = a_vector(embedded, "blocks.2.hook_resid_post")
    for given, got in (({"strengths": []}, "0 strengths, controls=3"), ({"controls": -1}, "5 strengths, controls=-1")):
        with pytest.raises(InvalidArgumentError) as raised:
            steering_sweep(embedded, vector, tokens, **given)
        assert str(raised.value).splitlines() == [
            "nothing to sweep over",
            "  expected: one strength or more, and controls >= 0",
            f"  got: {got}",
        ]
    with (
        embedded.hooks([("blocks.0.hook_attn_out", lambda value, hook: None)]),
        pytest.raises(PointNotReachedError),
    ):
        steering_sweep(embedded, vector, tokens)
