import pytest
import torch
from tests.zoo import build
from torch.utils._python_dispatch import TorchDispatchMode

import clearspan
from clearspan.analysis import singular_readings
from clearspan.errors import InvalidArgumentError, MissingWeightError

VARIANTS = {
    "gpt_bigcode": {},
    "llama biases": {},
    "gemma2": {},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32},
    "granite": {},
    "cohere2": {},
    "bloom": {},
    "gptj": {},
    "olmo2": {},
    "phi3": {},
}
K, TOKENS = 3, 4


@pytest.fixture(scope="module", params=VARIANTS)
def random_bridge(request):
    return clearspan.boot(build(request.param, **VARIANTS[request.param]))


def dense(bridge, matrix, layer, head):
    """The matrix itself."""
    block = bridge.blocks[layer]
    if matrix != "OV":
        return getattr(block.mlp, matrix)
    group = bridge.cfg.n_heads // len(block.attn.W_V)
    return block.attn.W_V[head // group] @ block.attn.W_O[head]


@torch.no_grad()
def read(bridge, vectors, layer, norm):
    """What vectors read of each token: off a norm's own output where the stream is put to the embedding alone."""
    ids = torch.arange(bridge.cfg.d_vocab)[:, None]
    _, clean = bridge.run_with_cache(ids, ["hook_embed"])
    out = clean["hook_embed"]
    if f"blocks.{layer}.{norm}.hook_out" in bridge.hook_dict:
        middle = f"blocks.{layer}.hook_resid_mid"
        point = middle if norm == "ln2" and middle in bridge.hook_dict else f"blocks.{layer}.hook_resid_pre"
        with bridge.hooks(fwd_hooks=[(point, lambda value, hook: clean["hook_embed"])]):
            _, cache = bridge.run_with_cache(ids, [f"blocks.{layer}.{norm}.hook_out"])
        bias = getattr(bridge.blocks[layer], norm).bias_or_none()
        out = cache[f"blocks.{layer}.{norm}.hook_out"] - (0 if bias is None else bias)
    return (out[:, 0] @ vectors.T).T


@torch.no_grad()
def written(bridge, vectors, layer, part):
    """What vectors in the last layer's sublayer add to all logits, with scales and MLP as in the clean run."""
    tokens = torch.tensor([[1, 2]])
    _, clean = bridge.run_with_cache(tokens)
    post = f"blocks.{layer}.{'ln1_post' if part == 'attn' else 'ln2_post'}.hook_scale"
    kept = [name for name in (post, "ln_final.hook_scale") if name in bridge.hook_dict]
    scale = torch.stack([clean[name][0, -1, 0] for name in kept]).prod()
    kept += [f"blocks.{layer}.hook_mlp_out"] if part == "attn" else []
    found = []
    for vector in vectors:

        def add(value, hook):
            value += vector

        hooks = [(f"blocks.{layer}.{part}.{'o' if part == 'attn' else 'out'}.hook_out", add)]
        hooks += [(name, lambda value, hook: clean[hook.name]) for name in kept]
        with bridge.hooks(fwd_hooks=hooks):
            _, edited = bridge.run_with_cache(tokens, ["unembed.hook_out"])
        added = edited["unembed.hook_out"] - clean["unembed.hook_out"]
        found.append(added[0, -1] * bridge.cfg.logit_scale * scale)
    return torch.stack(found)


def is_of(side, vector, scores):
    """Whether one vector's ends are the strongest of all tokens' scores."""
    strongest = torch.stack([scores, -scores]).topk(TOKENS)
    return torch.equal(side.ids[vector], strongest.indices) and torch.allclose(
        side.scores[vector], strongest.values, rtol=1e-3, atol=1e-3
    )


@torch.no_grad()
@pytest.mark.parametrize("matrix", ["OV", "W_in", "W_out"])
def test_both_sides_are_what_the_model_reads_and_writes(random_bridge, matrix):
    bridge, layer, head = random_bridge, random_bridge.cfg.n_layers - 1, 2 if matrix == "OV" else None
    found = singular_readings(bridge, matrix, layer, head, k=K, tokens=TOKENS)
    U, S, Vh = torch.linalg.svd(dense(bridge, matrix, layer, head), full_matrices=False)
    torch.testing.assert_close(found.values, S[:K], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.shares, S[:K] ** 2 / (S**2).sum(), rtol=1e-4, atol=1e-5)
    sides = {}
    if matrix != "W_out":
        own = f"blocks.{layer}.ln2.hook_out" in bridge.hook_dict
        norm = "ln1" if matrix == "OV" else "ln2" if own else "ln1" if bridge.blocks[layer].is_parallel else "none"
        sides["reads"] = read(bridge, U[:, :K].T, layer, norm)
    if matrix != "W_in":
        sides["writes"] = written(bridge, Vh[:K], layer, "attn" if matrix == "OV" else "mlp")
    assert [name for name in ("reads", "writes") if getattr(found, name) is not None] == list(sides)
    for vector in range(K):
        # The sign of a decomposition is free, but it is one for both sides.
        signs = [
            sign
            for sign in (1, -1)
            if all(is_of(getattr(found, name), vector, sign * scores[vector]) for name, scores in sides.items())
        ]
        assert len(signs) == 1
        ends = (found.reads if found.writes is None else found.writes).scores[vector, :, 0]
        assert ends[0] >= ends[1]


def test_the_gate_is_another_matrix():
    bridge = clearspan.boot(build("phi3"))
    gate, linear = (singular_readings(bridge, matrix, 0, k=2) for matrix in ("W_gate", "W_in"))
    torch.testing.assert_close(gate.values, torch.linalg.svdvals(bridge.blocks[0].mlp.W_gate.detach())[:2])
    torch.testing.assert_close(linear.values, torch.linalg.svdvals(bridge.blocks[0].mlp.W_in.detach())[:2])
    assert gate.writes is None
    assert not torch.equal(gate.reads.ids, linear.reads.ids)


@torch.no_grad()
def test_the_sign_is_that_of_the_matrix_and_not_of_its_factors(make_bridge):
    bridge = make_bridge(multi_query=False)
    before = singular_readings(bridge, "OV", 1, 2)
    attn = bridge.blocks[1].attn
    attn.W_V[2] *= -1
    attn.W_O[2] *= -1
    after = singular_readings(bridge, "OV", 1, 2)
    attn.W_O[2] *= -1
    opposite = singular_readings(bridge, "OV", 1, 2)
    assert torch.equal(before.writes.ids, after.writes.ids)
    assert torch.equal(before.reads.ids, after.reads.ids)
    assert torch.equal(opposite.writes.ids, before.writes.ids)
    assert torch.equal(opposite.reads.ids, before.reads.ids.flip(1))


def test_the_product_is_not_formed():
    bridge = clearspan.boot(build("llama biases"))
    d_model, shapes = bridge.cfg.d_model, []
    assert d_model != bridge.cfg.n_heads * bridge.cfg.d_head

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            outputs = result if isinstance(result, tuple | list) else (result,)
            shapes.extend(tuple(one.shape) for one in outputs if isinstance(one, torch.Tensor))
            return result

    with Shapes():
        singular_readings(bridge, "OV", 1, 2)
    assert (d_model, bridge.cfg.d_head) in shapes
    assert not [shape for shape in shapes if shape[-2:] == (d_model, d_model)]


def test_latent_attention_and_half_precision_are_read():
    found = singular_readings(clearspan.boot(build("deepseek_v3")), "OV", 1, 3, k=10)
    assert found.writes.ids.shape == found.reads.ids.shape == (10, 2, 10)
    found = singular_readings(clearspan.boot(build("llama").bfloat16()), "OV", 1, 3)
    assert found.values.dtype == found.writes.scores.dtype == found.reads.scores.dtype == torch.float32


def test_it_prints_and_plots(embedded):
    found = singular_readings(embedded, "OV", 4, 3, k=2, tokens=3)
    assert (
        found.title
        == f"OV of L4H3: tokens of the first 2 singular vectors, {found.shares.sum():.0%} of the squared norm"
    )
    frame = found.to_dataframe()
    assert list(frame.columns) == ["vector", "singular value", "end", "reads", "writes"]
    assert list(frame.vector) == [0, 0, 1, 1]
    assert list(frame.end) == ["+", "-", "+", "-"]
    ids = found.writes.ids[1, 1].tolist()
    assert frame.writes[3] == " ".join(found.words[token] for token in ids)
    assert all(embedded.to_single_str_token(token).strip() in found.words[token] for token in ids)
    figure = found.plot()
    assert list(figure.data[0].y) == ["0 +", "0 -", "1 +", "1 -"]
    assert torch.tensor(figure.data[0].z).allclose(found.writes.scores.flatten(0, 1), atol=1e-4)
    reads = found.plot("reads").data[0]
    assert torch.tensor(reads.z).allclose(found.reads.scores.flatten(0, 1), atol=1e-4)
    assert "L4H3" in str(found)
    inward = singular_readings(embedded, "W_in", 0, k=1)
    assert inward.title.startswith("W_in of layer 0: tokens of the first 1 singular vectors, ")
    assert list(inward.columns()) == ["vector", "singular value", "end", "reads", "neurons"]
    assert inward.plot().data[0].z[0][0] == pytest.approx(inward.reads.scores[0, 0, 0].item(), abs=1e-4)
    with pytest.raises(InvalidArgumentError) as error:
        inward.plot("writes")
    assert str(error.value) == "W_in has no side 'writes' in vocabulary\n  expected: 'reads'"


def test_without_a_tokenizer_tokens_are_ids(make_bridge):
    found = singular_readings(make_bridge(), "W_out", 0, k=1, tokens=2)
    assert found.columns()["writes"][0] == " ".join(f"#{token}" for token in found.writes.ids[0, 0].tolist())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("QK", 0), "unknown matrix 'QK'\n  expected: 'OV', 'W_in', 'W_gate' or 'W_out'"),
        (("OV", 5, 0), "there is no layer 5\n  expected: 0 to 4\n  got: 5"),
        (("OV", 0), "OV is one head's\n  expected: head=0 to 7\n  got: head=None"),
        (("OV", 0, 8), "OV is one head's\n  expected: head=0 to 7\n  got: head=8"),
        (("W_in", 0, 1), "W_in is the whole MLP's\n  expected: head=None\n  got: head=1"),
    ],
)
def test_what_is_not_there_raises(embedded, given, message):
    with pytest.raises(InvalidArgumentError) as error:
        singular_readings(embedded, *given)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 33}, "k=33 cannot be shown\n  expected: 1 to 32"),
        ({"k": 0}, "k=0 cannot be shown\n  expected: 1 to 32"),
        ({"tokens": 0}, "tokens=0 cannot be shown\n  expected: 1 to 4096"),
    ],
)
def test_more_than_there_is_raises(embedded, given, message):
    with pytest.raises(InvalidArgumentError) as error:
        singular_readings(embedded, "OV", 0, 0, **given)
    assert str(error.value) == message


