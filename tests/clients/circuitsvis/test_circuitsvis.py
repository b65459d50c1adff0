"""CircuitsVis draws what clearspan caches and finds: each figure's page holds the values that it was given."""

import json
from typing import Any

import circuitsvis as cv
import numpy as np
import torch
from circuitsvis.activations import text_neuron_activations
from circuitsvis.topk_samples import topk_samples
from circuitsvis.topk_tokens import topk_tokens

import clearspan
from clearspan.analysis import head_scores, logit_lens, max_activating_examples

CODE = "def area(self):\n    return self.width * self.height\n"
BRIDGE = clearspan.boot("tiny-bigcode")
TOKENS = BRIDGE.to_tokens(CODE)
WORDS = BRIDGE.to_str_tokens(CODE)
LOGITS, CACHE = BRIDGE.run_with_cache(TOKENS)  # with a graph: users rarely turn gradients off
N_LAYERS = BRIDGE.cfg.n_layers


def values_in(figure: object) -> dict[str, Any]:
    """Returns what a figure's page passes to its component: the last argument of `render`."""
    page = str(figure)
    start = page.index("{", page.index('",', page.rindex("render(")))
    found, _ = json.JSONDecoder().raw_decode(page, start)
    return found


def same(shown: object, expected: object) -> None:
    """Raises unless numbers that a page holds are the tensor's."""
    torch.testing.assert_close(torch.tensor(shown), torch.as_tensor(expected).detach(), rtol=1e-6, atol=1e-6)


def test_attention_patterns():
    """Heads of a layer, on the older figure."""
    pattern = CACHE["pattern", 2][0]
    shown = values_in(cv.attention.attention_patterns(tokens=WORDS, attention=pattern))
    assert shown["tokens"] == WORDS
    same(shown["attention"], pattern)


def test_attention_heads():
    """Heads of all layers, with their names."""
    patterns = torch.cat([CACHE["pattern", layer][0] for layer in range(N_LAYERS)])
    names = [f"L{layer}H{head}" for layer in range(N_LAYERS) for head in range(BRIDGE.cfg.n_heads)]
    shown = values_in(cv.attention.attention_heads(tokens=WORDS, attention=patterns, attention_head_names=names))
    assert shown["attentionHeadNames"] == names
    same(shown["attention"], patterns)


def test_attention_heads_of_a_difference():
    """What an ablation changes in the patterns of a later layer, which is negative in places."""

    def ablate(z: torch.Tensor, hook: object) -> torch.Tensor:
        z[:, :, 0] = 0
        return z

    with BRIDGE.hooks(fwd_hooks=[("blocks.1.attn.hook_z", ablate)]):
        _, ablated = BRIDGE.run_with_cache(TOKENS)
    change = ablated["pattern", 3][0] - CACHE["pattern", 3][0]
    assert change.min() < 0 < change.max()
    shown = values_in(cv.attention.attention_heads(tokens=WORDS, attention=change, min_value=-1.0, max_value=1.0))
    same(shown["attention"], change)


def test_attention_pattern():
    """One head, without the axis of rows."""
    _, cache = BRIDGE.run_with_cache(TOKENS, remove_batch_dim=True)
    pattern = cache["pattern", -1][1]
    shown = values_in(cv.attention.attention_pattern(tokens=WORDS, attention=pattern))
    same(shown["attention"], pattern)


def test_token_log_probs():
    """What the model foresaw, with the bridge's own method for the names of tokens."""
    log_probs = LOGITS.log_softmax(-1)
    figure = cv.logits.token_log_probs(TOKENS, log_probs, BRIDGE.to_single_str_token, top_k=5)
    shown = values_in(figure)
    assert shown["prompt"] == WORDS
    same(shown["topKLogProbs"], log_probs[0, :-1].topk(5).values)
    same(shown["correctTokenLogProb"], log_probs[0, :-1].gather(-1, TOKENS[0, 1:, None])[:, 0])
    assert values_in(cv.logits.token_log_probs(TOKENS, log_probs, BRIDGE.to_string, top_k=5))["prompt"] == WORDS


