"""Every supported architecture: all points read and written, and their values Hugging Face's own."""

import functools

import pytest
import torch
from tests.zoo import CONTINUOUS, MODELS, WITHOUT_VARIANT, build
from torch import Tensor
from transformers import DynamicCache

import clearspan
from clearspan import TransformerBridge
from clearspan.architectures import ADAPTERS
from clearspan.errors import ConflictingWritesError, MissingWeightError
from clearspan.points import VOCABULARY, HookPoint
from clearspan.verification.report import GROUPS

LENGTH = 9
SQUARE_EAGER = 1e-5
"""Relative; measured at most 1e-6, for patterns of later layers under fused attention against eager."""


@functools.cache
def made(variant: str) -> TransformerBridge:
    """A bridge that no test may leave changed."""
    return clearspan.boot(build(variant))


@pytest.fixture(params=MODELS)
def zoo(request: pytest.FixtureRequest) -> TransformerBridge:
    return made(request.param)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_every_adapter_is_in_the_zoo():
    assert {made(variant).cfg.architecture for variant in MODELS} == set(ADAPTERS) - WITHOUT_VARIANT


@pytest.mark.slow
@pytest.mark.parametrize("variant", MODELS)
def test_full_verification(variant, verified):
    found = verified(variant)
    assert found.passed, str(found)
    assert {check.group for check in found.checks} == GROUPS.keys() - {"precision", "tokenizer"}


def test_quick_verification_takes_at_most_forty_forwards(zoo):
    calls = []
    handle = zoo.hf_model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = zoo.verify()
    handle.remove()
    assert found.passed, str(found)
    assert found.forwards == len(calls) <= 40


def test_every_name_of_the_vocabulary_is_there_or_absent_with_a_reason(zoo):
    for entry in VOCABULARY:
        for layer in range(zoo.cfg.n_layers):
            name = entry.name.replace("{l}", str(layer))
            reason = zoo.why_absent(name)
            assert (name in zoo.hook_dict) == (reason is None), name
            assert reason is None or len(reason) > 10, name


def test_table_has_the_shapes_that_a_run_gives(zoo, ids):
    with torch.no_grad():
        _, cache = zoo.run_with_cache(ids)
    table = zoo.points()
    assert [row.name for row in table] == [point.name for point in zoo.index]
    for row in table:
        for axis, size, found in zip(row.axes, row.sizes, cache[row.name].shape, strict=True):
            expected = {"batch": 2, "pos": LENGTH, "q_pos": LENGTH, "k_pos": LENGTH}.get(axis, size)
            assert found == expected, (row, axis)


OWN_EAGER = ("llama eager", "gpt2 upcast", "falcon alibi")
"""Eager already; and Falcon, whose own eager attention adds the position bias twice."""


