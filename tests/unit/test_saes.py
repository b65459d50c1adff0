"""Sparse autoencoders on a bridge: their points, their effect, and how they come and go."""

import threading
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import tiny_model
from tests.zoo import build
from torch import Tensor, nn

import clearspan
from clearspan import TransformerBridge, sweep
from clearspan.errors import (
    InvalidArgumentError,
    NotCachedError,
    PointNotReachedError,
    UnknownPointError,
    UnplannableError,
)
from clearspan.interventions import Intervention, Zero

HOST = "blocks.1.hook_resid_post"
ACTS = f"{HOST}.hook_sae_acts_post"


class Dictionary(nn.Module):
    """A random sparse autoencoder; with `writes`, a transcoder."""

    def __init__(self, width: int = 48, reads: str = HOST, writes: str | None = None, features: int = 80) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.into = nn.Parameter(torch.randn(width, features, generator=generator) / 5)
        self.out = nn.Parameter(torch.randn(features, width, generator=generator) / 5)
        self.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name=reads, hook_name_out=writes))

    def encode(self, value: Tensor) -> Tensor:
        return (value @ self.into - 0.1).relu()

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ self.out


class OfHeads(Dictionary):
    """One that reads all heads as one vector."""

    def encode(self, value: Tensor) -> Tensor:
        return super().encode(value.flatten(-2))

    def decode(self, acts: Tensor) -> Tensor:
        return super().decode(acts).unflatten(-1, (4, 12))


