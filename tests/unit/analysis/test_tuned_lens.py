import inspect
import json
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import tiny_model
from tests.zoo import build

import clearspan
from clearspan.analysis import TunedLens, lens_divergence, lens_readings, logit_lens, train_tuned_lens
from clearspan.errors import InvalidArgumentError


def random_tokens(rows, length, seed=0):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_lens(bridge, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n, d = bridge.cfg.n_layers, bridge.cfg.d_model
    weight, bias = torch.randn(n, d, d, generator=generator) / d, torch.randn(n, d, generator=generator)
    return TunedLens(weight, bias, torch.empty(0, n), "random")


@pytest.fixture(scope="module")
def trained(bridge):
    return train_tuned_lens(bridge, [inspect.getsource(inspect)], steps=20, batch_size=4, length=64)


def test_on_held_out_text_it_is_nearer_at_every_depth_but_the_last(bridge, trained):
    found = lens_divergence(bridge, [inspect.getsource(textwrap)[:6000]], trained)
    assert (found.tuned_lens[:-1] < 0.9 * found.logit_lens[:-1]).all(), str(found)
    assert found.tuned_lens[-1] == found.logit_lens[-1] == 0


@pytest.mark.parametrize("variant", ["gpt2", "llama", "gemma2", "opt post-norm", "mixtral", "granite"])
def test_two_steps_bring_it_nearer_on_any_architecture(variant):
    model = build(variant)
    frozen = [name for name, _ in model.named_parameters()][::2]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    bridge = clearspan.boot(model)
    tokens = random_tokens(4, 12)
    lens = train_tuned_lens(bridge, tokens, steps=2, batch_size=4, learning_rate=1e-3)
    after = lens_divergence(bridge, tokens, lens)
    torch.testing.assert_close(lens.losses[0], after.logit_lens[:-1], rtol=1e-4, atol=1e-4)
    assert (after.tuned_lens[:-1] < after.logit_lens[:-1]).all()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_steps_are_adamws_on_the_mean_divergence_over_real_positions(bridge):
    """The same two steps by plain torch, each piece alone and so without padding; the second has half the rate."""
    texts, rate, decay = ["import os\nimport sys", "def f(self", "x"], 1e-3, 200.0
    lens = train_tuned_lens(bridge, texts, steps=2, batch_size=3, learning_rate=rate, weight_decay=decay)
    depth = 2
    affine = torch.nn.Linear(bridge.cfg.d_model, bridge.cfg.d_model)
    parameters = [torch.nn.init.zeros_(affine.weight), torch.nn.init.zeros_(affine.bias)]
    optimizer = torch.optim.AdamW(parameters, weight_decay=decay)
    for step, step_rate in enumerate((rate, rate / 2)):
        divergences = []
        for text in texts:
            logits, cache = bridge.run_with_cache(text)
            stream = cache["resid_post", depth - 1]
            read = bridge.unembed(bridge.ln_final(stream + affine(stream)))
            own, other = (torch.distributions.Categorical(logits=x) for x in (logits[0].detach(), read[0]))
            divergences.append(torch.distributions.kl_divergence(own, other))
        loss = torch.cat(divergences).mean()
        affine.weight.grad, affine.bias.grad = torch.autograd.grad(loss, parameters)
        optimizer.param_groups[0]["lr"] = step_rate
        optimizer.step()
        assert float(lens.losses[step, depth]) == pytest.approx(loss.item(), rel=1e-4)
    # Adam's steps have the gradient's sign: where that is rounding, the two need not agree.
    weight, gradient = affine.weight.detach(), affine.weight.grad
    clear = gradient.abs() > 1e-2 * gradient.abs().max()
    assert clear.float().mean() > 0.2
    torch.testing.assert_close(lens.weight[depth][clear], weight[clear], rtol=2e-2, atol=1e-5)
    torch.testing.assert_close(lens.bias[depth], affine.bias.detach(), rtol=2e-2, atol=1e-5)


def test_it_is_the_seeds_and_leaves_torchs_own_alone():
    bridge = clearspan.boot(tiny_model())
    tokens = random_tokens(8, 6)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (train_tuned_lens(bridge, tokens, steps=2, batch_size=2, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_it_trains_where_gradients_are_off_and_in_half_precision():
    bridge = clearspan.boot(tiny_model().bfloat16())
    with torch.no_grad():
        lens = train_tuned_lens(bridge, random_tokens(4, 8), steps=2, batch_size=4)
    assert lens.weight.dtype == torch.float32
    assert lens.weight.isfinite().all()
    assert lens.weight.abs().sum() > 0
    resid = torch.randn(2, 48).bfloat16()
    assert lens.translate(resid, 0).dtype == torch.bfloat16


def test_translate_is_affine_and_the_last_depth_is_left_alone():
    bridge = clearspan.boot(tiny_model())
    lens, resid = random_lens(bridge), torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    for depth in range(3):
        expected = resid + torch.einsum("oi,bpi->bpo", lens.weight[depth], resid) + lens.bias[depth]
        torch.testing.assert_close(lens.translate(resid, depth), expected)
        torch.testing.assert_close(lens(resid, depth), expected)
    assert torch.equal(lens.translate(resid, 3), resid)


@torch.no_grad()
def test_lenses_read_through_it():
    bridge = clearspan.boot(tiny_model())
    lens, tokens = random_lens(bridge), random_tokens(1, 5)
    _, cache = bridge.run_with_cache(tokens)
    expected = bridge.unembed(bridge.ln_final(lens.translate(cache["resid_post", 0], 1)))[0]
    assert torch.equal(logit_lens(bridge, tokens, lens=lens).top_ids[1], expected.argmax(-1))
    found = lens_readings(bridge, tokens, positions=None, lens=lens, top_k=1)
    assert torch.equal(found.top_ids[1, :, 0], expected.argmax(-1))


@torch.no_grad()
def test_divergence_is_the_mean_over_real_positions_of_what_is_read(bridge):
    texts = ["import os\nimport sys", "def f(self", "x"]
    lens = random_lens(bridge)
    found = lens_divergence(bridge, texts, lens, batch_size=2)
    plain = torch.cat([lens_readings(bridge, text, positions=None).kl for text in texts], dim=1)
    tuned = torch.cat([lens_readings(bridge, text, positions=None, lens=lens).kl for text in texts], dim=1)
    assert found.positions == plain.shape[1]
    torch.testing.assert_close(found.logit_lens, plain.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.tuned_lens, tuned.mean(1), rtol=1e-4, atol=1e-5)
    frame = found.to_dataframe()
    assert frame["KL(final || lens)"][frame.lens == "tuned lens"].tolist() == found.tuned_lens.tolist()
    assert frame["depth text"].tolist() == ["embed", *map(str, range(bridge.cfg.n_layers))] * 2
    assert [line.name for line in found.plot().data] == ["logit lens", "tuned lens"]
    title = "KL(final || lens) in nats of the stream at each depth, mean over 13 positions"
    assert str(found).splitlines()[0] == title


def test_it_comes_back_from_a_file(tmp_path, bridge, trained):
    trained.save(tmp_path / "lens.safetensors")
    loaded = TunedLens.load(tmp_path / "lens.safetensors", bridge)
    for name in ("weight", "bias", "losses"):
        assert torch.equal(getattr(loaded, name), getattr(trained, name))
    assert loaded.model_name == trained.model_name == "tiny-bigcode"


def test_a_file_for_another_model_and_a_file_that_is_none_raise(tmp_path, bridge, tokens, trained):
    trained.save(tmp_path / "lens.safetensors")
    narrow = clearspan.boot(tiny_model())
    expected = [
        "the tuned lens of tiny-bigcode does not fit GPTBigCodeForCausalLM",
        "  expected: a model of 5 layers and d_model 256",
        "  got: 3 layers and d_model 48",
        "  fix: train_tuned_lens(bridge, corpus)",
    ]
    for attempt in (
        lambda: TunedLens.load(tmp_path / "lens.safetensors", narrow),
        lambda: logit_lens(narrow, torch.tensor([[1, 2]]), lens=trained),
        lambda: lens_readings(narrow, torch.tensor([[1, 2]]), lens=trained),
        lambda: lens_divergence(narrow, torch.tensor([[1, 2]]), trained),
    ):
        with pytest.raises(InvalidArgumentError) as raised:
            attempt()
        assert str(raised.value).splitlines() == expected
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidArgumentError) as raised:
        TunedLens.load(tmp_path / "other.safetensors", bridge)
    assert str(raised.value).splitlines() == [
        "other.safetensors is no tuned lens",
        "  expected: a file written by TunedLens.save, of format 'clearspan tuned lens 1'",
        "  got: format None",
    ]


def test_a_stream_or_depth_that_it_does_not_have_raises(trained):
    for resid, depth in ((torch.zeros(3, 255), 0), (torch.zeros(3, 256), 6), (torch.zeros(3, 256), -1)):
        with pytest.raises(InvalidArgumentError) as raised:
            trained.translate(resid, depth)
        assert str(raised.value).splitlines() == [
            "the tuned lens of tiny-bigcode cannot translate this stream",
            "  expected: a depth from 0 to 5, and [..., d_model=256]",
            f"  got: depth {depth}, and {list(resid.shape)}",
        ]


def test_sizes_that_train_nothing_raise(bridge, trained):
    for wrong in ("steps", "batch_size", "learning_rate", "length"):
        with pytest.raises(InvalidArgumentError, match=f"^{wrong}=0\n"):
            train_tuned_lens(bridge, ["x"], **{wrong: 0})
    with pytest.raises(InvalidArgumentError, match="batch_size=0"):
        lens_divergence(bridge, ["x"], trained, batch_size=0)
    with pytest.raises(InvalidArgumentError, match="there is nothing to read"):
        train_tuned_lens(bridge, [])


def test_progress_and_losses_by_step():
    bridge, steps = clearspan.boot(tiny_model()), []
    lens = train_tuned_lens(
        bridge, random_tokens(3, 5), steps=3, batch_size=2, progress=lambda *step: steps.append(step)
    )
    assert steps == [("tuned lens", 1, 3), ("tuned lens", 2, 3), ("tuned lens", 3, 3)]
    frame = lens.to_dataframe()
    assert frame.loss[frame.step == 2].tolist() == lens.losses[2].tolist()
    assert [line.name for line in lens.plot().data] == ["depth 0", "depth 1", "depth 2"]
    assert str(lens).splitlines()[2].split()[:2] == ["2", "0"]


# --- the format of the package tuned-lens --------------------------------------------------------------------------


CONFIG = {
    "base_model_name_or_path": "theirs",
    "d_model": 48,
    "num_hidden_layers": 3,
    "bias": True,
    "unembed_hash": "0f",
}


def publish(folder, lens, *, config=CONFIG, prefix="", suffix=".pt"):
    """Writes a lens as the package's `TunedLens.save` does: translators of one module list, by number."""
    folder.mkdir(exist_ok=True)
    state = {f"{prefix}{layer}.weight": one.clone() for layer, one in enumerate(lens.weight)}
    state |= {f"{prefix}{layer}.bias": one.clone() for layer, one in enumerate(lens.bias) if config["bias"]}
    (folder / "config.json").write_text(json.dumps(config))
    (torch.save if suffix == ".pt" else save_file)(state, folder / f"params{suffix}")
    return folder


@pytest.mark.parametrize("prefix", ["", "layer_translators."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_published_lens_is_read(tmp_path, prefix, suffix):
    bridge = clearspan.boot(tiny_model())
    lens = random_lens(bridge)
    found = TunedLens.load(publish(tmp_path / "lens", lens, prefix=prefix, suffix=suffix), bridge)
    assert torch.equal(found.weight, lens.weight)
    assert torch.equal(found.bias, lens.bias)
    assert found.model_name == "theirs"
    assert str(found).startswith("tuned lens of theirs: 3 translators of width 48")
    found.plot()
    found.save(tmp_path / "own.safetensors")
    assert torch.equal(TunedLens.load(tmp_path / "own.safetensors", bridge).weight, lens.weight)


def test_a_published_lens_without_biases_has_zeros(tmp_path):
    bridge = clearspan.boot(tiny_model())
    folder = publish(tmp_path / "lens", random_lens(bridge), config={**CONFIG, "bias": False})
    assert not TunedLens.load(folder, bridge).bias.any()


def test_a_folder_that_holds_no_lens_of_this_model_is_named(tmp_path):
    bridge = clearspan.boot(tiny_model())
    lens = random_lens(bridge)
    with pytest.raises(InvalidArgumentError) as raised:
        TunedLens.load(tmp_path, bridge)
    assert str(raised.value).splitlines()[1:] == [
        "  expected: config.json, and params.pt or params.safetensors",
        "  got: an empty folder",
    ]
    cases = [
        ({"num_hidden_layers": 4}, r"lacks translators of the lens\n  expected: 4 of d_model 48, as config.json says"),
        ({"d_model": 50}, r"got: no 0\.weight, 1\.weight, 2\.weight of that shape"),
        ({"num_hidden_layers": 2}, "does not fit GPTBigCodeForCausalLM\n  expected: a model of 2 layers"),
        ({"num_hidden_layers": "3"}, "this is no config.json"),
    ]
    for changed, message in cases:
        with pytest.raises(InvalidArgumentError, match=message):
            TunedLens.load(publish(tmp_path / "lens", lens, config={**CONFIG, **changed}), bridge)
    (tmp_path / "lens" / "config.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match=r"this is no config\.json"):
        TunedLens.load(tmp_path / "lens", bridge)


class Evil:
    def __reduce__(self):
        return (print, ("code of a file ran",))


@pytest.mark.parametrize("content", [Evil(), {"0.weight": Evil()}, [1], b"no tensors"])
def test_no_code_of_a_file_runs(tmp_path, content, capsys):
    bridge = clearspan.boot(tiny_model())
    folder = publish(tmp_path / "lens", random_lens(bridge))
    if isinstance(content, bytes):
        (folder / "params.pt").write_bytes(content)
    else:
        torch.save(content, folder / "params.pt")
    with pytest.raises(InvalidArgumentError, match=r"params.pt is no tuned lens"):
        TunedLens.load(folder, bridge)
    assert capsys.readouterr().out == ""