@pytest.mark.parametrize("variant", [name for name in MODELS if name not in OWN_EAGER])
def test_patterns_and_residuals_are_those_of_hugging_face(variant, ids):
    bridge = made(variant)
    eager = build(variant, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        theirs = eager(ids, use_cache=False, output_attentions=True, output_hidden_states=True)
    for layer in range(bridge.cfg.n_layers):
        assert relative(cache["pattern", layer], theirs.attentions[layer]) < SQUARE_EAGER
        assert relative(cache["resid_pre", layer], theirs.hidden_states[layer]) < SQUARE_EAGER
    assert relative(cache["unembed.hook_in"], theirs.hidden_states[-1]) < SQUARE_EAGER


def test_patterns_with_padding_and_under_a_kv_cache(zoo, ids):
    """Rows of a cached run are those of the whole one, also where a sliding window hides the first keys."""
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    kv = DynamicCache(config=zoo.hf_model.config)
    with torch.no_grad():
        _, whole = zoo.run_with_cache(ids, attention_mask=mask)
        zoo(ids[:, :5], attention_mask=mask[:, :5], past_key_values=kv)
        _, rest = zoo.run_with_cache(ids[:, 5:], attention_mask=mask, past_key_values=kv)
    for layer in range(zoo.cfg.n_layers):
        pattern, expected = rest["pattern", layer], whole["pattern", layer][:, :, 5:]
        keys = pattern.shape[-1]  # fewer than all, where the cache keeps a window
        real = torch.stack([expected[0], expected[1]])
        assert relative(pattern, real[..., -keys:]) < SQUARE_EAGER
        hidden = expected[..., :-keys] if keys < LENGTH else expected[..., :0]
        assert not hidden.any()
        assert whole["pattern", layer][1, :, 3:, :3].abs().max() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone_in_cache_and_loss(zoo, ids, side):
    """At every point with positions, in logits and in the loss of each token."""
    real = slice(3, None) if side == "left" else slice(None, -3)
    mask = torch.zeros_like(ids)
    mask[0], mask[1, real] = 1, 1
    with torch.no_grad():
        losses, cache = zoo.run_with_cache(ids, attention_mask=mask, return_type="loss", loss_per_token=True)
        alone, expected = zoo.run_with_cache(ids[1:, real], return_type="loss", loss_per_token=True)
    of_pairs = slice(3, None) if side == "left" else slice(None, -3)
    assert relative(losses[1, of_pairs], alone[0]) < 1e-5
    for point in zoo.index:
        if point.axes[:2] == ("batch", "pos") and point.name not in ("pos_embed.hook_in",):
            found, wanted = cache[point.name][1, real], expected[point.name][0]
            if found.is_floating_point():
                assert relative(found, wanted) < 1e-5, point.name
            else:
                assert torch.equal(found, wanted), point.name
    for layer in range(zoo.cfg.n_layers):
        assert relative(cache["pattern", layer][1, :, real, real], expected["pattern", layer][0]) < 1e-5


def test_padded_rows_generate_what_they_generate_alone(zoo, ids):
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = zoo.generate(ids, attention_mask=mask, **options)
    for row, start in enumerate((0, 3)):
        alone = zoo.generate(ids[row : row + 1, start:], **options)
        assert torch.equal(together[row, LENGTH:], alone[0, LENGTH - start :])


def test_segments_join_to_the_whole(zoo, ids):
    with torch.no_grad():
        whole = zoo(ids)
        for layer in range(zoo.cfg.n_layers + 1):
            middle = zoo(ids, stop_at_layer=layer)
            assert middle.shape == (2, LENGTH, zoo.cfg.d_model)
            if layer < zoo.cfg.n_layers:
                assert torch.equal(zoo(middle, start_at_layer=layer), whole)


SMOOTH = {"steps": (3e-3, 3e-4), "relative": 0.02, "absolute": 3e-4}
"""Numeric gradients: many models normalise in float32 whatever their dtype, so that steps cannot be very small. One of
the two steps must agree."""


def in_float64(variant: str) -> TransformerBridge:
    model = build(variant, **CONTINUOUS.get(variant, {}))
    if "upcast" not in variant:
        model = model.double()
    model.config._experts_implementation = "eager"  # the fused kernels have no float64
    return clearspan.boot(model)


@pytest.mark.slow
@pytest.mark.parametrize("variant", MODELS)
def test_gradients_equal_numeric_ones(variant, ids):
    """Of the loss, at every point of a layer and outside the blocks: returned writes up, in-place writes down."""
    bridge = in_float64(variant)
    _, cache = bridge.run_with_cache(ids, return_type="loss", incl_bwd=True)
    generator = torch.Generator().manual_seed(3)
    layers = {0: "blocks.1."} | ({1: "blocks.2."} if bridge.hook_dict.keys() & {"blocks.2.attn.hook_rot_q"} else {})
    for point in bridge.index:
        value = cache[point.name]
        if not value.is_floating_point() or (
            point.name.startswith("blocks.") and point.name[:9] not in layers.values()
        ):
            continue
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        if point.axes[-1] == "k_pos":
            direction = direction.tril()
        analytic = (cache[f"{point.name}_grad"] * direction).sum().item()
        allowed = SMOOTH["relative"] * abs(analytic) + SMOOTH["absolute"] * direction.numel() ** 0.5 / 4
        numeric = []
        for step in SMOOTH["steps"]:
            numeric.append(_slope(bridge, ids, point.name, direction, step))
            if abs(numeric[-1] - analytic) < allowed:
                break
        else:
            raise AssertionError((point.name, analytic, numeric))


def _slope(bridge: TransformerBridge, ids: Tensor, name: str, direction: Tensor, step: float) -> float:
    with torch.no_grad():
        up = bridge.run_with_hooks(
            ids, return_type="loss", fwd_hooks=[(name, lambda value, hook: value + step * direction)]
        )
        down = bridge.run_with_hooks(
            ids, return_type="loss", fwd_hooks=[(name, lambda value, hook: value.sub_(step * direction))]
        )
    return ((up - down) / (2 * step)).item()


LATENT = ("deepseek_v3", "deepseek_v3 full queries")


@pytest.mark.parametrize("variant", [name for name in MODELS if name not in LATENT])
def test_attention_weights_give_the_projections(variant, ids):
    """`W_Q` and so on, with their biases, map what attention reads to `hook_q`."""
    bridge = made(variant)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        for layer, block in enumerate(bridge.blocks):
            read = cache[f"blocks.{layer}.attn.hook_in"]
            for letter in "QKV":
                expected = torch.einsum("bpm,hmd->bphd", read, getattr(block.attn, f"W_{letter}"))
                expected = expected + _or_zero(block.attn, f"b_{letter}")
                assert relative(cache[letter.lower(), layer], expected) < 1e-5


@pytest.mark.parametrize("variant", LATENT)
def test_latent_weights(variant, ids):
    """The composed `W_V` maps to values but for the latents' norm; `W_Q` is there without a low-rank part alone."""
    bridge = made(variant)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        for layer, block in enumerate(bridge.blocks):
            read = cache[f"blocks.{layer}.attn.hook_in"]
            scale = cache[f"blocks.{layer}.attn.kv_a_norm.hook_scale"][..., None]
            values = torch.einsum("bpm,hmd->bphd", read, block.attn.W_V) / scale
            assert relative(cache["v", layer], values) < 1e-5
            if variant == "deepseek_v3":
                with pytest.raises(MissingWeightError, match="a norm lies between the two query projections"):
                    _ = block.attn.W_Q
            else:
                assert relative(cache["q", layer], torch.einsum("bpm,hmd->bphd", read, block.attn.W_Q)) < 1e-5
            for missing in ("W_K", "b_Q", "b_K", "b_V"):
                with pytest.raises(MissingWeightError, match=f"has no {missing}"):
                    getattr(block.attn, missing)


def test_mlp_weights_give_the_hidden_layer(zoo, ids):
    """`W_gate`, or `W_in` without a gate, maps what the MLP reads to `hook_pre`; `W_in` to `hook_pre_linear`."""
    with torch.no_grad():
        _, cache = zoo.run_with_cache(ids)
        for layer, block in enumerate(zoo.blocks):
            if f"blocks.{layer}.mlp.hook_pre" not in cache:
                continue
            read = cache[f"blocks.{layer}.{'mlp.in' if block.mlp.name is None else 'mlp'}.hook_in"]
            is_gated = f"blocks.{layer}.mlp.hook_pre_linear" in cache
            first, bias = ("W_gate", "b_gate") if is_gated else ("W_in", "b_in")
            assert relative(cache["pre", layer], read @ getattr(block.mlp, first) + _or_zero(block.mlp, bias)) < 1e-5
            if is_gated:
                linear = read @ block.mlp.W_in + _or_zero(block.mlp, "b_in")
                assert relative(cache["pre_linear", layer], linear) < 1e-5


def _or_zero(part: object, bias: str) -> Tensor | float:
    try:
        return getattr(part, bias)
    except MissingWeightError:
        return 0.0


def uneven(value: Tensor) -> Tensor:
    """Returns a change that a norm does not undo."""
    return value * torch.linspace(0.5, 2, value.shape[-1]) + 0.25


def test_path_inputs_act_on_their_projections_alone(zoo, ids):
    """All three projections' inputs together are what attention reads; the MLP's is what the MLP reads."""

    def change(value: Tensor, hook: HookPoint) -> Tensor:
        return uneven(value)

    def logits(*names: str) -> Tensor:
        return zoo.run_with_hooks(ids, fwd_hooks=[(f"blocks.1.{name}", change) for name in names])

    block = zoo.blocks[1]
    alone = {name: logits(f"hook_{name}") for name in ("q_input", "k_input", "v_input", "attn_in") if has(zoo, name)}
    if "attn_in" in alone:
        together = logits("hook_q_input", "hook_k_input", "hook_v_input")
        assert relative(together, alone["attn_in"]) < 1e-5
        shares_norm = block.is_parallel and "ln2" not in block.submodules
        if not shares_norm:
            read = "ln1.hook_in" if has(zoo, "ln1.hook_in") and not block.norms_the_sum else "attn.hook_in"
            if read == "ln1.hook_in" and block.residual_is_normed:
                return  # there the residual branch reads the norm too
            assert relative(alone["attn_in"], logits(read)) < 1e-5
    base = zoo(ids)
    assert len({tuple(found[0, -1, :4].tolist()) for found in (*alone.values(), base)}) == len(alone) + 1


def has(bridge: TransformerBridge, name: str) -> bool:
    return f"blocks.1.{name}" in bridge.hook_dict or f"blocks.1.hook_{name}" in bridge.hook_dict


@pytest.mark.parametrize("variant", ["gptj", "cohere2", "falcon", "falcon one norm"])
def test_an_mlp_that_shares_attentions_norm_has_an_input_of_its_own(variant, ids):
    bridge = made(variant)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        norm = bridge.blocks[1].ln1.module

        def read(value: Tensor, hook: HookPoint) -> Tensor:
            return norm(uneven(cache["resid_pre", 1]))

        alone = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_mlp_in", lambda value, hook: uneven(value))])
        expected = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.mlp.hook_in", read)])
    assert relative(alone, expected) < 1e-6
    assert relative(alone, bridge(ids)) > 1e-3


def test_parts_called_alone_give_what_they_give_in_a_run(zoo, ids):
    with torch.no_grad():
        _, cache = zoo.run_with_cache(ids)
        for layer, block in enumerate(zoo.blocks):
            here = f"blocks.{layer}"
            heard = []
            with zoo.hooks(fwd_hooks=[(f"{here}.attn.hook_pattern", lambda value, hook: heard.append(value))]):
                attended = block.attn(cache[f"{here}.attn.hook_in"])
            assert relative(attended, cache[f"{here}.attn.o.hook_out"]) < 1e-5
            assert len(heard) == 1
            assert relative(heard[0], cache["pattern", layer]) < 1e-5
            entered = f"{here}.{'mlp.in' if block.mlp.name is None else 'mlp'}.hook_in"
            added = cache[f"{here}.mlp.out.hook_out" if has_out(zoo, layer) else f"{here}.mlp.hook_out"]
            assert relative(block.mlp(cache[entered]), added) < 1e-5
            assert relative(block(cache["resid_pre", layer]), cache["resid_post", layer]) < 1e-5


def has_out(bridge: TransformerBridge, layer: int) -> bool:
    return f"blocks.{layer}.mlp.out.hook_out" in bridge.hook_dict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "variant", ["gpt_bigcode", "llama", "gemma3", "falcon grouped", "mixtral", "deepseek_v3", "opt"]
)
def test_half_precision_is_verified_against_full(variant, dtype):
    found = clearspan.boot(build(variant).to(dtype)).verify()
    assert found.passed, str(found)
    control = [check for check in found.checks if check.group == "precision"]
    assert control[0].error is not None
    assert control[0].error > 1e-4
    assert all(check.passed for check in control[1:])


