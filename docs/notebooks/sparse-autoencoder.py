# %% [markdown]
# # A sparse autoencoder: trained, read, ablated, steered
#
# A sparse autoencoder (SAE) writes an activation as a sum of few out of many directions, its *features*, in the hope
# that each means something. This notebook trains a small one on the residual stream of the embedded model, in about a
# quarter of a minute, puts it into the model's forward, and asks what one of its features says and does.

# %%
import argparse
import dataclasses
import inspect
import logging
import subprocess
from collections import Counter
from types import SimpleNamespace

import torch

import clearspan
from clearspan import Intervention
from clearspan.interventions import Add, Zero
from clearspan.plots import lines, picture

bridge = clearspan.boot("tiny-bigcode")
POINT = "blocks.2.hook_resid_post"

# %% [markdown]
# ## Activations
#
# The texts are modules of the standard library, cut into pieces of 128 tokens, each after a BOS. The run stops after
# the layer that is read. The first position is left out: it is the same in every piece, and far from all others.

# %%
modules = [argparse, logging, dataclasses, inspect, subprocess]
ids = torch.cat([torch.tensor(bridge.tokenizer(inspect.getsource(each), verbose=False).input_ids) for each in modules])
ids = ids[: len(ids) // 127 * 127].view(-1, 127)
ids = torch.cat([torch.full((len(ids), 1), bridge.tokenizer.bos_token_id), ids], 1)
ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
held_out, ids = ids[:30], ids[30:]


def activations(tokens):
    """Returns the stream at POINT `[piece, pos, d_model]`, without the first position."""
    found = []
    for part in tokens.split(32):
        _, cache = bridge.run_with_cache(part, names_filter=POINT, stop_at_layer=3)
        found.append(cache[POINT][:, 1:])
    return torch.cat(found)


acts = activations(ids).flatten(0, 1)

# %% [markdown]
# ## The autoencoder
#
# `encode` keeps the 8 largest of 512 features at each position (TopK), `decode` adds up their directions. It is an
# ordinary module. With a `cfg` that names its hook point, the bridge takes it as it takes one of SAELens.


# %%
class TopK(torch.nn.Module):
    """A sparse autoencoder with a fixed number of features at each position."""

    def __init__(self, acts, features=512, k=8):
        super().__init__()
        self.cfg, self.k = SimpleNamespace(hook_name=POINT), k
        self.register_buffer("mean", acts.mean(0))
        self.register_buffer("scale", (acts - acts.mean(0)).norm(dim=-1).mean())
        directions = torch.randn(features, acts.shape[-1], generator=torch.Generator().manual_seed(0))
        self.W_dec = torch.nn.Parameter(directions / directions.norm(dim=-1, keepdim=True))
        self.W_enc = torch.nn.Parameter(self.W_dec.detach().T.clone())
        self.b_enc = torch.nn.Parameter(torch.zeros(features))

    def encode(self, x):
        before = (x - self.mean) / self.scale @ self.W_enc + self.b_enc
        largest = before.topk(self.k, dim=-1)
        return torch.zeros_like(before).scatter(-1, largest.indices, largest.values.relu())

    def decode(self, features):
        return features @ self.W_dec * self.scale + self.mean


def train(acts, steps=1000, rows=512):
    """Returns an autoencoder, and the share of the variance that it missed in every tenth batch."""
    sae, losses = TopK(acts), []
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = acts[torch.randint(len(acts), (rows,), generator=draw)]
        missed = (x - sae.decode(sae.encode(x))).square().sum() / (x - sae.mean).square().sum()
        optimizer.zero_grad()
        missed.backward()
        optimizer.step()
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)
        if step % 10 == 0:
            losses.append(missed.item())
    return sae.eval().requires_grad_(False), losses


sae, losses = train(acts)
lines(
    {"missed": losses}, x=list(range(0, 1000, 10)), x_title="step", value_title="share of the variance that is missed"
).update_traces(mode="lines")

# %% [markdown]
# ## In the model
#
# `run_with_saes` puts the reconstruction in the place of the stream. What is lost by it shows in the next-token loss
# on held-out text, between the model's own and that with the stream replaced by its mean. With the **error term**,
# what the autoencoder misses is added again, and nothing changes, to the last digit: so what is changed inside the
# autoencoder is the only change.


# %%
def loss(**keywords):
    """Returns the loss on held-out text in nats."""
    return bridge.run_with_saes(held_out, return_type="loss", **keywords).item()


mean_instead = Intervention("resid_post", Zero(), layer=2), Intervention("resid_post", Add(sae.mean), layer=2)
losses_with = {
    "model": loss(),
    "with error term": loss(saes=[sae], use_error_term=True),
    "reconstruction": loss(saes=[sae]),
    "mean": loss(interventions=mean_instead),
}
picture(torch.tensor(list(losses_with.values())), {"stream": list(losses_with)}, unit="loss in nats")

# %% [check]
assert losses_with["with error term"] == losses_with["model"]
_lost = losses_with["reconstruction"] - losses_with["model"]
assert 0 < _lost < 0.25 * (losses_with["mean"] - losses_with["model"])
assert losses[-1] < 0.45

# %% [markdown]
# ## A feature, read
#
# Features have no names. One way to find the one for something is to ask which tells it apart best: here, which
# feature is most correlated with the next token being ` =`, an assignment. And one way to read it is to look at what
# it is active on, and at what its direction says in the unembedding.

