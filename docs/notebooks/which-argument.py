# %% [markdown]
# # Which argument? A task with two candidates, by patching
#
# In `def set(self, start, stop): self.stop =` the embedded model, which has learned Python, expects `stop` and not
# `start`. Both words stand in the text, so that it has to know *which*. Large models have a task of this kind in
# English, the indirect object ("When Mary and John went to the shop, John gave a drink to"). This notebook takes the
# small task apart with the same tools: direct attribution, activation patching, path patching and ablation.
#
# ## Prompts in pairs
#
# The corrupted prompt differs from the clean one in a single token, the attribute that is assigned, so that the other
# argument is right there.

# %%
import random
import re

import torch

import clearspan
from clearspan import Intervention
from clearspan.analysis import direct_logit_attribution, path_patching
from clearspan.interventions import Mean
from clearspan.patching import activation_patching
from clearspan.plots import heatmap, picture
from clearspan.sweep import LogitDifference

bridge = clearspan.boot("tiny-bigcode")
NAMES = [
    *("name", "path", "value", "size", "key", "data", "text", "file", "line", "code", "mode", "width", "start"),
    *("stop", "left", "right", "index", "count", "item", "first", "second", "func", "args"),
]


def prompts(rows, seed):
    """Returns clean and corrupted prompts, the right argument of each clean one, and the other."""
    dice, found = random.Random(seed), []
    for _ in range(rows):
        first, second = dice.sample(NAMES, 2)
        right, wrong = dice.sample([first, second], 2)
        start = f"def {dice.choice(['set', 'add', 'get'])}(self, {first}, {second}):\n    self."
        found.append((f"{start}{right} =", f"{start}{wrong} =", f" {right}", f" {wrong}"))
    return [list(column) for column in zip(*found, strict=True)]


clean, corrupted, right, wrong = prompts(64, seed=0)
words = bridge.to_str_tokens(clean[0])
print(clean[0])
" | ".join(word.replace("\n", "⏎") for word in words)

# %% [markdown]
# The metric is how much higher the logit of the right argument is than that of the other, after the last token.

# %%
metric = LogitDifference(
    tuple(bridge.to_single_token(word) for word in right), tuple(bridge.to_single_token(word) for word in wrong)
)
batch = bridge.to_batch(clean)
difference = metric(bridge(batch), batch)
print(f"mean {difference.mean():.1f} logits, right in {(difference > 0).float().mean():.0%} of the prompts")

# %% [check]
assert (batch.rows, batch.longest) == (64, 15)
assert 3.5 < difference.mean() < 6.5
assert (difference > 0).float().mean() > 0.8

# %% [markdown]
# ## Who writes the answer?
#
# A logit is a sum of what each part of the model adds to the residual stream, read by the last norm and the
# unembedding. In the difference of two logits, heads show who favours the right argument.

# %%
direct = direct_logit_attribution(bridge, clean, right, wrong, unit="head")
direct.plot().update_layout(title_text="written to the logit difference, in logits")

# %%
top = direct.top(4)
dict(zip(top.parts, (round(value, 1) for value in top.mean().tolist()), strict=True))

# %% [markdown]
# Two heads of the last layer, L4H6 and L4H0, write most. Where do these four look from the last token?

# %%
_, cache = bridge.run_with_cache(clean)
LAST, ATTRIBUTE = batch.longest - 1, batch.longest - 2
rows = torch.arange(batch.rows)
answers = torch.tensor(metric.correct)
argument = (
    (batch.ids[:, :ATTRIBUTE] == answers[:, None]).int().argmax(-1)
)  # where the right one stands in the signature


def attention(layer, head):
    """Returns a head's mean attention from the last token to the attribute, and to the right argument."""
    pattern = cache["pattern", layer][:, head, LAST]
    return pattern[:, ATTRIBUTE].mean().item(), pattern[rows, argument].mean().item()


movers = {"L4H6": (4, 6), "L4H0": (4, 0), "L3H3": (3, 3), "L2H4": (2, 4)}
looks = torch.tensor([attention(*head) for head in movers.values()])
heatmap(
    looks, x=["the attribute", "the right argument"], y=list(movers), x_title="from the last token to", y_title="head",
    name="attention", title="attention", span=(0.0, 1.0),
)  # fmt: skip

# %% [markdown]
# All four look at the attribute, one token back. L4H6 looks at the signature too, at both arguments alike. That is a
# first hint of how the model does it.

# %% [check]
assert set(top.parts[:2]) == {"L4H6", "L4H0"}
assert set(top.parts) == set(movers)
assert (looks[:, 0] > 0.35).all()
assert (looks[:, 1] < 0.3).all()

# %% [markdown]
# ## Where is it, when?
#
# Activation patching asks by experiment. The stream of the clean run is put into the corrupted one, at one layer and
# position, and the picture has the share of the way from the corrupted metric (0) to the clean one (1).

# %%
streams = activation_patching(bridge, clean, corrupted, metric, "resid_pre", progress=False).normalised()
shown = [f"{position} {word.strip() or '⏎'}" for position, word in enumerate(words)]
shown[ATTRIBUTE], shown[6], shown[8], shown[2] = "13 attribute", "6 first", "8 second", "2 method"
picture(
    streams,
    {"layer": list(range(5)), "position": list(range(15))},
    {"position": shown},
    unit="share restored",
    title="share restored",
)

