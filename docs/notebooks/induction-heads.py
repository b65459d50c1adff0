# %% [markdown]
# # Induction heads, found and explained
#
# A head that continues repetitions has to do two things: find the place where the present token stood before, and
# move what came after it to the prediction. This notebook finds such heads in the embedded model with nothing but
# hooks, and explains them by their weights: what they move (their OV circuit), and how they find it (their QK
# circuit, and the head in an earlier layer that makes it possible). [Find the induction
# heads](../find-the-induction-heads.md) does the first part with ready functions and goes further in ablations.
#
# ## A text in which only repetition helps

# %%
import torch

import clearspan
from clearspan import Intervention
from clearspan.analysis import head_scores
from clearspan.interventions import Mean
from clearspan.plots import heatmap, lines, picture

bridge = clearspan.boot("tiny-bigcode")
LAYERS, HEADS = bridge.cfg.n_layers, bridge.cfg.n_heads
PERIOD = 40
draw = torch.Generator().manual_seed(0)
block = torch.randint(1, bridge.cfg.d_vocab, (24, PERIOD), generator=draw)
tokens = torch.cat([torch.full((24, 1), bridge.tokenizer.bos_token_id), block, block], 1)
logits, cache = bridge.run_with_cache(tokens)
loss = -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
lines(
    {"loss": loss.mean(0).tolist()}, x=list(range(1, 2 * PERIOD + 1)), x_title="position", value_title="loss in nats"
).update_traces(mode="lines").update_yaxes(rangemode="tozero")

# %% [markdown]
# The first token of the second copy cannot be known. From the second one on the model knows nearly all.

# %% [check]
assert loss[:, :PERIOD].mean() > 15
assert loss[:, PERIOD + 1 :].mean() < 0.3

# %% [markdown]
# ## Scores, by hooks
#
# An induction head attends from a token of the second copy to the token after its first occurrence, `PERIOD - 1`
# back. So the score is the mean of a diagonal of its attention pattern. A hook function on `hook_pattern` of each
# layer takes it; so it does for the diagonal one back, which is that of previous-token heads.

# %%
scores = {"induction": torch.zeros(LAYERS, HEADS), "previous token": torch.zeros(LAYERS, HEADS)}


def score(pattern, hook):
    """Keeps each head's mean attention along two diagonals; `pattern` is `[batch, head, to, from]`."""
    for name, back in (("induction", PERIOD - 1), ("previous token", 1)):
        diagonal = pattern.diagonal(-back, dim1=-2, dim2=-1)
        if name == "induction":
            diagonal = diagonal[..., 2:]  # the first ones are positions of the first copy
        scores[name][hook.layer()] = diagonal.mean((0, -1))


bridge.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith("hook_pattern"), score)], return_type=None)
layers, heads = [str(layer) for layer in range(LAYERS)], [str(head) for head in range(HEADS)]
heatmap(
    scores["induction"],
    x=heads,
    y=layers,
    x_title="head",
    y_title="layer",
    name="induction",
    title="induction",
    span=(0.0, 1.0),
)

# %%
heatmap(
    scores["previous token"],
    x=heads,
    y=layers,
    x_title="head",
    y_title="layer",
    name="previous token",
    title="previous token",
    span=(0.0, 1.0),
)

# %% [markdown]
# Five heads of layer 4 are induction heads, and L3H1 is a previous-token head. `head_scores` measures the same on
# other random tokens.

