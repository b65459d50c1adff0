# %% [markdown]
# # First look: what a model does with a text
#
# This notebook runs on a small model that comes with the package and has learned some Python. With a model of your own,
# `clearspan.boot` takes a hub id, a folder, or a model that is loaded already, and everything below stays as it is.

# %%
import clearspan
from clearspan import Intervention
from clearspan.analysis import head_scores, logit_lens, predictions
from clearspan.interventions import Zero
from clearspan.patching import activation_patching
from clearspan.plots import heatmap
from clearspan.sweep import LogitDifference

bridge = clearspan.boot("tiny-bigcode")
text = "def rename(self, name):\n    self._value ="
predictions(bridge, text, k=3).to_dataframe().tail(4)

# %% [markdown]
# The last row is the next token: the model expects ` name`, the argument. The rest of this notebook asks where that
# comes from.
#
# ## Every value has a name
#
# A run keeps what you ask for. Each entry has canonical axes, the same on every architecture.

# %%
logits, cache = bridge.run_with_cache(text)
cache["pattern", 2].shape, cache["k", 2].shape, cache["resid_post", 4].shape

# %% [check]
import torch  # noqa: E402 - the notebook itself needs none

assert cache["pattern", 2].shape == (1, 8, 14, 14)
assert torch.equal(logits, bridge.hf_model(bridge.to_tokens(text), use_cache=False).logits)

# %% [markdown]
# `bridge.points()` lists all names with their axes. An attention pattern is a matrix, from each token to those before:

# %%
tokens = [f"{place} {token}".replace("\n", "⏎") for place, token in enumerate(bridge.to_str_tokens(text))]
heatmap(cache["pattern", 4][0, 6], x=tokens, y=tokens, x_title="to", y_title="from", name="attention", span=(0.0, 1.0))

# %% [markdown]
# ## When does it know?
#
# The logit lens reads the residual stream after each layer as if it were the last.

# %%
lens = logit_lens(bridge, text)
lens.plot()

# %% [check]
last = lens.top_ids[:, -1] if lens.top_ids.ndim == 2 else lens.top_ids[0, :, -1]
assert bridge.to_string(last[-1:]) == " name"
assert bridge.to_string(last[-2:-1]) != " name"

# %% [markdown]
# At the last position ` name` comes with the last layer alone.
#
# ## Where does it stand?
#
# Activation patching asks by experiment. In the corrupted text the argument has another name; at each layer and
# position the residual stream of the clean text is put into it. Red is where that brings ` name` back.

# %%
corrupted = "def rename(self, path):\n    self._value ="
metric = LogitDifference.between(bridge, " name", " path")
patched = activation_patching(bridge, text, corrupted, metric, progress=False)
patched.plot()

# %% [check]
share = patched.normalised()
assert share[0, 7] > 0.99
assert share[4, 7] > 0.7
assert share[4, 13] < 0.3

# %% [markdown]
# The argument stands at its own position up to the last layer, whose attention moves it to the end.
#
# ## What if a part were missing?
#
# A function is given the value and may change it; an intervention says the same as data. Here the heads of the last
# layer are switched off, one at a time, in one sweep.

# %%
cells = {f"L4H{head}": Intervention("z", Zero(), layer=4, heads=head) for head in range(bridge.cfg.n_heads)}
without = clearspan.Sweep(bridge, text, cells, metric).run(progress=False)
print(without.top(3))

# %% [check]
assert without.top(1).mean() < 4


# %%
def switch_off_head_6(z, hook):
    """Sets what a head computes to zero, at every position."""
    z[:, :, 6] = 0


changed = bridge.run_with_hooks(text, fwd_hooks=[("blocks.4.attn.hook_z", switch_off_head_6)])
(logits - changed)[0, -1, bridge.to_single_token(" name")].item()

# %% [markdown]
# ## What is each head for?
#
# Two kinds can be told by their patterns on repeated random tokens: heads that look at the token before, and induction
# heads, which look at what came after the present token the last time.

# %%
scores = head_scores(bridge)
scores.plot()

# %% [check]
assert scores.induction.max() > 0.9

# %% [markdown]
# Go on with [which argument?](which-argument.ipynb), which takes this prompt apart over many pairs, or with [a model of
# your own](a-model-of-your-own.ipynb). All pages are in the [documentation](../README.md).
