"""How batches run: in one forward where the model can, in slower ways where it cannot, to the same numbers."""

import pytest
import torch
from tests.conftest import tiny_model
from tests.zoo import build
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeBlock

import clearspan
from clearspan.errors import InvalidArgumentError
from clearspan.hf.kernels import unplanned
from clearspan.interventions import Intervention, Patch, Scale, Zero
from clearspan.sweep import Grid, KLDivergence, LogitDifference, Sweep, grid
from clearspan.sweep.costs import Costs
from clearspan.sweep.metrics import Context

STREAM = grid("resid_pre", Patch(), layer=range(3), position=range(7))
METRIC = LogitDifference(5, 7)


@pytest.fixture
def others():
    return torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(5))


def _forwards(bridge, run):
    """Returns how often the model is called while something runs."""
    calls = []
    handle = bridge.hf_model.register_forward_pre_hook(lambda module, args: calls.append(1))
    run()
    handle.remove()
    return len(calls)


def test_a_batch_is_one_forward(bridge, tokens, others):
    costs = Costs(token=1.0, floor=100.0, start=100.0, join=0.0, most=1024)
    sweep = Sweep(bridge, tokens, STREAM, METRIC, sources={"clean": others})
    assert len(sweep.plan(costs=costs).tiles) == 1
    found = _forwards(bridge, lambda: sweep.run(costs=costs, progress=False))
    assert found == 2  # the base run with the source, and the batch
    assert sweep.check(21) < 2e-5


def test_what_blocks_are_given_is_looked_at_once_for_all_widths_and_positions(bridge, tokens, others):
    costs = Costs(token=1.0, floor=0.0, start=0.0, join=0.0, most=1024)
    Sweep(bridge, tokens, STREAM, METRIC, sources={"clean": others}).plan()
    for width in (7, 5):
        cells = grid("resid_pre", Patch(), layer=range(3), position=range(width))
        sweep = Sweep(bridge, tokens[:, :width], cells, METRIC, sources={"clean": others[:, :width]})
        batches = len(sweep.plan(costs=costs).tiles)
        assert batches == width  # each behind the positions before
        assert _forwards(bridge, lambda sweep=sweep: sweep.run(costs=costs, progress=False)) == 1 + batches
        assert sweep.check(3 * width) < 2e-5


def test_what_is_measured_and_tried_draws_no_number_of_the_users(tokens, others):
    bridge, drawn = clearspan.boot(tiny_model()), torch.get_rng_state()
    Sweep(bridge, tokens, STREAM, METRIC, sources={"clean": others}).run(progress=False)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_model_whose_blocks_take_the_rows_it_was_given_alone_runs_from_layer_to_layer(tokens, others):
    model = tiny_model()
    bridge, given = clearspan.boot(model), []

    def note(module, args, kwargs):
        given[:] = [len(next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None))]

    def check(module, args):
        if [len(args[0])] != given:
            raise ValueError(f"a batch of {len(args[0])} rows in a forward of {given[0]}")

    model.register_forward_pre_hook(note, with_kwargs=True)
    for block in model.transformer.h.children():
        block.get_submodule("attn").register_forward_pre_hook(check)
    sweep = Sweep(bridge, tokens, STREAM, METRIC, sources={"clean": others})
    assert "way: a forward from each layer where cells join to the next, since ValueError: a batch of 4" in str(
        sweep.plan()
    )
    sweep.run(progress=False)
    assert sweep.check(21) < 2e-5


def test_a_model_whose_blocks_are_not_run_apart_runs_whole_forwards():
    bridge = clearspan.boot(build("gpt2"))
    bridge.adapter.whole_forwards = "its blocks are not run apart"
    tokens = torch.randint(1, 97, (2, 2, 7), generator=torch.Generator().manual_seed(1))
    cells = Grid.of(
        {
            "embedding": Intervention("embed", Scale(2.0), positions=2),
            "stream": Intervention("resid_pre", Patch(), layer=1, positions=(3, 5)),
            "head": Intervention("z", Zero(), layer=0, heads=1),
            "end": Intervention("resid_post", Patch(), layer=bridge.cfg.n_layers - 1, positions=6),
        }
    )
    background = [Intervention("mlp_out", Scale(0.5), layer=0)]
    sweep = Sweep(bridge, tokens[0], cells, METRIC, sources={"clean": tokens[1]}, background=background)
    assert "way: whole forwards, since its blocks are not run apart" in str(sweep.plan())
    sweep.run(progress=False)
    assert sweep.check(4) < 2e-5


