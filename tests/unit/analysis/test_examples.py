import inspect
import itertools
import textwrap

import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan.analysis import max_activating_examples
from clearspan.errors import (
    InvalidArgumentError,
    NotFiniteError,
    NoTokenizerError,
    PointNotReachedError,
    UnknownPointError,
)

POST = "blocks.1.mlp.hook_post"
LENGTHS = (5, 9, 23, 1, 12, 7, 30, 2, 16)
"""Of texts; with pieces of 8 tokens, some are one piece and some are several."""
LENGTH = 8


@pytest.fixture(scope="module")
def texts():
    """Random tokens. No two pieces begin alike: equal values, rounded differently in batches, have no order."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(1, 97, (length,), generator=generator) for length in LENGTHS]
    starts = [(text, start) for text in made for start in range(0, len(text), LENGTH)]
    for number, (text, start) in enumerate(starts, start=1):
        text[start] = number
    return made


@pytest.fixture(scope="module")
def random_bridge():
    return clearspan.boot(build("gpt_bigcode"))


@torch.no_grad()
def every_value(bridge, texts, name, feature=None, length=LENGTH):
    """All values: for each piece alone, its text, its start, its tokens and `[pos, feature]`."""
    found = []
    for number, text in enumerate(texts):
        for start in range(0, len(text), length):
            piece = text[start : start + length]
            _, cache = bridge.run_with_cache(piece[None], names_filter=name)
            value = cache[name] if feature is None else feature(cache[name])
            value = value if value.ndim == 3 else value[..., None]
            found.append((number, start, piece, value[0].float()))
    return found


def brute_force(pieces, index, k, *, one_per_text, exclude_bos):
    """The places of the largest values of a feature, as (value, text, position), from all values."""
    places = [
        (value, text, start + position)
        for text, start, _, values in pieces
        for position, value in enumerate(values[:, index].tolist())
        if position or not exclude_bos
    ]
    places.sort(key=lambda place: -place[0])  # a stable sort: of equal values the first stays first
    if one_per_text:
        first = {}
        for place in places:
            first.setdefault(place[1], place)
        places = list(first.values())
    return places[:k]


def assert_same(examples, expected):
    assert [(example.text, example.position) for example in examples] == [place[1:] for place in expected]
    assert [example.value for example in examples] == pytest.approx(
        [place[0] for place in expected], rel=1e-4, abs=1e-4
    )


@pytest.mark.parametrize("exclude_bos", [True, False])
@pytest.mark.parametrize("one_per_text", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_they_are_the_largest_of_all_values(random_bridge, texts, one_per_text, exclude_bos, batch_size):
    options = {"one_per_text": one_per_text, "exclude_bos": exclude_bos}
    pieces = every_value(random_bridge, texts, POST)
    some = max_activating_examples(
        random_bridge, texts, POST, index=[7, 0, 33, 7], k=4, length=LENGTH, batch_size=batch_size, **options
    )
    assert some.features == (7, 0, 33)
    for index in some.features:
        assert_same(some.examples(index), brute_force(pieces, index, 4, **options))
    every = max_activating_examples(
        random_bridge, iter(texts), POST, k=4, length=LENGTH, batch_size=batch_size, **options
    )
    width = random_bridge.hook_dict[POST].sizes["d_mlp"]
    assert every.features == tuple(range(width))
    for index in range(width):
        assert_same(every.examples(index), brute_force(pieces, index, 4, **options))


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("llama", "blocks.0.mlp.hook_pre"),
        ("gemma2", "blocks.2.hook_mlp_out"),
        ("mixtral", "blocks.1.mlp.hook_router_logits"),
        ("bloom", "blocks.1.hook_resid_mid"),
        ("opt post-norm", POST),
        ("gpt2", "blocks.0.ln1.hook_scale"),
        ("gpt_neox", "hook_embed"),
        ("gpt_bigcode", "ln_final.hook_normalized"),
        ("gpt_bigcode", "hook_logits"),
    ],
)
def test_any_point_of_any_architecture(variant, name, texts):
    bridge = clearspan.boot(build(variant))
    found = max_activating_examples(bridge, texts, name, index=0, k=5, length=LENGTH, batch_size=4)
    pieces = every_value(bridge, texts, name)
    assert_same(found.examples(), brute_force(pieces, 0, 5, one_per_text=True, exclude_bos=True))


def previous_token(pattern):
    """How much each position attends to the one before, by head."""
    return torch.nn.functional.pad(pattern.diagonal(-1, dim1=-2, dim2=-1), (1, 0)).transpose(1, 2)


def first_head_norm(z):
    return z[:, :, 0].norm(dim=-1)


@pytest.mark.parametrize(
    ("name", "feature", "index"),
    [
        ("blocks.1.attn.hook_pattern", previous_token, 2),
        ("blocks.1.attn.hook_z", first_head_norm, None),
        (POST, lambda post: -post, 5),
    ],
)
def test_a_function_makes_the_features(random_bridge, texts, name, feature, index):
    found = max_activating_examples(
        random_bridge, texts, name, feature=feature, index=index, k=4, length=LENGTH, batch_size=4
    )
    pieces = every_value(random_bridge, texts, name, feature)
    assert found.features == (index or 0,)
    assert_same(found.examples(), brute_force(pieces, index or 0, 4, one_per_text=True, exclude_bos=True))
    assert found.title.startswith(f"largest activations of feature({name})[{index or 0}], among ")


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("one_per_text", [True, False])
def test_of_equal_values_the_first_come_first(random_bridge, texts, one_per_text, batch_size):
    def is_positive(post):
        return (post > 0.5).float()

    found = max_activating_examples(
        random_bridge,
        texts,
        POST,
        feature=is_positive,
        k=6,
        length=LENGTH,
        batch_size=batch_size,
        one_per_text=one_per_text,
    )
    pieces = every_value(random_bridge, texts, POST, is_positive)
    for index in range(40):
        assert_same(found.examples(index), brute_force(pieces, index, 6, one_per_text=one_per_text, exclude_bos=True))


def test_a_later_piece_of_a_text_takes_the_place_of_an_earlier_one(random_bridge):
    rising = torch.arange(1, 41)

    def number(embedding):  # which token it is, from the embedding alone
        weight = random_bridge.hf_model.transformer.wte.weight
        return torch.cdist(embedding.float(), weight[None].float()).argmin(-1).float()

    for text, expected in [(rising, 39), (rising.flip(0), 1)]:
        found = max_activating_examples(
            random_bridge, [text, torch.tensor([3, 3])], "hook_embed", feature=number, k=3, length=10, batch_size=1
        )
        assert [(example.text, example.position) for example in found.examples()] == [(0, expected), (1, 1)]
        assert found.top.texts.tolist() == [[0, 1, -1]]
        assert found.top.values[0, 2] == -torch.inf


@pytest.mark.parametrize(("context", "sides"), [(3, (3, 3)), ((6, 1), (6, 1)), (0, (0, 0)), ((2, 40), (2, 40))])
def test_the_window_is_what_the_model_saw_around_it(random_bridge, texts, context, sides):
    found = max_activating_examples(
        random_bridge, texts, POST, index=3, k=20, context=context, length=LENGTH, one_per_text=False, batch_size=4
    )
    pieces = every_value(random_bridge, texts, POST)
    before, after = (min(side, LENGTH - 1) for side in sides)
    assert found.top.tokens.shape == found.top.activations.shape == (1, 20, before + 1 + after)
    assert len(found.examples()) == 20
    for example in found.examples():
        _, start, tokens, values = next(
            piece for piece in pieces if piece[0] == example.text and 0 <= example.position - piece[1] < len(piece[2])
        )
        place = example.position - start
        window = slice(max(0, place - before), place + after + 1)
        assert list(example.tokens) == tokens[window].tolist()
        assert list(example.activations) == pytest.approx(values[window, 3].tolist(), rel=1e-4, abs=1e-4)
        assert example.at == min(place, before)
        assert example.tokens[example.at] == texts[example.text][example.position]
        assert example.activations[example.at] == example.value
        assert example.words == tuple(f"#{token}" for token in example.tokens)


def test_texts_are_asked_for_as_they_are_needed_and_once(random_bridge, texts):
    asked, seen = [], []

    def stream():
        for number, text in enumerate(texts):
            asked.append(number)
            yield text

    def note(post):
        seen.append(len(asked))
        return post

    max_activating_examples(random_bridge, stream(), POST, feature=note, index=0, length=64, batch_size=2)
    assert seen == [2, 4, 6, 8, 9]
    assert asked == list(range(len(texts)))


def test_later_blocks_are_not_run(random_bridge, texts):
    ran = []
    blocks = random_bridge.hf_model.transformer.h
    handles = [
        block.register_forward_hook(lambda *_, number=number: ran.append(number)) for number, block in enumerate(blocks)
    ]
    max_activating_examples(random_bridge, texts[:1], "blocks.0.mlp.hook_post", index=0)
    for handle in handles:
        handle.remove()
    assert set(ran) <= {0}


def test_strings_are_texts_and_a_string_is_one(embedded):
    sources = [inspect.getsource(textwrap.TextWrapper), "", "import os", inspect.getsource(textwrap.dedent)]
    found = max_activating_examples(embedded, iter(sources), "blocks.0.mlp.hook_post", index=4, k=3)
    first = found.examples()[0]
    assert (first.text, first.words[first.at]) == (0, "·raise")
    assert {example.text for example in found.examples()} == {0, 2, 3}
    assert found.text_count == 4
    alone = max_activating_examples(embedded, sources[3], "blocks.0.mlp.hook_post", index=4, k=3)
    assert [example.text for example in alone.examples()] == [0]
    place = alone.examples()[0].position
    assert embedded.to_tokens(sources[3])[0, place] == alone.examples()[0].tokens[alone.examples()[0].at]


def test_token_tensors_are_rows_or_one_row(random_bridge):
    tokens = torch.randint(1, 97, (3, 12), generator=torch.Generator().manual_seed(4))
    whole = max_activating_examples(random_bridge, tokens, POST, index=2, k=3)
    rows = max_activating_examples(random_bridge, list(tokens), POST, index=2, k=3)
    assert str(whole) == str(rows)
    one = max_activating_examples(random_bridge, tokens[0], POST, index=2, k=3)
    assert len(one.examples()) == 1


def test_the_first_position_of_each_piece_may_be_left_out(random_bridge, texts):
    found = max_activating_examples(random_bridge, texts, POST, k=50, one_per_text=False, length=LENGTH)
    counted = sum(len(piece[2]) - 1 for piece in every_value(random_bridge, texts, POST))
    assert found.statistics.positions == counted
    assert not (found.top.positions[found.top.texts >= 0] % LENGTH == 0).any()
    every = max_activating_examples(
        random_bridge, texts, POST, index=0, k=500, one_per_text=False, length=LENGTH, exclude_bos=False
    )
    assert len(every.examples()) == every.statistics.positions == sum(LENGTHS)


def test_statistics_are_over_all_real_positions(random_bridge, texts):
    found = max_activating_examples(
        random_bridge, texts, POST, length=LENGTH, batch_size=4, exclude_bos=False, sample=1000
    )
    values = torch.cat([piece[3] for piece in every_value(random_bridge, texts, POST)])
    torch.testing.assert_close(found.statistics.mean, values.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.statistics.active, (values > 0).float().mean(0))
    torch.testing.assert_close(found.statistics.sample.sort(0).values, values.sort(0).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.statistics.quantile(0.9), values.quantile(0.9, dim=0), rtol=1e-3, atol=1e-3)


def test_the_sample_is_uniform_over_the_stream(random_bridge):
    tokens = torch.randint(1, 97, (1000,), generator=torch.Generator().manual_seed(2))
    drawn = []
    for seed in range(60):
        places = itertools.count()

        def number(embedding, places=places):
            return torch.tensor([[next(places) for _ in row] for row in embedding]).float()

        found = max_activating_examples(
            random_bridge, tokens, "hook_embed", feature=number, length=20, exclude_bos=False, sample=50, seed=seed
        )
        sample = found.statistics.sample
        assert sample.unique().numel() == 50
        drawn.append(sample)
    counts = torch.histc(torch.cat(drawn), bins=10, min=0, max=1000)
    assert ((counts - 300).abs() < 60).all()  # 3,000 draws; four standard deviations are 66


def test_half_precision_is_ranked_in_float32(texts):
    bridge = clearspan.boot(build("llama").bfloat16())
    found = max_activating_examples(bridge, texts, POST, index=1, k=3, length=LENGTH, batch_size=1)
    pieces = every_value(bridge, texts, POST)
    assert found.top.values.dtype == torch.float32
    assert_same(found.examples(), brute_force(pieces, 1, 3, one_per_text=True, exclude_bos=True))


def test_hooks_count_and_those_that_cannot_fire_are_refused(random_bridge, texts):
    with random_bridge.hooks(fwd_hooks=[(POST, lambda value, hook: torch.full_like(value, 9.0))]):
        found = max_activating_examples(random_bridge, texts, POST, index=0, k=1)
    assert found.examples()[0].value == 9
    with (
        random_bridge.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda value, hook: None)]),
        pytest.raises(PointNotReachedError),
    ):
        max_activating_examples(random_bridge, texts, POST, index=0)


def test_it_prints_plots_and_exports(embedded):
    sources = [
        inspect.getsource(textwrap.TextWrapper),
        "if x < 1 & y:\n    raise <b>",
        inspect.getsource(textwrap.dedent),
    ]
    found = max_activating_examples(embedded, sources, "blocks.0.mlp.hook_post", index=[4, 9], k=3, context=(4, 2))
    assert found.title == (
        "largest activations of blocks.0.mlp.hook_post, 2 features, among "
        f"{found.statistics.positions} positions of 3 texts"
    )
    second = next(example for example in found.examples(4) if example.text == 1)
    assert str(second) == "".join(second.words[: second.at]) + "«·raise»" + "".join(second.words[second.at + 1 :])
    assert "«·raise»" in str(found)
    table = found.to_dataframe()
    assert table["feature"].tolist() == [4, 4, 4, 9, 9, 9]
    assert table["value"].tolist() == found.top.values.flatten().tolist()
    assert table["example"].tolist() == [str(example) for feature in (4, 9) for example in found.examples(feature)]
    (strip,) = found.plot(9).data
    assert list(strip.x) == ["-4", "-3", "-2", "-1", "0", "+1", "+2"]
    assert [row[4] for row in strip.z] == pytest.approx(found.top.values[1].tolist(), abs=1e-4)
    assert strip.text[0][4] == found.examples(9)[0].words[found.examples(9)[0].at]
    page = found.to_html()
    assert page.count("<tr>") == 3
    assert page.count("outline:") == 3
    assert "<b>" not in page
    assert "&lt;" in page
    assert f"above 0 at {found.statistics.active[0]:.2%} of {found.statistics.positions} positions" in page
    assert found.to_html(4) + found.to_html(9) in found._repr_html_()
    many = max_activating_examples(embedded, "import os", "blocks.0.mlp.hook_post", k=1)
    assert "… and 1019 more features: .to_html(feature)" in many._repr_html_()


def test_a_feature_without_examples_has_empty_pictures(random_bridge):
    found = max_activating_examples(
        random_bridge, torch.tensor([4, 5, 6]), POST, feature=lambda post: torch.full_like(post, -torch.inf), index=1
    )
    assert found.examples() == []
    assert found.to_dataframe().empty
    assert len(found.plot().data[0].z) == 0
    assert "<tr>" not in found.to_html()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 0}, "k=0\n  expected: a whole number, k >= 1"),
        ({"context": -1}, "context=-1\n  expected: a whole number, context >= 0"),
        ({"context": (3, -2)}, "context=-2\n  expected: a whole number, context >= 0"),
        ({"sample": -1}, "sample=-1\n  expected: a whole number, sample >= 0"),
        ({"texts": []}, "there is nothing to read\n  expected: at least one text\n  got: none"),
        (
            {"texts": torch.tensor([[3], [4]])},
            "there is no position to rank\n  expected: pieces of two tokens or more\n  fix: exclude_bos=False",
        ),
        ({"index": 80 * 4}, "there is no feature 320\n  expected: 0 to 191\n  where: blocks.1.mlp.hook_post"),
        ({"index": [1, -1]}, "there is no feature -1\n  expected: 0 to 191\n  where: blocks.1.mlp.hook_post"),
        (
            {"name": "blocks.1.attn.hook_z"},
            "blocks.1.attn.hook_z is not one number for each feature of a position\n  expected: [batch, pos, feature]\n"
            "  got: [batch, pos, head, d_head]\n"
            "  fix: feature=fn, with a function from this value to [batch, pos] or [batch, pos, feature]",
        ),
        (
            {"feature": lambda post: post.mean(1)},
            "`feature` did not return one number for each position, or for each position and feature\n"
            "  expected: [batch=1, pos=3] or [batch=1, pos=3, feature]\n  got: [1, 192]\n"
            "  where: blocks.1.mlp.hook_post",
        ),
        (
            {"feature": lambda post: 0.5},
            "`feature` did not return one number for each position, or for each position and feature\n"
            "  expected: [batch=1, pos=3] or [batch=1, pos=3, feature]\n  got: float\n"
            "  where: blocks.1.mlp.hook_post",
        ),
    ],
)
def test_what_cannot_be_searched_is_said(random_bridge, given, message):
    arguments = {"texts": torch.tensor([[3, 4, 5]]), "name": POST, **given}
    with pytest.raises(InvalidArgumentError) as error:
        max_activating_examples(random_bridge, **arguments)
    assert str(error.value) == message


def test_other_errors(random_bridge, texts):
    with pytest.raises(NotFiniteError) as error:
        max_activating_examples(random_bridge, texts, POST, feature=lambda post: post * torch.nan)
    assert str(error.value) == f"a value is not a number (NaN), so it cannot be ranked\n  where: {POST}"
    with pytest.raises(UnknownPointError):
        max_activating_examples(random_bridge, texts, "blocks.1.mlp.hook_pots")
    with pytest.raises(NoTokenizerError):
        max_activating_examples(random_bridge, ["text"], POST)
    found = max_activating_examples(random_bridge, texts, POST, index=[3, 4])
    with pytest.raises(InvalidArgumentError) as error:
        found.examples(5)
    assert str(error.value) == "feature 5 was not looked for\n  expected: 3, 4"
    with pytest.raises(InvalidArgumentError) as error:
        found.statistics.quantile(0.5)
    assert str(error.value) == (
        "there is no quantile 0.5\n  expected: 0 to 1, of a sample\n  got: 0.5, of a sample of 0 positions\n"
        "  fix: max_activating_examples(..., sample=10_000)"
    )
