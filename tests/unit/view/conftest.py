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
from clearspan.analysis.words import Words

WORDS = {0: "<s>", 1: "</script>", 2: "<b>bold</b>", 3: "\n    ", 4: "[red]x", 5: "a&b", 6: "\t{{ y }}", 7: "%{x}"}
LAYERS, HEADS = 3, 4


def random_report(token_ids, layers=LAYERS, heads=HEADS, seed=0):
    """A report whose every value is random, over tokens that are hard to write."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    n, depths, words = len(token_ids), layers + 1, Words(WORDS)
    axes = {"layer": tuple(range(layers)), "head": tuple(range(heads))}
    places = {"layer": tuple(range(layers)), "position": tuple(range(n))}
    base = torch.tensor([-0.25])
    ids = torch.arange(depths * n).reshape(depths, n) % len(WORDS)
    ranks = torch.ones(depths, n, dtype=torch.long)
    ranks[-1] = 0
    return Report(
        model=ModelFacts("tiny/<model>", "TestLM", 1234567, layers, heads, 16, 64, len(WORDS)),
        text="".join(WORDS[i] for i in token_ids[1:]),
        token_ids=tuple(token_ids),
        words=words,
        predictions=Predictions(
            tuple((0, position) for position in range(n)),
            torch.tensor(token_ids),
            torch.cat([torch.tensor([torch.nan]), rand(n - 1)]),
            ids[-1, :, None].repeat(1, 5),
            rand(n, 5).sort(descending=True).values,
            words,
        ),
        lens=LogitLens(ids, rand(depths, n), ids[-1], rand(depths, n), ranks),
        heads=HeadScores({name: rand(layers, heads, 1) for name in ("induction", "previous_token")}, axes),
        effect=CausalEffect(
            {"log probability": base + 0.5 - rand(layers, n, 1)},
            places,
            {"log probability": base},
            targets=(int(ids[-1, -1]),),
        ),
        patterns=rand(layers, heads, n, n).tril().softmax(-1),
    )


@pytest.fixture(scope="session")
def make_report():
    return random_report


@pytest.fixture(scope="session")
def report():
    return random_report([0, 1, 2, 3, 2, 4, 5, 6, 7])
