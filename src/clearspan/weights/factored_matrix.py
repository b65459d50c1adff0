"""A product of two matrices, kept as its factors."""

import warnings
from collections.abc import Callable
from types import EllipsisType
from typing import Literal, NamedTuple, Self

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from clearspan.checks import check_counts, check_kind, device_of, is_whole, whole
from clearspan.errors import InvalidArgumentError, OutOfRangeError

Index = int | slice | EllipsisType | Tensor | list[int]


class SVD(NamedTuple):
    """A thin singular value decomposition, `U * S @ V.mT`: singular vectors are columns on both sides."""

    U: Float[Tensor, "... left rank"]
    S: Float[Tensor, "... rank"]
    V: Float[Tensor, "... right rank"]


class FactoredMatrix:
    """The matrix `A @ B`, which is never formed.

    A head's `W_V @ W_O` is `[d_model, d_model]` but of rank `d_head`, so the factors give its decompositions and norms
    in a fraction of the memory and time. Leading axes (layer, head) broadcast. Factors in half precision are raised to
    float32 for decompositions and norms.

    Args:
        A: `[..., left, inner]`.
        B: `[..., inner, right]`.

    Raises:
        InvalidArgumentError: The inner sizes differ, a factor is no matrix, or they differ in dtype or device.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> bridge.OV.shape == (5, 8, bridge.cfg.d_model, bridge.cfg.d_model)
        True
        >>> bridge.OV[4, 3].svd().S.shape[0] == bridge.cfg.d_head
        True
    """

    def __init__(self, A: Float[Tensor, "... left inner"], B: Float[Tensor, "... inner right"]) -> None:
        check_kind(Tensor, A=A, B=B)
        if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2]:
            raise InvalidArgumentError(
                "cannot multiply these factors",
                expected="A [..., left, inner] and B [..., inner, right]",
                got=f"A {list(A.shape)} and B {list(B.shape)}",
            )
        if A.dtype != B.dtype or A.dtype == torch.bool or A.device != B.device:
            raise InvalidArgumentError(
                "cannot multiply these factors",
                expected="numbers of one dtype, on one device",
                got=f"A {A.dtype} on {A.device} and B {B.dtype} on {B.device}",
            )
        try:
            leading = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except RuntimeError:
            raise InvalidArgumentError(
                "cannot multiply these factors",
                expected="leading axes that broadcast",
                got=f"A {list(A.shape)} and B {list(B.shape)}",
            ) from None
        self.A = A.expand(*leading, *A.shape[-2:])
        self.B = B.expand(*leading, *B.shape[-2:])
        self._found: tuple[object, SVD] | None = None

    # --- shape -------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """The product's shape."""
        return torch.Size([*self.A.shape[:-1], self.B.shape[-1]])

    @property
    def ndim(self) -> int:
        """The product's number of axes."""
        return self.A.ndim

    @property
    def ldim(self) -> int:
        """Rows of the product."""
        return self.A.shape[-2]

    @property
    def mdim(self) -> int:
        """The inner size, which bounds the rank."""
        return self.A.shape[-1]

    @property
    def rdim(self) -> int:
        """Columns of the product."""
        return self.B.shape[-1]

    @property
    def has_leading_dims(self) -> bool:
        """Whether it is several matrices, by layer or head."""
        return self.ndim > 2

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Both factors."""
        return self.A, self.B

    @property
    def T(self) -> "FactoredMatrix":
        """The transpose of the product's last two axes."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    def unsqueeze(self, k: int) -> "FactoredMatrix":
        """Returns it with one more leading axis, of size 1, at place `k`."""
        if not is_whole(k):
            raise InvalidArgumentError(f"k={k!r}"[:80], expected="a whole number")
        at = k if k >= 0 else k + self.ndim + 1
        if not 0 <= at <= self.ndim - 2:
            raise InvalidArgumentError(
                f"no axis can be put at {k}", expected=f"0 to {self.ndim - 2}, before the matrix's own two"
            )
        return FactoredMatrix(self.A.unsqueeze(at), self.B.unsqueeze(at))

    def __getitem__(self, index: Index | tuple[Index | None, ...] | None) -> "FactoredMatrix":
        """Returns a part.

        Leading axes are indexed as in a tensor. An index of the matrix's own axes picks rows of `A` and columns of `B`;
        there an integer leaves an axis of size 1.

        Raises:
            OutOfRangeError: A place that is not there; it is an IndexError.
            InvalidArgumentError: Too many indices, or something that is none.
        """
        given = tuple(_one_index(one) for one in (index if isinstance(index, tuple) else (index,)))
        count = sum(1 for one in given if one is not None and one is not ...)
        ellipses = [at for at, one in enumerate(given) if one is ...]
        if len(ellipses) > 1:
            raise InvalidArgumentError("an index has one ellipsis at most", got=str(len(ellipses)), where=repr(self))
        for at in ellipses:
            given = (*given[:at], *(slice(None),) * (self.ndim - count), *given[at + 1 :])
            count = self.ndim
        if count > self.ndim:
            raise InvalidArgumentError(f"{count} indices for {self.ndim} axes", where=repr(self))
        leading: list[Index | None] = []
        matrix: list[Index] = []
        for one in given:
            if one is None and matrix:
                raise InvalidArgumentError(
                    "a new axis goes in front of the matrix's own two", got=f"[{index!r}]"[:80], where=repr(self)
                )
            if one is None or sum(1 for other in leading if other is not None) < self.ndim - 2:
                leading.append(one)
            else:
                matrix.append(slice(one, one + 1 or None) if isinstance(one, int) else one)
        rows = matrix[0] if matrix else slice(None)
        columns = matrix[1] if len(matrix) > 1 else slice(None)
        for place, size in zip((one for one in given if one is not None), self.shape, strict=False):
            if is_whole(place) and not -size <= place < size:
                raise OutOfRangeError(
                    f"index {place} is not there", expected=f"-{size} to {size - 1}", where=repr(self)
                )
        try:
            A, B = self.A[tuple(leading)] if leading else self.A, self.B[tuple(leading)] if leading else self.B
            return FactoredMatrix(A[..., rows, :], B[..., columns])
        except (IndexError, TypeError) as error:
            kind = OutOfRangeError if "out of" in str(error) else InvalidArgumentError
            raise kind(f"[{index!r}] is no index of this matrix"[:120], reason=str(error), where=repr(self)) from error

    # --- products ----------------------------------------------------------------------------------------------------

    @property
    def AB(self) -> Float[Tensor, "... left right"]:
        """The product itself: only this forms it."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "... inner inner"]:
        """The factors multiplied in reverse order, `[inner, inner]`: the product's eigenvalues, up to zeros.

        Raises:
            InvalidArgumentError: The product is not square.
        """
        if self.ldim != self.rdim:
            raise InvalidArgumentError("B @ A needs a square product", got=f"{self.ldim} x {self.rdim}")
        return self.B @ self.A

    def __matmul__(self, other: "Tensor | FactoredMatrix") -> "Tensor | FactoredMatrix":
        """Returns the product with a vector (a vector), or with a matrix (factored).

        Raises:
            InvalidArgumentError: It is none, or its size is another one.
        """
        self._check_operand(other, self.rdim, "right")
        if isinstance(other, FactoredMatrix):
            inner = self.B @ other.A
            if self.mdim <= other.mdim:
                return FactoredMatrix(self.A, inner @ other.B)
            return FactoredMatrix(self.A @ inner, other.B)
        if other.ndim == 1:
            return (self.A @ (self.B @ other)[..., None])[..., 0]
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Tensor) -> "Tensor | FactoredMatrix":
        """Returns the product of a vector (a vector), or of a matrix (factored), with it.

        Raises:
            InvalidArgumentError: It is none, or its size is another one.
        """
        self._check_operand(other, self.ldim, "left")
        if other.ndim == 1:
            return ((other @ self.A)[..., None, :] @ self.B)[..., 0, :]
        return FactoredMatrix(other @ self.A, self.B)

    def _check_operand(self, other: object, size: int, side: Literal["left", "right"]) -> None:
        """Raises unless something can stand on a side of this matrix in a product."""
        check_kind(Tensor, FactoredMatrix, other=other)
        assert isinstance(other, Tensor | FactoredMatrix), "checked above"
        axis = -1 if side == "left" or other.ndim == 1 else -2
        if not other.ndim or other.shape[axis] != size:
            raise InvalidArgumentError(
                f"cannot multiply this on the {side} of {self!r}",
                expected=f"a vector of {size}, or a matrix with {size} {'columns' if side == 'left' else 'rows'}",
                got=str(list(other.shape)),
            )

    def __mul__(self, scalar: float | Tensor) -> "FactoredMatrix":
        """Returns it times a number, or times one number for each matrix, `[..., 1, 1]`."""
        if not isinstance(scalar, Tensor | int | float):
            raise InvalidArgumentError(f"scalar={scalar!r}"[:80], expected="a number, or a tensor [..., 1, 1]")
        if isinstance(scalar, Tensor) and scalar.numel() != 1 and scalar.shape[-2:] != (1, 1):
            raise InvalidArgumentError(
                "a factored matrix is multiplied by numbers",
                expected="one, or [..., 1, 1]",
                got=str(list(scalar.shape)),
            )
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    # --- decompositions ----------------------------------------------------------------------------------------------

    def svd(self) -> SVD:
        """Returns the thin SVD `(U, S, V)` of the product; its rank axis has the smallest of the three sizes.

        With `A = Qa Ra` and `B^T = Qb Rb`, it follows from the SVD of the small `Ra Rb^T`. It is kept, and computed
        again only where a factor was written since, or gradients are enabled that were not.
        """
        state = (_version(self.A), _version(self.B), torch.is_grad_enabled())
        if self._found is None or self._found[0] != state:
            (Qa, Ra), (Qb, Rb) = torch.linalg.qr(_exact(self.A)), torch.linalg.qr(_exact(self.B).mT)
            U, S, Vh = torch.linalg.svd(Ra @ Rb.mT, full_matrices=False)
            self._found = state, SVD(Qa @ U, S, Qb @ Vh.mT)
        return self._found[1]

    @property
    def U(self) -> Float[Tensor, "... left rank"]:
        """Left singular vectors, in columns."""
        return self.svd().U

    @property
    def S(self) -> Float[Tensor, "... rank"]:
        """Singular values, largest first."""
        return self.svd().S

    @property
    def V(self) -> Float[Tensor, "... right rank"]:
        """Right singular vectors, in columns."""
        return self.svd().V

    @property
    def Vh(self) -> Float[Tensor, "... right rank"]:
        """`V`, by the name that TransformerLens has for it; `V.mT` is what elsewhere is called so."""
        warnings.warn(
            "FactoredMatrix.Vh is V, with singular vectors in columns, as in TransformerLens; V.mT has them in rows",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.V

    @property
    def eigenvalues(self) -> Complex[Tensor, "... rank"]:
        """The product's eigenvalues, without those that must be zero because the inner size is the smaller.

        Raises:
            InvalidArgumentError: The product is not square.
        """
        exact = self.to(torch.promote_types(self.A.dtype, torch.float32))
        return torch.linalg.eigvals(exact.AB if self.ldim == self.rdim < self.mdim else exact.BA)

    def norm(self) -> Float[Tensor, "..."]:
        """Returns the Frobenius norm of the product."""
        Ra, Rb = triangular(self.A), triangular(self.B.mT)
        return torch.linalg.matrix_norm(Ra @ Rb.mT)

    def collapse_l(self) -> Float[Tensor, "... rank right"]:
        """Returns singular values times right singular vectors."""
        found = self.svd()
        return found.S[..., None] * found.V.mT

    def collapse_r(self) -> Float[Tensor, "... left rank"]:
        """Returns left singular vectors times singular values."""
        found = self.svd()
        return found.U * found.S[..., None, :]

    def make_even(self) -> "FactoredMatrix":
        """Returns the same product with factors that share its singular values evenly."""
        found = self.svd()
        root = found.S.sqrt()
        return FactoredMatrix(found.U * root[..., None, :], root[..., None] * found.V.mT)

    def get_corner(self, k: int = 3) -> Tensor:
        """Returns the product's first `k` entries along each axis."""
        check_counts(k=k)
        leading = (slice(k),) * (self.ndim - 2)
        return self.A[leading][..., :k, :] @ self.B[leading][..., :k]

    # --- where it is -------------------------------------------------------------------------------------------------

    def to(self, target: torch.device | str | torch.dtype) -> "FactoredMatrix":
        """Returns it with both factors on a device, or in a dtype."""
        where = target if isinstance(target, torch.dtype) else device_of(target)
        return self._each(lambda factor: factor.to(where))

    def detach(self) -> "FactoredMatrix":
        """Returns it off the graph."""
        return self._each(Tensor.detach)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(change(self.A), change(self.B))

    def __repr__(self) -> str:
        return f"FactoredMatrix({list(self.shape)} through {self.mdim}, {self.A.dtype} on {self.A.device})"


def triangular(matrix: Float[Tensor, "... left inner"]) -> Float[Tensor, "... rank inner"]:
    """Returns the `R` of a matrix's QR decomposition: small, and of the same length in every direction."""
    return torch.linalg.qr(_exact(matrix)).R  # gradients need Q, so it is computed


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _version(factor: Tensor) -> int | None:
    """Returns torch's count of writes into a factor; tensors made under inference mode count none."""
    return None if factor.is_inference() else factor._version


def _one_index(one: Index | None) -> Index | None:
    """Returns an index, a whole number of numpy's or torch's as Python's."""
    number = whole(one)
    return one if number is None else number
