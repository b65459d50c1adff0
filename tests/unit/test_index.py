"""The table of hook points: rows as data, and as text."""

import pytest

from clearspan.errors import UnknownPointError


def test_rows_are_data(bridge):
    row = bridge.points("blocks.1.attn.hook_k")[0]
    assert row.name == "blocks.1.attn.hook_k"
    assert row.axes == ("batch", "pos", "kv_head", "d_head")
    assert row.sizes == (None, None, 1, 12)
    assert row.tap == "output of transformer.h.1.attn.c_attn"
    assert row.value.startswith("keys as projected")
    assert row.write == "scores"


def test_derived_points_and_aliases_show_as_such(bridge):
    derived, aliased = bridge.points(["blocks.0.ln1.hook_scale", "blocks.0.hook_mlp_in"])
    assert derived.tap == "computed from the input of transformer.h.0.ln_1"
    assert derived.shape == "[batch, pos, 1]"
    assert aliased.aliases == ("blocks.0.ln2.hook_in",)


def test_a_table_is_a_sequence(bridge):
    table = bridge.points(lambda name: name.startswith("blocks.1."))
    assert len(table) == len(list(table)) == len(table[:2]) + len(table[2:])
    assert table[:2][1] == table[1]
    lines = str(table).splitlines()
    assert len(lines) == len(table)
    assert len({line.index("[") for line in lines}) == 1, "columns are aligned"


def test_nothing_is_run(bridge):
    def refuse(*_):
        raise AssertionError("the model was run")

    handle = bridge.hf_model.register_forward_pre_hook(refuse)
    assert len(bridge.points()) == len(list(bridge.index))
    handle.remove()


def test_an_unknown_name_raises(bridge):
    with pytest.raises(UnknownPointError, match=r"no hook point 'blocks\.1\.attn\.hook_w'"):
        bridge.points("blocks.1.attn.hook_w")
