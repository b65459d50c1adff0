"""Interchanges against plain hooks on rows alone."""

import pytest
import torch
from tests.conftest import tiny_model
from tests.unit.analysis.abstraction.interchange_pairs import answer_logits, random_basis, random_pairs, whole, within
from tests.zoo import build

import clearspan
from clearspan.analysis import InterchangeExamples, InterchangeSite, interchange_accuracy, interchange_sweep
from clearspan.errors import ClearspanError, InvalidArgumentError, NotFiniteError, UnknownPointError

VARIANTS = ["gpt_bigcode", "llama", "gemma2", "gpt_neox", "mixtral"]
NAMES = [
    "blocks.0.hook_resid_pre",
    "blocks.2.hook_resid_post",
    "blocks.1.attn.hook_z",
    "blocks.0.attn.hook_k",
    "blocks.2.hook_mlp_out",
    "hook_embed",
]
ANSWERS = (3, 11, 50, 70)
# Logits of size 10 to 100 from random weights, padded and alone, in float32.
CLOSE = {"rtol": 1e-4, "atol": 2e-3}


@pytest.fixture(scope="module", params=VARIANTS)
def random_bridge(request):
    return clearspan.boot(build(request.param))


def last_logits(bridge, examples, *args, **parts):
    """Returns the logits after each base's last token, in one run with the examples' own intervention."""
    swap = examples.intervention(*args, **parts)
    logits = bridge(examples.base, interventions=[swap], sources={"source": examples.source})
    return torch.stack([logits[row, examples.base.column_of(row, -1)] for row in range(len(examples))])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_interventions_are_whole_runs_of_rows_alone_with_a_hook(random_bridge, padded):
    """Positions that differ by row, two places, and padding on both sides."""
    bridge = random_bridge
    has_window = bridge.cfg.architecture == "Gemma2ForCausalLM"  # it counts the columns of a hole
    examples = random_pairs(padded=padded, hole=not has_window)
    for name in NAMES:
        basis = random_basis(InterchangeSite.of(bridge, name).width, 5)
        for own, exchange in ((None, whole), (basis, within(basis))):
            expected = answer_logits(bridge, examples, name, exchange)
            torch.testing.assert_close(last_logits(bridge, examples, name, own), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gpt_bigcode", "llama"])
def test_heads_neurons_and_subspaces_of_them(variant):
    bridge, examples = clearspan.boot(build(variant)), random_pairs()
    basis = random_basis(2 * 12, 3)

    def heads(base, source):
        return torch.stack([base[:, 0], source[:, 1], base[:, 2], source[:, 3]], dim=1)

    def neurons(base, source):
        found = base.clone()
        found[:, [4, 7]] = source[:, [4, 7]]
        return found

    def in_heads(base, source):
        chosen = (source - base)[:, [1, 3]].flatten(1)
        found = base.clone()
        found[:, [1, 3]] += (chosen @ basis @ basis.T).view(-1, 2, 12)
        return found

    for name, parts, own, plain in (
        ("blocks.1.attn.hook_z", {"heads": (1, 3)}, None, heads),
        ("blocks.1.mlp.hook_post", {"neurons": [4, 7]}, None, neurons),
        ("blocks.1.hook_resid_pre", {"neurons": [4, 7]}, None, neurons),
        ("blocks.1.attn.hook_z", {"heads": [1, -1]}, basis, in_heads),
    ):
        expected = answer_logits(bridge, examples, name, plain)
        torch.testing.assert_close(last_logits(bridge, examples, name, own, **parts), expected, **CLOSE)
        hits = interchange_accuracy(bridge, examples, name=name, subspace=own, **parts).hits
        assert torch.equal(hits[0], (expected.argmax(-1) == examples.labels).float())


@torch.no_grad()
def test_accuracy_by_layer_among_all_tokens_and_among_answers(random_bridge):
    for answers in (None, ANSWERS):
        examples = random_pairs(rows=6, padded=True, answers=answers)
        among = torch.arange(97) if answers is None else torch.tensor(answers)
        for name in ("mlp_out", "hook_embed"):
            found = interchange_accuracy(random_bridge, examples, name=name, batch_size=4)
            layers = found.axes.get("layer")
            assert found.axes == ({"layer": (0, 1, 2)} if name == "mlp_out" else {"point": ("hook_embed",)})
            for place, layer in enumerate(layers or [None]):
                full = name if layer is None else f"blocks.{layer}.hook_mlp_out"
                logits = answer_logits(random_bridge, examples, full, whole)
                assert torch.equal(found.hits[place], (among[logits.argmax(-1)] == examples.labels).float())
            logits = answer_logits(random_bridge, examples, "hook_embed", lambda base, source: base)
            assert torch.equal(found.unchanged, (among[logits.argmax(-1)] == examples.labels).float())


@torch.no_grad()
@pytest.mark.parametrize("point", ["resid_pre", "resid_post", "z"])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_a_sweep_is_an_interchange_at_each_layer_and_position(random_bridge, point, is_ragged):
    """Where bases differ in length, they lie in other columns than their sources, and lack some positions."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 6, 4, 5, 2, 6] if is_ragged else [6] * 6
    sides = [[torch.randint(1, 97, (n,), generator=generator).tolist() for n in lengths] for _ in range(2)]
    base = random_bridge.to_batch(sides[0], padding_side="left")
    source = random_bridge.to_batch(sides[1], padding_side="right")
    labels = torch.tensor(ANSWERS)[torch.randint(4, (6,), generator=generator)]
    pairs = InterchangeExamples(base, source, labels, 0, 0, ANSWERS)
    positions = [0, 5, -3]
    found = interchange_sweep(random_bridge, pairs, name=point, positions=positions, batch_size=4)
    assert found.axes == {"layer": (0, 1, 2), "position": (0, 5, -3)}
    for place, position in enumerate(positions):
        has = torch.tensor([-length <= position < length for length in lengths])
        assert torch.equal(found.hits[:, place].isnan(), ~has.expand(3, -1))
        at = [[position]] * int(has.sum())
        own = pairs.select(has)
        own = InterchangeExamples(own.base, own.source, own.labels, at, at, ANSWERS)
        for layer in range(3):
            name = f"blocks.{layer}." + ("attn.hook_z" if point == "z" else f"hook_{point}")
            answered = answer_logits(random_bridge, own, name, whole).argmax(-1)
            expected = (torch.tensor(ANSWERS)[answered] == own.labels).float()
            assert torch.equal(found.hits[layer, place][has], expected)
    assert 0 < found.accuracy.nanmean() < 1


@torch.no_grad()
def test_a_sweep_of_chosen_heads():
    bridge, pairs = clearspan.boot(build("llama")), random_pairs(rows=8, answers=ANSWERS)
    examples = InterchangeExamples.of(bridge, pairs.base.ids[:, :6], pairs.source, pairs.labels, position=5)
    swept = interchange_sweep(bridge, examples, name="z", layers=-1, positions=[5], heads=[0, 2])
    alone = interchange_accuracy(bridge, examples, name="z", layers=2, heads=[0, 2])
    assert torch.equal(swept.hits[:, 0], alone.hits)
    assert swept.title.startswith("accuracy with whole vectors of blocks.2.attn.hook_z (heads 0, 2) exchanged; ")
    assert swept.title.endswith(" without; mean over 8 pairs")


@torch.no_grad()
def test_a_layer_is_run_from_where_it_changes(bridge):
    interchange_accuracy(bridge, random_pairs(), layers=[1, 3])  # the first time it is tried how the model can be run
    ran = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(bridge.hf_model.transformer.h)
    ]
    interchange_accuracy(bridge, random_pairs(), layers=[1, 3])
    for handle in handles:
        handle.remove()
    # The bases, the sources, and a batch that the cells join at blocks 2 and 4.
    assert sorted(ran) == sorted([*range(5), *range(5), 2, 3, 4])


@torch.no_grad()
def test_in_half_precision_whole_values_are_copied_exactly():
    bridge, examples, name = clearspan.boot(build("llama").bfloat16()), random_pairs(places=1), "blocks.1.hook_mlp_out"
    swap = [examples.intervention(name)]
    _, seen = bridge.run_with_cache(examples.base, name, interventions=swap, sources={"source": examples.source})
    _, cache = bridge.run_with_cache(examples.source, name)
    for row in range(5):
        assert torch.equal(seen[name][row, examples.written[row]], cache[name][row, examples.read[row]])


@torch.no_grad()
def test_a_subspace_is_exchanged_and_the_rest_is_left(bridge):
    examples, basis, name = random_pairs(places=1), random_basis(256, 4), "blocks.2.hook_resid_mid"
    swap = [examples.intervention(name, basis)]
    _, seen = bridge.run_with_cache(examples.base, name, interventions=swap, sources={"source": examples.source})
    (_, base), (_, source) = (bridge.run_with_cache(one, name) for one in (examples.base, examples.source))
    rows, at = torch.arange(5), [one[0] for one in examples.written]
    new, old, taken = seen[name][rows, at], base[name][rows, at], source[name][rows, [one[0] for one in examples.read]]
    torch.testing.assert_close(new @ basis, taken @ basis, rtol=1e-4, atol=1e-4)
    rest = torch.eye(256) - basis @ basis.T
    torch.testing.assert_close(new @ rest, old @ rest, rtol=1e-4, atol=1e-4)
    elsewhere = torch.ones(5, 7, dtype=torch.bool).index_put((rows, torch.tensor(at)), torch.tensor(False))
    assert torch.equal(seen[name][elsewhere], base[name][elsewhere])


def test_a_result_says_how_sure_it_is(bridge):
    examples = random_pairs(rows=20, places=1, answers=ANSWERS)
    found = interchange_accuracy(bridge, examples, layers=[0, 4], subspace=torch.eye(256)[:, :200])
    assert found.what == "a subspace of 200 dimensions of hook_resid_post exchanged"
    interval = found.interval()
    assert (interval.low < found.accuracy).all()
    assert (found.accuracy < interval.high).all()
    frame = found.to_dataframe()
    assert list(frame) == ["layer", "accuracy", "change", "standard error", "low", "high"]
    assert frame.accuracy.tolist() == found.accuracy.tolist()
    assert list(found.plot().data[0].y) == pytest.approx(found.accuracy.tolist())
    pairs = InterchangeExamples.of(bridge, [[1, 2, 3], [4, 5]], [[5, 6, 7], [8, 9]], [3, 4])
    swept = interchange_sweep(bridge, pairs, layers=[0, 1])
    assert swept.plot().data[0].z is not None
    assert swept.select(position=2).of()[:, 1].isnan().all()
    assert swept.interval().low[:, 2].isfinite().all()
    assert list(swept.to_dataframe())[:3] == ["layer", "position", "accuracy"]


def test_progress(bridge):
    steps = []
    interchange_accuracy(bridge, random_pairs(), layers=0, batch_size=2, progress=lambda *step: steps.append(step))
    assert steps == [("interchanges", 2, 5), ("interchanges", 4, 5), ("interchanges", 5, 5)]


def test_logits_that_are_no_numbers_raise():
    """Gemma 2 itself gives NaN in float64 for rows with padding on the left."""
    with pytest.raises(NotFiniteError) as raised:
        interchange_accuracy(clearspan.boot(build("gemma2").double()), random_pairs(padded=True))
    assert str(raised.value).splitlines() == [
        "the logits of the answers are not finite",
        "  got: torch.float64",
        "  fix: clearspan.boot(model, dtype=torch.float32), if they overflow",
    ]


MISTAKES = [
    ({"examples": 3}, "these are no InterchangeExamples\n  got: examples=3"),
    ({"name": 3}, "a hook point is given by its name\n  got: 3"),
    ({"name": "pattern"}, "blocks.0.attn.hook_pattern is not a value at each position"),
    ({"layers": "a"}, "layers='a'\n  expected: a whole number, or several"),
    ({"layers": []}, "there is no layer to read\n  expected: layers=None for all"),
    ({"name": "z", "heads": 4}, "no 4 among the heads of blocks.0.attn.hook_z\n  expected: -4 to 3"),
    ({"name": "z", "heads": "a"}, "heads='a' chooses no places"),
    ({"heads": 0}, "blocks.0.hook_resid_post has no heads"),
    ({"neurons": []}, "neurons=[] chooses no places"),
    ({"batch_size": 0}, "batch_size=0\n  expected: a whole number, batch_size >= 1"),
    ({"progress": 1}, "progress=1 shows nothing"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES)
@pytest.mark.parametrize("function", [interchange_accuracy, interchange_sweep])
def test_what_does_not_fit_raises(function, given, message):
    bridge, pairs = clearspan.boot(tiny_model()), random_pairs()
    aligned = InterchangeExamples.of(bridge, pairs.base.ids[:, :6], pairs.source, pairs.labels)
    with pytest.raises(InvalidArgumentError) as raised:
        function(bridge, **{"examples": aligned, "name": "resid_post", **given})
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("subspace", "lines"),
    [
        (
            torch.eye(40),
            [
                "the subspace is of another space than the vectors",
                "  expected: [d=48, k]",
                "  got: [40, 40]",
                "  where: blocks.0.hook_resid_post",
            ],
        ),
        ("a", ["the subspace is of another space than the vectors", "  expected: [d=48, k]", "  got: str"]),
        (
            2 * torch.eye(48),
            [
                "the columns of the subspace's basis are not orthonormal",
                "  expected: basis.T @ basis = 1",
                "  got: another by 3",
                "  fix: torch.linalg.qr(basis).Q",
            ],
        ),
    ],
)
def test_a_basis_that_does_not_fit_raises(subspace, lines):
    with pytest.raises(InvalidArgumentError) as raised:
        interchange_accuracy(clearspan.boot(tiny_model()), random_pairs(), subspace=subspace)
    assert str(raised.value).splitlines()[: len(lines)] == lines


@pytest.mark.parametrize("function", [interchange_accuracy, interchange_sweep])
def test_a_model_that_is_not_as_it_should_be_raises(function):
    bridge, pairs = clearspan.boot(tiny_model()), random_pairs(rows=2)
    aligned = InterchangeExamples.of(bridge, pairs.base.ids[:, :6], pairs.source, pairs.labels)
    with pytest.raises(UnknownPointError):
        function(bridge, aligned, name="resid")
    with pytest.raises(InvalidArgumentError, match="the label 97 is no token of the model\n  expected: 0 to 96"):
        function(bridge, aligned.relabelled(torch.tensor([1, 97])))
    with bridge.hooks([("hook_embed", lambda value, hook: None)]), pytest.raises(ClearspanError, match="hooks are on"):
        function(bridge, aligned)
    bridge.hf_model.train()
    with pytest.raises(InvalidArgumentError, match="in evaluation mode"):
        function(bridge, aligned)


def test_a_sweep_of_examples_that_are_not_aligned_raises():
    bridge = clearspan.boot(tiny_model())
    with pytest.raises(InvalidArgumentError, match="the two inputs do not lie position on position"):
        interchange_sweep(bridge, random_pairs())
    pairs = InterchangeExamples.of(bridge, [[1, 2, 3], [4, 5]], [[5, 6, 7], [8, 9]], [3, 4])
    for position in (3, -4):
        with pytest.raises(InvalidArgumentError, match=f"no base has the position {position}\n  expected: -3 to 2"):
            interchange_sweep(bridge, pairs, positions=[0, position])
    for positions in ("a", 1.5, [None]):
        with pytest.raises(InvalidArgumentError, match="positions="):
            interchange_sweep(bridge, pairs, positions=positions)


# --- examples --------------------------------------------------------------------------------------------------------


def pair(bridge, **changes):
    fields = {"base": [[5, 6, 7], [5, 8]], "source": [[1, 2], [3, 4]], "labels": [7, 9], **changes}
    return InterchangeExamples.of(bridge, **fields)


def test_they_are_made_of_text(bridge):
    examples = InterchangeExamples.of(
        bridge,
        ["import re", "import os, re"],
        ["import sys", "import re"],
        [" sys", " re"],
        position=[[2], [-1]],
        source_position=-1,
        answers=[" sys", " re", " os"],
    )
    assert examples.base.lengths.tolist() == [3, 5]
    assert not examples.source.is_padded
    assert examples.labels.tolist() == [bridge.to_single_token(word) for word in (" sys", " re")]
    assert (examples.written, examples.read) == (((2,), (4,)), ((2,), (2,)))
    assert repr(examples) == "InterchangeExamples(2 pairs of 5 and 3 tokens, values exchanged at 1 place, 3 answers)"
    several = InterchangeExamples.of(bridge, examples.base, examples.source, examples.labels, position=[1, 2])
    assert several.read == ((1, 2), (1, 2))


def test_any_input_makes_examples(bridge):
    """A row of a dataset, chat-like mappings, numpy, and one label for all."""
    rows = [{"text": "import re"}, {"text": "import os, re"}]
    examples = InterchangeExamples.of(bridge, rows, torch.tensor([[5, 6], [7, 8]]).numpy(), " sys", position=[0, 1])
    assert examples.base.lengths.tolist() == [3, 5]
    assert examples.labels.tolist() == [bridge.to_single_token(" sys")] * 2
    masked = InterchangeExamples.of(bridge, [[5, 6]], torch.tensor([[0, 7, 8]]), 3, source_mask=[[0, 1, 1]], position=0)
    assert masked.source.real_columns == ((1, 2),)


def test_targets_are_places_among_the_answers_in_order(bridge):
    assert pair(bridge).targets().tolist() == [7, 9]
    among = pair(bridge, answers=[9, 3, 7, 9])
    assert among.answers == (3, 7, 9)
    assert among.targets().tolist() == [1, 2]


def test_parts_keep_all_that_belongs_to_a_pair():
    examples = random_pairs(padded=True, answers=(3, 11))
    parts = list(examples.split(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.cat([part.labels for part in parts]).tolist() == examples.labels.tolist()
    assert sum((part.written for part in parts), ()) == examples.written
    assert sum((part.read for part in parts), ()) == examples.read
    mask = torch.tensor([False, True, False, True, False])
    for rows in (torch.tensor([1, 3]), [1, 3], mask, slice(1, 4, 2)):
        chosen = examples.select(rows)
        assert chosen.answers == (3, 11)
        for row, of in enumerate((1, 3)):
            own, whole = (
                one.base.ids[at][list(one.base.real_columns[at])] for one, at in ((chosen, row), (examples, of))
            )
            assert torch.equal(own, whole)
            assert chosen.written[row] == examples.written[of]
    assert examples.relabelled(torch.full((5,), 3)).labels.tolist() == [3] * 5
    with pytest.raises(InvalidArgumentError, match="chooses none that there is"):
        examples.select([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": [[1, 2]]}, "examples are pairs with a label each\n  expected: as many bases, sources"),
        ({"labels": [1, 2, 3]}, "labels are one token for each row"),
        ({"labels": [0.5, 1.0]}, "labels=[0.5, 1.0]"),
        ({"labels": [-1, 2]}, "labels are one token for each row"),
        ({"position": [[0, 1], [0, 1]], "source_position": 0}, "an interchange reads as many positions as it writes"),
        ({"position": [[0, 1], [0]]}, "an interchange reads as many positions as it writes"),
        ({"position": [[2], [2]]}, "row 1 has no base position 2\n  expected: -2 to 1\n  got: 2 real tokens"),
        ({"source_position": -3}, "row 0 has no source position -3\n  expected: -2 to 1\n  got: 2 real tokens"),
        ({"position": [0, -3], "source_position": [0, 1]}, "row 1 has no base position -3"),
        ({"position": [[0, -3], [0, 1]]}, "row 0 has no source position -3"),
        ({"position": [[1, -2], [0, 1]]}, "a position of base 0 is written twice\n  got: [1, 1]"),
        ({"position": "a"}, "base positions='a' are no positions"),
        ({"position": [[0]]}, "base positions are not one list for each row\n  expected: 2 lists\n  got: 1"),
        ({"position": []}, "row 0 has no base position in []"),
        ({"answers": [7, 8]}, "the label 9 of pair 1 is no answer\n  expected: 7, 8"),
        ({"answers": []}, "answers=[]\n  expected: tokens, or None for the whole vocabulary"),
        ({"answers": 3}, "answers=3\n  expected: tokens, or None for the whole vocabulary"),
        ({"base": 3}, "cannot run this input"),
        ({"base": []}, "an empty list has no rows"),
    ],
)
def test_what_makes_no_examples_raises(bridge, changes, message):
    with pytest.raises(ClearspanError) as raised:
        pair(bridge, **changes)
    assert str(raised.value).startswith(message)


def test_bare_tensors_are_no_batches():
    ids = torch.tensor([[1, 2]])
    with pytest.raises(InvalidArgumentError) as raised:
        InterchangeExamples(ids, ids, torch.tensor([1]))
    assert str(raised.value) == (
        "the base of examples is a Batch\n  got: Tensor\n  fix: InterchangeExamples.of(bridge, base, source, labels)"
    )