def test_every_point_is_in_the_part_of_the_forward_that_its_name_says(zoo, ids):
    """Runs of some of the blocks have all points of these blocks, and of no others."""
    with torch.no_grad():
        _, whole = zoo.run_with_cache(ids)
        _, first = zoo.run_with_cache(ids, stop_at_layer=1)
        _, rest = zoo.run_with_cache(whole["resid_pre", 1], start_at_layer=1)
    names = {point.name for point in zoo.index}
    of_first = {name for name in names if name.startswith("blocks.0.")}
    outside = {name for name in names if not name.startswith("blocks.")}
    assert set(first) >= of_first
    assert set(rest) >= names - of_first - outside
    assert not {name for name in first if name.startswith(("blocks.1.", "blocks.2.", "unembed", "hook_logits"))}
    assert not {name for name in rest if name.startswith(("blocks.0.", "embed", "hook_embed", "hook_pos_embed"))}
    assert {"hook_embed"} <= set(first)
    for name in of_first:
        if whole[name].is_floating_point():
            assert relative(first[name], whole[name]) < 1e-5, name


def test_only_layers_with_a_window_rotate_in_cohere2():
    bridge = made("cohere2")
    for layer, kind in enumerate(bridge.cfg.hf["layer_types"]):
        name = f"blocks.{layer}.attn.hook_rot_q"
        assert (name in bridge.hook_dict) == (kind == "sliding_attention")
    assert set(bridge.cfg.hf["layer_types"]) == {"sliding_attention", "full_attention"}


