"""The names that docs/coming-from-transformerlens.md calls the same, each with lines of code that both libraries run.

In a line, `bridge`, `cache`, `FactoredMatrix` and so on are those of the library that runs it; `WORDS` says what else
there is. Random arguments of the cache's methods and random indices are drawn with a seed.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clearspan import patching

TOKENS = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
CORRUPTED = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(2))


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def seen(bridge: Any, hooks: str, names: Any, **keywords: Any) -> list[object]:
    """Returns what forward hooks saw: layer and value of each call, and what the run returned."""
    found: list[object] = []

    def note(value: Tensor, hook: Any) -> None:
        found.append((hook.layer() if hook.name.startswith("blocks.") else None, value.clone()))

    match hooks:
        case "run_with_hooks":
            found.append(bridge.run_with_hooks(TOKENS, fwd_hooks=[(names, note)], **keywords))
        case "hooks":
            with bridge.hooks(fwd_hooks=[(names, note)]):
                found.append(bridge(TOKENS, **keywords))
        case "add_hook":
            bridge.add_hook(names, note, **keywords)
            bridge(TOKENS)
            bridge.reset_hooks()
            bridge(TOKENS)
            bridge.reset_hooks(including_permanent=True)
            bridge(TOKENS)
    return found


def name_seen(bridge: Any, name: str) -> str:
    """Returns what `hook.name` is in a hook."""
    found: list[str] = []
    bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: found.append(hook.name))])
    return found[0]


def written(bridge: Any, name: str, *, in_place: bool = False, **keywords: Any) -> Tensor:
    """Returns the logits of a run in which a value was doubled at the last position."""

    def double(value: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        if in_place:
            value[:, -1] *= 2
            return None
        return torch.cat([value[:, :-1], value[:, -1:] * 2], dim=1)

    return bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, double)], **keywords)


def counted(bridge: Any, **keywords: Any) -> list[object]:
    """Returns what two hooks kept in `hook.ctx`, during a run and after it."""
    found: list[object] = []

    def first(value: Tensor, hook: Any) -> None:
        hook.ctx["sum"] = value.abs().sum()

    def second(value: Tensor, hook: Any) -> None:  # noqa: ARG001
        found.append(hook.ctx["sum"])

    name = "blocks.1.hook_resid_post"
    bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, first), (name, second)], **keywords)
    found.append(sorted(bridge.hook_dict[name].ctx))
    bridge.reset_hooks()
    found.append(sorted(bridge.hook_dict[name].ctx))
    return found


def gradients(bridge: Any, names: Any, edit: Callable[[Tensor], Any] = lambda gradient: None) -> list[object]:
    """Returns the gradients that backward hooks saw, and that of the token embedding after them."""
    found: list[object] = []

    def note(gradient: Tensor, hook: Any) -> Any:
        found.append((hook.layer(), gradient.clone()))
        return edit(gradient)

    with torch.enable_grad():
        bridge.zero_grad()
        if names is None:
            bridge(TOKENS, return_type="loss").backward()
        else:
            with bridge.hooks(bwd_hooks=[(names, note)]):
                bridge(TOKENS, return_type="loss").backward()
    embedding = next(bridge.parameters()).grad.clone()
    bridge.zero_grad()
    return [*found, embedding]


def streams(name: str) -> bool:
    """Is a predicate of names."""
    return name.endswith(("hook_resid_pre", "hook_mlp_out"))


def all_inputs(name: str) -> bool:
    """Is a predicate of names that holds for token ids too, which have no gradient."""
    return name.endswith("hook_resid_pre") or name == "embed.hook_in"


def last_difference(logits: Tensor) -> Tensor:
    """Is the metric of the patching functions: a difference of two logits at the last position."""
    return (logits[:, -1, 3] - logits[:, -1, 4]).mean()


WORDS: Mapping[str, object] = {
    "torch": torch,
    "np": np,
    "tokens": TOKENS,
    "mask": MASK,
    "corrupted": CORRUPTED,
    "padded": TOKENS * MASK,
    "metric": last_difference,
    "streams": streams,
    "all_inputs": all_inputs,
    "seen": seen,
    "written": written,
    "counted": counted,
    "name_seen": name_seen,
    "gradients": gradients,
    "direction": _random(48),
    "directions": _random(48, 3),
    "A": _random(2, 3, 5, 2),
    "B": _random(2, 3, 2, 4),
    "L": _random(3, 4, 2),
    "R": _random(3, 2, 4),
    "vector": _random(4),
    "matrix": _random(4, 6),
}
"""Beside the library's own: what the lines may name."""