def test_a_matrix_that_a_layer_lacks_raises_with_its_reason(embedded):
    with pytest.raises(MissingWeightError) as error:
        singular_readings(embedded, "W_gate", 0)
    assert str(error.value) == "blocks.0.mlp has no W_gate\n  reason: the MLP is not gated"
    mixture = clearspan.boot(build("mixtral"))
    for matrix in ("W_in", "W_gate", "W_out"):
        with pytest.raises(MissingWeightError) as error:
            singular_readings(mixture, matrix, 1)
        assert str(error.value) == (
            f"blocks.1.mlp has no {matrix}\n  reason: the MLP is a mixture, and each expert has its own: "
            "bridge.blocks[layer].mlp.experts.module"
        )
    assert singular_readings(mixture, "OV", 1, 3).writes is not None


@torch.no_grad()
@pytest.mark.parametrize("matrix", ["OV", "W_in", "W_out"])
@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma2"])
def test_vectors_and_neurons_are_those_of_the_decomposition(variant, matrix):
    bridge, head = clearspan.boot(build(variant)), 2 if matrix == "OV" else None
    found = singular_readings(bridge, matrix, 1, head, k=3, tokens=5)
    U, _, Vh = torch.linalg.svd(dense(bridge, matrix, 1, head), full_matrices=False)
    for vector in range(3):
        sign = torch.sign(found.reading_vectors[vector] @ U[:, vector])
        torch.testing.assert_close(found.reading_vectors[vector] * sign, U[:, vector], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.writing_vectors[vector] * sign, Vh[vector], rtol=1e-3, atol=1e-4)
    if matrix == "OV":
        assert found.neurons is None
    else:
        components = found.reading_vectors if matrix == "W_out" else found.writing_vectors
        strongest = torch.stack([components, -components], 1).topk(5)
        assert torch.equal(found.neurons.ids, strongest.indices)
        assert torch.equal(found.neurons.scores, strongest.values)
        assert found.columns()["neurons"][0].split()[0] == f"N{int(strongest.indices[0, 0, 0])}"


