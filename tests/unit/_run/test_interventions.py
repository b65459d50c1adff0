import json

import pytest
import torch
from transformers import DynamicCache

from clearspan.errors import InvalidArgumentError, PointNotReachedError, UnknownPointError
from clearspan.interventions import Add, Inject, Intervention, Mask, Mean, Patch, Scale, Zero


@pytest.fixture
def others():
    return torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(5))


def _hooked(bridge, tokens, name, edit):
    return bridge.run_with_hooks(tokens, fwd_hooks=[(name, edit)])


@torch.no_grad()
def test_parts_of_a_value_are_patched_as_a_hook_would(bridge, tokens, others):
    _, clean = bridge.run_with_cache(others)

    def edit(value, hook):
        for position in (1, 6):
            for head in (0, 3):
                value[:, position, head] = clean["z", 1][:, position, head]

    patch = Intervention("z", Patch("other"), layer=1, positions=(1, -1), heads=(0, 3))
    expected = _hooked(bridge, tokens, "blocks.1.attn.hook_z", edit)
    for source in (others, clean, {"blocks.1.attn.hook_z": clean["z", 1]}):
        found = bridge.run_with_hooks(tokens, interventions=[patch], sources={"other": source})
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@torch.no_grad()
def test_one_row_stands_for_all(bridge, tokens, others):
    patch = Intervention("resid_pre", Patch("one"), layer=2, positions=3)
    found = bridge.run_with_hooks(tokens, interventions=[patch], sources={"one": others[:1]})
    each = bridge.run_with_hooks(tokens, interventions=[patch], sources={"one": others[:1].expand(2, -1)})
    torch.testing.assert_close(found, each, rtol=0, atol=1e-6)


@torch.no_grad()
def test_patterns_are_written_by_query_and_key(bridge, tokens):
    def edit(value, hook):
        value[:, 2, 5, 1] = 0
        value[:, 2, 5, 4] = 0
        value[:, 2, 6, 1] = 0
        value[:, 2, 6, 4] = 0

    zero = Intervention("pattern", Zero(), layer=1, heads=2, positions=(5, 6), key_positions=(1, 4))
    expected = _hooked(bridge, tokens, "blocks.1.attn.hook_pattern", edit)
    assert torch.equal(bridge.run_with_hooks(tokens, interventions=[zero]), expected)


@torch.no_grad()
def test_several_at_one_point_are_made_in_order(bridge, tokens):
    up = Intervention("mlp_out", Scale(2.0), layer=0)
    add = Intervention("mlp_out", Add([1.0] * 48), layer=0, positions=2)

    def edit(value, hook):
        value *= 2
        value[:, 2] += 1

    expected = _hooked(bridge, tokens, "blocks.0.hook_mlp_out", edit)
    assert torch.equal(bridge.run_with_hooks(tokens, interventions=[up, add]), expected)
    assert not torch.equal(bridge.run_with_hooks(tokens, interventions=[add, up]), expected)


@torch.no_grad()
def test_a_padded_source_gives_the_mean_of_its_real_positions(embedded):
    texts = ["import os", "def area(self):\n    return"]
    tokens, mask, _ = embedded.text.encode(texts)
    _, cache = embedded.run_with_cache(tokens, attention_mask=mask)
    mean = cache["mlp_out", 2][mask.bool()].mean(0)

    def edit(value, hook):
        value[:] = mean

    expected = embedded.run_with_hooks(texts, fwd_hooks=[("blocks.2.hook_mlp_out", edit)])
    found = embedded.run_with_hooks(
        texts, interventions=[Intervention("mlp_out", Mean("it"), layer=2)], sources={"it": texts}
    )
    torch.testing.assert_close(found, expected)


def test_gradients_pass(bridge, tokens):
    loss = bridge(tokens, "loss", interventions=[Intervention("z", Scale(0.5), layer=1)])
    (gradient,) = torch.autograd.grad(loss, [bridge.hf_model.transformer.wte.weight])
    assert gradient.abs().sum() > 0


