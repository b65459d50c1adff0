"""Every point: its shape, the identities that it takes part in, and the effect of a write, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from tests.conftest import tiny_model
from torch import Tensor
from torch.nn import functional

import clearspan
from clearspan import HookPoint, TransformerBridge
from clearspan.shapes import sizes

NAMES = list(clearspan.boot(tiny_model()).index.by_name)
IDS = ("embed.hook_in", "pos_embed.hook_in")
FLOATS = [name for name in NAMES if name not in IDS]


def uneven(value: Tensor) -> Tensor:
    """Returns a change that a norm does not undo."""
    return value * torch.linspace(0.5, 2, value.shape[-1]) + 0.25


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()))


def test_the_vocabulary_is_there_or_absent_with_a_reason(bridge):
    names = [f"{part}.hook_{end}" for part in ("embed", "pos_embed", "ln_final", "unembed") for end in ("in", "out")]
    names += ["hook_embed", "hook_pos_embed", "hook_logits", "ln_final.hook_scale", "ln_final.hook_normalized"]
    parts = ["", "ln1.", "ln2.", "attn.", "attn.qkv.", "attn.o.", "mlp.", "mlp.in.", "mlp.out."]
    in_blocks = [*IN_BLOCK, *(f"{part}hook_{end}" for part in parts for end in ("in", "out"))]
    names += [f"blocks.{layer}.{name}" for layer in range(3) for name in in_blocks]
    assert set(names) == set(bridge.hook_dict)
    for absent in ("attn.hook_rot_q", "mlp.hook_pre_linear", "mlp.hook_router_logits", "ln1_post.hook_scale"):
        assert bridge.why_absent(f"blocks.1.{absent}")
        assert f"blocks.1.{absent}" not in bridge.hook_dict
    assert bridge.why_absent("hook_embed") is None


def test_shapes_are_those_of_the_axes(variant, tokens):
    known = {**sizes(variant.cfg), "batch": 2, "pos": 7, "q_pos": 7, "k_pos": 7}
    known["width"] = (variant.cfg.n_heads + 2 * variant.cfg.n_key_value_heads) * variant.cfg.d_head
    _, cache = variant.run_with_cache(tokens)
    heard = {}
    variant.run_with_hooks(tokens, fwd_hooks=[(lambda _: True, lambda v, hook: heard.update({hook.name: v}))])
    for point in variant.index:
        expected = tuple(known[axis] for axis in point.axes)
        assert tuple(cache[point.name].shape) == expected, point.name
        assert tuple(heard[point.name].shape) == expected, point.name
        assert heard[point.name].is_contiguous()
        close(heard[point.name].float(), cache[point.name].float())


def test_identities(variant, tokens):
    with torch.no_grad():
        logits, c = variant.run_with_cache(tokens)
    close(c["hook_embed"] + c["hook_pos_embed"], c["resid_pre", 0])
    for layer, block in enumerate(variant.blocks):
        if layer:
            assert torch.equal(c["resid_post", layer - 1], c["resid_pre", layer])
        close(c["resid_pre", layer] + c["attn_out", layer], c["resid_mid", layer])
        close(c["resid_mid", layer] + c["mlp_out", layer], c["resid_post", layer])
        close(c["attn_scores", layer].softmax(-1), c["pattern", layer])
        groups = variant.cfg.n_heads // variant.cfg.n_key_value_heads
        values = c["v", layer].repeat_interleave(groups, dim=2)
        close(torch.einsum("bhqk,bkhd->bqhd", c["pattern", layer], values), c["z", layer])
        out = c[f"blocks.{layer}.attn.o.hook_out"]
        close(c["result", layer].sum(2) + block.attn.b_O, out)
        close(c["z", layer].flatten(2) @ block.attn.o.module.weight.T + block.attn.b_O, out)
        close(c["post", layer] @ block.mlp.W_out + block.mlp.b_out, c[f"blocks.{layer}.mlp.out.hook_out"])
        for norm, source in (("ln1", "resid_pre"), ("ln2", "resid_mid")):
            centred = c[source, layer] - c[source, layer].mean(-1, keepdim=True)
            close(c["scale", layer, norm] * c["normalized", layer, norm], centred)
            live = getattr(block, norm)
            close(c["normalized", layer, norm] * live.w + live.b, c[f"blocks.{layer}.{norm}.hook_out"])
    close(c["ln_final.hook_out"] @ variant.W_U + variant.b_U, logits)
    assert torch.equal(c["hook_logits"], logits)


# --- the effect of a write -------------------------------------------------------------------------------------------
# What must follow from a changed value is computed here by hand from the model's weights.


def writing(change: Callable[[Tensor], Tensor], how: str) -> Callable[[Tensor, HookPoint], Tensor | None]:
    """Returns a hook that writes the change of a value."""

    def in_place(value, hook):
        value.copy_(change(value))

    def returned(value, hook):
        return change(value)

    return in_place if how == "in place" else returned


def run(bridge: TransformerBridge, tokens: Tensor, name: str, change: Callable[[Tensor], Tensor], how: str):
    """Runs with one write, and returns logits and the cache of the run."""
    with bridge.hooks(fwd_hooks=[(name, writing(change, how))]):
        return bridge.run_with_cache(tokens)


def after_norm(block, norm: str, value: Tensor) -> Tensor:
    return getattr(block, norm).module(value)


def attend(bridge, layer, q, k, v, cache) -> Tensor:
    """z from queries, keys and values."""
    groups = bridge.cfg.n_heads // bridge.cfg.n_key_value_heads
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(groups, 2)) * bridge.cfg.d_head**-0.5
    pattern = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(groups, 2))


def expected_after(bridge: TransformerBridge, layer: int, name: str, new: Tensor, c) -> dict[str, Tensor]:
    """Returns, for a write of `new` at a point, the values that must follow (short name to value)."""
    block = bridge.blocks[layer]
    attn, mlp = block.attn, block.mlp
    heads = lambda value, W, b: torch.einsum("bphm,hmd->bphd", value, W) + b  # noqa: E731
    normed = lambda value: after_norm(block, "ln1", value)  # noqa: E731
    out = lambda z: z.flatten(2) @ attn.o.module.weight.T + attn.b_O  # noqa: E731
    groups = bridge.cfg.n_heads // bridge.cfg.n_key_value_heads
    q, k, v, pre, mid = c["q", layer], c["k", layer], c["v", layer], c["resid_pre", layer], c["resid_mid", layer]
    match name:
        case "hook_resid_pre":
            return {"attn_out": attn(normed(new)), "resid_mid": new + attn(normed(new))}
        case "hook_attn_in":
            return {
                "q": heads(normed(new.repeat_interleave(groups, 2)), attn.W_Q, attn.b_Q),
                "k": heads(normed(new), attn.W_K, attn.b_K),
                "v": heads(normed(new), attn.W_V, attn.b_V),
                "resid_pre": pre,
            }
        case "hook_q_input":
            return {"q": heads(normed(new), attn.W_Q, attn.b_Q), "k": k, "v": v, "resid_pre": pre}
        case "hook_k_input":
            return {"q": q, "k": heads(normed(new), attn.W_K, attn.b_K), "v": v, "resid_pre": pre}
        case "hook_v_input":
            return {"q": q, "k": k, "v": heads(normed(new), attn.W_V, attn.b_V), "resid_pre": pre}
        case "ln1.hook_scale" | "ln2.hook_scale":
            norm = name[:3]
            normalized = (c[name_of(layer, norm)] - c[name_of(layer, norm)].mean(-1, keepdim=True)) / new
            live = getattr(block, norm)
            return {f"blocks.{layer}.{norm}.hook_out": normalized * live.w + live.b, f"{norm}.normalized": normalized}
        case "ln1.hook_normalized" | "ln2.hook_normalized":
            live = getattr(block, name[:3])
            return {f"blocks.{layer}.{name[:3]}.hook_out": new * live.w + live.b}
        case "attn.hook_q":
            return {"z": attend(bridge, layer, new, k, v, c), "k": k, "v": v}
        case "attn.hook_k":
            return {"z": attend(bridge, layer, q, new, v, c), "q": q, "v": v}
        case "attn.hook_v":
            return {"z": attend(bridge, layer, q, k, new, c), "pattern": c["pattern", layer]}
        case "attn.hook_attn_scores":
            return {"pattern": new.softmax(-1)}
        case "attn.hook_pattern":
            return {"z": torch.einsum("bhqk,bkhd->bqhd", new, v.repeat_interleave(groups, 2))}
        case "attn.hook_z":
            return {"attn_out": out(new), "result": torch.einsum("bphd,hdm->bphm", new, attn.W_O)}
        case "attn.hook_result":
            return {"attn_out": new.sum(2) + attn.b_O, "z": c["z", layer]}
        case "hook_attn_out":
            return {"resid_mid": pre + new}
        case "hook_resid_mid":
            return {
                "mlp_out": mlp(after_norm(block, "ln2", new)),
                "resid_post": new + mlp(after_norm(block, "ln2", new)),
            }
        case "hook_mlp_in":
            return {"mlp_out": mlp(after_norm(block, "ln2", new)), "resid_mid": mid,
                    "resid_post": mid + mlp(after_norm(block, "ln2", new))}  # fmt: skip
        case "mlp.hook_pre":
            return {"post": functional.gelu(new, approximate="tanh")}
        case "mlp.hook_post":
            return {"mlp_out": new @ mlp.W_out + mlp.b_out}
        case "hook_mlp_out":
            return {"resid_post": mid + new}
        case "hook_resid_post":
            following = ("resid_pre", layer + 1)
            return {} if layer == bridge.cfg.n_layers - 1 else {"next": new} | {"following": torch.tensor(following[1])}
    raise AssertionError(name)


def name_of(layer: int, norm: str) -> str:
    return f"blocks.{layer}.hook_{'resid_pre' if norm == 'ln1' else 'resid_mid'}"


IN_BLOCK = [
    "hook_resid_pre", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "ln1.hook_scale",
    "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_attn_scores", "attn.hook_pattern",
    "attn.hook_z", "attn.hook_result", "hook_attn_out", "hook_resid_mid", "ln2.hook_scale", "ln2.hook_normalized",
    "hook_mlp_in", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
]  # fmt: skip


@pytest.mark.parametrize("multi_query", [True, False])
@pytest.mark.parametrize("how", ["in place", "returned"])
@pytest.mark.parametrize("name", IN_BLOCK)
def test_a_write_has_its_stated_effect(name, how, multi_query, tokens):
    bridge = clearspan.boot(tiny_model(multi_query=multi_query))
    layer, written = 1, {}

    def change(value: Tensor) -> Tensor:
        noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(3))
        new = value * (0.5 + noise) if "scores" in name or "scale" in name else value + noise - 0.5
        written["value"] = new.clone()
        return new

    with torch.no_grad():
        base, before = bridge.run_with_cache(tokens)
        logits, cache = run(bridge, tokens, f"blocks.{layer}.{name}", change, how)
        expected = expected_after(bridge, layer, name, written["value"], before)
    assert (logits - base).abs().max() > 1e-3
    close(cache[f"blocks.{layer}.{name}"], written["value"])
    for short, value in expected.items():
        if short == "next":
            close(cache["resid_pre", layer + 1], value)
        elif short.endswith(".normalized"):
            close(cache["normalized", layer, short[:3]], value)
        elif short != "following":
            close(cache[short] if "." in short else cache[short, layer], value)
    for earlier in ("resid_pre", "resid_post"):
        assert torch.equal(cache[earlier, 0], before[earlier, 0])
    assert torch.equal(bridge(tokens), base)


@pytest.mark.parametrize("how", ["in place", "returned"])
@pytest.mark.parametrize("name", FLOATS)
def test_every_name_can_be_written_under_every_mode(name, how, bridge, tokens):
    outputs = []
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            base = bridge(tokens)
            with bridge.hooks(fwd_hooks=[(name, writing(uneven, how))]):
                logits = bridge(tokens)
            assert torch.equal(bridge(tokens), base)
        assert (logits - base).abs().max() > 1e-3
        outputs.append(logits.detach())
    close(outputs[0], outputs[1].clone())
    close(outputs[0], outputs[2])


@pytest.mark.parametrize("name", IDS)
def test_ids_can_be_written(name, bridge, tokens):
    logits = bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: value.flip(1))])
    assert (logits - bridge(tokens)).abs().max() > 1e-2
    if name == "embed.hook_in":
        assert torch.equal(logits, bridge(tokens.flip(1)))


def test_alias_and_name_have_the_same_value_and_effect(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens)
    for point in bridge.index:
        for alias in point.aliases:
            assert bridge.hook_dict[alias] is point
            assert torch.equal(cache[alias], cache[point.name])
    by_alias = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_out", lambda v, hook: v * 2)])
    by_name = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_attn_out", lambda v, hook: v * 2)])
    assert torch.equal(by_alias, by_name)


def test_residual_and_mlp_input_are_different_writes(bridge, tokens):
    double = lambda value, hook: value * 2  # noqa: E731
    stream = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_mid", double)])
    branch = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_in", double)])
    assert (stream - branch).abs().max() > 1e-2


def test_points_at_one_tensor_fire_in_order(bridge, tokens):
    order = []
    names = ["ln2.hook_normalized", "ln2.hook_scale", "hook_mlp_in", "hook_resid_mid", "ln2.hook_in"]
    hooks = [(f"blocks.0.{name}", lambda value, hook: order.append(hook.name)) for name in names]
    bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    assert [name.removeprefix("blocks.0.") for name in order] == [
        "hook_resid_mid", "hook_mlp_in", "ln2.hook_in", "ln2.hook_scale", "ln2.hook_normalized",
    ]  # fmt: skip


def test_later_path_inputs_see_the_group_they_are_in(bridge, tokens):
    def zero(value, hook):
        value.zero_()

    seen = {}
    bridge.run_with_hooks(
        tokens,
        fwd_hooks=[
            ("blocks.1.hook_attn_in", zero),
            ("blocks.1.hook_q_input", lambda value, hook: seen.update(q=value)),
            ("blocks.1.hook_k_input", lambda value, hook: seen.update(k=value)),
        ],
    )
    assert seen["q"].shape == (2, 7, 4, 48)
    assert seen["k"].shape == (2, 7, 1, 48)
    assert not seen["q"].any()
    assert not seen["k"].any()


def test_a_component_alone(variant, tokens):
    with torch.no_grad():
        _, cache = variant.run_with_cache(tokens)
        block = variant.blocks[1]
        close(block.attn(cache["blocks.1.ln1.hook_out"]), cache["attn_out", 1])
        close(block.mlp(cache["blocks.1.ln2.hook_out"]), cache["mlp_out", 1])
        close(block.ln1(cache["resid_pre", 1]), cache["blocks.1.ln1.hook_out"])
        close(block(cache["resid_pre", 1]), cache["resid_post", 1])
        close(variant.unembed(variant.ln_final(cache["resid_post", 2])), cache["hook_logits"])
        close(variant.embed(tokens), cache["hook_embed"])
        heard = []
        names = ["blocks.1.attn.hook_q", "blocks.1.attn.hook_pattern", "blocks.1.hook_attn_out"]
        with variant.hooks(fwd_hooks=[(name, lambda v, hook: heard.append((hook.name, v))) for name in names]):
            block.attn(cache["blocks.1.ln1.hook_out"])
        assert [name for name, _ in heard] == names
        close(heard[1][1], cache["pattern", 1])
