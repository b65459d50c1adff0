import dataclasses

import pytest
import torch
from tests.conftest import tiny_model
from tests.hybrids import hybrid
from tests.releases import start_checkpointing
from tests.zoo import build

import clearspan
from clearspan import zoo
from clearspan.analysis import JacobianLens, fit_jacobian_lens, lens_divergence, lens_readings, logit_lens
from clearspan.analysis.token_decomposition import nonnegative
from clearspan.errors import InvalidArgumentError, NotFiniteError, UnwritableError


def random_tokens(rows, length, seed=0):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def fit(bridge, corpus, **options):
    return fit_jacobian_lens(bridge, corpus, **{"skip_first": 1, "progress": False, **options})


def by_hand(bridge, rows, skip_first=1):
    """The mean Jacobians by `torch.autograd.functional.jacobian`, each row alone and each depth on its own."""
    n_layers, found = bridge.cfg.n_layers, []
    for depth in range(n_layers):
        name = f"blocks.{depth - 1}.hook_resid_post" if depth else "blocks.0.hook_resid_pre"
        total = torch.zeros(bridge.cfg.d_model, bridge.cfg.d_model)
        for row in rows:
            _, cache = bridge.run_with_cache(row[None], name)

            def last(stream, row=row, name=name):
                return bridge.run_with_hooks(
                    row[None], fwd_hooks=[(name, lambda value, hook: stream)], stop_at_layer=n_layers
                )

            whole = torch.autograd.functional.jacobian(last, cache[name])[0, :, :, 0].float()
            used = range(skip_first, len(row) - 1)
            total += sum(whole[to, :, of] for to in used for of in used) / len(used)
        found.append(total / len(rows))
    return torch.stack(found)


def assert_near(found, expected, share=1e-5):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=share * expected.abs().max().item())


@pytest.fixture(scope="module")
def model():
    return clearspan.boot(tiny_model())


@pytest.fixture(scope="module")
def lens(model):
    return fit(model, random_tokens(3, 8))


@pytest.mark.parametrize(
    "variant", ["gpt2", "llama", "gemma2", "opt post-norm", "bloom", "falcon", "mixtral", "granite"]
)
def test_it_is_the_mean_of_torchs_own_jacobians(variant):
    """Rows of unequal length, which run in one padded batch, and twice over."""
    bridge = clearspan.boot(build(variant))
    tokens = random_tokens(3, 7)
    rows = [tokens[0], tokens[1, :4], tokens[2, :6]]
    assert_near(fit(bridge, rows, batch_size=7).jacobians, by_hand(bridge, rows))


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_it_is_that_of_hybrids(kind):
    bridge = hybrid(kind)
    rows = [random_tokens(1, 4)[0]]
    assert_near(fit(bridge, rows).jacobians, by_hand(bridge, rows), share=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64, 1000])
def test_it_does_not_depend_on_the_batch(model, lens, batch_size):
    assert_near(fit(model, random_tokens(3, 8), batch_size=batch_size).jacobians, lens.jacobians)


def test_positions_at_the_start_and_the_last_one_are_left_out(model):
    rows = list(random_tokens(2, 9))
    assert_near(fit(model, rows, skip_first=5).jacobians, by_hand(model, rows, skip_first=5))
    short = random_tokens(1, 4, seed=1)[0]
    found = fit(model, [*rows, short], skip_first=3)
    assert found.texts == 2
    assert_near(found.jacobians, by_hand(model, rows, skip_first=3))


def test_a_text_is_cut_into_pieces_that_count_alike(model):
    tokens = random_tokens(1, 10)[0]
    found = fit(model, tokens[None], length=6)
    assert found.texts == 2
    assert_near(found.jacobians, by_hand(model, [tokens[:6], tokens[6:]]))


