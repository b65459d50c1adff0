# %% [markdown]
# # Function vectors
#
# Show a model a few examples of a task, and it does the task on a new input. Where in the run is *which task it is*?
# In some models it is a vector: the mean of what some heads write at the last token of such prompts. Put into a run
# without any example, it makes the model do the task. This notebook trains a tiny model that learns tasks from
# examples, in a few seconds, takes the vector out of it, and measures what it does.
#
# ## A translator
#
# There are 16 words, and 6 languages with a word of their own for each. A prompt has words and their translations
# into one language, and then a word to translate: `x₁ y₁ x₂ y₂ x₃ y₃ x`. Which language it is has to be taken from
# the examples.

# %%
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import clearspan
from clearspan import Intervention
from clearspan.interventions import Add
from clearspan.plots import heatmap, lines

WORDS, LANGUAGES, PAIRS = 16, 6, 4
seeded = torch.Generator().manual_seed(0)
TRANSLATED = WORDS + torch.randperm(LANGUAGES * WORDS, generator=seeded).view(LANGUAGES, WORDS)


def texts(rows, draw, language=None, mixed=False):
    """Returns rows of words, each with its translation: of one language by row, or of any language by word."""
    words = torch.rand(rows, WORDS, generator=draw).argsort(1)[:, :PAIRS]
    languages = torch.randint(LANGUAGES, (rows, PAIRS if mixed else 1), generator=draw)
    languages = languages if language is None else torch.full_like(languages, language)
    return torch.stack([words, TRANSLATED[languages, words]], 2).flatten(1)


def train(steps=600, rows=64, rate=4e-3):
    """Returns a model trained to translate by example."""
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS * (LANGUAGES + 1), "n_positions": 2 * PAIRS, "n_embd": 64, "n_layer": 2, "n_head": 4}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **none))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = texts(rows, draw)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[:, ::2]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1::2].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


bridge = clearspan.boot(train())
draw = torch.Generator().manual_seed(2)
tokens = texts(500, draw)
right = bridge(tokens[:, :-1])[:, ::2].argmax(-1) == tokens[:, 1::2]
lines(
    {"accuracy": right.float().mean(0).tolist()},
    x=list(range(PAIRS)),
    x_title="examples before the word",
    value_title="share of words translated into the right language",
)

# %% [markdown]
# Without an example it is right one time in six, by chance. One example is enough.

# %% [check]
_by_examples = right.float().mean(0)
assert 0.05 < _by_examples[0] < 0.3
assert _by_examples[1:].min() > 0.9

# %% [markdown]
# ## The mean of what heads write
#
# For each language, the mean over many prompts of each head's output at the last token. Words and examples differ
# from prompt to prompt, so that what is left in the mean is the language.

# %%
LAYERS, HEADS = bridge.cfg.n_layers, bridge.cfg.n_heads
outputs = []
for language in range(LANGUAGES):
    _, cache = bridge.run_with_cache(texts(300, draw, language)[:, :-1])
    outputs.append(torch.stack([cache["result", layer][:, -1].mean(0) for layer in range(LAYERS)]))
outputs = torch.stack(outputs)  # language, layer, head, d_model
outputs -= outputs.mean(0)  # what all languages share is no sign of one
outputs.shape

# %% [markdown]
# ## Which heads?
#
# A prompt whose examples are of mixed languages says nothing of the language. Into such a prompt each head's mean for
# one language is added, and the measure is the probability of the word in that language.

# %%
unclear = texts(200, draw, mixed=True)[:, :-1]


def into(tokens, vector, layer=0):
    """Returns the logits after the last token, with a vector added to what attention adds there."""
    edit = Intervention("attn_out", Add(vector), layer=layer, positions=-1)
    return bridge(tokens, interventions=[edit])[:, -1]


def probability(logits, tokens, language):
    """Returns the mean probability of the last word in a language."""
    return logits.softmax(-1).gather(1, TRANSLATED[language, tokens[:, -1]][:, None]).mean().item()


by_head = torch.zeros(LAYERS, HEADS)
for language in range(LANGUAGES):
    for layer in range(LAYERS):
        for head in range(HEADS):
            logits = into(unclear, outputs[language, layer, head], layer)
            by_head[layer, head] += probability(logits, unclear, language) / LANGUAGES