def test_rows_that_go_on_otherwise_than_the_model_are_noticed(tokens):
    """A model that counts something of its own in its first positions cannot be run behind these."""
    model = tiny_model()
    bridge = clearspan.boot(model)
    model.transformer.h[1].register_forward_hook(
        lambda module, args, output: (
            (output[0] * output[0].shape[1],) if isinstance(output, tuple) else output * output.shape[1]
        )
    )
    sweep = Sweep(bridge, tokens, grid("resid_pre", Scale(0.5), layer=range(3), position=range(7)), METRIC)
    plan = sweep.plan()
    assert (plan.way.in_one, plan.way.after_prefix) == (True, False)
    assert "whole sequences, since rows that go on from the plain run end otherwise than it" in str(plan)
    sweep.run(progress=False)
    assert sweep.check(21) < 2e-5


class Paired(GPTBigCodeBlock):
    """A block that is given something which depends on the rows twice."""

    pairs: torch.Tensor

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **{**kwargs, "pairs": self.pairs})

    def forward(self, *args, pairs=None, **kwargs):
        assert pairs.shape == (len(args[0]),) * 2
        return super().forward(*args, **kwargs)


def test_a_batch_that_cannot_grow_after_all_is_run_from_layer_to_layer(bridge, tokens, others):
    sweep = Sweep(bridge, tokens, STREAM, METRIC, sources={"clean": others})
    assert sweep.plan().way.in_one

    def give(module, args, kwargs):
        rows = len(next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None))
        for block in bridge.hf_model.transformer.h:
            block.pairs = torch.zeros(rows, rows)

    bridge.hf_model.register_forward_pre_hook(give, with_kwargs=True)
    for block in bridge.hf_model.transformer.h:
        block.__class__ = Paired
    sweep.run(progress=False)
    assert sweep.check(21) < 2e-5


MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
HALF = Intervention("mlp_out", Scale(0.5), layer=0)


@pytest.mark.parametrize(
    ("what", "point", "together"),
    [
        ("tokens", "resid_pre", True),
        ("several", "z", True),
        ("padded alike", "resid_mid", True),
        ("padded otherwise", "resid_pre", False),
        ("one row", "resid_pre", False),
        ("embeddings", "resid_pre", False),
        ("a background", "resid_pre", False),
        ("many tokens", "resid_pre", False),
        ("tokens", "pattern", False),  # attention is another one where its pattern is kept
    ],
)
def test_sources_are_rows_of_the_base_runs_forward_where_that_changes_nothing(
    bridge, tokens, others, what, point, together
):
    given, mask = {"clean": others}, None
    match what:
        case "several":
            given["other"] = tokens.flip(1)
        case "padded alike":
            mask, given["clean"] = MASK, {"input_ids": others, "attention_mask": MASK}
            given["other"] = {"input_ids": others.flip(0), "attention_mask": MASK}
        case "padded otherwise":
            mask, given["clean"] = MASK, {"input_ids": others.flip(1), "attention_mask": MASK.flip(1)}
        case "one row":
            given["clean"] = others[:1]
        case "embeddings":
            given["clean"] = bridge.hf_model.get_input_embeddings()(others).detach()
    cells = {
        f"{name} {layer}": Intervention(point, Patch(name), layer=layer, positions=-2)
        for name in given
        for layer in range(3)
    }
    sweep = Sweep(
        bridge,
        tokens,
        Grid.of(cells),
        {"difference": METRIC, "divergence": KLDivergence("clean")} if what != "one row" else METRIC,
        sources=given,
        background=[HALF] if what == "a background" else [],
        attention_mask=mask,
    )
    costs = Costs(1.0, 100.0, 100.0, 0.0, most=16 if what == "many tokens" else 1024)
    plan = sweep.plan(costs=costs)
    assert plan.together == (tuple(given) if together else ())
    assert len(plan.tiles) == 1
    ran = []
    handle = bridge.hf_model.transformer.h[0].ln_1.register_forward_pre_hook(
        lambda module, args: ran.append(len(args[0]))
    )
    sweep.run(costs=costs, progress=False)
    handle.remove()
    assert ran[:-1] == ([2 * (1 + len(given))] if together else [2, len(given["clean"])])
    assert sweep.check(len(cells)) < 2e-5
    for name, found in sweep.result().sources.items():
        source = bridge.to_batch(given[name])
        torch.testing.assert_close(found["difference"], METRIC.measure(bridge(source), Context(source)))