SIGNATURES = {
    "bridge": "forward run_with_hooks run_with_cache hooks add_hook reset_hooks to_tokens to_string to_str_tokens "
    "to_single_token",
    "cache": "accumulated_resid decompose_resid stack_head_results stack_neuron_results get_neuron_results "
    "get_full_resid_decomposition stack_activation apply_ln_to_stack logit_attrs remove_batch_dim "
    "apply_slice_to_batch_dim to toggle_autodiff compute_head_results",
    "FactoredMatrix": "svd norm make_even get_corner collapse_l collapse_r unsqueeze",
}
"""Methods whose parameters and defaults are compared."""

ACTIVATIONS = (
    "q k v z rot_q rot_k attn_scores pattern result pre post resid_pre resid_mid resid_post attn_out mlp_out attn_in "
    "mlp_in q_input k_input v_input attn attn_logits key query value mlp_pre mlp_post"
)

NAMES: dict[str, dict[str, list[str]]] = {
    "Names": {
        "get_act_name": [
            *(f"get_act_name('{name}', 2)" for name in ACTIVATIONS.split()),
            "get_act_name('embed')",
            "get_act_name('pos_embed')",
            "get_act_name('k6')",
            "get_act_name('k6a')",
            "get_act_name('scale4ln1')",
            "get_act_name('resid_pre3')",
            "get_act_name('scale')",
            "get_act_name('normalized')",
            "get_act_name('normalized', 2, 'ln2')",
            "get_act_name('k', 1, 'a')",
            "get_act_name('pre', 1, 'mlp')",
            "get_act_name('post', 1, 'm')",
            "get_act_name('z', 1, 'attention')",
            "get_act_name('resid_pre', 1, 'b')",
            "get_act_name('blocks.1.hook_resid_pre')",
            "get_act_name('hook_embed')",
        ],
        "cache[...]": [
            "cache['blocks.1.attn.hook_q']",
            "cache['q', 1]",
            "cache['q', -1]",
            "cache['q1']",
            "cache['pattern', 2]",
            "cache['attn', 0]",
            "cache['attn', torch.tensor(1)]",
            "cache['attn', np.int64(1)]",
            "cache['attn', 1, None]",
            "cache['embed', None]",
            "cache['embed']",
            "cache['hook_embed']",
            "cache['scale', 1, 'ln2']",
            "cache['scale']",
            "cache['normalized', -1, 'ln1']",
            "cache['mlp_out', -3]",
            "cache['resid_mid', 1]",
            "cache['blocks.0.hook_in']",
            "cache['unembed.hook_out']",
            "'blocks.0.hook_resid_pre' in cache",
            "'nonsense' in cache",
            "len(cache.cache_dict) == len(cache)",
        ],
    },
    "Runs": {
        "forward": [
            "bridge(tokens)",
            "bridge(tokens[0])",
            "bridge('5 6 7')",
            "bridge(['5 6 7', '8 9 10'])",
            "bridge(tokens, return_type='loss')",
            "bridge(tokens, return_type='loss', loss_per_token=True)",
            "bridge(tokens, return_type='both')",
            "bridge(tokens, return_type='both', loss_per_token=True)",
            "bridge(tokens, return_type=None)",
            "bridge('5 6 7', prepend_bos=False)",
            "bridge('5 6 7', prepend_bos=True)",
            "bridge(padded, attention_mask=mask)[mask.bool()]",
            "bridge(padded, attention_mask=mask, return_type='loss')",
            "bridge(['5 6 7', '8'], padding_side='left')[:, -1]",
            "bridge(['5 6 7', '8'], padding_side='right')[0]",
            "bridge(['5 6 7', '8'], padding_side='right')[1, :2]",
        ],
        "stop_at_layer": [f"bridge(tokens, stop_at_layer={layer})" for layer in (0, 1, 2, -1, -3, 3)],
        "start_at_layer": [
            *(f"bridge(cache['resid_pre', {layer}], start_at_layer={layer})" for layer in (0, 1, 2)),
            "bridge(cache['resid_pre', -1], start_at_layer=-1)",
            "bridge(cache['resid_pre', 1], start_at_layer=1, stop_at_layer=2)",
        ],
        "run_with_hooks": [
            "seen(bridge, 'run_with_hooks', 'blocks.1.attn.hook_q')",
            "seen(bridge, 'run_with_hooks', streams)",
            "seen(bridge, 'run_with_hooks', 'blocks.1.hook_resid_pre', return_type='loss')",
            "seen(bridge, 'run_with_hooks', 'blocks.0.hook_resid_pre', stop_at_layer=2)",
            "seen(bridge, 'run_with_hooks', 'nonsense')",
            *(
                f"written(bridge, '{name}'{more})"
                for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.0.attn.hook_z",
                             "blocks.2.mlp.hook_post", "blocks.1.attn.hook_q", "ln_final.hook_normalized")
                for more in ("", ", in_place=True")
            ),
            "written(bridge, 'blocks.1.hook_resid_pre', return_type='loss')",
        ],
        "hooks": ["seen(bridge, 'hooks', 'blocks.1.attn.hook_q')", "seen(bridge, 'hooks', streams)"],
        "add_hook, reset_hooks": [
            "seen(bridge, 'add_hook', 'blocks.1.attn.hook_q')",
            "seen(bridge, 'add_hook', streams)",
            "seen(bridge, 'add_hook', 'blocks.1.attn.hook_q', is_permanent=True)",
        ],
        "backward hooks": [
            "gradients(bridge, None)",
            "gradients(bridge, 'blocks.1.hook_resid_pre')",
            "gradients(bridge, streams)",
            "gradients(bridge, all_inputs)",
            "gradients(bridge, 'blocks.1.hook_resid_pre', lambda gradient: gradient * 2)",
            "gradients(bridge, 'blocks.1.hook_mlp_out', lambda gradient: (gradient * 0.5,))",
        ],
        "hook.name": [
            f"name_seen(bridge, 'blocks.1.{name}')" for name in ("hook_resid_pre", "attn.hook_pattern")
        ],
        "hook.ctx": ["counted(bridge)", "counted(bridge, clear_contexts=True)"],
        "run_with_cache": [
            "bridge.run_with_cache(tokens)[0]",
            *(
                f"bridge.run_with_cache(tokens, names_filter={names})[1]['{name}']"
                for names in ("streams", "'blocks.1.hook_resid_pre'", "['blocks.1.hook_resid_pre', 'hook_embed']")
                for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid")
            ),
            "len(bridge.run_with_cache(tokens, names_filter='blocks.1.hook_resid_pre')[1])",
            "bridge.run_with_cache(tokens, names_filter=['blocks.1.attn.hook_z', 'hook_embed'])[1]['z', 1]",
            "bridge.run_with_cache(tokens, names_filter='nonsense')",
            "bridge.run_with_cache(tokens, return_type='loss')[0]",
            "bridge.run_with_cache(tokens, return_type=None)[0]",
            "bridge.run_with_cache(tokens, stop_at_layer=1)[0]",
            "bridge.run_with_cache(tokens, stop_at_layer=1)[1]['resid_post', 0]",
            "bridge.run_with_cache(tokens, device='cpu')[1]['pattern', 1]",
            "bridge.run_with_cache(tokens[:1], remove_batch_dim=True)[1]['pattern', 1]",
            "bridge.run_with_cache(tokens[:1], remove_batch_dim=True)[1]['q', 1]",
            "bridge.run_with_cache(tokens, remove_batch_dim=True)",
        ],
        "pos_slice": [
            f"bridge.run_with_cache(tokens, pos_slice={chosen}, remove_batch_dim=False)[1]['{name}', 1]"
            for chosen in ("-1", "2", "np.int64(2)", "torch.tensor(2)", "(1, 4)", "(3,)", "(0, 6, 2)", "[0, 3]",
                           "torch.tensor([1, 2])", "slice(1, 3)", "np.array([4, 0])")
            for name in ("resid_pre", "q", "pattern", "mlp_out")
        ],
        "incl_bwd": [
            *(
                f"torch.enable_grad()(bridge.run_with_cache)(tokens, return_type='loss', incl_bwd=True)[1]['{name}']"
                for name in ("blocks.1.hook_resid_pre_grad", "blocks.0.attn.hook_z_grad", "blocks.2.mlp.hook_post_grad",
                             "blocks.1.attn.hook_pattern_grad", "hook_embed_grad", "blocks.1.hook_resid_pre")
            ),
        ],
    },
    "Text": {
        "to_tokens": [
            "bridge.to_tokens('5 6 7')",
            "bridge.to_tokens(['5 6 7', '8 9 10'])",
            "bridge.to_tokens(['5 6 7', '8'])",
            "bridge.to_tokens(['5 6 7', '8'], padding_side='left')",
            "bridge.to_tokens('5 6 7', prepend_bos=False)",
            "bridge.to_tokens('5 6 7', prepend_bos=True)",
            "bridge.to_tokens('5 6 7', truncate=False)",
            "bridge.to_tokens('5 ' * 70)",
            "bridge.to_tokens('')",
        ],
        "to_string": [
            "bridge.to_string(tokens)",
            "bridge.to_string(tokens[0])",
            "bridge.to_string(tokens[0, 0])",
            "bridge.to_string([5, 6])",
            "bridge.to_string(np.array([5, 6]))",
            "bridge.to_string([[5, 6], [7, 8]])",
        ],
        "to_str_tokens": [
            "bridge.to_str_tokens('5 6 7')",
            "bridge.to_str_tokens('5 6 7', prepend_bos=False)",
            "bridge.to_str_tokens(['5 6 7', '8'])",
            "bridge.to_str_tokens(tokens[0])",
            "bridge.to_str_tokens(tokens[:1])",
            "bridge.to_str_tokens(tokens)",
            "bridge.to_str_tokens(tokens[0, 0])",
            "bridge.to_str_tokens(np.array([5, 6]))",
            "bridge.to_str_tokens(np.array([[5, 6]]))",
            "bridge.to_str_tokens([5, 6])",
        ],
        "to_single_token": ["bridge.to_single_token('5')", "bridge.to_single_token('5 6')"],
        "generate": [
            "bridge.generate(tokens[:1], max_new_tokens=4, do_sample=False)",
            "bridge.generate(tokens, max_new_tokens=4, do_sample=False)",
            "bridge.generate('5 6 7', max_new_tokens=4, do_sample=False)",
            "bridge.generate(tokens[:1], max_new_tokens=3, do_sample=True, top_k=1)",
        ],
    },
    "Weights": {
        **{
            f"W_*, b_* of {where}": [
                f"{there}.{letter}"
                for letter, there in letters
            ]
            for where, letters in {
                "bridge": [(letter, "bridge") for letter in (
                    "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_gate", "W_out", "b_in", "b_out",
                    "W_E", "W_pos", "W_E_pos", "W_U", "b_U",
                )],
                "bridge.blocks[l]": [
                    *((letter, "bridge.blocks[1].attn") for letter in
                      ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")),
                    *((letter, "bridge.blocks[1].mlp") for letter in ("W_in", "W_gate", "W_out", "b_in", "b_out")),
                    ("w", "bridge.blocks[1].ln1"),
                    ("w", "bridge.ln_final"),
                ],
            }.items()
        },
        "QK, OV": [
            "bridge.QK",
            "bridge.OV",
            "bridge.OV[1, 2]",
            "bridge.QK[1].S",
            "bridge.OV.norm()",
            "bridge.OV * torch.tensor([2.])",
            "bridge.W_E @ bridge.OV[1, 2] @ bridge.W_U",
        ],
    },
    "FactoredMatrix": {
        "A, B, AB, BA, T, pair, shape, ...": [
            "FactoredMatrix(A, B)",
            "FactoredMatrix(A[0, 0], B)",
            "FactoredMatrix(A, B).AB",
            "FactoredMatrix(L, R).BA",
            "FactoredMatrix(A, B).BA",
            "FactoredMatrix(A, B).T",
            "FactoredMatrix(A, B).pair",
            "FactoredMatrix(A, B).shape",
            "FactoredMatrix(A, B).ndim",
            "[FactoredMatrix(A, B).ldim, FactoredMatrix(A, B).mdim, FactoredMatrix(A, B).rdim]",
            "[FactoredMatrix(A, B).has_leading_dims, FactoredMatrix(A[0, 0], B[0, 0]).has_leading_dims]",
            "FactoredMatrix(A, R[..., :3, :])",
        ],
        "svd, U, S, V": [
            *(
                f"FactoredMatrix({pair}).svd()[{place}].abs()"
                for pair in ("A, B", "L, R", "R, L")
                for place in (0, 1, 2)
            ),
            *(f"FactoredMatrix(A, B).{name}.abs()" for name in ("U", "S", "V", "Vh")),
            "FactoredMatrix(A, B).U * FactoredMatrix(A, B).S[..., None, :] @ FactoredMatrix(A, B).V.mT",
            "FactoredMatrix(A.bfloat16(), B.bfloat16()).S",
            "len(FactoredMatrix(A, B).svd())",
            "bridge.OV.svd()[2].abs()",
        ],
        "eigenvalues": [
            "FactoredMatrix(L, R).eigenvalues",
            "FactoredMatrix(R, L).eigenvalues",
            "FactoredMatrix(A, B).eigenvalues",
            "bridge.OV.eigenvalues.abs().sort(-1)[0]",
        ],
        "norm, make_even, collapse_l, collapse_r, get_corner, unsqueeze": [
            "FactoredMatrix(A, B).norm()",
            "FactoredMatrix(A, B).make_even()",
            "FactoredMatrix(A, B).make_even().A.abs()",
            "FactoredMatrix(A, B).collapse_l().abs()",
            "FactoredMatrix(A, B).collapse_r().abs()",
            "FactoredMatrix(A, B).get_corner()",
            "FactoredMatrix(A, B).get_corner(2)",
            "FactoredMatrix(A, B).unsqueeze(0)",
            "FactoredMatrix(A, B).unsqueeze(1)",
        ],
        "[...]": [],
        "@ and *": [
            "FactoredMatrix(A, B) @ vector",
            "vector @ FactoredMatrix(L, R)",
            "FactoredMatrix(A, B) @ matrix",
            "matrix.T @ FactoredMatrix(L, R)",
            "FactoredMatrix(A, B) @ FactoredMatrix(L, R)",
            "FactoredMatrix(L, R) @ FactoredMatrix(L, R).T",
            "FactoredMatrix(A, B) @ matrix.T",
            *(
                f"{expression}"
                for number in ("2", "0.5", "torch.tensor(2.)", "torch.tensor([2.])", "torch.tensor([[2.]])")
                for expression in (f"FactoredMatrix(A, B) * {number}", f"{number} * FactoredMatrix(A, B)")
            ),
            "FactoredMatrix(A, B) * torch.ones(2)",
        ],
    },
    "The cache's tools": {
        "accumulated_resid": [
            "cache.accumulated_resid()",
            "cache.accumulated_resid(apply_ln=True) @ bridge.W_U + bridge.b_U",
        ],
        "decompose_resid": ["cache.decompose_resid()",
            "cache.decompose_resid(layer=0, incl_embeds=False)",
            "cache.decompose_resid(mlp_input=True)",
        ],
        "stack_head_results": ["cache.stack_head_results()", "cache.stack_head_results(0, incl_remainder=True)"],
        "stack_neuron_results": ["cache.stack_neuron_results(-1)"],
        "get_neuron_results": ["cache.get_neuron_results(-1)"],
        "get_full_resid_decomposition": ["cache.get_full_resid_decomposition()"],
        "stack_activation": [
            "cache.stack_activation('pattern')",
            "cache.stack_activation('resid_pre', layer=2)",
            "cache.stack_activation('scale', 2, 'ln1')",
            "cache.stack_activation('z', -1)",
            "row.stack_activation('q')",
        ],
        "apply_ln_to_stack": [
            "cache.apply_ln_to_stack(cache['resid_post', -1][:, -1], layer=-1, pos_slice=-1)",
            "cache.apply_ln_to_stack(cache['resid_post', -1], layer=-1)",
            "cache.apply_ln_to_stack(cache.decompose_resid(), recompute_ln=True)",
            *(
                f"{line} ~ {line} * bridge.{norm}.w"
                for line, norm in (
                    ("cache.apply_ln_to_stack(cache.decompose_resid())", "ln_final"),
                    ("cache.apply_ln_to_stack(cache.decompose_resid(1), 1)", "blocks[1].ln1"),
                    ("cache.get_full_resid_decomposition(2, True, apply_ln=True)", "blocks[2].ln2"),
                    ("row.stack_head_results(1, apply_ln=True, pos_slice=-1)", "blocks[1].ln1"),
                )
            ),
            "cache.apply_ln_to_stack(cache.decompose_resid(), layer=1, recompute_ln=True)",
        ],
        "logit_attrs": [
            "cache.logit_attrs(cache.decompose_resid(pos_slice=-1), tokens[:, 0], pos_slice=-1)",
            "cache.logit_attrs(cache.decompose_resid(), '5')",
            "cache.logit_attrs(cache.decompose_resid(), 5) ~ "
            "cache.apply_ln_to_stack(cache.decompose_resid()) * bridge.ln_final.w @ bridge.W_U[:, 5]",
            "cache.logit_attrs(cache.decompose_resid(), '5', '6')",
            "cache.logit_attrs(cache['resid_post', -1][:, -1], tokens[:, 0], pos_slice=-1)",
        ],
        "remove_batch_dim, apply_slice_to_batch_dim, to, toggle_autodiff, compute_head_results": [
            "bridge.run_with_cache(tokens[:1])[1].remove_batch_dim()['pattern', 1]",
            "bridge.run_with_cache(tokens)[1].remove_batch_dim()",
            *(
                f"cache.apply_slice_to_batch_dim({chosen})['{name}', 1]"
                for chosen in ("0", "-1", "[1]", "(0, 1)", "torch.tensor([1, 0])", "None")
                for name in ("resid_pre", "pattern")
            ),
            "cache.apply_slice_to_batch_dim(0).has_batch_dim",
            "cache.to('cpu')['q', 1]",
            "cache.compute_head_results()",
            "(cache.compute_head_results(), cache['result', 1])[1]",
            "[cache.has_batch_dim, cache.has_embed, row.has_batch_dim]",
        ],
        "cache_dict, ActivationCache(dict, model)": [
            "ActivationCache(dict(cache.cache_dict), bridge).decompose_resid()",
            "ActivationCache(dict(row.cache_dict), bridge, has_batch_dim=False).accumulated_resid(apply_ln=True)",
            "ActivationCache({'blocks.1.attn.hook_z': cache['z', 1] * 2}, bridge)['z', 1]",
            "(own := ActivationCache(dict(cache.cache_dict), bridge), "
            "own.cache_dict.__setitem__('blocks.1.hook_mlp_out', cache['mlp_out', 0]), own.decompose_resid())[2]",
        ],
    },
    "Analysis, by other names": {
        "composition_scores, all_composition_scores": [
            f"bridge.composition_scores('{mode}').scores ~ bridge.all_composition_scores('{mode}')[:]" for mode in "QKV"
        ],
        "detect_heads, detect_head": [
            f"library.analysis.detect_heads(bridge, '5 6 7 5 6 7', '{pattern}'{more}).scores ~ "
            f"library.head_detector.detect_head(bridge, '5 6 7 5 6 7', '{pattern}_head'{more})"
            for pattern in ("previous_token", "duplicate_token", "induction")
            for more in ("", ", exclude_bos=True", ", exclude_current_token=True", ", error_measure='abs'")
        ],
    },
    "Patching": {
        f"patching.{name}": [f"patching.{name}(bridge, corrupted, cache, metric)"]
        for name in patching.__all__
        if name.startswith("get_act_patch")
    },
}  # fmt: skip
"""Lines of code by section and by what the page calls them."""


