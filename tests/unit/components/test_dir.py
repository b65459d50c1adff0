"""What completion offers on a component: its points, weights and parts, and what users do with it."""

import pytest
from tests.zoo import MODELS, build

import clearspan
from clearspan.components import GeneralizedComponent
from clearspan.errors import MissingWeightError, UnreadableWeightError
from clearspan.points import HookPoint


def offered(component):
    return [name for name in dir(component) if not name.startswith("_")]


def test_attention_norms_and_maps(bridge):
    assert offered(bridge.blocks[0].attn) == [
        "W_K", "W_O", "W_Q", "W_V", "b_K", "b_O", "b_Q", "b_V", "cfg", "has_bias", "has_rotary", "has_sinks",
        "hook_attn_scores", "hook_in", "hook_k", "hook_out", "hook_pattern", "hook_q", "hook_result", "hook_v",
        "hook_z", "is_quantised", "module", "module_path", "n_heads", "n_kv_heads", "o", "path", "qkv", "submodules",
        "weight",
    ]  # fmt: skip
    assert offered(bridge.ln_final) == [
        "affine", "b", "cfg", "eps", "hook_in", "hook_normalized", "hook_out", "hook_scale", "is_quantised", "module",
        "module_path", "normalize", "path", "scale", "submodules", "uses_rms_norm", "w", "weight",
    ]  # fmt: skip
    mlp = offered(bridge.blocks[0].mlp)
    assert {"W_in", "W_out", "b_in", "b_out", "in", "out", "hook_pre", "hook_post"} <= {*mlp}
    assert "W_gate" not in mlp
    assert "points" in offered(bridge.adapter.component_mapping["ln_final"])


@pytest.mark.parametrize("name", MODELS)
def test_what_is_offered_is_there(name):
    bridge = clearspan.boot(build(name))
    reachable = set()
    for component in bridge.components:
        for part in component.walk():
            names = offered(part)
            assert len(names) < 45
            for one in names:
                try:
                    value = getattr(part, one)
                except (MissingWeightError, UnreadableWeightError):
                    assert one[0] in "Wb"  # a bias that this checkpoint has not
                    continue
                if isinstance(value, HookPoint):
                    reachable.add(value.name)
                assert isinstance(value, GeneralizedComponent) == (one in part.submodules)
    assert {point.name for point in bridge.index if "." in point.name} <= reachable