@pytest.fixture
def sae() -> Dictionary:
    return Dictionary()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_its_reconstruction_takes_the_values_place(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    replaced = bridge.run_with_hooks(tokens, fwd_hooks=[(HOST, lambda value, hook: sae.decode(sae.encode(value)))])
    assert torch.equal(bridge.run_with_saes(tokens, saes=[sae]), replaced)
    with bridge.saes(sae) as inside:
        assert inside is bridge
        assert torch.equal(bridge(tokens), replaced)
    assert not torch.allclose(bridge(tokens), replaced)


@pytest.mark.parametrize("grad", [False, True])
def test_with_the_error_nothing_changes(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        assert torch.equal(bridge.run_with_saes(tokens, saes=sae, use_error_term=True), bridge(tokens))


def test_the_error_term_is_its_own_setting_by_default(bridge: TransformerBridge, tokens: Tensor) -> None:
    sae = Dictionary()
    sae.use_error_term = True
    assert torch.equal(bridge.run_with_saes(tokens, saes=[sae]), bridge(tokens))
    assert not torch.allclose(bridge.run_with_saes(tokens, saes=[sae], use_error_term=False), bridge(tokens))


def test_a_cache_has_what_is_inside(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    value = bridge.run_with_cache(tokens)[1][HOST]
    _, cache = bridge.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
    acts, recons = sae.encode(value), sae.decode(sae.encode(value))
    for leaf, expected in {"input": value, "acts_post": acts, "recons": recons, "error": value - recons}.items():
        close(cache[f"{HOST}.hook_sae_{leaf}"], expected)
    assert torch.equal(cache[f"{HOST}.hook_sae_output"], value)
    assert ACTS not in bridge.hook_dict  # the cache shows it all the same
    assert ACTS in cache
    assert cache.axes_of(ACTS) == {"batch": 2, "pos": 7, "feature": 80}
    assert "hook_sae_acts_post" in repr(cache)
    _, cache = bridge.run_with_cache_with_saes(
        tokens, saes=[sae], names_filter=[ACTS], stop_at_layer=2, pos_slice=(2, 4)
    )
    assert list(cache) == [ACTS]
    close(cache[ACTS], acts[:, 2:4])
    with pytest.raises(NotCachedError):
        cache[HOST]


def test_a_write_to_a_feature_moves_the_value_by_its_direction(
    bridge: TransformerBridge, tokens: Tensor, sae: Dictionary
) -> None:
    acts = bridge.run_with_cache_with_saes(tokens, saes=[sae])[1][ACTS]
    feature = int(acts[:, -1].sum(0).argmax())

    def off(value: Tensor, hook: object) -> None:
        value[:, -1, feature] = 0

    def moved(value: Tensor, hook: object) -> None:
        value[:, -1] -= acts[:, -1, feature, None] * sae.out[feature]

    expected = bridge.run_with_hooks(tokens, fwd_hooks=[(HOST, moved)])
    assert not torch.allclose(expected, bridge(tokens), atol=1e-3)
    found = bridge.run_with_hooks_with_saes(tokens, saes=[sae], use_error_term=True, fwd_hooks=[(ACTS, off)])
    close(found, expected)
    intervention = Intervention(ACTS, Zero(), positions=-1, neurons=feature)
    with bridge.saes(sae, use_error_term=True):
        close(bridge(tokens, interventions=[intervention]), expected)


def test_their_values_are_not_planned(bridge: TransformerBridge, sae: Dictionary) -> None:
    with bridge.saes(sae), pytest.raises(UnplannableError, match=r"cannot be planned(.|\n)*reset_saes"):
        bridge.plan_cache((2, 7))


def test_interventions_count_positions_of_padded_rows(embedded: TransformerBridge) -> None:
    sae = Dictionary(256)
    last = Intervention(ACTS, Zero(), positions=-1)
    with embedded.saes(sae, use_error_term=True):
        together = embedded(["import os", "x = 1, 2"], interventions=[last], padding_side="right")
        alone = embedded("import os", interventions=[last])
    torch.testing.assert_close(together[:1, : alone.shape[1]], alone, atol=1e-3, rtol=1e-3)


def test_gradients_pass_through_features_alone(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    _, cache = bridge.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    after = cache[f"{HOST}_grad"]
    with bridge.saes(sae, use_error_term=True):
        _, cache = bridge.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    close(cache[f"{HOST}.hook_sae_error_grad"], after)
    close(cache[f"{ACTS}_grad"], after @ sae.out.T)
    active = (cache[ACTS] > 0).float()
    close(cache[f"{HOST}.hook_sae_input_grad"], (after @ sae.out.T * active) @ sae.into.T)
    close(cache[f"{HOST}_grad"], after)  # of the value that the model goes on with


def test_backward_hooks_edit_gradients(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    seen: list[str] = []

    def stop(gradient: Tensor, hook: clearspan.HookPoint) -> Tensor:
        seen.append(hook.name)
        return torch.zeros_like(gradient)

    loss = bridge.run_with_hooks_with_saes(tokens, saes=[sae], bwd_hooks=[(ACTS, stop)], return_type="loss")
    loss.backward()
    assert seen == [ACTS]
    assert not sae.into.grad.any()
    assert sae.out.grad.any()


def test_they_are_on_until_reset(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    plain = bridge(tokens)
    bridge.add_sae(sae)
    replaced = bridge(tokens)
    assert bridge.acts_to_saes == {HOST: sae}
    assert not torch.allclose(replaced, plain)
    bridge.add_hook(ACTS, lambda acts, hook: acts * 0)
    assert not torch.allclose(bridge(tokens), replaced)
    bridge.reset_hooks()
    assert torch.equal(bridge(tokens), replaced)
    bridge.reset_saes(HOST)
    assert torch.equal(bridge(tokens), plain)
    assert bridge.acts_to_saes == {}
    assert not bridge.taps.is_listening
    assert not any("hook_sae" in name for name in bridge.hook_dict)


def test_one_takes_anothers_place_and_gives_it_back(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    other = Dictionary(features=60)
    bridge.add_sae(sae)
    with bridge.saes([other]):
        assert bridge.run_with_cache(tokens)[1][ACTS].shape[-1] == 60
        assert torch.equal(bridge(tokens), bridge.run_with_saes(tokens, saes=[other]))
    assert bridge.acts_to_saes == {HOST: sae}
    assert bridge.run_with_cache(tokens)[1][ACTS].shape[-1] == 80
    bridge.add_sae(other)
    assert bridge.run_with_cache(tokens)[1][ACTS].shape[-1] == 60
    bridge.reset_saes()
    with bridge.saes([sae], reset_saes_end=False):
        pass
    assert bridge.acts_to_saes == {HOST: sae}


def test_they_come_off_after_an_error(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    with pytest.raises(ZeroDivisionError):
        bridge.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=[(ACTS, lambda acts, hook: 1 / 0)])
    assert bridge.acts_to_saes == {}
    assert not bridge.taps.is_listening
    with pytest.raises(UnknownPointError):
        bridge.run_with_saes(tokens, saes=[sae, Dictionary(reads="blocks.9.hook_resid_post")])
    assert bridge.acts_to_saes == {}


def test_other_threads_see_none_of_a_context(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    plain, found = bridge(tokens), []
    with bridge.saes(sae):
        thread = threading.Thread(target=lambda: found.append(bridge(tokens)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], plain)


def test_threads_do_not_share_a_place(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    bridge.add_sae(sae)
    replaced, there, done, found = bridge(tokens), threading.Event(), threading.Event(), []

    def other() -> None:
        with bridge.saes(Dictionary(features=60)):
            there.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert there.wait(60)
    found.append(bridge(tokens))
    with pytest.raises(
        InvalidArgumentError, match=r"another thread has a sparse autoencoder on blocks.1.hook_resid_post"
    ):
        bridge.run_with_saes(tokens, saes=sae)
    done.set()
    thread.join()
    assert torch.equal(found[0], replaced)
    assert torch.equal(bridge(tokens), replaced)


def test_one_of_a_context_can_be_taken_off_inside(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    plain = bridge(tokens)
    with bridge.saes(sae):
        bridge.reset_saes()
        assert torch.equal(bridge(tokens), plain)
    with bridge.saes(sae):
        bridge.add_sae(Dictionary(features=60))
        inside = bridge(tokens)
    assert torch.equal(bridge(tokens), inside)
    assert bridge.run_with_cache(tokens)[1][ACTS].shape[-1] == 60


def test_backward_hooks_need_gradients(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    with torch.no_grad(), pytest.raises(PointNotReachedError, match=r"cannot fire(.|\n)*under no_grad"):
        bridge.run_with_hooks_with_saes(tokens, saes=sae, bwd_hooks=[(ACTS, lambda gradient, hook: None)])


def test_sweeps_refuse_them(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    """They are hooks, which sweeps would call with the rows and positions of batches."""
    bridge.add_sae(sae, use_error_term=True)
    cells = {"one": Intervention(ACTS, Zero(), neurons=1)}
    with pytest.raises(InvalidArgumentError, match="hooks are on the model"):
        sweep.Sweep(bridge, tokens[:1], cells, sweep.LogitDifference(3, 5)).run(progress=False)


def test_a_transcoder_writes_elsewhere_than_it_reads(bridge: TransformerBridge, tokens: Tensor) -> None:
    transcoder = Dictionary(reads="blocks.1.mlp.hook_in", writes="blocks.1.hook_mlp_out")
    read = bridge.run_with_cache(tokens)[1]["blocks.1.mlp.hook_in"]
    expected = bridge.run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: transcoder.decode(transcoder.encode(read)))]
    )
    close(bridge.run_with_saes(tokens, saes=[transcoder]), expected)
    logits, cache = bridge.run_with_cache_with_saes(tokens, saes=[transcoder], use_error_term=True)
    assert torch.equal(logits, bridge(tokens))
    close(cache["blocks.1.hook_mlp_out.hook_sae_acts_post"], transcoder.encode(read))


def test_a_skip_connection_is_part_of_what_is_made(bridge: TransformerBridge, tokens: Tensor) -> None:
    transcoder = Dictionary(reads="blocks.1.mlp.hook_in", writes="blocks.1.hook_mlp_out")
    transcoder.W_skip = nn.Parameter(torch.randn(48, 48, generator=torch.Generator().manual_seed(4)))
    read = bridge.run_with_cache(tokens)[1]["blocks.1.mlp.hook_in"]
    _, cache = bridge.run_with_cache_with_saes(tokens, saes=[transcoder])
    expected = transcoder.decode(transcoder.encode(read)) + read @ transcoder.W_skip.T
    close(cache["blocks.1.hook_mlp_out.hook_sae_recons"], expected)


def test_points_have_the_name_that_was_asked_for(bridge: TransformerBridge, tokens: Tensor) -> None:
    sae = Dictionary(reads="blocks.1.hook_in")
    with bridge.saes(sae):
        assert list(bridge.acts_to_saes) == ["blocks.1.hook_in"]
        assert "blocks.1.hook_in.hook_sae_acts_post" in bridge.run_with_cache(tokens)[1]
        with bridge.saes(Dictionary(reads="blocks.1.hook_resid_pre")):
            assert list(bridge.acts_to_saes) == ["blocks.1.hook_resid_pre"]
            assert "blocks.1.hook_in.hook_sae_acts_post" not in bridge.hook_dict


def test_heads_may_be_read_as_one_vector(bridge: TransformerBridge, tokens: Tensor) -> None:
    sae = OfHeads(reads="blocks.1.attn.hook_z")
    _, cache = bridge.run_with_cache_with_saes(tokens, saes=[sae])
    assert cache["blocks.1.attn.hook_z.hook_sae_acts_post"].shape == (2, 7, 80)
    assert cache["blocks.1.attn.hook_z.hook_sae_recons"].shape == (2, 7, 4, 12)


FAMILIES = ["falcon", "falcon sequential", "gemma2", "gptj", "mixtral", "olmo2", "opt", "opt post-norm"]
HOSTS = [
    (family, point)
    for family in FAMILIES
    for point in ("hook_resid_pre", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
    if not (family in ("falcon", "gptj") and point == "hook_resid_mid")  # their sublayers run side by side
]


@pytest.mark.parametrize(("variant", "point"), HOSTS)
def test_families_with_writes_of_every_kind(variant: str, point: str) -> None:
    """The residual stream is written in place in some, handed over flat in others, or written into by the model."""
    found = clearspan.boot(build(variant))
    name = f"blocks.1.{point}"
    sae = Dictionary(width=found.cfg.d_model, reads=name)
    tokens = torch.randint(1, 90, (2, 7), generator=torch.Generator().manual_seed(6))
    plain, cache = found.run_with_cache(tokens)
    value = cache[name].clone()
    logits, inside = found.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
    assert torch.equal(logits, plain)
    close(inside[f"{name}.hook_sae_acts_post"], sae.encode(value))
    expected = found.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: sae.decode(sae.encode(value)))])
    assert torch.equal(found.run_with_saes(tokens, saes=[sae]), expected)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_generation_goes_through_them(bridge: TransformerBridge, tokens: Tensor, sae: Dictionary) -> None:
    with bridge.saes(sae):
        generated, cache = bridge.generate(tokens, return_cache=True, max_new_tokens=3, do_sample=False)
        whole = bridge.run_with_cache(generated[:, :-1], names_filter=ACTS)[1]
    close(cache[ACTS], whole[ACTS])


def test_half_precision_models_take_exact_autoencoders(tokens: Tensor) -> None:
    half = clearspan.boot(tiny_model(), dtype=torch.bfloat16)

    class Exact(Dictionary):
        def encode(self, value: Tensor) -> Tensor:
            return super().encode(value.float())

    _, cache = half.run_with_cache_with_saes(tokens, saes=[Exact()], use_error_term=True)
    assert cache[ACTS].dtype == torch.float32
    assert cache[f"{HOST}.hook_sae_output"].dtype == torch.bfloat16


def test_what_does_not_fit_is_refused(bridge: TransformerBridge, sae: Dictionary) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        bridge.add_sae(Dictionary(width=32))
    assert str(raised.value).startswith(
        "the sparse autoencoder does not fit blocks.1.hook_resid_post\n"
        "  expected: one that encodes and decodes [1, 1, 48] (batch, pos, d_model)"
    )
    with pytest.raises(InvalidArgumentError, match=r"can be on blocks.1.attn.hook_pattern"):
        bridge.add_sae(Dictionary(reads="blocks.1.attn.hook_pattern"))
    with pytest.raises(InvalidArgumentError, match=r"this is no sparse autoencoder(.|\n)*got: Linear"):
        bridge.add_sae(nn.Linear(2, 2))
    with pytest.raises(InvalidArgumentError, match=r"two sparse autoencoders are on blocks.1.hook_resid_post"):
        bridge.run_with_saes(torch.tensor([[1]]), saes=[sae, sae])
    with pytest.raises(InvalidArgumentError, match=r"no sparse autoencoder is on blocks.0.hook_resid_post"):
        bridge.reset_saes("blocks.0.hook_resid_post")
    assert bridge.acts_to_saes == {}