def test_attentions_in_the_output_are_the_models_own():
    """Falcon takes its eager branch then, with whatever mask it has: listening changes nothing."""
    model = build("falcon", output_attentions=True)
    bridge, ids = clearspan.boot(model), torch.randint(1, 97, (2, 7))
    listened = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda value, hook: None)])
    assert torch.equal(listened, model(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("self_attn.o_proj", "attn.hook_result"),
        ("self_attn.q_proj", "hook_q_input"),
        ("input_layernorm", "ln1.hook_scale"),
    ],
)
def test_another_hook_on_a_target_is_not_undone(ids, path, name):
    model = build("llama")
    model.model.layers[1].get_submodule(path).register_forward_hook(lambda module, args, output: output * 0.5)
    bridge = clearspan.boot(model)
    with pytest.raises(ConflictingWritesError, match="where something else changes what is computed of it"):
        bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.1.{name}", lambda value, hook: value.clone())])
    heard = []
    bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.1.{name}", lambda value, hook: heard.append(1))])
    assert heard, "reading is no conflict"


def test_a_run_that_breaks_off_leaves_nothing_behind(zoo, ids):
    """Whatever the point at which a listener fails, the next run is the model's own."""
    with torch.no_grad():
        base = zoo(ids)
        for name in (point.name for point in zoo.points() if ".1." in point.name and point.name in zoo.hook_dict):

            def fail(value, hook):
                raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                zoo.run_with_hooks(ids, fwd_hooks=[(name, fail)])
            assert not any(point.is_listening for point in zoo.hook_dict.values())
        found = zoo(ids)
    torch.testing.assert_close(found, base, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_writes_of_the_routing_reach_the_experts(variant, ids):
    bridge = made(variant)

    def run(name=None, change=None):
        """Returns what the experts add, and which were chosen."""
        hooks = [] if name is None else [(f"blocks.2.mlp.{name}", change)]
        with torch.no_grad(), bridge.hooks(hooks):
            _, cache = bridge.run_with_cache(ids)
        return cache["mlp_out", 2], cache["blocks.2.mlp.hook_expert_indices"]

    out, _ = run()
    nothing, _ = run("hook_expert_weights", lambda value, hook: value * 0)
    halved, _ = run("hook_expert_weights", lambda value, hook: value * 0.5)
    torch.testing.assert_close(halved - nothing, (out - nothing) / 2, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(out, nothing, atol=1e-5)

    # The same experts in another order, with their weights in that order too, are the same mixture.
    def swap(value, hook):
        return value.flip(-1)

    with bridge.hooks([("blocks.2.mlp.hook_expert_weights", swap)]):
        swapped, _ = run("hook_expert_indices", swap)
    torch.testing.assert_close(swapped, out, rtol=1e-4, atol=1e-6)
    other, _ = run("hook_expert_indices", swap)
    assert relative(other, out) > 1e-3

    # Logits that favour one expert by far make it each token's first.
    def favour(value, hook):
        value = value.clone()
        value[..., 2] = 50.0
        return value

    _, chosen = run("hook_router_logits", favour)
    assert bool((chosen == 2).any(-1).all())
