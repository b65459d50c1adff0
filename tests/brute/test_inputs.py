"""Ways of giving an input, and odd arguments: each is right, or an error of clearspan that says what was wrong.

Rows of a batch are compared with each row alone, without padding, so that nothing here knows a padding side.
"""

import functools
import re

import pytest
import torch

import clearspan
from clearspan import Intervention, analysis, interventions, sweep
from clearspan.errors import ClearspanError
from clearspan.weights import FactoredMatrix

from . import metrics, ours
from .draws import Draw
from .families import FAMILIES
from .reference import Reference, full_name
from .rows import Rows

TEXTS, IDS, ODD, FACTORED = 12, 8, 18, 6
WORDS = ("import os", "def f(self):\n    return", "x = 1", "for line in lines:\n    print(line", "class A:", "if not x")
TOKENS = (" os", " sys", " self", "(", " None", ":", " x")


@functools.cache
def embedded():
    """Returns the bridge to the embedded model, and the reference of the same model."""
    bridge = clearspan.boot("tiny-bigcode")
    return bridge, Reference(bridge.hf_model, FAMILIES["gpt_bigcode"])


def ids_of(bridge, text):
    """Returns a text's ids, with the token that texts begin with."""
    return [bridge.tokenizer.bos_token_id, *bridge.tokenizer(text, add_special_tokens=False)["input_ids"]]


def text_form(draw, bridge, texts):
    """Returns texts as an input, in one of the ways there are."""
    tokenizer = bridge.tokenizer
    ids = [ids_of(bridge, text) for text in texts]
    match draw.one("form", ("texts", "rows of text", "lists of ids", "rows of ids", "a batch", "tokenizer's output")):
        case "texts":
            return texts[0] if len(texts) == 1 and draw.chance(0.5) else texts
        case "rows of text":
            return [{"text": text} for text in texts]
        case "lists of ids":
            return ids
        case "rows of ids":
            return [{"input_ids": row} for row in ids]
        case "a batch":
            return bridge.to_batch(texts, padding_side=draw.one("side", ("left", "right")))
    tokenizer.padding_side, before = draw.one("side", ("left", "right")), tokenizer.padding_side
    try:
        return tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    finally:
        tokenizer.padding_side = before


@pytest.mark.parametrize("number", range(TEXTS))
def test_texts_of_several_lengths_are_each_text_alone(number):
    draw = Draw("texts", number)
    bridge, reference = embedded()
    texts = draw.note("texts", list(draw.some(WORDS, 1, 3)))
    alone = [Rows.unpadded(torch.tensor([ids_of(bridge, text)])) for text in texts]
    shortest = min(rows.lengths[0] for rows in alone)
    position = draw.note("position", draw.random.randrange(-shortest, shortest))
    right, wrong = draw.note("tokens", draw.some(TOKENS, 2, 2))
    given = text_form(draw, bridge, texts)
    logits = [reference.run(rows).logits for rows in alone]
    metric = metrics.LogitDifference(bridge.to_single_token(right), bridge.to_single_token(wrong), position)
    measured = torch.cat([metric.of(one, rows, {}) for one, rows in zip(logits, alone, strict=True)])
    own = sweep.LogitDifference.between(bridge, right, wrong, position)
    match draw.one("way", ("forward", "sweep", "patching", "predictions", "cache")):
        case "forward":
            batch = bridge.to_batch(given)
            found = bridge(given)
            for row, (one, columns) in enumerate(zip(logits, batch.real_columns, strict=True)):
                ours.agree(draw, found[row, list(columns)], one[0], f"logits of row {row}")
        case "sweep" | "patching":  # one cell that changes nothing
            cells = {"same": Intervention("resid_pre", interventions.Scale(1.0), layer=1, positions=position)}
            found = sweep.Sweep(bridge, given, cells, own).run(progress=False)
            ours.agree(draw, found.of()[0], measured, "the metric of the cell")
            ours.agree(draw, next(iter(found.base.values())), measured, "the metric")
        case "predictions":
            found = analysis.predictions(bridge, given, k=1)
            best = torch.cat([one[0].argmax(-1) for one in logits])
            assert found.top_ids[:, 0].tolist() == best.tolist(), str(draw)
        case _:
            layer = draw.random.randrange(reference.n_layers)
            cache = bridge.run_with_cache(given)[1].at(position)
            for row, rows in enumerate(alone):
                value = reference.run(rows, (), [full_name("resid_post", layer)]).values
                own = value[full_name("resid_post", layer)][0, rows.column(0, position)]
                ours.agree(draw, cache["resid_post", layer][row], own, f"the stream of row {row}")


@pytest.mark.parametrize("number", range(IDS))
def test_ids_in_every_form_are_each_row_alone(number):
    draw = Draw("ids", number)
    subject = draw.subject(is_padded=True)
    bridge, reference = ours.bridge_to(subject), subject.reference
    rows = draw.rows(draw.one("padding", ("left", "right", "mixed")))
    ids = [rows.ids[row, columns].tolist() for row, columns in enumerate(rows.columns)]
    match draw.one("form", (*ours.FORMS, "lists", "numpy", "embeddings", "keyword")):
        case "lists":
            given, keywords = ids, {}
        case "numpy":
            given, keywords = rows.ids.numpy(), {"attention_mask": rows.mask}
        case "embeddings":
            given, keywords = subject.model.get_input_embeddings()(rows.ids), {"attention_mask": rows.mask}
        case "keyword":
            embeds = subject.model.get_input_embeddings()(rows.ids)
            given, keywords = None, {"inputs_embeds": embeds, "attention_mask": rows.mask}
        case form:
            given, keywords = ours.given(bridge, rows, form)
    found = bridge(given, **keywords)
    columns = rows.columns
    if isinstance(given, list) and isinstance(given[0], list):
        columns = bridge.to_batch(given).real_columns
    for row, own in enumerate(ids):
        alone = reference.run(Rows.unpadded(torch.tensor([own]))).logits[0]
        ours.agree(draw, found[row, list(columns[row])], alone, f"logits of row {row}")


