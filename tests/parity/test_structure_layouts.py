"""Residual streams whose tensors are not rows by tokens: positions first, a prompt before, several side by side."""

import pytest
import torch

import clearspan
from clearspan import zoo
from clearspan.errors import GenerationRefusedError, WholeForwardError
from clearspan.points import Layout
from clearspan.structure import derive

PROMPT = 4
"""Positions that the zoo's CPMAnt puts before the tokens."""
KINDS = {
    "cpmant": (Layout.LAST, "cpmant.encoder.layers", lambda raw: raw[:, PROMPT:]),
    "prophetnet": (Layout.SECOND, "prophetnet.decoder.layers", lambda raw: raw[:, 8:16]),
    "xlnet": (Layout.POS_FIRST, "transformer.layer", lambda raw: raw.transpose(0, 1)),
}
"""For each model type how its stream lies, where its blocks are, and what of a block's tensor are the tokens."""
TOKENS = torch.randint(5, 90, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=KINDS)
def laid(request):
    model = zoo.build(request.param)
    bridge = clearspan.boot(model, adapter=derive(model))
    return bridge, *KINDS[request.param]


def test_verify_finds_no_fault_but_the_models_own(laid):
    bridge, layout, *_ = laid
    groups = {check.group for check in bridge.verify(level="quick").failures}
    pinned = {Layout.LAST: {"padding"}, Layout.SECOND: {"generation"}, Layout.POS_FIRST: set()}
    assert groups == pinned[layout]


def test_the_stream_is_shown_by_rows_and_tokens(laid):
    bridge, layout, path, shown = laid
    assert bridge.blocks[0].layout is layout
    entered = []
    block = bridge.hf_model.get_submodule(f"{path}.1")
    handle = block.register_forward_pre_hook(lambda _, given: entered.append(given[0].clone()))
    _, cache = bridge.run_with_cache(TOKENS)
    handle.remove()
    assert torch.equal(cache["resid_pre", 1], shown(entered[0]))
    shapes = {cache[f"blocks.1.{name}"].shape for name in ("hook_resid_mid", "hook_mixer_out", "hook_mlp_out")}
    assert shapes == {(2, 8, 64)}


def test_a_write_is_at_its_token_and_leaves_the_other_positions_alone(laid):
    bridge, _, path, shown = laid
    entered = []

    def double(value, hook):
        value[1, 3] *= 2

    block = bridge.hf_model.get_submodule(f"{path}.1")
    for hooks in ([], [("blocks.1.hook_resid_pre", double)]):
        with bridge.hooks(fwd_hooks=hooks):
            handle = block.register_forward_pre_hook(lambda _, given: entered.append(given[0].clone()))
            bridge(TOKENS)
            handle.remove()
    plain, edited = entered
    wanted = plain.clone()
    shown(wanted)[1, 3] *= 2
    assert torch.equal(edited, wanted)


def test_some_positions_are_kept_alone(laid):
    bridge, *_ = laid
    _, whole = bridge.run_with_cache(TOKENS)
    _, last = bridge.run_with_cache(TOKENS, pos_slice=-1)
    torch.testing.assert_close(last["resid_post", 1], whole["resid_post", 1][:, -1:])


def test_blocks_are_not_run_apart(laid):
    bridge, layout, *_ = laid
    with pytest.raises(WholeForwardError, match=f"the stream lies as {layout}".replace("(", r"\(").replace(")", r"\)")):
        bridge(TOKENS, stop_at_layer=1)


def test_generations_on_other_tokens_are_refused():
    model = zoo.build("xlnet")
    with pytest.raises(GenerationRefusedError) as caught:
        clearspan.boot(model, adapter=derive(model)).generate(TOKENS, max_new_tokens=2)
    assert str(caught.value) == (
        "this model's generations cannot be followed\n"
        "  where: XLNetLMHeadModel\n"
        "  reason: `generate` runs it on other tokens than those of the sequence\n"
        "  fix: bridge.hf_model.generate(...), without hooks; or a run of the whole sequence"
    )


def test_reversible_blocks_show_the_stream_that_their_halves_hand_on():
    model = zoo.build("reformer")
    bridge = clearspan.boot(model, adapter=derive(model))
    seen = []
    block = model.get_submodule("reformer.encoder.layers.1")
    handle = block.register_forward_hook(lambda _, __, given, left: seen.append((given, left)), with_kwargs=True)
    _, cache = bridge.run_with_cache(TOKENS[:, :7])  # which the model pads to 8
    handle.remove()
    ((given, left),) = seen
    assert torch.equal(cache["resid_pre", 1], given["hidden_states"][:, :7])
    assert torch.equal(cache["resid_post", 1], left.hidden_states[:, :7])
    assert bridge.layer_types() == ["unknown", "unknown"]
    assert "reversible" in bridge.why_absent("blocks.0.hook_mlp_out")
    failed = {check.what for check in bridge.verify(level="quick").failures}
    assert failed == {"row of 9 tokens padded on the left to 12", "a short generation"}