def test_some_depths_are_those_of_all(model, lens):
    found = fit(model, random_tokens(3, 8), depths=[-2, 1])
    assert found.depths == (1, 2)
    assert_near(found.jacobians, lens.jacobians[[1, 2]])
    assert_near(found.activation_norms, lens.activation_norms[[1, 2]])


def test_norms_are_means_over_what_was_counted(model, lens):
    _, cache = model.run_with_cache(random_tokens(3, 8))
    streams = torch.stack([cache["resid_pre", 0], cache["resid_post", 0], cache["resid_post", 1]])
    assert_near(lens.activation_norms, streams[:, :, 1:-1].norm(dim=-1).mean((1, 2)))


def test_the_model_stays_as_it_is_also_where_gradients_are_off():
    model = tiny_model()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    before = {name: (one.clone(), one.requires_grad) for name, one in model.named_parameters()}
    bridge = clearspan.boot(model)
    with torch.no_grad():
        found = fit(bridge, random_tokens(2, 6))
    assert not found.jacobians.requires_grad
    for name, one in model.named_parameters():
        assert torch.equal(one, before[name][0])
        assert one.requires_grad == before[name][1]
        assert one.grad is None
    model.requires_grad_(False)
    assert_near(fit(bridge, random_tokens(2, 6)).jacobians, found.jacobians)


def test_in_half_precision_it_is_near():
    exact = fit(clearspan.boot(tiny_model()), random_tokens(2, 6)).jacobians
    found = fit(clearspan.boot(tiny_model().bfloat16()), random_tokens(2, 6))
    assert found.jacobians.dtype == torch.float32
    assert (found.jacobians - exact).norm() < 0.05 * exact.norm()
    assert found.translate(torch.ones(2, 48).bfloat16(), 0).dtype == torch.bfloat16