def test_interventions_are_data():
    one = Intervention("pattern", Zero(), layer=1, heads=[2], positions=range(2, 4), key_positions=-1)
    assert one == Intervention("pattern", Zero(), 1, (2, 3), (2,), None, (-1,))
    assert Intervention.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert one.to_json() == {
        "point": "pattern",
        "layer": 1,
        "positions": [2, 3],
        "heads": [2],
        "key_positions": [-1],
        "action": {"kind": "zero"},
    }
    assert {one: 1}[one.at(heads=2)] == 1


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (
            Intervention("resid_pre", Zero(), layer=0, heads=1),
            "blocks.0.hook_resid_pre has no heads\n  expected: places on its axes: pos, d_model",
        ),
        (
            Intervention("z", Zero(), layer=0, positions=7),
            "row 0 has no position 7\n  expected: -7 to 6",
        ),
        (
            Intervention("k", Zero(), layer=0, heads=1),
            "no 1 among the heads of blocks.0.attn.hook_k\n  expected: -1 to 0",
        ),
        (Intervention("z", Zero(), layer=3), "there is no layer 3\n  expected: -3 to 2\n  where: point 'z'"),
        (
            Intervention("z", Patch(), layer=1),
            "an intervention takes values from the run 'clean', which is not given\n  got: 'x'",
        ),
    ],
)
def test_mistakes_are_named(bridge, tokens, intervention, message):
    with pytest.raises(InvalidArgumentError) as error:
        bridge.run_with_hooks(tokens, interventions=[intervention], sources={"x": tokens})
    assert str(error.value).startswith(message)


def test_a_source_of_another_length_does_not_fit(bridge, tokens, others):
    patch = Intervention("z", Patch(), layer=1)
    with pytest.raises(InvalidArgumentError) as error:
        bridge.run_with_hooks(tokens, interventions=[patch], sources={"clean": others[:, :5]})
    assert str(error.value) == (
        "the source run 'clean' does not fit the run that is changed\n"
        "  expected: 2 rows (or one) of 7 positions\n"
        "  got: 2 rows of [5] positions\n"
        "  where: blocks.1.attn.hook_z"
    )


def test_unknown_points_and_things_that_are_no_interventions(bridge, tokens):
    with pytest.raises(UnknownPointError, match="no hook point has the short name 'zz'"):
        bridge.run_with_hooks(tokens, interventions=[Intervention("zz", Zero(), layer=1)])
    with pytest.raises(InvalidArgumentError, match="this is no intervention"):
        bridge.run_with_hooks(tokens, interventions=["z"])


# --- padding, positions by row, other places -------------------------------------------------------------------------