@torch.no_grad()
@pytest.mark.parametrize("matrix", ["OV", "W_in"])
@pytest.mark.parametrize("variant", ["llama", "gpt2"])
@pytest.mark.parametrize("is_folded", [False, True])
def test_the_reading_side_may_meet_the_unembedding(variant, matrix, is_folded):
    """On folded weights, without means, that is the unembedding's product with the vectors: as in the original post."""
    bridge, head = clearspan.boot(build(variant)), 1 if matrix == "OV" else None
    bridge = bridge.processed() if is_folded else bridge
    size, norm = bridge.cfg.d_vocab, bridge.blocks[1].ln1 if matrix == "OV" else bridge.blocks[1].ln2
    found = singular_readings(bridge, matrix, 1, head, k=3, tokens=size, reads_by="unembed")
    last = found.reading_vectors if is_folded else found.reading_vectors * norm.w
    last = last - last.mean(-1, keepdim=True) if variant == "gpt2" else last
    expected = (last if is_folded else last * bridge.ln_final.w) @ bridge.W_U
    scores = torch.zeros(3, size).scatter(1, found.reads.ids[:, 0], found.reads.scores[:, 0])
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)


def test_another_way_to_read_is_named():
    with pytest.raises(InvalidArgumentError, match="unknown reads_by 'W_U'\n  expected: 'embed' or 'unembed'"):
        singular_readings(clearspan.boot(build("llama")), "W_in", 0, reads_by="W_U")