STEPS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
"""The arguments of weight processing."""

PRODUCTS = ["bridge(tokens).log_softmax(-1)", "bridge.QK", "bridge.OV", "bridge.W_in", "bridge.W_U"]
WEIGHTS = [
    *PRODUCTS,
    *(f"bridge.W_{letter}" for letter in ("Q", "K", "V", "O", "out", "E", "pos")),
    *(f"bridge.b_{letter}" for letter in ("Q", "K", "V", "O", "in", "out", "U")),
    "bridge.ln_final.w",
    "bridge.blocks[1].ln2.w",
]
"""What is compared after a step."""


def drawn(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Yields names of the cache's methods with lines that call them with random arguments, and random indices.

    The arguments are those that both take: layers that there are, and positions in every way of saying them.
    """
    draw = random.Random(seed)

    def some(**choices: list[str]) -> str:
        given = [f"{name}={draw.choice(values)}" for name, values in choices.items() if draw.random() < 0.5]
        return ", ".join(given)

    flags = ["True", "False"]
    layers = ["None", "-1", "0", "1", "2", "3"]
    positions = ["None", "-1", "0", "3", "(1, 4)", "(2,)", "[0, 5]", "torch.tensor([3, 1])", "np.int64(2)"]
    neurons = ["None", "3", "[7]", "(0, 5)", "[1, 4]", "torch.tensor([2, 0])"]
    onto = ["None", "direction", "directions"]
    ways: dict[str, dict[str, list[str]]] = {
        "accumulated_resid": {
            "layer": layers, "incl_mid": flags, "apply_ln": flags, "pos_slice": positions, "mlp_input": flags,
            "return_labels": flags,
        },
        "decompose_resid": {
            "layer": layers, "mlp_input": flags, "mode": ["'all'", "'mlp'", "'attn'"], "apply_ln": flags,
            "pos_slice": positions, "incl_embeds": flags, "return_labels": flags,
        },
        "stack_head_results": {
            "layer": layers, "return_labels": flags, "incl_remainder": flags, "pos_slice": positions, "apply_ln": flags,
        },
        "stack_neuron_results": {
            "pos_slice": positions, "neuron_slice": neurons, "return_labels": flags, "incl_remainder": flags,
            "apply_ln": flags, "project_output_onto": onto, "mlp_input": flags,
        },
        "get_neuron_results": {"neuron_slice": neurons, "pos_slice": positions, "project_output_onto": onto},
        "get_full_resid_decomposition": {
            "layer": layers, "mlp_input": flags, "expand_neurons": flags, "apply_ln": flags, "pos_slice": positions,
            "return_labels": flags, "project_output_onto": onto,
        },
        "apply_ln_to_stack": {"layer": layers, "mlp_input": flags, "recompute_ln": flags},
        "logit_attrs": {"incorrect_tokens": ["None", "'6'", "6"]},
    }  # fmt: skip
    for _ in range(count // 2):
        places = ["0", "1", "-1", ":", ":2", "1:", "[1, 0]", "torch.tensor([0, 1])", "None", "...", "np.int64(1)"]
        yield "[...]", f"FactoredMatrix(A, B)[{', '.join(draw.choices(places, k=draw.randint(1, 5)))}]"
    for _ in range(count):
        method = draw.choice(list(ways))
        cache = draw.choice(["cache", "cache", "row"])
        arguments = some(**ways[method])
        first = ""
        match method:
            case "stack_neuron_results":
                first = f"layer={draw.choice(layers)}"
            case "get_neuron_results":
                first = f"layer={draw.choice(['0', '1', '2', '-1'])}"
            case "apply_ln_to_stack" | "logit_attrs":
                at = draw.choice(positions)
                first = f"{cache}.decompose_resid(pos_slice={at})"
                first += "" if method == "apply_ln_to_stack" else draw.choice([", '5'", ", 5", ", torch.tensor(5)"])
                first += f", pos_slice={at}{'' if cache == 'cache' else ', has_batch_dim=False'}"
        yield method, f"{cache}.{method}({', '.join(part for part in (first, arguments) if part)})"
