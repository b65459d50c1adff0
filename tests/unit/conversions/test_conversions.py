"""Conversions are inverse pairs, and views where they say so."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clearspan.architectures import MQAQKVConversionRule
from clearspan.conversions import (
    BaseTensorConversion,
    ChainedConversion,
    ChannelsConversion,
    GateConversion,
    GroupedQKVConversionRule,
    HalfConversion,
    HeadPartConversion,
    HeadsConversion,
    ParamProcessingConversion,
    QKVConversionRule,
    QKVPartConversion,
    RearrangeTensorConversion,
    ScaledConversion,
    ShiftedConversion,
    SlicedQKVConversionRule,
)
from clearspan.errors import InvalidArgumentError

small = st.integers(1, 5)


def shares_storage(view: torch.Tensor, whole: torch.Tensor) -> bool:
    return view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@given(small, small, small, st.sampled_from(["(n h) m -> n m h", "m (n h) -> n h m", "n h m -> n m h"]))
def test_rearranging_reverts(n, h, m, pattern):
    shapes = {"(n h) m -> n m h": (n * h, m), "m (n h) -> n h m": (m, n * h), "n h m -> n m h": (n, h, m)}
    weight = torch.randn(shapes[pattern])
    conversion = RearrangeTensorConversion(pattern, n=n)
    canonical = conversion.handle_conversion(weight)
    assert canonical.shape[0] == n
    assert shares_storage(canonical, weight)
    assert torch.equal(conversion.revert(canonical), weight)


def test_rearranging_shows_its_pattern():
    conversion = RearrangeTensorConversion("(n h) m -> n m h", n=4)
    assert repr(conversion) == "RearrangeTensorConversion('(n h) m -> n m h', n=4)"
    assert conversion.pattern == "(n h) m -> n m h"
    assert conversion.axes_lengths == {"n": 4}


def test_param_conversion_goes_both_ways():
    weight = torch.randn(6, 5)
    conversion = ParamProcessingConversion(RearrangeTensorConversion("(n h) m -> n m h", n=2))
    assert conversion.convert(weight).shape == (2, 5, 3)
    assert torch.equal(conversion.revert(conversion.convert(weight)), weight)


@given(small, small, small, small)
def test_heads_revert(batch, pos, n_heads, d_head):
    value = torch.randn(batch, pos, n_heads * d_head)
    conversion = HeadsConversion(n_heads)
    by_head = conversion.handle_conversion(value)
    assert by_head.shape == (batch, pos, n_heads, d_head)
    assert shares_storage(by_head, value)
    assert torch.equal(conversion.revert(by_head), value)


@given(small, small, st.sampled_from([0.25, 2.0, -4.0]))
def test_scaling_reverts(batch, pos, factor):
    value, conversion = torch.randn(batch, pos, 3), ScaledConversion(factor)
    assert torch.equal(conversion.handle_conversion(value), value * factor)
    assert torch.equal(conversion.revert(conversion.handle_conversion(value)), value)


PARTS = {
    "first half": (HalfConversion(is_second=False), slice(0, 6)),
    "second half": (HalfConversion(is_second=True), slice(6, 12)),
    "part of each head": (HeadPartConversion(2, 2, 3), [2, 3, 4, 8, 9, 10]),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_tensor_is_a_view_and_is_put_back_alone(name):
    conversion, columns = PARTS[name]
    whole = torch.randn(2, 3, 12)
    value = conversion.handle_conversion(whole)
    assert torch.equal(value.flatten(2), whole[..., columns])
    assert shares_storage(value, whole)
    before, new = whole.clone(), torch.randn_like(value)
    written = conversion.revert(new, whole)
    assert torch.equal(whole, before)
    before[..., columns] = new.flatten(2)
    assert torch.equal(written, before)


def rules(n_heads: int, d_head: int) -> dict[str, tuple[QKVConversionRule, int, int]]:
    """Each rule with its key/value heads and the width of its fused axis."""
    return {
        "mqa": (MQAQKVConversionRule(n_heads, d_head), 1, (n_heads + 2) * d_head),
        "interleaved": (GroupedQKVConversionRule(n_heads, d_head, n_heads), n_heads, 3 * n_heads * d_head),
        "sliced": (SlicedQKVConversionRule(n_heads, d_head, n_heads, n_heads, "qvk"), n_heads, 3 * n_heads * d_head),
    }


@given(small, small, st.sampled_from(["mqa", "interleaved", "sliced"]), st.sampled_from(["q", "k", "v"]))
def test_a_part_is_read_as_a_view_and_put_back_alone(n_heads, d_head, name, part):
    rule, n_kv_heads, width = rules(n_heads, d_head)[name]
    fused = torch.randn(2, 3, width)
    conversion = QKVPartConversion(rule, part)
    value = conversion.handle_conversion(fused)
    assert value.shape == (2, 3, n_heads if part == "q" else n_kv_heads, d_head)
    assert shares_storage(value, fused)
    assert torch.equal(conversion.revert(value, fused), fused)

    before, new = fused.clone(), torch.randn_like(value)
    written = conversion.revert(new, fused)
    assert torch.equal(fused, before)
    for other in "qkv":
        expected = new if other == part else QKVPartConversion(rule, other).handle_conversion(before)
        assert torch.equal(QKVPartConversion(rule, other).handle_conversion(written), expected)


@given(small, small, st.sampled_from(["mqa", "interleaved", "sliced"]))
def test_putting_a_part_back_is_differentiable(n_heads, d_head, name):
    rule, _, width = rules(n_heads, d_head)[name]
    fused = torch.randn(1, 2, width, requires_grad=True)
    conversion = QKVPartConversion(rule, "k")
    written = conversion.revert(conversion.handle_conversion(fused) * 3, fused)
    written.sum().backward()
    assert fused.grad is not None
    assert torch.equal(
        conversion.handle_conversion(fused.grad), torch.full_like(conversion.handle_conversion(fused), 3)
    )
    assert int((fused.grad == 1).sum()) + conversion.handle_conversion(fused.grad).numel() == fused.numel()


def test_slices_hold_their_heads_in_blocks_of_any_order():
    rule = SlicedQKVConversionRule(n_heads=4, d_head=2, n_kv_heads=2, slices=2, order="vqk")
    fused = torch.arange(16)
    parts = [part.flatten().tolist() for part in rule.split(fused, 0)]
    assert parts == [[2, 3, 4, 5, 10, 11, 12, 13], [6, 7, 14, 15], [0, 1, 8, 9]]
    weight = torch.randn(16, 3)
    by_letter = rule.weight("q").handle_conversion(rule.split(weight, 0)[0])
    assert torch.equal(by_letter, weight[parts[0]].reshape(4, 2, 3).transpose(1, 2))
    with pytest.raises(InvalidArgumentError, match=r"16 = 2 slices \* 4 heads \* 2"):
        rule.split(torch.zeros(15), 0)


@given(st.integers(1, 6), st.integers(1, 6), small, small)
def test_mqa_heads_and_back(n_heads, d_head, batch, pos):
    rule = MQAQKVConversionRule(n_heads, d_head)
    queries, keys = torch.randn(batch, pos, n_heads * d_head), torch.randn(batch, pos, d_head)
    assert rule.handle_conversion(queries).shape == (batch, pos, n_heads, d_head)
    assert rule.handle_conversion(keys).shape == (batch, pos, 1, d_head)
    for value in (queries, keys):
        by_head = rule.handle_conversion(value)
        assert torch.equal(rule.handle_conversion(by_head), by_head)
        assert torch.equal(rule.revert(by_head), value)
        assert torch.equal(rule.revert(value), value)


def test_mqa_takes_any_other_width_as_one_head():
    assert MQAQKVConversionRule(4, 12).handle_conversion(torch.zeros(2, 7, 5)).shape == (2, 7, 1, 5)


@given(small, small)
def test_interleaved_heads_and_back(n_heads, d_head):
    rule = GroupedQKVConversionRule(n_heads, d_head, n_heads)
    flat = torch.randn(2, 3, n_heads * d_head)
    by_head = rule.handle_conversion(flat)
    assert by_head.shape == (2, 3, n_heads, d_head)
    assert torch.equal(rule.handle_conversion(by_head), by_head)
    assert torch.equal(rule.revert(by_head), flat)
    assert torch.equal(rule.revert(flat), flat)


@pytest.mark.parametrize("rule", [MQAQKVConversionRule(4, 12), GroupedQKVConversionRule(4, 12, 4)])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 7, 4, 12, 1, 1)])
@pytest.mark.parametrize("way", ["handle_conversion", "revert"])
def test_other_ranks_raise_with_rank_and_shape(rule, shape, way):
    with pytest.raises(ValueError, match=f"got {len(shape)}-D with shape") as error:
        getattr(rule, way)(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


def conversions() -> dict[str, tuple[BaseTensorConversion, int]]:
    """Conversions that only move numbers, each with the width of the last axis that it reads."""
    parts = {
        f"{name}, {part}": (QKVPartConversion(rule, part), width)
        for name, (rule, _, width) in rules(4, 3).items()
        for part in "qkv"
    }
    return {
        **parts,
        **{name: (conversion, 12) for name, (conversion, _) in PARTS.items()},
        "heads": (HeadsConversion(3), 12),
        "axes": (RearrangeTensorConversion("b p (n h) -> b n p h", n=4), 12),
        "channels": (ChannelsConversion(1, 2, groups=3, d_head=2), 12),
        "chained": (ChainedConversion(HalfConversion(is_second=True), HeadsConversion(2)), 12),
    }


@pytest.mark.parametrize("name", conversions())
def test_the_gradient_of_moved_numbers_is_moved_likewise(name):
    """The gradient at the value that is put back is the converted gradient at the tensor."""
    conversion, width = conversions()[name]
    assert conversion.only_moves
    whole, at_whole = torch.randn(2, 3, width), torch.randn(2, 3, width)
    value = conversion.handle_conversion(whole).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(conversion.revert(value, whole), value, at_whole)
    assert torch.equal(gradient, conversion.handle_conversion(at_whole))


def test_what_computes_does_not_only_move():
    shift = ShiftedConversion(lambda: torch.ones(3))
    scaled = ScaledConversion(2.0)
    computing = [scaled, shift, GateConversion(2, "sigmoid"), ChainedConversion(HeadsConversion(2), scaled)]
    assert not any(conversion.only_moves for conversion in computing)