def odd_names_filter(draw, bridge, reference, rows):
    """A compiled pattern chooses the names that it finds."""
    _, cache = bridge.run_with_cache(rows.ids, re.compile(r"blocks\.1\..*resid_pre"))
    name = "blocks.1.hook_resid_pre"
    ours.agree(draw, cache[name], reference.run(rows, (), [name]).values[name], name)


def odd_list_of_names(draw, bridge, reference, rows):
    """A list of names has one function on all of them."""
    names = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    found = bridge.run_with_hooks(rows.ids, fwd_hooks=[(names, lambda value, hook: value * 2)])
    expected = reference.run(rows, [(name, lambda value: value * 2) for name in names]).logits
    ours.agree(draw, found, expected, "logits")


def odd_second_parameter(draw, bridge, reference, rows):
    """A function's second parameter may have any name."""
    name = "blocks.1.hook_resid_post"
    found = bridge.run_with_hooks(rows.ids, fwd_hooks=[(name, lambda value, point: value * 2)])
    ours.agree(draw, found, reference.run(rows, [(name, lambda value: value * 2)]).logits, "logits")


def odd_string(draw, bridge, reference, rows):
    """Functions that read predictions take a text as it is."""
    bridge, reference = embedded()
    text = draw.one("text", WORDS)
    found = analysis.predictions(bridge, text, k=1)
    best = reference.run(Rows.unpadded(torch.tensor([ids_of(bridge, text)]))).logits[0].argmax(-1)
    assert found.top_ids[:, 0].tolist() == best.tolist(), str(draw)


def odd_integer_point(draw, bridge, reference, rows):
    """Ids cannot be calculated with."""
    action = draw.one("action", (interventions.Scale(2.0), interventions.ProjectOut((1.0,)), interventions.Mean()))
    bridge(rows.ids, interventions=[Intervention("embed.hook_in", action)], sources={"clean": rows.ids})


def odd_position(draw, bridge, reference, rows):
    """A position that a row lacks."""
    bridge(rows.ids, interventions=[Intervention("resid_pre", interventions.Zero(), layer=0, positions=99)])


def odd_metric_position(draw, bridge, reference, rows):
    """A metric's position that a row lacks."""
    cells = {"same": Intervention("resid_pre", interventions.Zero(), layer=0)}
    sweep.Sweep(bridge, rows.ids, cells, sweep.LogitDifference(3, 5, position=99)).run(progress=False)


def odd_places(draw, bridge, reference, rows):
    """Heads, layers and points that the model does not have."""
    wrong = (("z", 0, {"heads": 99}), ("z", 99, {}), ("resid_prr", 0, {}), ("resid_pre", 0, {"heads": 0}))
    point, layer, places = draw.one("point", wrong)
    bridge(rows.ids, interventions=[Intervention(point, interventions.Zero(), layer=layer, **places)])


def odd_types(draw, bridge, reference, rows):
    """Arguments of other types than they should be."""
    match draw.one("argument", ("input", "interventions", "sources", "fwd_hooks", "names_filter", "empty list")):
        case "input":
            bridge(draw.one("input", (3.5, {"ids": [1]}, object(), [["a"], [1]])))
        case "interventions":
            bridge(rows.ids, interventions=["resid_pre"])
        case "sources":
            patch = Intervention("resid_pre", interventions.Patch(), layer=0)
            bridge(rows.ids, interventions=[patch], sources=rows.ids)
        case "fwd_hooks":
            bridge.run_with_hooks(rows.ids, fwd_hooks=[("blocks.0.hook_resid_pre", None)])
        case "names_filter":
            bridge.run_with_cache(rows.ids, 3)
        case _:
            bridge([])


WORKS = (odd_names_filter, odd_list_of_names, odd_second_parameter, odd_string)
RAISES = (odd_integer_point, odd_position, odd_metric_position, odd_places, odd_types)


@pytest.mark.parametrize("number", range(ODD))
def test_odd_arguments_work_or_raise_an_error_of_ours(number):
    draw = Draw("odd arguments", number)
    subject = draw.subject()
    rows = draw.rows("none")
    function = (*WORKS, *RAISES)[number % 9]
    draw.note("case", function.__name__)
    arguments = draw, ours.bridge_to(subject), subject.reference, rows
    if function in WORKS:
        function(*arguments)
        return
    with pytest.raises(ClearspanError):
        function(*arguments)


@pytest.mark.parametrize("number", range(FACTORED))
def test_eigenvalues_of_a_product_are_those_of_the_whole_matrix(number):
    draw = Draw("factored matrices", number)
    outer, inner = draw.one("outer size", (2, 4, 6)), draw.one("inner size", (2, 4, 6, 9))
    left = torch.randn(outer, inner, generator=draw.generator, dtype=torch.float64)
    right = torch.randn(inner, outer, generator=draw.generator, dtype=torch.float64)
    found = FactoredMatrix(left, right).eigenvalues
    assert found.shape == (min(outer, inner),), str(draw)
    power = torch.eye(outer, dtype=torch.float64)
    for exponent in range(1, outer + 1):  # sums of powers say which numbers they are, in whatever order
        power = power @ left @ right
        ours.agree(draw, (found**exponent).sum().real[None], power.trace()[None], f"power {exponent}", 1e-8)
    ours.agree(draw, FactoredMatrix(left, right).AB, left @ right, "the product", 1e-12)