PADDED = [[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]], [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
RIGHT = [[5, 6, 7, 8, 0, 0], [9, 10, 11, 12, 13, 14]], [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
HOLES = [[5, 0, 6, 7, 0, 8], [9, 10, 11, 12, 13, 14]], [[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]
ROWS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
OTHERS = [[15, 16, 17, 18], [19, 20, 21, 22, 23, 24]]


def _batch(bridge, padded):
    return bridge.to_batch(*padded)


def _last_logits(bridge, batch, logits):
    return torch.stack([logits[row, real[-1]] for row, real in enumerate(batch.real_columns)])


@torch.no_grad()
@pytest.mark.parametrize("layout", [PADDED, RIGHT, HOLES], ids=["left", "right", "holes"])
@pytest.mark.parametrize(
    "intervention",
    [
        Intervention("resid_pre", Zero(), layer=1, positions=-1),
        Intervention("z", Scale(3.0), layer=1, positions=(0, 2), heads=1),
        Intervention("resid_post", Patch(), layer=0, positions=1),
        Intervention("mlp_out", Mean(), layer=1),
        Intervention("pattern", Zero(), layer=1, positions=-1, key_positions=0),
        Intervention("resid_pre", Patch(layer=0, position=-1), layer=2, positions=2),
        Intervention("attn_scores", Mask(), layer=1, heads=(0, 2), positions=-1, key_positions=(0, 1)),
        Intervention("pattern", Patch(), layer=2),
        Intervention("v", Patch(), layer=1),
    ],
    ids=lambda one: f"{one.action.kind} {one.point}",
)
def test_padded_rows_are_written_as_each_row_alone(bridge, layout, intervention):
    batch = _batch(bridge, layout)
    source = bridge.to_batch(OTHERS, padding_side="left")
    if isinstance(intervention.action, Mean):  # a mean is over all rows of its source
        source = bridge.to_batch([[15, 16, 17, 18]])
    found = _last_logits(bridge, batch, bridge(batch, interventions=[intervention], sources={"clean": source}))
    for row, tokens in enumerate(ROWS):
        alone = [[15, 16, 17, 18]] if isinstance(intervention.action, Mean) else [OTHERS[row]]
        expected = bridge([tokens], interventions=[intervention], sources={"clean": alone})[0, -1]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
    plain = _last_logits(bridge, batch, bridge(batch))
    assert (found - plain).abs().amax(-1).gt(1e-3).all()


@torch.no_grad()
def test_positions_may_differ_by_row(bridge, tokens):
    by_row = Intervention("resid_pre", Zero(), layer=1, positions=[[0, 3], [-1]])

    def edit(value, hook):
        value[0, [0, 3]] = 0
        value[1, -1] = 0

    assert torch.equal(bridge(tokens, interventions=[by_row]), _hooked(bridge, tokens, "blocks.1.hook_resid_pre", edit))
    assert Intervention.from_json(json.loads(json.dumps(by_row.to_json()))) == by_row
    span = Intervention("resid_pre", Zero(), layer=1, positions=slice(2, None))
    assert Intervention.from_json(json.loads(json.dumps(span.to_json()))) == span
    assert torch.equal(
        bridge(tokens, interventions=[span]), bridge(tokens, interventions=[span.at(positions=range(2, 7))])
    )
    with pytest.raises(InvalidArgumentError, match="positions are not one list for each row\n  expected: 2 lists"):
        bridge(tokens, interventions=[Intervention("resid_pre", Zero(), layer=1, positions=[[0]])])


@torch.no_grad()
def test_a_row_that_lacks_a_position_is_named(bridge):
    batch = _batch(bridge, PADDED)
    with pytest.raises(InvalidArgumentError, match=r"row 0 has no position 4\n  expected: -4 to 3"):
        bridge(batch, interventions=[Intervention("resid_pre", Zero(), layer=1, positions=4)])
    columns = Intervention("resid_pre", Zero(), layer=1, columns=5)
    last = Intervention("resid_pre", Zero(), layer=1, positions=-1)
    assert torch.equal(bridge(batch, interventions=[columns]), bridge(batch, interventions=[last]))
    with pytest.raises(InvalidArgumentError, match="column 1 of row 0 has no real token"):
        bridge(batch, interventions=[Intervention("resid_pre", Zero(), layer=1, columns=1)])


@torch.no_grad()
def test_bare_ids_of_a_source_share_the_padding_or_are_refused(bridge):
    ids, mask = map(torch.tensor, PADDED)
    mean = [Intervention("mlp_out", Mean("it"), layer=1)]
    shared = bridge(ids, attention_mask=mask, interventions=mean, sources={"it": ids})
    told = bridge(ids, attention_mask=mask, interventions=mean, sources={"it": bridge.to_batch(ids, mask)})
    assert torch.equal(shared, told)
    _, cache = bridge.run_with_cache(ids, attention_mask=mask)
    assert torch.equal(shared, bridge(ids, attention_mask=mask, interventions=mean, sources={"it": cache}))
    with pytest.raises(InvalidArgumentError, match="the token ids of a source do not tell which of them are padding"):
        bridge(ids, attention_mask=mask, interventions=mean, sources={"it": ids + 1})


# --- with hook functions, in every run -------------------------------------------------------------------------------


@torch.no_grad()
def test_interventions_come_after_hooks_that_are_there_and_before_the_runs_own(bridge, tokens):
    double = Intervention("mlp_out", Scale(2.0), layer=1)

    def add(value, hook):
        value += 1.0

    def halve(value, hook):
        value *= 0.5

    def both(value, hook):
        value[:] = ((value + 1.0) * 2.0) * 0.5

    expected = _hooked(bridge, tokens, "blocks.1.hook_mlp_out", both)
    bridge.add_hook("blocks.1.hook_mlp_out", add)
    try:
        hooks = [("blocks.1.hook_mlp_out", halve)]
        torch.testing.assert_close(bridge.run_with_hooks(tokens, hooks, interventions=[double]), expected)
        logits, cache = bridge.run_with_cache(tokens, fwd_hooks=hooks, interventions=[double])
        torch.testing.assert_close(logits, expected)
        with bridge.hooks(hooks, interventions=[double]):
            torch.testing.assert_close(bridge(tokens), expected)
    finally:
        bridge.reset_hooks()
    torch.testing.assert_close(cache["resid_mid", 1] + cache["mlp_out", 1], cache["resid_post", 1])
    assert torch.equal(bridge(tokens), bridge.hf_model(tokens, use_cache=False).logits)


@torch.no_grad()
def test_between_points_the_order_is_the_models(bridge, tokens):
    one = Intervention("resid_pre", Scale(0.5), layer=2)
    other = Intervention("resid_post", Add([1.0] * 48), layer=1)
    assert torch.equal(bridge(tokens, interventions=[one, other]), bridge(tokens, interventions=[other, one]))


@torch.no_grad()
@pytest.mark.parametrize("layout", [None, PADDED, RIGHT], ids=["alone", "left", "right"])
@pytest.mark.parametrize(
    ("positions", "every_step"),
    [(1, False), (-1, False), ((3, 5), False), (None, False), (slice(4, None), False), (-1, True), (0, True)],
)
def test_generation_writes_each_position_in_the_step_that_makes_it(bridge, layout, positions, every_step):
    rows = [ROWS[1][:4]] if layout is None else ROWS
    batch = bridge.to_batch(rows) if layout is None else _batch(bridge, layout)
    steer = Intervention("resid_post", Add([2.0] * 48), layer=1, positions=positions, every_step=every_step)
    generated = bridge.generate(batch, max_new_tokens=4, do_sample=False, interventions=[steer], eos_token_id=None)
    if layout is RIGHT:  # Hugging Face puts new tokens after the padding
        assert generated.shape[1] == batch.width + 4
    for row, tokens in enumerate(rows):
        grown = list(tokens)
        for _ in range(4):
            known, length = len(tokens), len(grown)
            match positions:
                case None:
                    at = range(length)
                case slice():
                    at = range(length)[positions]
                case _:
                    given = (positions,) if isinstance(positions, int) else positions
                    at = [one + known if one < 0 else one for one in given]
            chosen = sorted({*(one for one in at if one < length), *(range(known, length) if every_step else ())})

            def edit(value, hook, chosen=chosen):
                value[:, chosen] += 2.0

            logits = bridge.run_with_hooks([grown], [("blocks.1.hook_resid_post", edit)])
            grown.append(int(logits[0, -1].argmax()))
        new = generated[row, batch.width :].tolist()
        assert new == grown[len(tokens) :], f"row {row}"


@torch.no_grad()
def test_generation_with_a_source_a_cache_a_stream_and_embeddings(bridge, tokens):
    patch = Intervention("resid_pre", Patch("other"), layer=2, positions=-1)
    sources = {"other": tokens.flip(0)}
    given = {
        "max_new_tokens": 3,
        "do_sample": False,
        "interventions": [patch],
        "sources": sources,
        "eos_token_id": None,
    }
    whole = bridge.generate(tokens, **given)
    again, cache = bridge.generate(tokens, return_cache=True, **given)
    assert torch.equal(whole, again)
    assert torch.equal(torch.cat(list(bridge.generate_stream(tokens, **given)), 1), whole[:, 7:])
    _, other = bridge.run_with_cache(tokens.flip(0))
    torch.testing.assert_close(cache["resid_pre", 2][:, 6], other["resid_pre", 2][:, 6])
    embeds = bridge.hf_model.get_input_embeddings()(tokens)
    assert torch.equal(bridge.generate(inputs_embeds=embeds, **given), whole[:, 7:])
    assert torch.equal(bridge(inputs_embeds=embeds), bridge(embeds))
    far = Intervention("resid_pre", Zero(), layer=2, positions=20)
    with pytest.raises(PointNotReachedError, match="wrote nothing"):
        bridge.generate(tokens, max_new_tokens=3, interventions=[far])
    everywhere = Intervention("resid_pre", Patch("other"), layer=2, positions=-1, every_step=True)
    with pytest.raises(InvalidArgumentError, match="patch takes values for new tokens, which the source run 'other'"):
        bridge.generate(tokens, max_new_tokens=3, interventions=[everywhere], sources=sources)


@torch.no_grad()
def test_new_tokens_are_told_without_a_kv_cache(bridge, tokens):
    steer = Intervention("resid_post", Add([2.0] * 48), layer=1, positions=-1, every_step=True)
    given = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "interventions": [steer]}
    assert torch.equal(bridge.generate(tokens, use_cache=False, **given), bridge.generate(tokens, **given))


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_pattern"])
def test_a_generation_takes_positions_of_a_longer_source_as_it_reaches_them(bridge, name, use_cache):
    prompt, source = [ROWS[1][:4]], [[31, 32, 33, 34, 35, 36, 37]]
    _, clean = bridge.run_with_cache(source, names_filter=name)
    written, read = (1, 5), ((3, 0) if "resid" in name else None)
    patch = Intervention(name, Patch("other", position=read), positions=written)
    found = bridge.generate(
        bridge.to_batch(prompt),
        interventions=[patch],
        sources={"other": clean},
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        use_cache=use_cache,
    )
    grown = list(prompt[0])
    for length in range(4, 8):

        def edit(value, hook, length=length):
            for at, taken in zip(written, read or written, strict=True):
                if at < length and value.ndim == 3:
                    value[:, at] = clean[name][:, taken]
                elif at < length:
                    value[:, :, at, : at + 1] = clean[name][:, :, taken, : at + 1]

        grown.append(int(bridge.run_with_hooks([grown], [(name, edit)])[0, -1].argmax()))
    assert found[0].tolist() == grown


@torch.no_grad()
def test_a_generation_shares_its_padding_with_the_bare_ids_of_a_source(bridge):
    batch = _batch(bridge, PADDED)
    mean = Intervention("resid_pre", Mean("clean"), layer=1, positions=-1)
    given = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "interventions": [mean]}
    found = bridge.generate(batch, sources={"clean": batch.ids}, **given)
    assert torch.equal(found, bridge.generate(batch, sources={"clean": batch}, **given))


NEW = "takes values for new tokens, which the source run 'other' does not have"
LONG = "the source run 'other' does not fit the run that is changed"
LACKS = "row 0 has no position -8\n  expected: -7 to 6\n  got: 7 real tokens"


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (Intervention("resid_pre", Patch("other"), layer=0), NEW),
        (Intervention("pattern", Patch("other"), layer=0, positions=slice(2, None)), NEW),
        (Intervention("pattern", Mean("other"), layer=0, positions=-1, every_step=True), NEW),
        (Intervention("z", Mean("other", by_position=True), layer=0), NEW),
        (Intervention("resid_pre", Patch("other", position=(0, 1)), layer=0, positions=-1, every_step=True), NEW),
        (Intervention("resid_pre", Patch("other"), layer=0, positions=8), LONG),
        (Intervention("pattern", Patch("other"), layer=0, positions=[[8], [1]]), LONG),
        (Intervention("resid_pre", Zero(), layer=0, positions=-8), LACKS),
    ],
)
@pytest.mark.parametrize("opened", [False, True])
def test_what_a_generation_cannot_take_raises_before_it_runs(bridge, tokens, intervention, message, opened):
    sources, steps = {"other": tokens.flip(0)}, []

    def count(value, hook):
        steps.append(hook.step)

    given = {"interventions": [intervention], "sources": sources}
    with pytest.raises(InvalidArgumentError) as raised:
        if opened:
            with bridge.hooks(**given):
                bridge.generate(tokens, max_new_tokens=3, fwd_hooks=[("blocks.2.hook_resid_pre", count)])
        else:
            bridge.generate(tokens, max_new_tokens=3, fwd_hooks=[("embed.hook_in", count)], **given)
    assert message in str(raised.value)
    assert not steps