# %%
ready = head_scores(bridge, period=PERIOD)
agreement = torch.stack([scores["induction"].flatten(), ready.induction.flatten()]).corrcoef()[0, 1]
found = [(int(i) // HEADS, int(i) % HEADS) for i in (scores["induction"].flatten() > 0.6).nonzero()]
print(", ".join(f"L{layer}H{head}" for layer, head in found), f"; correlation with head_scores {agreement:.2f}")

# %% [check]
assert agreement > 0.98
assert {layer for layer, _ in found} == {4}
assert {(4, 0), (4, 1), (4, 3)} <= set(found)
assert scores["previous token"].argmax() == 3 * HEADS + 1
assert scores["previous token"][3, 1] > 0.7

# %% [markdown]
# This is what one of them looks like on one text: nothing to find on the first copy, and a line on the second.

# %%
heatmap(
    cache["pattern", 4][0, 3],
    x=[str(i) for i in range(2 * PERIOD + 1)],
    y=[str(i) for i in range(2 * PERIOD + 1)],
    x_title="from position",
    y_title="to position",
    name="attention",
    title="attention",
    span=(0.0, 1.0),
).update_traces(xgap=0, ygap=0).update_layout(height=460, width=520)

# %% [markdown]
# ## What they move: the OV circuit
#
# What a head writes for a token that it looks at is `x W_V W_O`, and in logits `x W_V W_O W_U`. If it copies, the
# token's own logit is raised more than others. In this model `x` is not the embedding, which the first block changes
# beyond recognition, but what the stream holds at the head's layer for a token behind a BOS, normed. The norms'
# weights are folded into the matrices (`processed()`). `OV` is a `FactoredMatrix`, which keeps the product of two
# thin matrices as its factors.

# %%
folded = bridge.processed()
some = torch.arange(1, bridge.cfg.d_vocab, 8)
pairs = torch.stack([torch.full_like(some, bridge.tokenizer.bos_token_id), some], 1)
_, alone = folded.run_with_cache(pairs, names_filter=lambda name: name.endswith("ln1.hook_normalized"))
copied = torch.zeros(LAYERS, HEADS)
for layer in range(1, LAYERS):
    x = alone["normalized", layer, "ln1"][:, 1]
    for head in range(HEADS):
        raised = (x @ folded.OV[layer, head]) @ folded.W_U
        own = raised.AB.gather(1, some[:, None])
        copied[layer, head] = ((own < raised.AB).sum(1) < 10).float().mean()
heatmap(
    copied,
    x=heads,
    y=layers,
    x_title="head",
    y_title="layer",
    name="share of tokens copied",
    title="share of tokens copied",
    span=(0.0, 1.0),
)

# %% [markdown]
# Four of the five induction heads copy most of the vocabulary, the fifth a quarter of it, and hardly any other head
# does. Nothing of the text went into this, only weights and single tokens.

# %% [check]
_four = torch.tensor([copied[4, head] for head in (0, 3, 5, 6)])
_rest = torch.ones(LAYERS, HEADS, dtype=torch.bool)
_rest[4, [0, 1, 3, 5, 6]] = False
assert (_four > 0.6).all()
assert 0.1 < copied[4, 1] < 0.5
assert copied[_rest].max() < 0.35

# %% [markdown]
# ## How they find it: the QK circuit
#
# The place that an induction head looks for holds *another* token than the present one; it is the token before it
# that is the same. So an earlier head must have written "the token before me is t" into that place, and the induction
# head's keys must read it: **K-composition**. If L3H1 is that head, then a query made by token `t` should match the
# key that is made of what L3H1 writes for `t`, better than the keys of other tokens. Both ends are single tokens
# again: the query is the stream at layer 4 for `t`, the key what a head of layer 3 writes when it looks at `t`.

# %%
queries, values = (alone["normalized", layer, "ln1"][:, 1] for layer in (4, 3))
matched = torch.zeros(HEADS, HEADS)
for writer in range(HEADS):
    written = values @ folded.OV[3, writer].AB
    for reader in range(HEADS):
        match = queries @ folded.QK[4, reader].AB @ (written - written.mean(0)).T  # token asked for, token written
        matched[writer, reader] = ((match > match.diagonal()[:, None]).sum(1) < 10).float().mean()
heatmap(
    matched, x=[f"L4H{i}" for i in range(HEADS)], y=[f"L3H{i}" for i in range(HEADS)], x_title="reader (query)",
    y_title="writer (key)", name="share of tokens found", title="share of tokens found", span=(0.0, 1.0),
)  # fmt: skip

# %% [markdown]
# What L3H1 writes for a token is found by the five induction heads (L4H0, H1, H3, H5, H6) for practically every
# token, and by the three others for few. L3H0 and L3H2 write in much the same code. What decides is where they look:
# of the three L3H1 alone is at the previous token nearly always, L3H2 less than half of the time.
#
# ## Is it so in the run?
#
# Weights say what would match. Whether it does is a question for an experiment: each head's output is replaced by its
# mean over all texts and positions, and the induction scores are taken again.


# %%
def scores_without(*ablated):
    """Returns the induction scores of layer 4 with some heads of layer 3 replaced by their mean."""
    kept = []

    def keep(pattern, hook):
        kept.append(pattern.diagonal(-(PERIOD - 1), dim1=-2, dim2=-1)[..., 2:].mean((0, -1)))

    edits = [Intervention("z", Mean("texts"), layer=3, heads=list(ablated))] if ablated else []
    hooks = [("blocks.4.attn.hook_pattern", keep)]
    bridge.run_with_hooks(tokens, fwd_hooks=hooks, interventions=edits, sources={"texts": tokens}, return_type=None)
    return kept[0]


ablated = {"nothing": (), "L3H1": (1,), "L3H1 and L3H2": (1, 2), "L3H0, H3 to H7": (0, 3, 4, 5, 6, 7)}
left = torch.stack([scores_without(*heads) for heads in ablated.values()])[:, [0, 1, 3, 5, 6]]
picture(
    left, {"without": list(ablated), "reader": ["L4H0", "L4H1", "L4H3", "L4H5", "L4H6"]}, unit="induction score",
    kind="heat map", span=(0.0, 1.0),
)  # fmt: skip

# %% [markdown]
# Without the two heads that look one token back most, all lose, some half of their score and more. L4H0 keeps most of
# its own. Without the six others nothing happens. So the account holds for most of what these heads do, and leaves
# open how L4H0 does the rest.

# %% [check]
_five = [0, 1, 3, 5, 6]
assert (matched[1, _five] > 0.9).all()
assert matched[1, [2, 4]].max() < 0.6
assert (left[1] <= left[0] + 0.02).all()
assert left[0].mean() - left[1].mean() > 0.1
assert left[2].min() < 0.65
assert (left[0] - left[3]).max() < 0.25
assert (left[0] - left[2]).mean() > 2 * (left[0] - left[3]).mean()

# %% [markdown]
# ## What it does not show
#
# - The circuits were read from single tokens behind a BOS. In a text the streams hold more.
# - "Copies" and "found" are ranks. They do not say by how many logits, and norms' scales are left out.
# - The model was trained on repeated random tokens for a tenth of its rows, so that these heads are stronger than
#   text would make them.
#
# References: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits"; Olsson et al. (2022),
# "In-context Learning and Induction Heads", arXiv:2209.11895.