# --- reading -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_lenses_read_through_it_as_through_a_tuned_lens(model, lens):
    tokens = random_tokens(2, 5, seed=3)
    _, cache = model.run_with_cache(tokens)
    expected = model.read_out(cache["resid_post", 0] @ lens.jacobians[1].T).log_softmax(-1)
    final = model(tokens).log_softmax(-1)
    found = lens_readings(model, tokens, positions=[-1], depths=[1, 3], lens=lens, top_k=3)
    assert torch.equal(found.top_ids[0], expected[:, -1].topk(3).indices)
    torch.testing.assert_close(found.top_log_probs[1], final[:, -1].topk(3).values)
    kl = (final.exp() * (final - expected)).sum(-1)
    torch.testing.assert_close(found.kl[0], kl[:, -1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lens_divergence(model, tokens, lens).tuned_lens[1], kl.mean(), rtol=1e-4, atol=1e-6)
    assert torch.equal(logit_lens(model, tokens[:1], lens=lens).top_ids[1], expected[0].argmax(-1))


def test_of_a_model_whose_blocks_add_nothing_it_is_the_logit_lens():
    bridge = clearspan.boot(build("llama"))
    with torch.no_grad():
        for block in bridge.blocks:
            block.attn.W_O = block.attn.W_O * 0
            block.mlp.W_out = block.mlp.W_out * 0
    found = fit(bridge, random_tokens(1, 5))
    torch.testing.assert_close(found.jacobians, torch.eye(bridge.cfg.d_model).expand_as(found.jacobians))
    assert found.columns()["cosine"] == pytest.approx([1.0] * bridge.cfg.n_layers)


def test_a_depth_that_was_not_fitted_is_named(model):
    found = fit(model, random_tokens(1, 5), depths=2)
    resid = torch.randn(2, 48)
    assert torch.equal(found.translate(resid, 3), resid)
    with pytest.raises(InvalidArgumentError) as error:
        lens_readings(model, random_tokens(1, 5), lens=found)
    assert str(error.value) == (
        f"the Jacobian lens of {found.model_name} was not fitted at depth 0\n  expected: depths 2, or the last, 3\n"
        "  fix: depths=[2, 3]"
    )
    assert lens_readings(model, random_tokens(1, 5), lens=found, depths=[2, 3]).kl[-1] == 0


# --- directions and edits ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_direction_raises_the_tokens_logit_by_its_square_to_first_order(model, lens):
    """A step along it changes what the lens reads of the token, before the norm's scale, by the product with it."""
    direction = lens.directions(model, [5], 1)[0]
    stream = torch.randn(48, generator=torch.Generator().manual_seed(0))

    def logit(step):
        last = (stream + step * direction) @ lens.jacobians[1].T
        normed = (last - last.mean()) * model.ln_final.w
        return normed @ model.W_U[:, 5]

    change = logit(1.0) - logit(0.0)
    torch.testing.assert_close(change, direction @ direction, rtol=1e-3, atol=1e-3 * float(direction @ direction))


@torch.no_grad()
def test_steering_is_by_the_unit_direction_in_units_of_the_stream(model, lens):
    vector = lens.steering_vector(model, 5, against=9, depths=[0, 2])
    assert vector.names == ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post")
    one, other = lens.directions(model, [5, 9], 2)
    assert_near(vector.vectors["blocks.1.hook_resid_post"], (one - other) / (one - other).norm())
    assert vector.activation_norms["blocks.1.hook_resid_post"] == pytest.approx(lens.activation_norms[2].item())
    assert vector.made_by == "Jacobian lens for 5 against 9"
    tokens = random_tokens(1, 6)
    edits = vector.at(1).with_norm(vector.activation_norms).interventions(3.0)
    steered, plain = (model(tokens, interventions=each).log_softmax(-1)[0, -1] for each in (edits, []))
    assert steered[5] - steered[9] > plain[5] - plain[9] + 0.5


@torch.no_grad()
def test_ablation_leaves_nothing_in_the_span_and_all_of_the_rest(model, lens):
    tokens, name = random_tokens(2, 5), "blocks.0.hook_resid_post"
    edits = lens.ablation(model, [5, 9, 11], depths=1, positions=[1, 3])
    _, before = model.run_with_cache(tokens)
    _, after = model.run_with_cache(tokens, interventions=edits)
    basis = torch.linalg.svd(lens.directions(model, [5, 9, 11], 1), full_matrices=False).Vh
    expected = before[name].clone()
    expected[:, [1, 3]] -= expected[:, [1, 3]] @ basis.T @ basis
    assert_near(after[name], expected)


@torch.no_grad()
def test_a_swap_exchanges_two_coordinates(model, lens):
    tokens, name = random_tokens(2, 5), "blocks.0.hook_resid_post"
    _, before = model.run_with_cache(tokens)
    columns = lens.directions(model, [5, 9], 1).T
    coordinates = before[name] @ torch.linalg.pinv(columns).T
    for strength in (1.0, 2.0):
        edits = lens.swap(model, 5, 9, depths=1, strength=strength)
        _, after = model.run_with_cache(tokens, interventions=edits)
        change = strength * (coordinates.flip(-1) - coordinates) @ columns.T
        assert_near(after[name], before[name] + change)
    twice = lens.swap(model, 5, 9, depths=1) * 2
    _, back = model.run_with_cache(tokens, interventions=twice)
    assert_near(back[name], before[name], share=1e-4)


@torch.no_grad()
def test_a_stream_is_taken_apart_into_the_directions_that_it_was_made_of(model, lens):
    units = torch.nn.functional.normalize(lens.directions(model, list(range(97)), 1), dim=-1)
    stream = 4 * units[7] + 2 * units[30] + 1 * units[55]
    found = lens.decompose(model, stream, 1, k=8)
    assert found.ids[:3].tolist() == [7, 30, 55]
    torch.testing.assert_close(found.weights[:3], torch.tensor([4.0, 2.0, 1.0]), rtol=1e-2, atol=1e-2)
    assert found.share == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(found.weights @ units[found.ids] + found.left, stream, rtol=1e-4, atol=1e-4)
    assert str(found).splitlines()[0].endswith("directions of tokens, 100% of its squared norm")
    assert len(found.plot().data[0].x) == len(found.ids)
    one = lens.decompose(model, stream, 1, k=1)
    along = units @ stream
    assert one.ids.tolist() == [int(along.argmax())]
    torch.testing.assert_close(one.weights[0], along.max(), rtol=1e-4, atol=1e-4)


def test_weights_are_the_best_that_are_not_negative():
    """What holds of them alone: no slope upwards for those at 0, none at all for the others."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        columns = torch.randn(12, 9, generator=generator, dtype=torch.double)
        target = torch.randn(12, generator=generator, dtype=torch.double)
        weights = nonnegative(columns, target)
        slope = columns.T @ (target - columns @ weights)
        assert (weights >= 0).all()
        assert (slope < 1e-7).all()
        assert (slope[weights > 0].abs() < 1e-7).all()


def test_a_stream_that_cannot_be_taken_apart_is_named(model, lens):
    with pytest.raises(InvalidArgumentError, match=r"expected: resid of \[48\]\n  got: \[2, 48\]"):
        lens.decompose(model, torch.ones(2, 48), 1)
    with pytest.raises(NotFiniteError, match="the stream is not finite"):
        lens.decompose(model, torch.full((48,), torch.inf), 1)
    assert len(lens.decompose(model, torch.zeros(48), 1).ids) == 0


def test_directions_that_depend_on_one_another_are_named(model, lens):
    with pytest.raises(InvalidArgumentError) as error:
        lens.swap(model, 5, 5, depths=1)
    assert str(error.value) == (
        "the directions of [5, 5] at depth 1 depend on one another\n"
        "  expected: 2 directions that span 2 dimensions\n  got: 1"
    )
    with pytest.raises(InvalidArgumentError, match="is zero, so it has no direction"):
        lens.steering_vector(model, 5, against=5)


# --- files ---------------------------------------------------------------------------------------------------------


def test_it_comes_back_from_a_file(tmp_path, model, lens):
    lens.save(tmp_path / "lens.safetensors")
    loaded = JacobianLens.load(tmp_path / "lens.safetensors", model)
    for one in dataclasses.fields(lens):
        kept, found = getattr(lens, one.name), getattr(loaded, one.name)
        assert torch.equal(kept, found) if isinstance(kept, torch.Tensor) else kept == found
    with pytest.raises(InvalidArgumentError) as error:
        JacobianLens.load(tmp_path / "lens.safetensors", clearspan.boot(build("gpt2", n_layer=2)))
    assert str(error.value) == (
        f"the Jacobian lens of {lens.model_name} does not fit GPT2LMHeadModel\n"
        "  expected: a model of 3 layers and d_model 48\n  got: 2 layers and d_model 48\n"
        "  fix: fit_jacobian_lens(bridge, corpus)"
    )


def published(lens, **changed):
    """The dictionary of the published format, in half precision as it is published."""
    by_layer = {depth - 1: one.half() for depth, one in zip(lens.depths, lens.jacobians, strict=True) if depth}
    plain = {"J": by_layer, "n_prompts": 3, "source_layers": [*by_layer], "d_model": lens.d_model}
    return {**plain, "metadata": {"model_name": "theirs"}, **changed}


def test_a_published_lens_is_read(tmp_path, model, lens):
    torch.save(published(lens), tmp_path / "lens.pt")
    found = JacobianLens.load(tmp_path / "lens.pt", model)
    assert (found.depths, found.texts, found.model_name) == ((1, 2), 3, "theirs")
    assert torch.equal(found.jacobians, lens.jacobians[1:].half().float())
    vector = found.steering_vector(model, 5)
    assert vector.activation_norms == {}
    assert vector.norms["blocks.1.hook_resid_post"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"J": {2: torch.eye(48)}},
            r"the model\n  expected: \[48, 48\] for layers of 0 to 1, by the last",
        ),
        ({"J": {0: torch.eye(40)}}, "does not fit the model"),
        ({"J": {}}, "does not fit the model"),
        ({"metadata": {"target_layer": 1}}, r"got: layers \[0, 1\], by layer 1"),
        ({"d_model": 40, "J": {0: torch.eye(40)}}, "does not fit"),
    ],
)
def test_a_published_lens_of_another_model_is_named(tmp_path, model, lens, changed, message):
    torch.save(published(lens, **changed), tmp_path / "lens.pt")
    with pytest.raises(InvalidArgumentError, match=message):
        JacobianLens.load(tmp_path / "lens.pt", model)


class Evil:
    def __reduce__(self):
        return (print, ("code of a file ran",))


@pytest.mark.parametrize("content", [Evil(), {"J": Evil()}, [1], {"jacobian_sum": {}}])
def test_no_code_of_a_file_runs(tmp_path, model, content, capsys):
    torch.save(content, tmp_path / "lens.pt")
    with pytest.raises(InvalidArgumentError, match=r"this is no Jacobian lens|lens.pt is no Jacobian lens"):
        JacobianLens.load(tmp_path / "lens.pt", model)
    assert capsys.readouterr().out == ""


def test_lenses_of_parts_of_a_corpus_merge_into_that_of_all(model, lens):
    tokens = random_tokens(3, 8)
    found = JacobianLens.merged([fit(model, tokens[:2]), fit(model, tokens[2:])])
    assert found.texts == 3
    assert_near(found.jacobians, lens.jacobians)
    assert_near(found.activation_norms, lens.activation_norms)
    with pytest.raises(InvalidArgumentError, match="not of one model and of the same depths"):
        JacobianLens.merged([lens, fit(model, tokens, depths=1)])
    with pytest.raises(InvalidArgumentError, match="these are no lenses"):
        JacobianLens.merged([])


# --- results and errors --------------------------------------------------------------------------------------------


def test_it_prints_and_plots(lens):
    assert str(lens).splitlines()[:2] == [
        f"Jacobian lens of {lens.model_name}, mean over 3 texts: norm of each Jacobian as a multiple of the "
        "identity's, and cosine with the identity",
        "depth  stream    norm  cosine",
    ]
    assert lens.to_dataframe()["stream"].tolist() == ["embed", "0", "1"]
    assert [line.name for line in lens.plot().data] == ["norm", "cosine"]


def test_what_cannot_be_fitted_is_named(model):
    with pytest.raises(InvalidArgumentError) as error:
        fit_jacobian_lens(model, random_tokens(2, 9), progress=False)
    assert str(error.value) == (
        "no text is long enough\n  expected: more than 17 tokens\n  got: 9 at most\n"
        "  fix: skip_first=0, or longer texts"
    )
    with pytest.raises(InvalidArgumentError, match="no text is long enough"):
        fit(model, random_tokens(2, 1), skip_first=0)
    with pytest.raises(InvalidArgumentError, match="the last depth is what the others are derived by"):
        fit(model, random_tokens(1, 5), depths=[0, 3])
    broken = tiny_model()
    with torch.no_grad():
        broken.transformer.h[2].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="the derivatives of the last stream are not finite"):
        fit(clearspan.boot(broken), random_tokens(1, 5))


def test_gradient_checkpointing_raises():
    checkpointing = tiny_model()
    start_checkpointing(checkpointing)
    checkpointing.train()
    with pytest.raises(UnwritableError):
        fit(clearspan.boot(checkpointing), random_tokens(1, 5))


def test_several_streams_are_refused_by_name():
    bridge = clearspan.boot(zoo.build("gemma3n_text"))
    with pytest.raises(InvalidArgumentError) as error:
        fit(bridge, random_tokens(1, 5))
    assert str(error.value) == (
        "a Jacobian lens is of one residual stream\n  got: 3 streams between the blocks of Gemma3nForCausalLM"
    )
