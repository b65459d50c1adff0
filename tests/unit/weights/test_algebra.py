"""The algebra of processing: each function keeps what it says it keeps."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clearspan.weights import algebra

seeds = st.integers(0, 999)


def randoms(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([(), (3,)]), st.booleans())
def test_a_norm_before_a_map_is_in_the_map(seed, leading, transposed):
    """With axes `[out, in]` or `[in, out]`, and for a stack of experts."""
    matrix, scale, shift, x = randoms(seed, (*leading, 5, 4), (4,), (4,), (4,))
    weight, axis = (matrix.mT, -2) if transposed else (matrix, -1)
    new = algebra.scale_inputs(weight, scale, axis)
    added = algebra.shifted_output(weight, shift, axis)
    folded = (new.mT if transposed else new) @ x + added
    close(folded, matrix @ (x * scale + shift))


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([-1, -2]))
def test_centred_has_no_mean(seed, axis):
    (weight,) = randoms(seed, (5, 4))
    found = algebra.centred(weight, axis)
    close(found.sum(axis), torch.zeros_like(found.sum(axis)))
    close(algebra.centred(found, axis), found)
    x, y = randoms(seed + 1, (5,), (4,))
    inputs = x if axis == -1 else y
    product = (inputs @ found) if axis == -1 else (found @ inputs)
    whole = (inputs @ weight) if axis == -1 else (weight @ inputs)
    close(product, whole - whole.mean())


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([1, 2, 4]))
def test_value_biases_add_a_constant(seed, kv_heads):
    b_V, W_O, logits = randoms(seed, (kv_heads, 3), (4, 3, 6), (4, 7, 7))
    pattern = logits.softmax(-1)
    values = b_V.repeat_interleave(4 // kv_heads, 0)[:, None].expand(-1, 7, -1)
    out = torch.einsum("hqk,hkd,hdm->qm", pattern, values, W_O)
    close(out, algebra.constant_of_values(b_V, W_O).expand(7, -1))


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([1, 2, 4]), st.booleans(), st.booleans(), st.sampled_from([3, 8]))
def test_refactored_scores_and_outputs_stay(seed, kv_heads, has_b_Q, has_b_K, d_head):
    """Heads that share keys or values have one basis; d_head 8 is more than the rank of what d_model 6 gives."""
    W_Q, b_Q, W_K, b_K, W_V, b_V, W_O, x, y = randoms(
        seed, (4, 6, d_head), (4, d_head), (kv_heads, 6, d_head), (kv_heads, d_head), (kv_heads, 6, d_head),
        (kv_heads, d_head), (4, d_head, 6), (6,), (6,),
    )  # fmt: skip
    b_Q, b_K = b_Q if has_b_Q else None, b_K if has_b_K else None
    group = 4 // kv_heads

    def apply(weight, bias, vector):
        found = torch.einsum("m,hmd->hd", vector, weight)
        return found if bias is None else found + bias

    def scores(W_Q, b_Q, W_K, b_K):
        return (apply(W_Q, b_Q, x) * apply(W_K, b_K, y).repeat_interleave(group, 0)).sum(-1)

    new = algebra.refactored_QK(W_Q, b_Q, W_K, b_K)
    close(scores(*new), scores(W_Q, b_Q, W_K, b_K))
    assert [part is None for part in new] == [False, not has_b_Q, False, not has_b_K]
    queries, keys = torch.linalg.svdvals(new.left if kv_heads == 4 and not has_b_Q else torch.eye(1)), None
    if kv_heads == 4 and not has_b_Q and not has_b_K:
        keys = torch.linalg.svdvals(new.right)
        close(queries, keys)

    def results(W_V, b_V, W_O):
        return torch.einsum("hd,hdm->hm", apply(W_V, b_V, x).repeat_interleave(group, 0), W_O)

    values = algebra.refactored_OV(W_V, b_V, W_O)
    close(results(*values[:3]), results(W_V, b_V, W_O))
    beside = values.right.unflatten(0, (kv_heads, group)).transpose(1, 2).flatten(2)
    rank = min(d_head, 7, 6 * group)
    close((beside @ beside.mT)[:, :rank, :rank], torch.eye(rank, dtype=torch.float64).expand(kv_heads, -1, -1))
