"""Key/value heads for all query heads, and composition scores against the products themselves."""

import pytest
import torch
from tests.zoo import MODELS, build

import clearspan
from clearspan.errors import InvalidArgumentError, MissingWeightError
from clearspan.weights import expand_kv_heads


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("axis", "shape"), [(-3, (3, 0, 6, 5)), (-2, (3, 0, 5)), (-2, (2, 7, 0, 5))])
def test_each_query_head_has_its_groups(kv_heads, axis, shape):
    value = torch.randn([size or kv_heads for size in shape])
    expected = value.repeat_interleave(4 // kv_heads, dim=axis)
    found = expand_kv_heads(value, 4, axis)
    assert torch.equal(found, expected)
    grouped = expand_kv_heads(value, 4, axis, by_group=True)
    at = axis % value.ndim
    assert torch.equal(grouped.flatten(at, at + 1), expected)
    assert grouped.data_ptr() == value.data_ptr()
    assert grouped.shape[at + 1] == 1 or grouped.stride(at + 1) == 0
    if kv_heads in (1, 4):
        assert found.data_ptr() == value.data_ptr()
    if kv_heads == 1:
        assert found.stride(at) == 0


def test_another_axis_is_no_head_axis():
    with pytest.raises(InvalidArgumentError, match=r"divides 8 query heads at axis -3(.|\n)*axis=-2 for biases"):
        expand_kv_heads(torch.zeros(3, 5, 6), 8)


@pytest.mark.parametrize("variant", ["gpt_bigcode", "gpt_bigcode multi-head", "llama", "gpt2"])
def test_factored_matrices_and_composition(variant):
    bridge = clearspan.boot(build(variant))
    heads, group = bridge.cfg.n_heads, bridge.cfg.n_heads // bridge.cfg.n_key_value_heads
    QK, OV = bridge.QK.AB, bridge.OV.AB
    for layer, block in enumerate(bridge.blocks):
        for head in range(heads):
            attn = block.attn
            torch.testing.assert_close(QK[layer, head], attn.W_Q[head] @ attn.W_K[head // group].T)
            torch.testing.assert_close(OV[layer, head], attn.W_V[head // group] @ attn.W_O[head])
    norm = torch.linalg.matrix_norm
    for mode, right in (("Q", QK), ("K", QK.mT), ("V", OV)):
        found = bridge.composition_scores(mode)
        expected = norm(OV[0, 1] @ right[2, 3]) / (norm(OV[0, 1]) * norm(right[2, 3]))
        torch.testing.assert_close(found.scores[0, 1, 2, 3], expected.detach())
        assert not found.scores[1, :, 1].any()
        assert not found.scores[2, :, 1].any()
        # The weights are Gaussian here, so they score as the baseline does.
        later = found.scores[found.scores > 0]
        assert abs(later.mean() - found.baseline) < 0.3 * found.baseline
        assert len(found.columns()["score"]) == 3 * heads**2 == len(later)
        assert "random heads have" in str(found)
        assert found.plot().data[0].z is not None


def test_composition_that_is_there_stands_out():
    """A head that writes what another one reads for its values."""
    bridge = clearspan.boot(build("gpt_bigcode multi-head"))
    with torch.no_grad():
        bridge.blocks[2].attn.W_V[3] = bridge.blocks[0].attn.W_O[1].T
    found = bridge.composition_scores("V")
    best = found.to_dataframe().sort_values("score").iloc[-1]
    assert (best.writer, best.reader) == ("L0H1", "L2H3")
    assert best.deviations > 10


def test_no_such_composition():
    with pytest.raises(InvalidArgumentError, match="'Q', 'K' or 'V'"):
        clearspan.boot(build("gpt2")).composition_scores("QK")


@pytest.mark.parametrize("variant", MODELS)
def test_factored_matrices_are_there_or_absent_with_a_reason(variant):
    bridge = clearspan.boot(build(variant))
    size = (bridge.cfg.n_layers, bridge.cfg.n_heads, bridge.cfg.d_model, bridge.cfg.d_model)
    assert bridge.OV.shape == size
    if "deepseek" in variant:
        with pytest.raises(MissingWeightError, match=r"W_[QK] cannot be stacked: no layer has it"):
            bridge.QK  # noqa: B018
    else:
        assert bridge.QK.shape == size
