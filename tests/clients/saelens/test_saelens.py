"""SAELens takes the bridge as it takes a HookedTransformer: its store, training, measures and splicing."""

import argparse
import collections
import copy
import inspect
import json.decoder
import pathlib
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    ActivationsStore,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.registry import get_sae_class
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import clearspan
from clearspan import TransformerBridge

HOST = "blocks.2.hook_resid_post"
ACTS = f"{HOST}.hook_sae_acts_post"
K = 16


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    """A bridge to the embedded model."""
    return clearspan.boot("tiny-bigcode")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Source of the standard library, in pieces."""
    sources = map(inspect.getsource, (json.decoder, argparse, pathlib, collections, inspect))
    return Dataset.from_dict({"text": [text[at : at + 2000] for text in sources for at in range(0, len(text), 2000)]})


def config(hook_name: str = HOST, sae: Any = None, steps: int = 80) -> LanguageModelSAERunnerConfig:
    """Returns the settings of a short training on a CPU, without files or logs."""
    return LanguageModelSAERunnerConfig(
        sae=sae or TopKTrainingSAEConfig(d_in=256, d_sae=512, k=K, normalize_activations="none"),
        model_name="tiny-bigcode",
        hook_name=hook_name,
        dataset_path="",
        is_dataset_tokenized=False,
        streaming=False,
        context_size=64,
        training_tokens=steps * 512,
        train_batch_size_tokens=512,
        store_batch_size_prompts=8,
        n_batches_in_buffer=8,
        lr=5e-3,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        seed=0,
    )


class Watched(LanguageModelSAETrainingRunner):
    """The training runner, with the loss of each step."""

    losses: list[float]

    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        self.losses, step = [], trainer.step

        def noted(batch: Tensor) -> Any:
            output = step(batch)
            self.losses.append(output.losses["mse_loss"].item())
            return output

        trainer.step = noted
        return super().run_trainer_with_interruption_handling(trainer)


def trained(cfg: LanguageModelSAERunnerConfig, bridge: TransformerBridge, dataset: Dataset) -> tuple[SAE, list[float]]:
    """Returns an autoencoder that SAELens trained on the bridge, ready to use, and the losses."""
    runner = Watched(cfg, override_dataset=dataset, override_model=bridge)
    return ready(runner.run()), runner.losses


def ready(training: Any) -> SAE:
    """Returns an autoencoder as SAELens loads it after training."""
    settings = training.cfg.get_inference_sae_cfg_dict()
    sae = SAE.from_dict(settings)
    state = training.state_dict()
    training.process_state_dict_for_saving_inference(state)
    sae.load_state_dict(state)
    return sae


@pytest.fixture(scope="module")
def run(bridge: TransformerBridge, dataset: Dataset) -> tuple[SAE, list[float]]:
    """An autoencoder of the residual stream, and the losses of its training."""
    return trained(config(), bridge, dataset)


@pytest.fixture
def sae(run: tuple[SAE, list[float]]) -> SAE:
    """The trained autoencoder."""
    return run[0]


@pytest.fixture
def store(bridge: TransformerBridge, dataset: Dataset) -> ActivationsStore:
    """SAELens's store of activations, from the bridge."""
    return ActivationsStore.from_config(bridge, config(), override_dataset=dataset)


@pytest.fixture
def tokens(store: ActivationsStore) -> Tensor:
    """Rows of the store."""
    return store.get_batch_tokens()


@pytest.mark.parametrize(
    "hook_name", [HOST, "blocks.1.hook_mlp_out", "blocks.3.attn.hook_z", "blocks.0.hook_resid_pre"]
)
def test_the_store_holds_what_the_cache_holds(bridge: TransformerBridge, dataset: Dataset, hook_name: str) -> None:
    store = ActivationsStore.from_config(bridge, config(hook_name), override_dataset=dataset)
    tokens = store.get_batch_tokens()
    assert tokens.shape == (8, 64)
    assert bool((tokens[:, 0] == bridge.tokenizer.bos_token_id).all())
    own = bridge.run_with_cache(tokens)[1][hook_name].reshape(8, 64, 256)
    assert torch.equal(store.get_activations(tokens), own)


def test_training_lowers_the_loss(run: tuple[SAE, list[float]], capsys: pytest.CaptureFixture[str]) -> None:
    losses = run[1]
    with capsys.disabled():
        shown = " ".join(f"{loss:.0f}" for loss in losses[::8])
        print(f"\nSAELens trains on the bridge; squared error of every eighth step: {shown}, last {losses[-1]:.0f}")
    assert len(losses) == 80
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_training_by_another_loss_on_heads(bridge: TransformerBridge, dataset: Dataset) -> None:
    settings = StandardTrainingSAEConfig(d_in=256, d_sae=512, l1_coefficient=0.1, reshape_activations="hook_z")
    sae, losses = trained(config("blocks.1.attn.hook_z", settings, steps=20), bridge, dataset)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    _, cache = bridge.run_with_cache_with_saes("import os", saes=[sae])
    assert cache["blocks.1.attn.hook_z.hook_sae_acts_post"].shape[-1] == 512
    assert cache["blocks.1.attn.hook_z.hook_sae_recons"].shape[2:] == (8, 32)


