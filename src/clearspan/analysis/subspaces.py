"""Subspaces compared: the projection kernel of two column spaces, and of what heads write with what heads read."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._forward.readout import exact
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_choice, check_counts, number_of, tensor_of
from clearspan.effects import Effects
from clearspan.errors import InvalidArgumentError, NotFiniteError
from clearspan.model import check_bridge, check_layers
from clearspan.modes import no_grad
from clearspan.plots import LineChart
from clearspan.results import Columns, Result, number

HeadReads = Literal["Q", "K", "V"]


@dataclass(frozen=True, eq=False, repr=False)
class ProjectionKernel(Result):
    """How much two subspaces of one space share: the sum of the squared cosines of their principal angles.

    Attributes:
        cosines: Of the principal angles, largest first, one for each dimension of the smaller subspace; on the CPU.
        ranks: Dimensions of the two subspaces.
        dimensions: Of the space that they are in.
    """

    cosines: Float[Tensor, "angle"]
    ranks: tuple[int, int]
    dimensions: int

    @property
    def title(self) -> str:
        """The kernel, with that of random subspaces."""
        return (
            f"projection kernel {number(self.kernel)} of subspaces of {self.ranks[0]} and {self.ranks[1]} of "
            f"{self.dimensions} dimensions; random ones have {number(self.expected)} ± {number(self.deviation)}"
        )

    @property
    def kernel(self) -> float:
        """`|U.T @ V|²` for orthonormal bases `U` and `V`: from 0 to the smaller of the ranks, how many are shared."""
        return self.cosines.square().sum().item()

    @property
    def normalised(self) -> float:
        """The kernel by the root of the product of the ranks: the cosine between the two projections, from 0 to 1."""
        return self.kernel / math.sqrt(math.prod(self.ranks))

    @property
    def angles(self) -> Float[Tensor, "angle"]:
        """The principal angles in radians, smallest first."""
        return self.cosines.acos()

    @property
    def expected(self) -> float:
        """Mean kernel of random subspaces of these ranks, every orientation as likely."""
        return math.prod(self.ranks) / self.dimensions

    @property
    def deviation(self) -> float:
        """Standard deviation of the kernel of such random subspaces."""
        return _deviation(self.dimensions, *torch.tensor(self.ranks, dtype=torch.double)).item()

    def columns(self) -> Columns:
        """Returns one row for each principal angle."""
        return {"number": range(len(self.cosines)), "cosine": self.cosines.tolist(), "angle": self.angles.tolist()}

    def chart(self) -> LineChart:
        """Returns the cosines."""
        x = list(range(len(self.cosines)))
        series = {"cosine": self.cosines.tolist()}
        return LineChart(series, x, "principal angle", "cosine", self.title)


@no_grad
def projection_kernel(
    a: Float[Tensor, "d m"], b: Float[Tensor, "d n"], *, rank: int | None = None, tolerance: float | None = None
) -> ProjectionKernel:
    """Returns how much the column spaces of two matrices share.

    Computed in float32 at least. Which columns span a space does not matter.

    Args:
        a: Columns that span the first subspace.
        b: Columns that span the second one.
        rank: How many leading singular directions of each are taken; by default all above the tolerance.
        tolerance: Singular values of at most this share of the largest are taken for zero; by default what rounding
            makes of a zero: the larger side of the matrix times the least step of its dtype, float32 at least.

    Raises:
        InvalidArgumentError: No matrices, or of other heights; a matrix of rank 0, or of a smaller rank than asked for.
        NotFiniteError: A value is infinite or not a number.

    Example:
        >>> found = projection_kernel(torch.eye(4)[:, :2], torch.eye(4)[:, 1:])
        >>> found.kernel, found.ranks, found.expected
        (1.0, (2, 3), 1.5)

    References:
        Björck and Golub (1973), "Numerical methods for computing angles between linear subspaces", for the angles.
    """
    bases = []
    for name, given in (("a", a), ("b", b)):
        matrix = tensor_of(name, given)
        if matrix.ndim != 2 or not matrix.numel() or not matrix.is_floating_point():
            raise InvalidArgumentError(
                f"{name} is no matrix of numbers", expected="[d, n]", got=f"{matrix.dtype} {list(matrix.shape)}"
            )
        basis, ranks = _bases(matrix[None], rank, tolerance, [name])
        bases.append(basis[0, :, : int(ranks[0])].cpu())
    first, second = bases
    if len(first) != len(second):
        raise InvalidArgumentError(
            "the subspaces are not of one space", expected="matrices of one height", got=f"{len(first)}, {len(second)}"
        )
    dtype = torch.promote_types(first.dtype, second.dtype)
    cosines = torch.linalg.svdvals(first.to(dtype).T @ second.to(dtype)).clamp(0, 1)
    return ProjectionKernel(cosines, (first.shape[1], second.shape[1]), len(first))


@no_grad
def head_projection_kernels(
    bridge: TransformerBridge,
    reads: HeadReads = "Q",
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    order: Literal["forward", "all"] = "forward",
) -> Effects:
    """Returns how much of the subspace that each head writes to is in that which each later head reads from.

    The subspace that a head writes to is spanned by the rows of its `W_O`; that which it reads from by the columns of
    its `W_Q`, `W_K` or `W_V`. How strongly it writes or reads along a direction does not count, as it does in
    `bridge.composition_scores`. Norms between the heads are ignored: `bridge.processed()` folds their weights into the
    readers.

    Args:
        bridge: The model.
        reads: Whether readers read for queries, keys or values. Keys and values have as many heads as the model has.
        rank: How many leading singular directions of each head are taken; by default all above the tolerance.
        tolerance: As for `projection_kernel`.
        order: `"forward"`: a pair whose writer is not in an earlier layer is NaN; `"all"`: all pairs count.

    Returns:
        By writer and reader, each a layer and a head: `"overlap"`, `kernel / sqrt(rank * rank)` from 0 to 1;
        `"kernel"`, the sum of the squared cosines of the principal angles; `"deviations"`, how many standard deviations
        of random subspaces' kernels it is above their mean. Heads of a trained model are no random subspaces, so the
        last is no test.

    Raises:
        MissingPartError, MissingWeightError: No layer has attention, or attention without these weights.
        InvalidArgumentError: A head of a smaller rank than asked for, or weights of rank 0.
        NotFiniteError: A weight is infinite or not a number.

    Example:
        >>> import clearspan
        >>> found = head_projection_kernels(clearspan.boot("tiny-bigcode"), "K")
        >>> found.axes["writer"][-1], found.axes["reader"][-1]
        ((4, 7), (4, 0))
        >>> round(found.select(writer=(0, 0), reader=(0, 0)).mean().item(), 1)
        nan
    """
    check_bridge(bridge)
    check_choice(get_args(HeadReads), reads=reads)
    check_choice(("forward", "all"), order=order)
    layers = bridge.layers_with("attn")
    check_layers(bridge, "attn", layers or [0])
    (writers, written), (readers, read) = (
        _of_heads(bridge, layers, letter, rank, tolerance) for letter in ("O", reads)
    )
    shared = torch.stack([(basis.T @ read.bases).square().sum((1, 2)) for basis in written.bases]).cpu()
    is_earlier = torch.tensor([[one < other for other, _ in readers] for one, _ in writers])
    kernel = shared if order == "all" else shared.masked_fill(~is_earlier, torch.nan)
    ranks, d = (written.ranks[:, None], read.ranks), bridge.cfg.d_model
    product, spread = ranks[0] * ranks[1], _deviation(d, *ranks)
    values = {
        "overlap": kernel / product.sqrt(),
        "kernel": kernel,
        "deviations": (kernel - product / d) / spread,
    }
    return Effects(
        {name: one[..., None] for name, one in values.items()},
        {"writer": writers, "reader": readers},
        texts={
            axis: tuple(f"L{layer}H{head}" for layer, head in heads)
            for axis, heads in (("writer", writers), ("reader", readers))
        },
        what=f"the subspaces that a head writes and that another reads by W_{reads}",
    )


@dataclass(frozen=True, eq=False)
class Bases:
    """Orthonormal bases of heads' subspaces; columns of zeros where a head has a smaller rank than others."""

    bases: Float[Tensor, "head d_model d_head"]
    ranks: Int[Tensor, "head"]