# %% [markdown]
# What differs enters at the attribute, and stands there alone until layer 2. It is carried to the last token in
# layers 2 to 4, most of it in layer 4. By heads (`z`), clean into corrupted:

# %%
heads = activation_patching(bridge, clean, corrupted, metric, "z", ("layer", "head"), progress=False).normalised()
picture(heads, {"layer": list(range(5)), "head": list(range(8))}, unit="share restored", title="share restored")

# %% [markdown]
# The same heads come out as in direct attribution: L4H6, L4H0, L3H3 and L2H4.

# %% [check]
assert streams[0, ATTRIBUTE] > 0.95
assert streams[4, LAST] < 0.55
assert streams[2, LAST] < streams[3, LAST] < streams[4, LAST]
assert set(heads.flatten().topk(4).indices.tolist()) == {layer * 8 + head for layer, head in movers.values()}

# %% [markdown]
# ## By which path?
#
# A head matters by what it reads, and somebody wrote that. Path patching carries what one sender writes to one
# reader, with all other paths frozen. In this model the heads of a layer share one key and one value, so that these
# are readers for all eight together.

# %%
senders = ["embed", "L0.mlp", "L1.mlp", "L2.mlp", "L3.mlp", "L2H1", "L2H4", "L3H0", "L3H1", "L3H3"]
readers = ["L4H6.q", "L4H0.q", "L4H0-7.k", "L4H0-7.v", "L4.mlp", "logits"]
paths = path_patching(bridge, clean, corrupted, metric, senders, readers, progress=False)
picture(
    paths.change().mean(-1),
    {"sender": senders, "reader": readers},
    unit="change in logits",
    title="change in logits",
    kind="heat map",
)

# %% [markdown]
# One path stands out: what the first MLP makes of the attribute's token goes into the **values** of layer 4. Queries
# carry hardly anything of the difference. So the heads of layer 4 do not find out *where* to look by which argument
# it is; they look one token back in both runs, and what they find there differs.

# %% [check]
_change = paths.change().mean(-1)
assert _change[senders.index("L0.mlp"), readers.index("L4H0-7.v")] > 4
assert _change[:, :2].abs().max() < 0.8
assert _change.flatten().topk(2).values[1] < 2

# %% [markdown]
# ## What is needed?
#
# Ablation takes heads away. Each is replaced by its mean at each position over clean and corrupted prompts, in which
# both arguments are right equally often.


# %%
def without(*heads):
    """Returns the mean logit difference without some heads."""
    edits = [Intervention("z", Mean("both", by_position=True), layer=layer, heads=head) for layer, head in heads]
    logits = bridge(batch, interventions=edits, sources={"both": clean + corrupted})
    return metric(logits, batch).mean().item()


named = list(movers.items())
left = {"none": without()} | {f"{name} alone": without(head) for name, head in named}
left |= {" ".join(name for name, _ in named[:n]): without(*(head for _, head in named[:n])) for n in (2, 3, 4)}
left["L4H1 L4H3 L3H1"] = without((4, 1), (4, 3), (3, 1))
picture(torch.tensor(list(left.values())), {"without": list(left)}, unit="logit difference")

# %% [markdown]
# Each of the four costs a little, and together they cost most of the difference. Three others, which are the model's
# induction and previous-token heads, are not needed.

# %% [check]
_without_four = left["L4H6 L4H0 L3H3 L2H4"]
assert _without_four < 0.45 * left["none"]
assert all(left[f"{name} alone"] > 0.6 * left["none"] for name in movers)
assert left["L4H1 L4H3 L3H1"] > 0.7 * left["none"]

# %% [markdown]
# ## Does it use the signature at all?
#
# Everything so far says: the model repeats the attribute. Then the signature should not matter. So put other names
# into it:


# %%
def probability(texts):
    """Returns the mean probability of the right argument, and the mean logit difference."""
    tokens = bridge.to_batch(texts)
    logits = bridge(tokens)
    chosen = logits[:, -1].softmax(-1).gather(1, answers[:, None])
    return round(chosen.mean().item(), 2), round(metric(logits, tokens).mean().item(), 1)


elsewhere = [re.sub(r"self, \w+, \w+", "self, x, y", text) for text in clean]
probability(clean), probability(elsewhere)

# %% [markdown]
# With `x, y` in the signature the logit difference is *larger*: no other candidate stands in the text now. But the
# probability of the answer falls from 0.62 to 0.36. So the signature is used, to make its names likelier as such, and
# both alike. A difference of two logits cannot see what raises both. That is the price of a metric that isolates one
# question: *which argument*, and not *an argument at all*.

# %% [check]
_own, _other = probability(clean), probability(elsewhere)
assert _other[1] > _own[1] + 1
assert _other[0] < 0.8 * _own[0]

# %% [markdown]
# ## What it does not show
#
# - This is no small copy of the circuit of large models for the indirect object. There heads have to find the name
#   that was *not* repeated; here repeating is right. The tools are the same, the finding is this model's.
# - The four heads are those of this pair of runs. Prompts in which the attribute and the argument differ in name
#   would ask for others.
# - Ablation by the mean leaves what the heads do in all prompts alike.
#
# References: Wang et al. (2022), "Interpretability in the Wild", arXiv:2211.00593; Heimersheim and Nanda (2024), "How
# to use and interpret activation patching", arXiv:2404.15255. In this documentation: [Attribute a prediction to
# heads](../attribute-a-prediction.md), [Patch at speed](../sweeps.md).
