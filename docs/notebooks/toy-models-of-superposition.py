# %% [markdown]
# # Toy models of superposition
#
# A layer with a few dimensions may carry more features than it has dimensions, each in a direction of its own that is
# not at right angles to the others. The features then disturb one another, and that can still be worth it where each
# is rarely present. This notebook trains the smallest model that does so, and reads from its weights which features
# it keeps, in which directions, and what they cost one another.
#
# The model has `n` features and `m < n` dimensions. It writes features by a matrix `W` (`n × m`) and reads them by
# its transpose: `x' = relu(x W Wᵀ + b)`. A feature is absent with a probability called its *sparsity*, and otherwise
# uniform between 0 and 1. All sparsities are trained side by side, one model each.

# %%
import torch
from plotly.subplots import make_subplots

import clearspan
from clearspan import FactoredMatrix
from clearspan.plots import DIVERGING, lines, picture


def train(sparsity, n=5, m=2, importance=None, steps=1500, learning_rate=0.02, seed=0):
    """Returns W `[model, feature, dimension]` and b `[model, feature]`, one model for each sparsity."""
    draw = torch.Generator().manual_seed(seed)
    present = (1 - torch.tensor(sparsity))[:, None, None]
    weight = importance if importance is not None else torch.ones(n)
    W = (torch.randn(len(sparsity), n, m, generator=draw) * 0.5).requires_grad_()
    b = torch.zeros(len(sparsity), n, requires_grad=True)
    optimizer = torch.optim.Adam([W, b], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        shape = (len(sparsity), 256, n)
        x = torch.rand(shape, generator=draw) * (torch.rand(shape, generator=draw) < present)
        guess = (x @ W @ W.mT + b[:, None]).relu()
        loss = (weight * (x - guess) ** 2).mean((1, 2))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
    return W.detach(), b.detach()


# %% [markdown]
# ## Five features in two dimensions
#
# The features differ in importance: each matters half as much again as the next. Below, each arrow is the direction
# in which one feature is written.

# %%
sparsity = [0.0, 0.7, 0.9, 0.98]
importance = 1.5 ** -torch.arange(5.0)
W, b = train(sparsity, importance=importance)


def arrows(W, names):
    """Returns a picture of the rows of each `W [feature, 2]`."""
    figure = make_subplots(cols=len(W), subplot_titles=names)
    for column, rows in enumerate(W.tolist(), start=1):
        for number, (x, y) in enumerate(rows):
            text = ["", str(number)] if (x * x + y * y) ** 0.5 > 0.1 else ["", ""]
            figure.add_scatter(
                x=[0, x], y=[0, y], text=text, mode="lines+markers+text", textposition="top center", line_width=2,
                line_color="#215f86", marker_size=[0, 7], showlegend=False, row=1, col=column,
            )  # fmt: skip
        figure.update_xaxes(range=[-1.5, 1.5], title="dimension 0", row=1, col=column)
        figure.update_yaxes(range=[-1.5, 1.5], row=1, col=column)
    figure.update_yaxes(title="dimension 1", col=1)
    return figure.update_layout(template="simple_white", height=270, margin={"l": 50, "r": 8, "t": 30, "b": 45})


arrows(W, [f"sparsity {share}" for share in sparsity])

# %% [markdown]
# Without sparsity the two most important features get a dimension each and the other three are dropped: that is what
# principal components would do. With sparsity, features share dimensions, first as pairs that point in opposite
# directions, and in the end all five, as the corners of a pentagon.

# %%
kept = (W.norm(dim=-1) > 0.5).sum(-1)
dict(zip(sparsity, kept.tolist(), strict=True))

# %% [check]
assert kept[0] == 2
assert set((W[0].norm(dim=-1) > 0.5).nonzero().flatten().tolist()) == {0, 1}
assert kept[-1] == 5
assert kept.tolist() == sorted(kept.tolist())
_angles = torch.atan2(W[-1, :, 1], W[-1, :, 0]).sort().values.rad2deg()
_gaps = torch.cat([_angles.diff(), _angles[:1] + 360 - _angles[-1:]])
assert ((_gaps > 55) & (_gaps < 90)).all()  # a pentagon has 72

# %% [markdown]
# ## Interference
#
# `W Wᵀ` says what comes out for each feature that goes in: the diagonal is the feature itself, and the rest is what
# it adds to others by mistake. `FactoredMatrix` keeps the product as its two factors, and has its rank, norm and
# singular values without ever making it; here it is small enough to look at.

# %%
product = FactoredMatrix(W, W.mT)
figure = make_subplots(cols=len(sparsity), subplot_titles=[f"sparsity {share}" for share in sparsity])
for column, one in enumerate(product.AB.tolist(), start=1):
    colors = [[i / 4, color] for i, color in enumerate(DIVERGING)]
    figure.add_heatmap(z=one, zmin=-1.2, zmax=1.2, colorscale=colors, showscale=column == 4, row=1, col=column)
    figure.update_xaxes(title="feature out", row=1, col=column)
figure.update_yaxes(autorange="reversed").update_yaxes(title="feature in", col=1)
figure.update_layout(template="simple_white", height=250, margin={"l": 50, "r": 8, "t": 30, "b": 45})

# %% [markdown]
# The bias answers the interference. A feature that is disturbed needs a negative bias, so that the ReLU cuts off what
# others add by mistake while it is absent itself. A feature that was dropped gets its mean, which is the best guess
# about what cannot be read: 0.5 where nothing is sparse.

# %%
picture(b, {"sparsity": sparsity, "feature": list(range(5))}, unit="bias", title="bias", kind="heat map")

# %% [check]
assert (b[0, 2:] - 0.5).abs().max() < 0.05
assert (b[-1] < 0.02).all()
assert torch.linalg.matrix_rank(product[0].AB) == 2

# %% [markdown]
# ## A phase change
#
# With 64 features of equal importance in 8 dimensions, ask how many dimensions a feature costs: `m / ‖W‖²`, where
# `‖W‖²` counts the features that are kept.

# %%
n, m = 64, 8
shares = [0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99]
many, _ = train(shares, n=n, m=m, steps=2500, learning_rate=0.03)
per_feature = m / FactoredMatrix(many, many.mT).AB.diagonal(dim1=-2, dim2=-1).sum(-1)
lines(
    {"dimensions": per_feature.tolist()},
    x=[1 / (1 - share) for share in shares],
    x_title="1 / (1 - sparsity)",
    value_title="dimensions per feature",
).update_xaxes(type="log")

# %% [markdown]
# Where little is sparse a feature costs almost a dimension. From a sparsity of 0.5 on it costs a half, and then less
# and less: at 0.99 the 8 dimensions hold around fifty features. For each feature on its own, its share of the
# dimensions that it lies in is `‖Wᵢ‖² / Σⱼ (Ŵᵢ · Wⱼ)²`: 1 for a dimension of its own, one half for one of an opposite
# pair, less in larger groups, and 0 if it is dropped.

# %%
unit = many / many.norm(dim=-1, keepdim=True).clamp_min(1e-6)
own = many.norm(dim=-1) ** 2 / ((unit @ many.mT) ** 2).sum(-1).clamp_min(1e-6)
lines(
    {f"sparsity {shares[i]}": own[i].sort(descending=True).values.tolist() for i in (4, 6, 8, 11)},
    x=list(range(n)),
    x_title="feature, from the one with the largest share",
    value_title="share of its dimensions",
)

# %% [markdown]
# At 0.7 most of those that are kept are in pairs, at 0.8 in threes, at 0.9 in fours. So it goes in steps: features
# are arranged in shapes, not spread evenly.

# %%
groups = {0.7: 1 / 2, 0.8: 1 / 3, 0.9: 1 / 4}
{at: round(own[shares.index(at)][own[shares.index(at)] > 0.1].median().item(), 2) for at in groups}

# %% [check]
assert 0.75 < per_feature[0] < 1.15
assert 0.35 < per_feature[shares.index(0.7)] < 0.65
assert per_feature[-1] < 0.15
assert (own[-1] > 0.05).sum() > 40
for _at, _share in groups.items():
    _found = own[shares.index(_at)]
    assert abs(_found[_found > 0.1].median() - _share) < 0.1

# %% [markdown]
# ## Is a real model like that?
#
# The embedded model writes 4,096 tokens in 256 dimensions, so that they cannot all be at right angles. Directions
# drawn at random would have cosines of about `1/√256 = 0.06`. A token's nearest other is much nearer than the nearest
# of as many random directions: tokens are not packed as far apart as they could be, because similar tokens share
# features.

# %%
bridge = clearspan.boot("tiny-bigcode")
generator = torch.Generator().manual_seed(0)


def nearest(directions):
    """Returns each direction's largest cosine with another."""
    unit = directions / directions.norm(dim=-1, keepdim=True)
    return ((unit @ unit.T).fill_diagonal_(-1)).max(-1).values


tokens = nearest(bridge.W_E.detach() - bridge.W_E.detach().mean(0))
random = nearest(torch.randn(bridge.W_E.shape, generator=generator))
round(tokens.median().item(), 2), round(random.median().item(), 2)

# %% [check]
assert 0.2 < random.median() < 0.28
assert tokens.median() > 1.2 * random.median()

# %% [markdown]
# ## What it does not show
#
# - Features here are given, independent and equally sparse. In a real model nobody gives them, and they are
#   correlated, which changes how they are arranged.
# - The loss is reconstruction through one ReLU. A model that computes with its features has other reasons to keep
#   them apart.
# - Directions that overlap are a sign of superposition only where the features are known. Similar tokens overlap
#   because they mean similar things.
#
# References: Elhage et al. (2022), "Toy Models of Superposition", arXiv:2209.10652, sections 2 and 3.