class Louder(GPTBigCodeBlock):
    """A block that is given how loud its input is: the same for all rows, or different ones."""

    volume: torch.Tensor

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **{**kwargs, "volume": self.volume})

    def forward(self, hidden_states, *args, volume=None, **kwargs):
        return super().forward(hidden_states * volume[..., None], *args, **kwargs)


def test_what_blocks_are_given_is_looked_at_again_where_it_has_another_shape(tokens, others):
    """Of few positions blocks are told one volume for all rows, of many one for each."""
    model = tiny_model()
    bridge = clearspan.boot(model)
    for block in model.transformer.h:
        block.__class__ = Louder

    def give(module, args, kwargs):
        value = next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
        rows, positions = value.shape[:2]
        by_row = 1 + 0.5 * (torch.arange(rows) % 2)
        volume = by_row[:, None].expand(rows, positions) if positions > 3 else torch.ones(1, positions)
        for block in model.transformer.h:
            block.volume = volume

    model.register_forward_pre_hook(give, with_kwargs=True)
    costs = Costs(token=1.0, floor=1e6, start=1e6, join=0.0, most=1024)
    for width in (3, 7):
        cells = grid("resid_pre", Patch(), layer=range(3), position=range(width))
        sweep = Sweep(bridge, tokens[:, :width], cells, METRIC, sources={"clean": others[:, :width]})
        plan = sweep.plan(costs=costs)
        assert plan.way.in_one
        assert len(plan.tiles) == 1
        sweep.run(costs=costs, progress=False)
        assert sweep.check(3 * width) < 2e-5


def test_a_plan_of_a_model_in_training_mode_raises(bridge, tokens):
    sweep = Sweep(bridge, tokens, STREAM, METRIC, sources={"clean": tokens})
    bridge.hf_model.train()
    with pytest.raises(InvalidArgumentError, match="evaluation mode"):
        sweep.plan()
    bridge.hf_model.eval()


def test_costs_choose_the_batches(bridge, tokens, others):
    sweep = Sweep(bridge, tokens, STREAM, METRIC, sources={"clean": others})
    by_tokens, by_forwards = (
        sweep.plan(costs=Costs(token=1.0, floor=floor, start=floor, join=0.0, most=1024)) for floor in (0.0, 1e6)
    )
    assert len(by_tokens.tiles) == 7  # each position behind the ones before
    assert len(by_forwards.tiles) == 1
    assert by_tokens.forwards < by_forwards.forwards
    assert by_tokens.seconds == pytest.approx(by_tokens.forwards * 3 * tokens.numel())  # of 3 layers, a second a token


@pytest.mark.parametrize("whole", [None, "its blocks are not run apart"])
def test_costs_are_measured_once(bridge, whole):
    bridge.adapter.whole_forwards = whole
    found = Costs.of(bridge)
    assert found.token > 0
    assert min(found.floor, found.start, found.join) >= 0
    assert Costs.of(bridge) == found


def test_planned_kernels_are_allowed_again_after_the_last_run_without_them():
    device, are_allowed = torch.device("cuda"), torch.backends.cuda.cudnn_sdp_enabled
    before = are_allowed()
    with unplanned(device):
        with pytest.raises(KeyError), unplanned(device):
            assert not are_allowed()
            raise KeyError
        assert not are_allowed()
    assert are_allowed() == before
    with unplanned(torch.device("cpu")):
        assert are_allowed() == before
