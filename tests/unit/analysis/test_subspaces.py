import pytest
import torch
from tests.hybrids import hybrid
from tests.zoo import build

import clearspan
from clearspan import zoo
from clearspan.analysis import head_projection_kernels, projection_kernel
from clearspan.errors import DerivedWarning, InvalidArgumentError, MissingPartError, MissingWeightError, NotFiniteError


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projector(matrix):
    return matrix @ torch.linalg.pinv(matrix)


def test_it_is_the_trace_of_the_product_of_projections():
    a, b = drawn(20, 5), drawn(20, 3, seed=1)
    found = projection_kernel(a, b)
    assert found.kernel == pytest.approx(torch.trace(projector(a) @ projector(b)).item(), rel=1e-4)
    assert found.normalised == pytest.approx(found.kernel / 15**0.5)
    assert found.ranks == (5, 3)
    torch.testing.assert_close(found.angles.cos(), found.cosines, rtol=1e-4, atol=1e-5)


def test_which_columns_span_a_space_does_not_matter():
    a, b = drawn(20, 5), drawn(20, 3, seed=1)
    other = torch.cat([a @ drawn(5, 5, seed=2), a[:, :2]], 1)
    found = projection_kernel(other, b)
    assert found.ranks == (5, 3)
    torch.testing.assert_close(found.cosines, projection_kernel(a, b).cosines, rtol=1e-3, atol=1e-4)
    half = projection_kernel(a.half(), b.bfloat16())
    assert half.kernel == pytest.approx(projection_kernel(a, b).kernel, rel=0.05)


def test_principal_angles_in_a_plane():
    along, turned = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.5], [3**0.5 / 2]])
    assert projection_kernel(along, turned).angles.item() == pytest.approx(torch.pi / 3, rel=1e-4)


def test_random_subspaces_have_the_expected_kernel():
    kernels = torch.tensor(
        [projection_kernel(drawn(12, 4, seed=2 * i), drawn(12, 7, seed=2 * i + 1)).kernel for i in range(400)]
    )
    found = projection_kernel(drawn(12, 4), drawn(12, 7, seed=1))
    assert kernels.mean().item() == pytest.approx(found.expected, rel=0.02)
    assert kernels.std().item() == pytest.approx(found.deviation, rel=0.15)


def test_a_rank_takes_the_leading_directions():
    u, v = torch.linalg.qr(drawn(9, 3)).Q, torch.linalg.qr(drawn(4, 3, seed=1)).Q
    matrix = u @ torch.diag(torch.tensor([3.0, 2.0, 1e-3])) @ v.T
    assert projection_kernel(matrix, u).ranks == (3, 3)
    assert projection_kernel(matrix, u, tolerance=0.01).ranks == (2, 3)
    assert projection_kernel(matrix, u[:, :1], rank=1).kernel == pytest.approx(1.0, rel=1e-4)


def test_what_spans_nothing_is_named():
    with pytest.raises(InvalidArgumentError) as error:
        projection_kernel(torch.eye(4)[:, :2], torch.zeros(4, 2))
    assert str(error.value) == "b is of too small a rank\n  expected: 1 or more\n  got: 0"
    with pytest.raises(InvalidArgumentError, match="a is of too small a rank\n  expected: 2 or more\n  got: 1"):
        projection_kernel(torch.ones(4, 2), torch.eye(4), rank=2)
    with pytest.raises(NotFiniteError, match="b is not finite"):
        projection_kernel(torch.eye(4), torch.full((4, 1), torch.nan))
    with pytest.raises(InvalidArgumentError, match="not of one space"):
        projection_kernel(torch.eye(4), torch.eye(3))
    with pytest.raises(InvalidArgumentError, match=r"tolerance=1\.5"):
        projection_kernel(torch.eye(4), torch.eye(4), tolerance=1.5)


@torch.no_grad()
@pytest.mark.parametrize("reads", ["Q", "K", "V"])
@pytest.mark.parametrize("variant", ["llama", "gpt_bigcode", "gpt2"])
def test_heads_are_compared_pair_by_pair(variant, reads):
    bridge = clearspan.boot(build(variant))
    found = head_projection_kernels(bridge, reads)
    every = head_projection_kernels(bridge, reads, order="all")
    for writer in found.axes["writer"]:
        for reader in found.axes["reader"]:
            W_O = bridge.blocks[writer[0]].attn.W_O[writer[1]]
            read = getattr(bridge.blocks[reader[0]].attn, f"W_{reads}")[reader[1]]
            one = projection_kernel(W_O.T, read)
            at = every.select(writer=writer, reader=reader)
            assert at.mean("kernel").item() == pytest.approx(one.kernel, rel=1e-3)
            assert at.mean().item() == pytest.approx(one.normalised, rel=1e-3)
            away = (one.kernel - one.expected) / one.deviation
            assert at.mean("deviations").item() == pytest.approx(away, rel=1e-2, abs=1e-3)
            own = found.select(writer=writer, reader=reader).mean()
            assert own.isnan() if reader[0] <= writer[0] else own == at.mean()
    assert len(found.axes["reader"]) == bridge.cfg.n_layers * getattr(bridge, f"W_{reads}").shape[1]
    assert found.labels["writer"][1] == "L0H1"


@torch.no_grad()
def test_heads_of_smaller_rank_count_with_their_own():
    bridge = clearspan.boot(build("llama"))
    bridge.blocks[0].attn.W_O[0, 1:] = 0
    found = head_projection_kernels(bridge, "Q", order="all").select(writer=(0, 0), reader=(1, 1))
    one = projection_kernel(bridge.blocks[0].attn.W_O[0].T, bridge.blocks[1].attn.W_Q[1])
    assert one.ranks[0] == 1
    assert found.mean().item() == pytest.approx(one.normalised, rel=1e-3)
    with pytest.raises(InvalidArgumentError, match="W_O of L0H0 is of too small a rank\n  expected: 2 or more"):
        head_projection_kernels(bridge, "Q", rank=2)


def test_layers_without_attention_are_passed_over_and_models_without_it_named():
    bridge = hybrid("jamba")
    layers = {layer for layer, _ in head_projection_kernels(bridge, "K").axes["writer"]}
    assert layers == set(bridge.layers_with("attn"))
    with pytest.raises(MissingPartError, match="no layer has 'attn'"):
        head_projection_kernels(hybrid("mamba"), "K")
    with pytest.warns(DerivedWarning):
        opaque = clearspan.boot(zoo.build("deepseek_v4"))
    with pytest.raises(MissingWeightError, match="W_O cannot be stacked: no layer has it"):
        head_projection_kernels(opaque, "Q")


def test_it_prints_and_plots():
    one = projection_kernel(torch.eye(4)[:, :2], torch.eye(4)[:, 1:])
    assert str(one).splitlines() == [
        "projection kernel 1.0000 of subspaces of 2 and 3 of 4 dimensions; random ones have 1.5000 ± 0.2887",
        "number  cosine   angle",
        "     0  1.0000  0.0000",
        "     1  0.0000  1.5708",
    ]
    assert list(one.plot().data[0].y) == [1.0, 0.0]
    found = head_projection_kernels(clearspan.boot(build("llama")), "K")
    assert str(found).splitlines()[0] == (
        "overlap and kernel and deviations of the subspaces that a head writes and that another reads by W_K"
    )
    assert found.plot().data[0].x[0] == "L0H0"