def _of_heads(
    bridge: TransformerBridge, layers: list[int], letter: str, rank: int | None, tolerance: float | None
) -> tuple[tuple[tuple[int, int], ...], Bases]:
    """Returns the heads, each a layer and a number, and the bases of what they write (`"O"`) or read."""
    heads: list[tuple[int, int]] = []
    bases, ranks = [], []
    for layer in layers:
        weight = bridge.stacked(f"W_{letter}", [layer])[0]
        own = [(layer, head) for head in range(len(weight))]
        found = _bases(
            weight.mT if letter == "O" else weight, rank, tolerance, [f"W_{letter} of L{one}H{two}" for one, two in own]
        )
        heads += own
        bases.append(found[0].cpu())
        ranks.append(found[1].cpu())
    width = max(one.shape[-1] for one in bases)
    padded = [torch.nn.functional.pad(one, (0, width - one.shape[-1])) for one in bases]
    return tuple(heads), Bases(torch.cat(padded), torch.cat(ranks))


def _bases(
    matrices: Float[Tensor, "matrix d n"], rank: int | None, tolerance: float | None, names: list[str]
) -> tuple[Float[Tensor, "matrix d n"], Int[Tensor, "matrix"]]:
    """Returns orthonormal bases of column spaces, columns past a matrix's rank being zero, and ranks."""
    wide = exact(matrices)
    for name, one in zip(names, wide, strict=True):
        if not one.isfinite().all():
            raise NotFiniteError(f"{name} is not finite", got=str(matrices.dtype))
    if rank is not None:
        check_counts(rank=rank)
    share = max(wide.shape[-2:]) * torch.finfo(wide.dtype).eps if tolerance is None else tolerance
    share = number_of("tolerance", share)
    if not 0 <= share < 1:
        raise InvalidArgumentError(f"tolerance={tolerance}", expected="a share, from 0 to 1")
    left, values, _ = torch.linalg.svd(wide, full_matrices=False)
    measured = (values > share * values[:, :1]).sum(1)
    least = 1 if rank is None else rank
    for name, own in zip(names, measured.tolist(), strict=True):
        if own < least:
            raise InvalidArgumentError(f"{name} is of too small a rank", expected=f"{least} or more", got=str(own))
    ranks = measured if rank is None else torch.full_like(measured, rank)
    columns = torch.arange(left.shape[-1], device=left.device)
    return left * (columns < ranks[:, None])[:, None], ranks


def _deviation(d: int, a: Tensor, b: Tensor) -> Tensor:
    """Returns the standard deviation of the projection kernel of random subspaces of `a` and `b` of `d` dimensions."""
    return torch.sqrt(2.0 * a * b * (d - a) * (d - b) / (d**2 * max(d - 1, 1) * (d + 2)))
