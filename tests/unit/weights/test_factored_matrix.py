"""Everything that is computed from factors is what the product itself gives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clearspan.errors import InvalidArgumentError
from clearspan.weights import FactoredMatrix

sizes = st.integers(1, 7)
leading = st.lists(st.integers(1, 3), max_size=2).map(tuple)


def factors(shape, left, inner, right, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(*shape, left, inner, generator=generator, dtype=torch.float64)
    return A, torch.randn(*shape, inner, right, generator=generator, dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(leading, sizes, sizes, sizes, st.integers(0, 99))
def test_decompositions_are_the_products(shape, left, inner, right, seed):
    matrix = FactoredMatrix(*factors(shape, left, inner, right, seed))
    product = matrix.A @ matrix.B
    close(matrix.AB, product)
    close(matrix.T.AB, product.mT)
    close(matrix.norm(), torch.linalg.matrix_norm(product))
    U, S, V = matrix.svd()
    rank = min(left, inner, right)
    assert S.shape[-1] == rank
    close(U * S[..., None, :] @ V.mT, product)
    close(S, torch.linalg.svdvals(product)[..., :rank])
    close(U.mT @ U, torch.eye(rank, dtype=U.dtype).expand(*shape, -1, -1))
    close(V.mT @ V, torch.eye(rank, dtype=U.dtype).expand(*shape, -1, -1))
    even = matrix.make_even()
    close(even.AB, product)
    close(torch.linalg.svdvals(even.A), torch.linalg.svdvals(even.B))
    close(matrix.U @ matrix.collapse_l(), product)
    close(matrix.collapse_r() @ matrix.V.mT, product)
    assert (matrix.U is U, matrix.S is S, matrix.V is V) == (True, True, True), "it is computed once"
    close(matrix.get_corner(2), product[(slice(2),) * product.ndim])


@settings(max_examples=40, deadline=None)
@given(leading, sizes, sizes, st.integers(0, 99))
def test_eigenvalues_are_the_products_without_zeros(shape, size, inner, seed):
    matrix = FactoredMatrix(*factors(shape, size, inner, size, seed))
    expected = torch.linalg.eigvals(matrix.AB)
    found = matrix.eigenvalues
    assert found.shape == (*shape, min(size, inner))
    for power in (1, 2, 3):  # eigenvalues come in no order; sums of powers do not need one
        a, b = (found**power).sum(-1), (expected**power).sum(-1)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(leading, sizes, sizes, sizes, sizes, st.integers(0, 99))
def test_products_from_either_side(shape, left, inner, right, other, seed):
    matrix = FactoredMatrix(*factors(shape, left, inner, right, seed))
    product = matrix.AB
    before = torch.randn(other, left, dtype=torch.float64)
    after = torch.randn(right, other, dtype=torch.float64)
    close((matrix @ after).AB, product @ after)
    close((before @ matrix).AB, before @ product)
    close(matrix @ after[:, 0], product @ after[:, 0])
    close(before[0] @ matrix, before[0] @ product)
    close((matrix * 3).AB, product * 3)
    close((0.5 * matrix).AB, product * 0.5)
    second = FactoredMatrix(*factors(shape, right, other, left, seed + 1))
    both = matrix @ second
    close(both.AB, product @ second.AB)
    assert both.mdim == min(inner, other)


@pytest.mark.parametrize(
    "index",
    [0, -1, slice(1), (1, 2), (slice(None), 0), (..., 0), (0, ..., 2), (None, 1), torch.tensor([1, 0]), ([0, 1],),
     (0, 1, 3), (0, 1, slice(2), slice(1, 3)), (..., slice(2), -1), (slice(None), 1, ..., 0, 0), ...],
)  # fmt: skip
def test_indexing_is_the_products(index):
    matrix = FactoredMatrix(*factors((2, 3), 5, 2, 4))
    given = index if isinstance(index, tuple) else (index,)
    # Integers at the matrix's own axes leave an axis of size 1.
    full = matrix.AB[index]
    found = matrix[index]
    close(found.AB.reshape(full.shape), full)
    assert found.ndim == len([i for i in given if i is None]) + 4 - sum(
        isinstance(one, int) for one in _leading(given, 2)
    )


@pytest.mark.parametrize("one", [np.int64(-1), torch.tensor(-1), np.array(-1)])
def test_numbers_of_numpy_and_torch_index_as_pythons_do(one):
    matrix = FactoredMatrix(*factors((2, 3), 5, 2, 4))
    for index in ((0, one), (one, 1, one), (..., one, one), (slice(None), one, slice(2), one)):
        plain = matrix[tuple(-1 if place is one else place for place in index)]
        assert matrix[index].shape == plain.shape
        close(matrix[index].AB, plain.AB)


def test_indices_that_are_none():
    matrix = FactoredMatrix(*factors((2, 3), 5, 2, 4))
    assert matrix[:, :, None].shape == (2, 3, 1, 5, 4)
    for index in ((..., None), (0, 0, 1, None)):
        with pytest.raises(InvalidArgumentError, match="a new axis goes in front of the matrix's own two"):
            matrix[index]
    with pytest.raises(InvalidArgumentError) as error:
        matrix[..., 0, ...]
    assert str(error.value).splitlines()[:2] == ["an index has one ellipsis at most", "  got: 2"]


def _leading(given, count):
    """The indices of the leading axes."""
    if ... in [one for one in given if not isinstance(one, torch.Tensor | list)]:
        at = next(i for i, one in enumerate(given) if one is ...)
        behind = len(given) - at - 1
        given = (*given[:at], *(slice(None),) * (4 - at - behind), *given[at + 1 :])
    return [one for one in given if one is not None][:count]


def test_shapes_and_pairs():
    matrix = FactoredMatrix(*factors((2, 3), 5, 2, 4))
    assert matrix.shape == (2, 3, 5, 4)
    assert (matrix.ldim, matrix.mdim, matrix.rdim, matrix.ndim) == (5, 2, 4, 4)
    assert matrix.pair == (matrix.A, matrix.B)
    assert matrix.unsqueeze(0).shape == (1, 2, 3, 5, 4)
    assert matrix.unsqueeze(-3).shape == (2, 3, 1, 5, 4)
    assert repr(matrix) == "FactoredMatrix([2, 3, 5, 4] through 2, torch.float64 on cpu)"
    assert matrix.to(torch.float32).A.dtype == torch.float32
    assert matrix.detach().shape == matrix.shape


def test_what_vh_is():
    matrix = FactoredMatrix(*factors((), 5, 2, 4))
    with pytest.warns(DeprecationWarning, match="Vh is V, with singular vectors in columns, as in TransformerLens"):
        assert matrix.Vh is matrix.V
    assert matrix.V.shape == (4, 2)


def test_a_decomposition_is_of_the_factors_as_they_are_now():
    A, B = factors((), 5, 2, 4)
    matrix = FactoredMatrix(A, B)
    before = matrix.S
    A *= 3
    close(matrix.S, before * 3)
    with torch.inference_mode():
        frozen = FactoredMatrix(A * 1, B * 1)
        assert frozen.U is frozen.U
    A.requires_grad_()
    with torch.no_grad():
        assert not matrix.S.requires_grad
    assert FactoredMatrix(A, B).S.requires_grad


def test_numbers_that_multiply():
    matrix = FactoredMatrix(*factors((2, 3), 5, 2, 4))
    for number in (2, 2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]])):
        close((matrix * number).AB, matrix.AB * 2)
        close((number * matrix).AB, matrix.AB * 2)
    each = torch.rand(2, 3, 1, 1, dtype=torch.float64)
    close((matrix * each).AB, matrix.AB * each)
    with pytest.raises(InvalidArgumentError) as error:
        matrix * torch.ones(2)
    assert str(error.value).splitlines() == [
        "a factored matrix is multiplied by numbers", "  expected: one, or [..., 1, 1]", "  got: [2]"
    ]  # fmt: skip
    assert matrix.has_leading_dims
    assert not matrix[0, 0].has_leading_dims


def test_leading_axes_broadcast_without_a_copy():
    A, B = torch.randn(4, 6, 2), torch.randn(1, 2, 6)
    matrix = FactoredMatrix(A, B)
    assert matrix.B.stride(0) == 0
    torch.testing.assert_close(matrix.AB, A @ B)


def test_half_precision_is_raised_for_decompositions():
    matrix = FactoredMatrix(*factors((), 6, 2, 6)).to(torch.bfloat16)
    exact = matrix.to(torch.float32)
    assert matrix.svd().S.dtype == torch.float32
    torch.testing.assert_close(matrix.norm(), exact.norm())
    torch.testing.assert_close(matrix.eigenvalues.abs().sort().values, exact.eigenvalues.abs().sort().values)


def test_gradients_pass():
    A, B = (factor.requires_grad_() for factor in factors((), 4, 2, 4))
    FactoredMatrix(A, B).norm().backward()
    expected = torch.autograd.grad(torch.linalg.matrix_norm(A @ B), [A, B])
    close(A.grad, expected[0])
    close(B.grad, expected[1])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FactoredMatrix(torch.zeros(2, 3), torch.zeros(4, 2)), r"(?s)inner\].*A \[2, 3\] and B \[4, 2\]"),
        (lambda: FactoredMatrix(torch.zeros(3), torch.zeros(3, 2)), "cannot multiply"),
        (lambda: FactoredMatrix(torch.zeros(2, 3), torch.zeros(3, 4)).eigenvalues, "2 x 4"),
        (lambda: FactoredMatrix(torch.zeros(2, 3), torch.zeros(3, 2))[0, 0, 0], "3 indices for 2 axes"),
        (lambda: FactoredMatrix(torch.zeros(2, 3), torch.zeros(3, 2)) * torch.ones(2), r"\[\.\.\., 1, 1\]"),
        (lambda: FactoredMatrix(torch.zeros(2, 3), torch.zeros(3, 2)).unsqueeze(1), "no axis can be put at 1"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make, says):
    with pytest.raises(InvalidArgumentError, match=says):
        make()