# %%
words = [bridge.to_single_str_token(token).replace("\n", "⏎") for token in range(bridge.cfg.d_vocab)]
some = ids[:400]
features = sae.encode(activations(some))  # piece, pos, feature
current, following = some[:, 1:-1].flatten(), some[:, 2:].flatten()
features = features[:, :-1].flatten(0, 1)
ASSIGN = bridge.to_single_token(" =")
is_assigned = (following == ASSIGN).float()
correlation = torch.corrcoef(torch.cat([features.T, is_assigned[None]]))[-1, :-1].nan_to_num()
feature = int(correlation.argmax())
largest = features[:, feature].topk(300).indices


def most(tokens):
    """Returns the three most frequent words."""
    return ", ".join(f"{words[token]!r} {count}" for token, count in Counter(tokens.tolist()).most_common(3))


says = (sae.W_dec[feature] @ bridge.W_U).topk(4).indices.tolist()
print(f"active at {(features[:, feature] > 0).float().mean():.0%} of positions")
print("on:", most(current[largest]))
print("before:", most(following[largest]))
print("in the unembedding:", ", ".join(repr(words[token]) for token in says))

# %% [markdown]
# It is active on many different names, and ` =` comes after many of them. Its direction has ` =` among the tokens
# that it raises most. So it says "an assignment comes", in the middle of the model, two layers before the prediction.

# %% [check]
_share = (following[largest] == ASSIGN).float().mean()
assert _share > 5 * is_assigned.mean()
assert ASSIGN in says

# %% [markdown]
# ## Ablated
#
# Where the feature is active, it is set to 0 inside the autoencoder, with the error term, so that nothing else
# changes. For comparison the same is done to other features that are active as often.

# %%
INSIDE = f"{POINT}.hook_sae_acts_post"
own, inside = bridge.run_with_cache_with_saes(held_out, saes=[sae], use_error_term=True)
is_active = inside[INSIDE][..., feature] > 0
is_active[:, 0] = False


def log_prob(logits):
    """Returns the mean log-probability of ` =` where the feature is active, in nats."""
    return logits.log_softmax(-1)[..., ASSIGN][is_active].mean().item()


def without(which):
    """Returns the log-probability of ` =` with one feature ablated."""

    def ablate(acts, hook):
        acts[..., which] = 0

    return log_prob(
        bridge.run_with_hooks_with_saes(held_out, saes=[sae], use_error_term=True, fwd_hooks=[(INSIDE, ablate)])
    )


size = inside[INSIDE][is_active].mean(0)
size[feature] = 0
others = size.topk(5).indices.tolist()
print(f"ablated: {without(feature) - log_prob(own):.1f} nats")
print("others:", ", ".join(f"{without(other) - log_prob(own):z.1f}" for other in others))

# %% [check]
_change = without(feature) - log_prob(own)
assert _change < -0.5
assert all(_change < 2 * min(0.0, without(other) - log_prob(own)) for other in others[:3])

# %% [markdown]
# ## Steered
#
# The feature's direction is an ordinary steering vector. Added to the stream at the last token of prompts after which
# no assignment comes, in units of the feature's mean activation, it makes one likelier.

# %%
prompts = [
    "def read(path):\n    return path",
    "import os\n\nclass Reader(object",
    "def total(items):\n    for item in items",
    "def show(self):\n    print(self.name",
    "try:\n    import json\nexcept ImportError",
    "if value is None",
]
unit = features[:, feature][features[:, feature] > 0].mean() * sae.W_dec[feature] * sae.scale
other = torch.randn(len(unit), generator=torch.Generator().manual_seed(2))
batch = bridge.to_batch(prompts, padding_side="left")
strengths = [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]


def assigned(direction, strength):
    """Returns the mean log-probability of ` =` after the prompts."""
    edit = Intervention("resid_post", Add(direction, strength), layer=2, positions=-1)
    return bridge(batch, interventions=[edit])[:, -1].log_softmax(-1)[:, ASSIGN].mean().item()


curves = {
    "feature": [assigned(unit, strength) for strength in strengths],
    "random, as long": [assigned(other * unit.norm() / other.norm(), strength) for strength in strengths],
}
lines(curves, x=strengths, x_title="strength, in mean activations", value_title="log-probability of ' =' in nats")

# %% [check]
_feature, _random = (torch.tensor(curve) for curve in curves.values())
assert _feature[3] > _feature[2] + 1
assert ((_random - _random[2])[3:5] < 0.5 * (_feature - _feature[2])[3:5]).all()

# %% [markdown]
# ## What it does not show
#
# - That the model has this feature. Another seed or width gives other features, and splits or merges this one.
# - That the feature means what its largest activations suggest. Small ones may be something else, and there are more
#   of them.
# - That the autoencoder is good. It was trained for seconds on five modules. It misses a quarter of the variance, and
#   some of what the model does is in there.
# - A feature that was found by correlation with a token was bound to have something to do with it. Ablation and
#   steering say that the model uses the direction; the random direction and the other features are the controls.
#
# References: Bricken et al. (2023), "Towards Monosemanticity"; Gao et al. (2024), "Scaling and evaluating sparse
# autoencoders", arXiv:2406.04093, for TopK; Marks et al. (2024), "Sparse Feature Circuits", arXiv:2403.19647, for the
# error term.