def test_its_measures_are_the_bridges(
    bridge: TransformerBridge, sae: SAE, dataset: Dataset, store: ActivationsStore, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = get_eval_everything_config(4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2)
    measures, _ = run_evals(sae, store, bridge, ActivationScaler(), everything, exclude_special_tokens=False)
    losses = measures["model_performance_preservation"]
    with capsys.disabled():
        variance = measures["reconstruction_quality"]["explained_variance"]
        shown = {name: round(value, 3) for name, value in losses.items()}
        print(f"\nSAELens's measures: L0 {measures['sparsity']['l0']:.1f}, explained variance {variance:.3f}, {shown}")
    assert measures["sparsity"]["l0"] <= K
    assert measures["reconstruction_quality"]["explained_variance"] > 0.2
    assert losses["ce_loss_without_sae"] < losses["ce_loss_with_sae"] < losses["ce_loss_with_ablation"]
    assert 0 < losses["ce_loss_score"] < 1

    again = ActivationsStore.from_config(bridge, config(), override_dataset=dataset)
    batches = [again.get_batch_tokens(4) for _ in range(2)]
    plain = torch.stack([bridge(batch, return_type="loss") for batch in batches]).mean()
    spliced = torch.stack([bridge.run_with_saes(batch, saes=sae, return_type="loss") for batch in batches]).mean()
    assert losses["ce_loss_without_sae"] == pytest.approx(plain.item(), abs=1e-4)
    assert losses["ce_loss_with_sae"] == pytest.approx(spliced.item(), abs=1e-4)


def test_the_error_term_leaves_logits_as_they_are(bridge: TransformerBridge, sae: SAE, tokens: Tensor) -> None:
    plain = bridge(tokens)
    assert torch.equal(bridge.run_with_saes(tokens, saes=[sae], use_error_term=True), plain)
    assert not torch.allclose(bridge.run_with_saes(tokens, saes=[sae]), plain, atol=0.1)


def test_a_feature_can_be_written(bridge: TransformerBridge, sae: SAE, tokens: Tensor) -> None:
    _, cache = bridge.run_with_cache_with_saes(tokens, saes=[sae], names_filter=[ACTS])
    feature = int(cache[ACTS].sum((0, 1)).argmax())

    def off(acts: Tensor, hook: object) -> Tensor:
        acts[..., feature] = 0
        return acts

    def without(value: Tensor, hook: object) -> Tensor:
        return value - cache[ACTS][..., feature, None] * sae.W_dec[feature]

    found = bridge.run_with_hooks_with_saes(tokens, saes=[sae], use_error_term=True, fwd_hooks=[(ACTS, off)])
    expected = bridge.run_with_hooks(tokens, fwd_hooks=[(HOST, without)])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found, bridge(tokens), atol=0.1)


def test_gradients_reach_features_and_weights(bridge: TransformerBridge, sae: SAE, tokens: Tensor) -> None:
    with bridge.saes(saes=[sae], use_error_term=True):
        _, cache = bridge.run_with_cache(tokens, return_type="loss", incl_bwd=True)
        bridge(tokens, return_type="loss").backward()
    direct = cache[f"{HOST}_grad"] @ sae.W_dec.T
    torch.testing.assert_close(cache[f"{ACTS}_grad"], direct, atol=1e-6, rtol=1e-3)
    assert sae.W_dec.grad is not None
    assert bool(sae.W_dec.grad.any())
    sae.zero_grad()
    bridge.zero_grad()


@pytest.mark.parametrize("kind", ["standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit"])
def test_every_kind_fits(bridge: TransformerBridge, tokens: Tensor, kind: str) -> None:
    cls, settings = get_sae_class(kind)
    sae = cls.from_dict({**settings(d_in=256, d_sae=128).to_dict(), "metadata": {"hook_name": HOST}})
    logits, cache = bridge.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
    assert torch.equal(logits, bridge(tokens))
    torch.testing.assert_close(cache[f"{HOST}.hook_sae_recons"], sae(cache[f"{HOST}.hook_sae_input"]))


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_every_kind_of_transcoder_fits(bridge: TransformerBridge, tokens: Tensor, kind: str) -> None:
    cls, settings = get_sae_class(kind)
    said = settings(d_in=256, d_sae=64, d_out=256, apply_b_dec_to_input=False).to_dict()
    said["metadata"] = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    transcoder = cls.from_dict(said)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) / 10)
    logits, cache = bridge.run_with_cache_with_saes(tokens, saes=[transcoder], use_error_term=True)
    assert torch.equal(logits, bridge(tokens))
    made = transcoder(cache["blocks.1.mlp.hook_in"])
    torch.testing.assert_close(cache["blocks.1.hook_mlp_out.hook_sae_recons"], made, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("option", ["prefetch_llm_batches", "autocast_lm", "compile_llm"])
def test_options_of_the_runner(bridge: TransformerBridge, dataset: Dataset, option: str) -> None:
    settings = config(steps=10)
    setattr(settings, option, True)
    _, losses = trained(settings, copy.copy(bridge), dataset)
    assert losses[-1] < losses[0]


def test_points_inside_hold_what_saelens_puts_there(tmp_path: pathlib.Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    model.save_pretrained(tmp_path)
    theirs = SAETransformerBridge.boot_transformers(str(tmp_path), device="cpu", dtype=torch.float32)
    ours = clearspan.boot(model)
    settings = StandardTrainingSAEConfig(d_in=48, d_sae=64).to_dict()
    settings["metadata"] = {"hook_name": "blocks.1.hook_resid_pre"}
    sae = SAE.from_dict(SAE.from_dict(settings).cfg.to_dict())
    tokens = torch.randint(0, 97, (2, 9), generator=generator)
    for use_error_term in (False, True):
        expected, inside = theirs.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=use_error_term)
        found, cache = ours.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=use_error_term)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        names = {name.rpartition(".")[2]: name for name in inside if "hook_sae" in name}
        assert len(names) == 6 if use_error_term else 5
        for leaf, name in names.items():
            if leaf != "hook_sae_acts_pre":
                own = cache[f"blocks.1.hook_resid_pre.{leaf}"]
                torch.testing.assert_close(own, inside[name], atol=1e-4, rtol=1e-4)