@torch.no_grad()
def test_a_kv_cache_counts_the_whole_sequence(bridge, tokens):
    scale = Intervention("resid_post", Scale(2.0), layer=0, positions=5)
    whole = bridge(tokens, interventions=[scale])
    past = DynamicCache()
    bridge(tokens[:, :4], past_key_values=past)
    rest = bridge(tokens[:, 4:], past_key_values=past, interventions=[scale])
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-4)
    past = DynamicCache()
    bridge(tokens[:, :4], past_key_values=past)
    with pytest.raises(PointNotReachedError, match="position 2 is not among those of this run"):
        bridge(tokens[:, 4:], past_key_values=past, interventions=[scale.at(positions=2)])


@pytest.mark.parametrize("positions", [None, 2, (1, 4), [[1], [3]], [[1, 2], [3, 0]], [[1], [3, 0]]])
@pytest.mark.parametrize("norm", ["own", "stream"])
def test_gradients_go_through_what_is_written(bridge, tokens, positions, norm):
    vector = torch.linspace(-1, 1, 48)
    inject = Intervention("resid_pre", Inject(vector, norm=norm, add=True), layer=1, positions=positions)
    rows = range(2) if positions is None else positions if isinstance(positions, list) else [positions] * 2
    every = [list(range(7)) if positions is None else [one] if isinstance(one, int) else list(one) for one in rows]

    def edit(value, hook):
        added = torch.zeros(2, 7, 1)
        for row, own in enumerate(every):
            added[row, own] = 1.0
        scale = value.norm(dim=-1, keepdim=True) / vector.norm() if norm == "stream" else 1.0
        return value + added * vector * scale

    found = []
    for given in ({"interventions": [inject]}, {"fwd_hooks": [("blocks.1.hook_resid_pre", edit)]}):
        bridge.zero_grad()
        bridge.run_with_hooks(tokens, return_type="loss", **given).backward()
        found.append(bridge.hf_model.transformer.wte.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


# --- actions at points that cannot take them -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (Intervention("pattern", Mask(), layer=0, key_positions=0), "Mask hides keys from the softmax"),
        (Intervention("attn_scores", Mask(), layer=0), "Mask without key positions hides every key"),
        (
            Intervention("attn_scores", Mask(), layer=0, positions=0, key_positions=0),
            "a query has no key left to attend to",
        ),
        (Intervention("embed.hook_in", Scale(2.0)), "scale calculates with numbers, and embed.hook_in holds none"),
        (Intervention("resid_pre", Add([1.0]), layer=0), "the vector does not fit the values\n  expected: [48]"),
        (Intervention("resid_pre", Patch("x", layer=9), layer=0), "a patch cannot read layer 9\n  expected: -3 to 2"),
        (
            Intervention("resid_pre", Patch("x", position=(0, 1)), layer=0, positions=3),
            "a patch reads as many positions as it writes\n  expected: 1 positions\n  got: 2",
        ),
        (Intervention("resid_pre", Patch("x", position=9), layer=0, positions=3), "row 0 has no source position 9"),
    ],
)
def test_actions_that_a_point_cannot_take(bridge, tokens, intervention, message):
    with pytest.raises(InvalidArgumentError) as error:
        bridge(tokens, interventions=[intervention], sources={"x": tokens})
    assert str(error.value).startswith(message)
    assert torch.equal(bridge(tokens), bridge.hf_model(tokens, use_cache=False).logits)
