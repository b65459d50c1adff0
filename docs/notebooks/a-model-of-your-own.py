# %% [markdown]
# # A model of your own
#
# Any causal language model of `transformers` works, also one that you have just made. This notebook builds a Llama of
# two layers, teaches it to continue repeated sequences, which takes some seconds, and looks for the heads that do it.

# %%
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import clearspan
from clearspan import Intervention
from clearspan.interventions import Zero
from clearspan.plots import heatmap, lines
from clearspan.sweep import Sweep

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=64, pad_token_id=0, **sizes))
draw = torch.Generator().manual_seed(0)


def repeated(rows, period):
    """Returns random sequences, each twice in a row, behind a first token that is always the same."""
    once = torch.randint(2, 40, (rows, period), generator=draw)
    return torch.cat([torch.ones(rows, 1, dtype=torch.long), once, once], 1)


# %% [markdown]
# ## Trained as any other
#
# clearspan takes no part in it: the model is Hugging Face's own.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
losses = []
for _ in range(500):
    period = int(torch.randint(6, 14, (1,), generator=draw))
    tokens = repeated(64, period)
    logits = model(tokens[:, :-1]).logits[:, period:]  # the second copy alone can be known
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, period + 1 :].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
lines({"loss": losses[::10]}, x=list(range(0, 500, 10)), x_title="step", value_title="loss in nats")

# %% [check]
assert losses[0] > 3
assert sum(losses[-20:]) / 20 < 0.8

# %% [markdown]
# ## Booted, and checked
#
# `boot` finds the adapter of its class, or derives one from the structure of the model. No module is replaced, no
# parameter copied. `verify` compares on these very weights: points with the unbridged model, writes with what they
# change, gradients with slopes.

# %%
bridge = clearspan.boot(model.eval())
checked = bridge.verify()
print(f"{len(checked.checks)} checks, {len(checked.failures)} failed")

# %% [check]
assert checked.passed

# %% [markdown]
# ## The heads that are needed
#
# With ids and no tokenizer, everything that takes text takes tensors of ids. Each head is switched off in turn, in one
# sweep, and the loss on the second copy is measured.

# %%
PERIOD = 12
probe = repeated(16, PERIOD)


def loss_on_the_copy(logits):
    """Returns each row's loss where the next token is known."""
    chances = logits[:, PERIOD:-1].log_softmax(-1)
    return -chances.gather(-1, probe[:, PERIOD + 1 :, None])[..., 0].mean(-1)


layers, heads = range(bridge.cfg.n_layers), range(bridge.cfg.n_heads)
cells = {f"L{layer}H{head}": Intervention("z", Zero(), layer=layer, heads=head) for layer in layers for head in heads}
without = Sweep(bridge, probe, cells, {"loss": loss_on_the_copy}).run(progress=False)
print(without.top(4))

# %% [check]
known = loss_on_the_copy(model(probe).logits).mean()
assert without.top(1).mean() > known + 0.5

# %% [markdown]
# Where does the head of the second layer look whose absence costs most?

# %%
costs = without.mean().reshape(len(layers), len(heads))
head = int(costs[1].argmax())
_, cache = bridge.run_with_cache(probe, "blocks.1.attn.hook_pattern")
heatmap(
    cache["pattern", 1][:, head].mean(0), x=list(range(25)), y=list(range(25)), x_title="to", y_title="from",
    name="attention", title=f"L1H{head}, mean over 16 sequences", span=(0.0, 1.0),
)  # fmt: skip

# %% [markdown]
# A diagonal that begins with the second copy: there it looks a fixed distance back. How the heads of the first layer
# prepare such a match is taken apart in [induction heads](induction-heads.ipynb), on another model.
#
# A class that `boot` refuses, or of which a part is missing, can have [an adapter of your own](../adapters.md);
# [derived adapters](../derived-adapters.md) says what is found without one.