def test_colored_tokens():
    """The loss on each token."""
    losses = BRIDGE(TOKENS, return_type="loss", loss_per_token=True)[0]
    shown = values_in(cv.tokens.colored_tokens(WORDS[1:], losses))
    assert shown["tokens"] == WORDS[1:]
    same(shown["values"], losses)


def test_colored_tokens_multi():
    """The residual stream's length at every depth, with the cache's labels."""
    streams, labels = CACHE.accumulated_resid(return_labels=True)
    norms = streams[:, 0].norm(dim=-1).T
    shown = values_in(cv.tokens.colored_tokens_multi(WORDS, norms, labels=labels))
    assert shown["labels"] == labels
    same(shown["values"], norms)


def test_model_performance():
    """Logits, log-probabilities and probabilities of each token."""
    shown = values_in(cv.tokens.visualize_model_performance(TOKENS, WORDS, LOGITS))
    assert shown["labels"] == ["logits", "log_probs", "probs"]
    losses = BRIDGE(TOKENS, return_type="loss", loss_per_token=True)[0]
    torch.testing.assert_close(torch.tensor(shown["values"])[:, 1], -losses.detach(), rtol=1e-4, atol=1e-4)


def test_neuron_activations():
    """Neurons of every layer on two texts of different lengths."""
    texts = [CODE, "import os, sys"]
    found = []
    for text in texts:
        _, cache = BRIDGE.run_with_cache(text)
        found.append(cache.stack_activation("post")[:, 0].movedim(0, 1))
    shown = values_in(text_neuron_activations([BRIDGE.to_str_tokens(text) for text in texts], found))
    for part, expected in zip(shown["activations"], found, strict=True):
        same(part, expected)


def test_most_active_tokens():
    """The tokens on which each neuron is largest: this figure takes numpy's arrays, and has a list for each neuron."""
    posts = CACHE.stack_activation("post")[:, 0].numpy()
    assert isinstance(posts, np.ndarray)
    shown = values_in(topk_tokens([WORDS], [posts], max_k=3))
    same(shown["topkVals"][0], torch.from_numpy(posts).topk(3, dim=1).values)


def test_most_active_examples():
    """Texts on which neurons are largest, as the pass over a corpus found them."""
    corpus = [CODE, "import os\nimport sys\n", "for i in range(10):\n    print(i)\n"]
    found = max_activating_examples(BRIDGE, corpus, "blocks.1.mlp.hook_post", index=[0, 5], k=3)
    examples = [[list(found.examples(feature)) for feature in found.features]]
    words = [[[list(one.words) for one in few] for few in layer] for layer in examples]
    values = [[[list(one.activations) for one in few] for few in layer] for layer in examples]
    labels = [str(feature) for feature in found.features]
    shown = values_in(topk_samples(words, values, zeroth_dimension_labels=["1"], first_dimension_labels=labels))
    assert shown["tokens"] == words
    assert shown["activations"] == values
    assert shown["firstDimensionLabels"] == labels


def test_scores_of_heads():
    """A result's table as a figure of tokens: induction scores of heads, one label for each layer."""
    scores = head_scores(BRIDGE).mean("induction")
    heads, layers = [f"H{head}" for head in range(scores.shape[1])], [f"L{layer}" for layer in range(len(scores))]
    shown = values_in(cv.tokens.colored_tokens_multi(heads, scores.T, labels=layers))
    assert shown["labels"] == layers
    same(shown["values"], scores.T)


def test_lens():
    """How likely the logit lens's best token is, at each position and depth."""
    found = logit_lens(BRIDGE, TOKENS)
    shown = values_in(cv.tokens.colored_tokens_multi(WORDS, found.top_probs.T, labels=list(found.depths)))
    assert shown["labels"][0] == "embed"
    same(shown["values"], found.top_probs.T)
