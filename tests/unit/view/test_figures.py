import pytest
import torch

from clearspan.errors import InvalidArgumentError
from clearspan.view import effect_figure, head_figure, lens_figure, pattern_figure


def values(figure):
    return torch.tensor(figure.data[0].z)


def test_the_lens_shows_the_token_and_probability_of_every_depth_and_position(report):
    figure = lens_figure(report)
    torch.testing.assert_close(values(figure), report.lens.top_probs.T, rtol=0, atol=5e-5)
    assert list(figure.data[0].x) == ["embed", "layer 0", "layer 1", "layer 2"]
    assert figure.data[0].text[2][0] == "&lt;b&gt;bold&lt;/b&gt;"
    assert figure.data[0].text[0][-1].startswith("<b>")
    assert figure.layout.yaxis.ticktext[3] == "⏎····"


def test_scores_effects_and_patterns_keep_their_values(report):
    scores = head_figure(report.heads.induction, name="induction")
    torch.testing.assert_close(values(scores), report.heads.induction, rtol=0, atol=5e-5)
    torch.testing.assert_close(values(effect_figure(report)), report.effect.drop, rtol=0, atol=5e-5)
    torch.testing.assert_close(values(pattern_figure(report, 1, 2)), report.patterns[1, 2], rtol=0, atol=5e-5)


def test_the_effect_is_neutral_at_zero(report):
    trace = effect_figure(report).data[0]
    assert trace.zmax == -trace.zmin == pytest.approx(float(report.effect.drop[:, :-1].abs().max()))


def test_the_last_positions_alone(report):
    figure = pattern_figure(report, 0, 0, last=3)
    torch.testing.assert_close(values(figure), report.patterns[0, 0, -3:, -3:], rtol=0, atol=5e-5)
    assert list(figure.layout.xaxis.tickvals) == list(figure.data[0].x)


def test_equal_tokens_have_places_of_their_own(report):
    names = pattern_figure(report, 0, 0).data[0].x
    assert len(set(names)) == len(report.tokens)


@pytest.mark.parametrize(("layer", "head"), [(3, 0), (-4, 0), (0, 4), ("0", 0), (0, None)])
def test_a_head_that_is_not_there(report, layer, head):
    with pytest.raises(InvalidArgumentError, match=r"there is no (layer|head)"):
        pattern_figure(report, layer, head)


def test_figures_of_nothing(report):
    with pytest.raises(InvalidArgumentError, match="scores are one for each head"):
        head_figure([0.5], name="induction")
    with pytest.raises(InvalidArgumentError, match="last=0"):
        pattern_figure(report, 0, 0, last=0)