heatmap(
    by_head,
    x=[str(head) for head in range(HEADS)],
    y=[str(layer) for layer in range(LAYERS)],
    x_title="head",
    y_title="layer",
    name="probability",
    title="probability",
    span=(0.0, by_head.max().item()),
)

# %% [markdown]
# Heads of block 0 carry it, several of them, and those of block 1 do not. So the **function vector** of a language is
# the sum over the heads of block 0.

# %%
vectors = outputs[:, 0].sum(1)  # language, d_model

# %% [check]
assert by_head[0].max() > 1.5 / LANGUAGES
assert by_head[1].max() < 1.5 / LANGUAGES

# %% [markdown]
# ## Injected where there is no example
#
# The prompt is now a single word. The vector is added at several strengths, and so are vectors of the same length in
# random directions, which show what any push does.

# %%
alone = torch.arange(WORDS)[:, None]
noise = torch.randn(vectors.shape, generator=draw)
noise *= vectors.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


def accuracy(tokens, strength, added):
    """Returns the share of words that are translated into the language of the vector that is added."""
    shares = [
        into(tokens, strength * added[language]).argmax(-1) == TRANSLATED[language, tokens[:, -1]]
        for language in range(LANGUAGES)
    ]
    return torch.stack(shares).float().mean().item()


strengths = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
curves = {
    "function vector": [accuracy(alone, strength, vectors) for strength in strengths],
    "random, as long": [accuracy(alone, strength, noise) for strength in strengths],
}
lines(curves, x=strengths, x_title="strength", value_title="share in the vector's language")

# %% [check]
assert max(curves["function vector"]) > 0.85
assert max(curves["random, as long"]) < 0.4

# %% [markdown]
# ## One function for another
#
# In a prompt of another language the vector of that language is taken away and the new one added. The examples say
# one thing, the vector another, and the model follows the vector.

# %%
follows = torch.zeros(LANGUAGES, LANGUAGES)
for shown in range(LANGUAGES):
    tokens = texts(100, draw, shown)[:, :-1]
    for new in range(LANGUAGES):
        said = into(tokens, vectors[new] - vectors[shown]).argmax(-1)
        follows[shown, new] = (said == TRANSLATED[new, tokens[:, -1]]).float().mean()
print(f"follows the vector: {follows.mean():.0%}")

# %% [check]
assert follows.mean() > 0.9

# %% [markdown]
# ## Is it more than the answer's tokens?
#
# A vector might do this by raising all words of its language in the logits, with nothing that deserves to be called a
# function. Then the direct effect of the vector, through the last norm and the unembedding alone, would suffice. So
# add it after the last block, where nothing but these is left:

# %%
late = []
for language in range(LANGUAGES):
    edit = Intervention("resid_post", Add(vectors[language]), layer=LAYERS - 1, positions=-1)
    logits = bridge(unclear, interventions=[edit])[:, -1]
    late.append(probability(logits, unclear, language))
early = [probability(into(unclear, vectors[language]), unclear, language) for language in range(LANGUAGES)]
round(sum(early) / LANGUAGES, 1), round(sum(late) / LANGUAGES, 1)

# %% [markdown]
# The same vector does much less there. Its effect goes through block 1, which makes the word in that language from
# the language and the word.

# %% [check]
assert sum(early) / LANGUAGES > 0.5
assert sum(late) < 0.6 * sum(early)

# %% [markdown]
# ## What it does not show
#
# - That all of the task is in the vector. The words are in the model's weights; the vector says which of the tasks
#   that it knows is to be done.
# - That every task has such a vector. It works here because the language is the same for every word. A model that
#   looks for an example that fits this one word has no mean to take: the mean over prompts says nothing there.
# - That heads which write it are the only ones that could. Other heads may stand in for them.
#
# References: Todd et al. (2023), "Function Vectors in Large Language Models", arXiv:2310.15213; Hendel et al. (2023),
# "In-Context Learning Creates Task Vectors", arXiv:2310.15916. For vectors made of two kinds of text, see [Steer with
# a difference of means](../steering.md).
