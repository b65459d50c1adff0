"""Bridges to hybrids whose mixers show their inside: caches, generation, verification, other threads."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.hybrids import HYBRIDS, hybrid_model
from tests.releases import on, repeats_keys
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

import clearspan
from clearspan.architectures import ADAPTERS, mixers
from clearspan.components import MixerBridge, PerLayer
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import MissingWeightError, NotCachedError

Sizes = dict[str, Any]
TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def _heads(name: str) -> Callable[[TransformerBridgeConfig], MixerBridge]:
    return lambda cfg: mixers.state_space_heads(name, heads=4, d_head=24, groups=1, state=8)


MIXERS: dict[str, Callable[[TransformerBridgeConfig], MixerBridge]] = {
    "mamba": lambda cfg: mixers.selective_scan("mixer", d_inner=96, state=8),
    "jamba": lambda cfg: mixers.selective_scan("mamba", d_inner=96, state=8, has_norms=True),
    "falcon_h1": lambda cfg: mixers.state_space_heads("mamba", heads=4, d_head=24, groups=1, state=8, norm=None),
    "nemotron_h": _heads("mixer"),
    "granitemoehybrid": _heads("mamba"),
    "qwen3_next": lambda cfg: mixers.gated_delta(
        "linear_attn",
        heads=4,
        qk_heads=2,
        d_head_qk=8,
        d_head_v=8,
        submodules={"qkvz": "in_proj_qkvz", "ba": "in_proj_ba", "out_proj": "out_proj", "norm": "norm"},
        repeats_keys=repeats_keys(Qwen3NextGatedDeltaNet),
    ),
    "minimax": lambda cfg: mixers.lightning("self_attn", heads=4, d_head=12),
}


def bridge_of(name: str) -> clearspan.TransformerBridge:
    """Returns a bridge to a tiny hybrid whose mixers are described."""
    base = HYBRIDS[name][1]

    class Adapter(base):
        def __init__(self, cfg: TransformerBridgeConfig) -> None:
            super().__init__(cfg)
            blocks = self.component_mapping["blocks"]
            assert isinstance(blocks, PerLayer)
            described = MIXERS[name](cfg)
            templates = []
            for template in blocks.templates:
                own = copy.copy(template)
                there = own.submodules.get("mixer")
                if there is not None and there.name == described.name:
                    own.submodules = {**own.submodules, "mixer": described}
                templates.append(own)
            self.component_mapping = {**self.component_mapping, "blocks": PerLayer(templates)}

    model = hybrid_model(name, **({"mlp_only_layers": [0, 1, 2, 3]} if name == "qwen3_next" else {}))
    for path, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif path.endswith("dt_bias"):  # steps longer than the bound of NemotronH, which it forgets behind a cache
            torch.nn.init.zeros_(parameter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ADAPTERS, type(model).__name__, Adapter)
        return clearspan.boot(model)


@pytest.fixture(scope="module")
def bridges() -> dict[str, clearspan.TransformerBridge]:
    return {}


@pytest.fixture
def bridge(
    bridges: dict[str, clearspan.TransformerBridge], request: pytest.FixtureRequest
) -> clearspan.TransformerBridge:
    if request.param not in bridges:
        bridges[request.param] = bridge_of(request.param)
    return bridges[request.param]


every = pytest.mark.parametrize("bridge", list(MIXERS), indirect=True)
few = pytest.mark.parametrize("bridge", ["mamba", "falcon_h1", "qwen3_next"], indirect=True)


@every
def test_verification_passes(bridge: clearspan.TransformerBridge) -> None:
    found = bridge.verify("quick")
    failed = [check for check in found.checks if not check.passed]
    assert not failed, [f"{check.group} {check.what}: {check.error} {check.explanation[:250]}" for check in failed[:12]]
    texts = [check.what for check in found.checks]
    if bridge.cfg.architecture not in ("MambaForCausalLM", "JambaForCausalLM", "MiniMaxForCausalLM"):
        assert any("mixer.hook_effective_attention @" in text for text in texts)


@every
def test_a_cache_keeps_what_forwards_make_and_the_rest_by_name(bridge: clearspan.TransformerBridge) -> None:
    bare = bridge.hf_model(TOKENS, use_cache=False).logits
    logits, cache = bridge.run_with_cache(TOKENS)
    assert torch.equal(logits, bare)
    layer = next(layer for layer, kind in enumerate(bridge.layer_types()) if "mixer" in kind)
    names = [name for name in bridge.hook_dict if name.startswith(f"blocks.{layer}.mixer.hook")]
    heard: dict[str, Tensor] = {}
    with torch.no_grad():
        bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, _keeping(heard)) for name in names])
    for name in names:
        if bridge.hook_dict[name].is_computed:
            with pytest.raises(NotCachedError):
                cache[name]
            own = bridge.run_with_cache(TOKENS, names_filter=name)[1]
            assert torch.equal(own[name], heard[name])
        else:
            assert torch.equal(cache[name], heard[name]), name


def _keeping(heard: dict[str, Tensor]) -> Callable[..., None]:
    def keep(value: Tensor, hook: clearspan.HookPoint) -> None:
        heard[hook.name] = value.clone()

    return keep


@few
def test_gradients_of_a_cache_are_those_of_hooks(bridge: clearspan.TransformerBridge) -> None:
    _, cache = bridge.run_with_cache(TOKENS, incl_bwd=True)
    name = "blocks.0.mixer.hook_ssm_out"
    found: list[Tensor] = []
    with bridge.hooks(bwd_hooks=[(name, lambda gradient, hook: found.append(gradient.clone()))]):
        bridge(TOKENS, return_type="loss").backward()
    bridge.hf_model.zero_grad()
    assert torch.allclose(cache[f"{name}_grad"], found[0], atol=1e-6)
    inner = [one for one in cache if one.startswith("blocks.0.mixer.hook") and one.endswith("_grad")]
    assert len(inner) > 6


@few
def test_another_thread_sees_nothing_of_a_run(bridge: clearspan.TransformerBridge) -> None:
    name = next(one for one in ("hook_scan_in", "hook_v") if f"blocks.0.mixer.{one}" in bridge.hook_dict)
    bare = bridge.hf_model(TOKENS, use_cache=False).logits
    found: list[Tensor] = []

    def edit(value: Tensor, hook: clearspan.HookPoint) -> Tensor:
        thread = threading.Thread(target=lambda: found.append(bridge.hf_model(TOKENS, use_cache=False).logits))
        thread.start()
        thread.join()
        return value * torch.linspace(0.3, 1.3, value.shape[-1])

    edited = bridge.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.0.mixer.{name}", edit)])
    assert torch.equal(found[0], bare)
    assert not torch.allclose(edited, bare, atol=1e-3)


@every
def test_a_generation_with_a_cache_shows_one_forward(bridge: clearspan.TransformerBridge) -> None:
    name = "blocks.0.mixer.hook_ssm_out"
    made, cache = bridge.generate(
        TOKENS, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_cache=True, names_filter=name
    )
    _, once = bridge.run_with_cache(made[:, :-1], names_filter=name)
    assert torch.allclose(cache[name], once[name], atol=1e-4)


def test_nemotron_bounds_step_sizes_only_in_the_chunked_form() -> None:
    """Transformers' own: a token behind a cache has other logits than in one forward; `bridge_of` knows."""
    model = bridge_of("nemotron_h").hf_model
    model.model.layers[0].mixer.time_step_limit = (1.0, float("inf"))
    with torch.no_grad():
        before = model(TOKENS[:, :-1], use_cache=True).past_key_values
        behind = model(TOKENS[:, -1:], **on(model, before)).logits[:, -1]
        once = model(TOKENS, use_cache=False).logits[:, -1]
    assert float((behind - once).abs().max()) > 1e-3


@few
def test_a_planned_cache_is_the_one_that_is_made(bridge: clearspan.TransformerBridge) -> None:
    plan = bridge.plan_cache(TOKENS.shape)
    _, cache = bridge.run_with_cache(TOKENS)
    assert {entry.name for entry in plan.entries} == set(cache)
    assert all(entry.shape == tuple(cache[entry.name].shape) for entry in plan.entries)


def test_weights_are_views_of_the_live_parameters() -> None:
    bridge = bridge_of("falcon_h1")
    mixer, module = bridge.blocks[0].mixer, bridge.hf_model.model.layers[0].mamba
    assert torch.equal(mixer.W_in, module.in_proj.weight.T)
    assert mixer.W_out.data_ptr() == module.out_proj.weight.data_ptr()
    assert mixer.W_conv.shape == (96 + 16, 4)
    assert mixer.A_log is module.A_log
    assert mixer.D is module.D
    assert mixer.dt_bias is module.dt_bias
    with pytest.raises(MissingWeightError, match="has no A_log"):
        bridge_of("minimax").blocks[0].mixer.A_log  # noqa: B018
    assert bridge.why_absent("blocks.0.mixer.hook_x_proj") == "the model's layers mix positions by attention alone"
