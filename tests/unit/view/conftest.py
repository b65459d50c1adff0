import pytest
import torch

from clearspan.analysis import (
    CausalEffect,
    HeadScores,
    LogitLens,
    ModelFacts,
    Predictions,
    Report,
)

WORDS = {0: "<s>", 1: "</script>", 2: "<b>bold</b>", 3: "\n    ", 4: "[red]x", 5: "a&b", 6: "\t{{ y }}", 7: "%{x}"}
LAYERS, HEADS = 3, 4


def random_report(token_ids, layers=LAYERS, heads=HEADS, seed=0):
    """A report whose every value is random, over tokens that are hard to write."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    n, depths = len(token_ids), layers + 1
    ids = torch.arange(depths * n).reshape(depths, n) % len(WORDS)
    ranks = torch.ones(depths, n, dtype=torch.long)
    ranks[-1] = 0
    return Report(
        model=ModelFacts("tiny/<model>", "TestLM", 1234567, layers, heads, 16, 64, len(WORDS)),
        text="".join(WORDS[i] for i in token_ids[1:]),
        token_ids=tuple(token_ids),
        words=WORDS,
        predictions=Predictions(ids[0, :, None].repeat(1, 5), rand(n, 5).sort(descending=True).values, rand(n - 1)),
        lens=LogitLens(ids, rand(depths, n), ids[-1], rand(depths, n), ranks),
        heads=HeadScores(rand(layers, heads), rand(layers, heads)),
        effect=CausalEffect(int(ids[-1, -1]), -0.25, rand(layers, n) - 0.5),
        patterns=rand(layers, heads, n, n).tril().softmax(-1),
    )


@pytest.fixture(scope="session")
def make_report():
    return random_report


@pytest.fixture(scope="session")
def report():
    return random_report([0, 1, 2, 3, 2, 4, 5, 6, 7])
