"""Gemma 3n, whose stream is several that AltUp mixes."""

from tests.structures import assert_verified

import clearspan
from clearspan import zoo
from clearspan.architectures.gemma3n import Gemma3nArchitectureAdapter


def test_streams_are_points_and_keys_are_shared():
    bridge = clearspan.boot(zoo.build("gemma3n_text"))
    assert type(bridge.adapter) is Gemma3nArchitectureAdapter
    first, last = "blocks.0.", f"blocks.{bridge.cfg.n_layers - 1}."
    assert {f"{first}{name}" for name in ("hook_streams_pre", "hook_active_pre", "attn.k.hook_out")} <= {
        *bridge.hook_dict
    }
    assert f"{last}attn.hook_rot_q" in bridge.hook_dict
    assert f"{last}attn.k.hook_out" not in bridge.hook_dict
    assert_verified(bridge, "quick")
