import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import clearspan
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Add, Intervention, Mean, Patch, Scale, Zero
from clearspan.sweep import (
    Costs,
    Experiment,
    Grid,
    KLDivergence,
    LogitDifference,
    NextTokenLoss,
    Probability,
    Sweep,
    grid,
)
from clearspan.sweep.execution import Execution


@pytest.fixture
def others():
    return torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(5))


def _reference(bridge, tokens, others, metric):
    """Returns the sweep over the residual stream by a forward for each cell, with hooks."""
    with torch.no_grad():
        _, clean = bridge.run_with_cache(others)
        found = torch.empty(3, 7, 2)
        for layer in range(3):
            for position in range(7):

                def edit(value, hook, position=position, layer=layer):
                    value[:, position] = clean["resid_pre", layer][:, position]

                logits = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", edit)])
                found[layer, position] = metric(logits)
    return found


STREAM = grid("resid_pre", Patch(), layer=range(3), position=range(7))


def test_cells_equal_one_forward_each(bridge, tokens, others):
    metrics = {"difference": LogitDifference((1, 2), 3), "plain": lambda logits: logits[:, 3:, 4].sum(-1)}
    found = Sweep(bridge, tokens, STREAM, metrics, sources={"clean": others}).run(progress=False)
    for name, metric in metrics.items():
        expected = _reference(bridge, tokens, others, metric)
        torch.testing.assert_close(found.of(name), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(found.base[name], metric(bridge(tokens).detach()))
        torch.testing.assert_close(found.sources["clean"][name], metric(bridge(others).detach()))


def test_every_metric_reads_what_it_says(bridge, tokens, others):
    metrics = {
        "difference": LogitDifference(1, (3, 4), position=(2, -1)),
        "logit": LogitDifference(9),
        "probability": Probability((5, 6), position=4),
        "log probability": Probability(5, is_log=True),
        "from base": KLDivergence(),
        "from clean": KLDivergence("clean", position=None),
        "loss": NextTokenLoss(),
    }
    sweep = Sweep(bridge, tokens, STREAM, metrics, sources={"clean": others})
    found = sweep.run(progress=False)
    assert sweep.check(21) < 2e-5
    with torch.no_grad():
        clean = bridge(others)
        logits = bridge(tokens, interventions=STREAM.cells[9], sources={"clean": others})
        probs, log_probs = logits.softmax(-1), logits.log_softmax(-1)
        loss = bridge(tokens, "loss", loss_per_token=True, interventions=STREAM.cells[9], sources={"clean": others})
        base = bridge(tokens).log_softmax(-1)[:, -1]
        reference = clean.log_softmax(-1)
    expected = {
        "difference": torch.stack([logits[0, 2, 1] - logits[0, 2, 3], logits[1, 6, 1] - logits[1, 6, 4]]),
        "logit": logits[:, 6, 9],
        "probability": torch.stack([probs[0, 4, 5], probs[1, 4, 6]]),
        "log probability": log_probs[:, 6, 5],
        "from base": (base.exp() * (base - log_probs[:, -1])).sum(-1),
        "from clean": (reference.exp() * (reference - log_probs)).sum(-1).mean(-1),
        "loss": loss.mean(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found.of(name)[1, 2], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.base["from base"], torch.zeros(2), atol=1e-6, rtol=0)


def test_nothing_but_what_metrics_read_is_unembedded(bridge, tokens, others):
    sweep, sizes = Sweep(bridge, tokens, STREAM, Probability(5), sources={"clean": others}), []
    sweep.plan()  # tries how the model can be run, the first time
    handle = bridge.hf_model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[:2]))
    sweep.run(progress=False)
    handle.remove()
    runs, *cells = sizes
    assert runs == (4, 7)  # the base run and the clean one
    assert {positions for _, positions in cells} == {1}
    assert sum(rows for rows, _ in cells) == 2 * 21


def test_earlier_positions_and_layers_are_not_run_again(bridge, tokens, others):
    sweep = Sweep(bridge, tokens, STREAM, LogitDifference(1), sources={"clean": others})
    plan, ran = sweep.plan(), []
    handles = [
        block.ln_1.register_forward_pre_hook(lambda module, args: ran.append(args[0].shape[:2].numel()))
        for block in bridge.hf_model.transformer.h
    ]
    sweep.run(progress=False)
    for handle in handles:
        handle.remove()
    whole = 3 * 2 * 7
    assert sum(ran) == pytest.approx((plan.forwards + 2) * whole)  # and the base run, and the clean one
    assert plan.forwards < 0.7 * 21


def test_cells_after_all_that_is_read_are_not_run(bridge, tokens, others):
    cells = grid("resid_pre", Patch(), layer=range(3), position=(5, 6))
    sweep, ran = Sweep(bridge, tokens, cells, LogitDifference(1, position=2), sources={"clean": others}), []
    sweep.plan()  # tries how the model can be run, the first time
    handle = bridge.hf_model.transformer.h[2].ln_1.register_forward_pre_hook(
        lambda module, args: ran.append(len(args[0]))
    )
    found = sweep.run(progress=False)
    handle.remove()
    assert ran == [4]  # the base run and the clean one
    assert not found.change().any()


def test_a_small_memory_makes_small_batches_and_no_other_number(bridge, tokens, others):
    sweep = Sweep(bridge, tokens, STREAM, LogitDifference(1, 2), sources={"clean": others})
    whole = sweep.run(progress=False)
    small = Sweep(bridge, tokens, STREAM, LogitDifference(1, 2), sources={"clean": others})
    plan = small.plan(memory=100_000)
    assert len(plan.tiles) > 4
    assert max(len(tile.cells) for tile in plan.tiles) < 4
    torch.testing.assert_close(small.run(memory=100_000, progress=False).of(), whole.of(), rtol=1e-5, atol=1e-5)


def test_a_batch_for_which_memory_is_short_is_run_in_halves(bridge, tokens, others, monkeypatch):
    run, tried = Execution.run, []

    def run_few(self, tile):
        tried.append(len(tile.cells))
        if len(tile.cells) > 3:
            raise torch.OutOfMemoryError("no memory")
        return run(self, tile)

    expected = Sweep(bridge, tokens, STREAM, LogitDifference(1), sources={"clean": others}).run(progress=False)
    monkeypatch.setattr(Execution, "run", run_few)
    found = Sweep(bridge, tokens, STREAM, LogitDifference(1), sources={"clean": others}).run(progress=False)
    assert max(tried) > 3
    torch.testing.assert_close(found.of(), expected.of(), rtol=1e-5, atol=1e-5)


def test_other_errors_are_not_taken_for_a_lack_of_memory(bridge, tokens):
    def metric(logits):
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        Sweep(bridge, tokens, STREAM, metric, sources={"clean": tokens}).run(progress=False)


class Interrupting:
    """A metric that is interrupted, as by Ctrl-C, after some calls."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, logits):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return logits[:, -1, 3]


def test_what_is_done_is_kept_when_interrupted(bridge, tokens, others):
    metric = Interrupting(12)
    sweep = Sweep(bridge, tokens, STREAM, metric, sources={"clean": others})
    with pytest.raises(KeyboardInterrupt):
        sweep.run(memory=100_000, progress=False)
    part = sweep.result().of()
    done = ~part.isnan()
    assert 0 < done.sum() < done.numel()
    left = metric.left = 10_000
    whole = sweep.run(progress=False)
    # Base and clean run, and the cells that were left.
    assert left - metric.left == (~done).sum() / 2 + 1
    assert not whole.of().isnan().any()
    torch.testing.assert_close(whole.of()[done], part[done], rtol=0, atol=0)


def test_a_stored_sweep_goes_on_and_gives_the_same_figures(bridge, tokens, others, tmp_path):
    metrics = {"difference": LogitDifference((1, 2), 3), "loss": NextTokenLoss()}
    background = [
        Intervention("mlp_out", Add(tuple(0.5 * (-1) ** i * (i % 5) for i in range(48))), layer=1, positions=2)
    ]
    sweep = Sweep(bridge, tokens, STREAM, metrics, sources={"clean": others}, background=background)
    whole = sweep.run(progress=False)
    again = Sweep.of(Experiment.from_json(sweep.experiment().to_json()), bridge).run(progress=False)
    for name in metrics:
        assert torch.equal(again.of(name), whole.of(name))
    sweep.findings.done[4:] = False
    sweep.save(tmp_path / "sweep.safetensors")
    loaded = Sweep.load(tmp_path / "sweep.safetensors", bridge)
    assert loaded.plan().cells == 17
    resumed = loaded.run(progress=False)
    for name in metrics:
        torch.testing.assert_close(resumed.of(name), whole.of(name), rtol=1e-5, atol=1e-5)
    assert resumed.base.keys() == whole.base.keys()
    torch.testing.assert_close(resumed.normalised(), again.normalised(), rtol=1e-4, atol=1e-4)
    sweep.experiment().save(tmp_path / "experiment.json")
    assert Experiment.load(tmp_path / "experiment.json") == sweep.experiment()
    assert set(json.loads((tmp_path / "experiment.json").read_text())["versions"]) == {
        "clearspan",
        "torch",
        "transformers",
    }


def test_an_experiment_of_another_model_is_refused(bridge, tokens, others, make_bridge):
    experiment = Sweep(bridge, tokens, STREAM, LogitDifference(1), sources={"clean": others}).experiment()
    other = make_bridge()
    with torch.no_grad():
        other.hf_model.transformer.wte.weight[0, 0] += 1
    with pytest.raises(InvalidArgumentError, match="the experiment was made for another model") as error:
        Sweep.of(experiment, other)
    assert "GPTBigCodeForCausalLM" in str(error.value)


def _interrupted(bridge, tokens, others):
    """A sweep that was stopped after its first batch."""
    sweep = Sweep(bridge, tokens, STREAM, LogitDifference(1, 2), sources={"clean": others})

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run(1, progress=stop)
    assert 0 < int(sweep.findings.done.sum()) < len(sweep.findings.done)
    return sweep


@pytest.mark.parametrize("name", ["transformer.h.1.attn.c_proj.weight", "transformer.ln_f.bias"])
@pytest.mark.parametrize("way", ["in place", "loaded", "as an experiment"])
def test_a_sweep_does_not_go_on_with_other_weights(tokens, others, make_bridge, tmp_path, name, way):
    bridge = make_bridge()
    sweep = _interrupted(bridge, tokens, others)
    path = tmp_path / "sweep.safetensors"
    sweep.save(path)
    loaded = Sweep.load(path, bridge)
    experiment = sweep.experiment()
    bridge.hf_model.get_parameter(name).data.view(-1)[20] += 0.1  # as PEFT merges: no counter of torch's tells
    with pytest.raises(InvalidArgumentError, match=r"the weights are not those|made for another model"):
        match way:
            case "in place":
                sweep.run(progress=False)
            case "loaded":
                with pytest.raises(InvalidArgumentError, match="made for another model"):
                    Sweep.load(path, bridge)
                loaded.run(progress=False)
            case "as an experiment":
                Sweep.of(experiment, bridge)
    bridge.hf_model.get_parameter(name).data.view(-1)[20] -= 0.1


@pytest.mark.parametrize("is_merged", [True, False])
def test_a_sweep_does_not_go_on_after_an_adapter_was_merged(tokens, others, make_bridge, tmp_path, is_merged):
    bridge = make_bridge()
    sweep = _interrupted(bridge, tokens, others)
    sweep.save(tmp_path / "sweep.safetensors")
    weight = bridge.blocks[1].attn.module.c_attn.weight
    version, before = weight._version, weight.detach().clone()
    adapted = peft.get_peft_model(bridge.hf_model, peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False))
    (adapted.merge_and_unload if is_merged else adapted.unload)()
    assert bridge.blocks[1].attn.module.c_attn.weight is weight
    assert weight._version == version  # torch does not count the merge
    assert torch.equal(weight, before) != is_merged
    if not is_merged:
        Sweep.load(tmp_path / "sweep.safetensors", bridge).run(progress=False)
        return
    with pytest.raises(InvalidArgumentError, match="the weights are not those"):
        sweep.run(progress=False)
    with pytest.raises(InvalidArgumentError, match="made for another model"):
        Sweep.load(tmp_path / "sweep.safetensors", bridge)


def test_a_sweep_that_was_interrupted_goes_on(bridge, tokens, others):
    whole = Sweep(bridge, tokens, STREAM, LogitDifference(1, 2), sources={"clean": others}).run(progress=False)
    found = _interrupted(bridge, tokens, others).run(progress=False)
    torch.testing.assert_close(found.of(), whole.of(), rtol=1e-5, atol=1e-5)


def _damaged(path, way):
    """Damages a stored sweep."""
    tensors = {name: one.clone() for name, one in load_file(path).items()}  # which are read from the file when used
    metadata = safe_open(path, "pt").metadata()
    match way:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(path.read_bytes()[:-40])
        case "pickle":
            torch.save(tensors, path)
        case "no cells":
            save_file({name: one for name, one in tensors.items() if name != "done"}, path, metadata)
        case "fewer cells":
            save_file({**tensors, "done": tensors["done"][:3].clone()}, path, metadata)
        case "another metric":
            save_file({name.replace("difference", "loss"): one for name, one in tensors.items()}, path, metadata)
        case "fewer values":
            name = next(name for name in tensors if name.startswith("values/"))
            save_file({**tensors, name: tensors[name][:3].clone()}, path, metadata)
        case "no experiment":
            save_file(tensors, path, {"format": metadata["format"]})
        case "half an experiment":
            data = json.loads(metadata["experiment"])
            del data["grid"]
            save_file(tensors, path, {**metadata, "experiment": json.dumps(data)})
        case "odd rows":
            data = json.loads(metadata["experiment"])
            data["input"]["tokens"] = [3]
            save_file(tensors, path, {**metadata, "experiment": json.dumps(data)})


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("empty", "sweep.safetensors is no sweep"),
        ("truncated", "sweep.safetensors is no sweep"),
        ("pickle", "sweep.safetensors is no sweep"),
        ("no cells", "sweep.safetensors is damaged\n  reason: which cells were run is not told"),
        ("fewer cells", "sweep.safetensors is damaged"),
        ("another metric", "is no finding of this sweep"),
        ("fewer values", "is no finding of this sweep"),
        ("no experiment", "this is no experiment"),
        ("half an experiment", "this experiment is damaged\n  reason: 'grid'"),
        ("odd rows", "this experiment is damaged"),
    ],
)
def test_a_damaged_file_is_named(bridge, tokens, others, tmp_path, way, message):
    path = tmp_path / "sweep.safetensors"
    _interrupted(bridge, tokens, others).save(path)
    _damaged(path, way)
    with pytest.raises(InvalidArgumentError) as error:
        Sweep.load(path, bridge)
    assert message in str(error.value)
    assert path.name in str(error.value)


def test_a_sweep_is_saved_over_the_file_that_it_came_from(bridge, tokens, others, tmp_path):
    path = tmp_path / "sweep.safetensors"
    _interrupted(bridge, tokens, others).save(path)
    loaded = Sweep.load(path, bridge)
    first = {name: one.clone() for name, one in loaded.findings.tensors().items()}
    again = Sweep.load(path, bridge)
    loaded.run(progress=False)
    loaded.save(path)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    for name, one in again.findings.tensors().items():
        torch.testing.assert_close(one, first[name], equal_nan=True)
    assert Sweep.load(path, bridge).plan().cells == 0
    with pytest.raises(InvalidArgumentError, match="there is no folder"):
        loaded.save(tmp_path / "nowhere" / "sweep.safetensors")


def test_what_is_no_data_cannot_be_stored(bridge, tokens, others):
    _, cache = bridge.run_with_cache(others)
    sweep = Sweep(bridge, tokens, STREAM, {"mine": lambda logits: logits[:, -1, 0]}, sources={"clean": cache})
    with pytest.raises(InvalidArgumentError) as error:
        sweep.experiment()
    assert str(error.value) == (
        "'mine', 'clean' cannot be stored\n"
        "  reason: a plain function or a cache is no data\n"
        "  fix: a metric of clearspan.sweep, and sources as text or token ids"
    )


def test_a_file_that_is_no_sweep(bridge, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InvalidArgumentError, match=r"x\.safetensors is no sweep"):
        Sweep.load(tmp_path / "x.safetensors", bridge)


def test_the_model_is_left_as_it_was(bridge, tokens, others):
    before = bridge(tokens)
    Sweep(bridge, tokens, STREAM, LogitDifference(1), sources={"clean": others}).run(progress=False)
    assert torch.equal(bridge(tokens), before)
    assert not any(point.is_listening for point in bridge.index)
    for module in bridge.hf_model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_results_have_errors_effects_and_a_table(bridge, tokens, others):
    found = Sweep(bridge, tokens, STREAM, LogitDifference(1, 2), sources={"clean": others}).run(progress=False)
    change = found.of() - found.base["logit_difference"]
    torch.testing.assert_close(found.standard_error(), change.std(-1) / 2**0.5)
    interval = found.interval()
    assert (interval.low <= interval.mean).all()
    base, clean = found.base["logit_difference"].mean(), found.sources["clean"]["logit_difference"].mean()
    torch.testing.assert_close(found.normalised(), (found.mean() - base) / (clean - base))
    frame = found.to_dataframe()
    assert list(frame.columns) == ["layer", "position", "logit_difference", "change", "standard error"]
    assert frame["change"][8] == pytest.approx(change[1, 1].mean().item())
    assert str(found).splitlines()[0] == (
        f"logit_difference in logits with one cell of layer, position changed; {base:.4f} without; mean over 2 rows"
    )
    assert found.plot().data[0].z[1][1] == pytest.approx(change[1, 1].mean().item(), abs=1e-4)


def test_pictures_of_more_than_two_axes_are_asked_for_by_label(bridge, tokens, others):
    cells = grid("z", Patch(), layer=range(2), position=(1, 2), head=range(4))
    found = Sweep(bridge, tokens, cells, LogitDifference(1), sources={"clean": others}).run(progress=False)
    with pytest.raises(InvalidArgumentError, match="a picture has one axis or two, and there are 3"):
        found.plot()
    change = found.change().mean(-1)
    assert found.plot(head=2).data[0].z[1][0] == pytest.approx(change[1, 0, 2].item(), abs=1e-4)
    assert list(found.plot(head=2, position=2).data[0].y) == pytest.approx(change[:, 1, 2].tolist())
    with pytest.raises(InvalidArgumentError, match="there is no head=9"):
        found.plot(head=9)


def test_a_source_given_as_a_cache_has_no_metric(bridge, tokens, others):
    _, cache = bridge.run_with_cache(others)
    found = Sweep(bridge, tokens, STREAM, LogitDifference(1), sources={"clean": cache}).run(progress=False)
    with pytest.raises(InvalidArgumentError, match="the metric of the source run 'clean' is not known"):
        found.normalised()


def test_hooks_and_training_are_refused(bridge, tokens):
    sweep = Sweep(bridge, tokens, STREAM, LogitDifference(1), sources={"clean": tokens})
    listening = bridge.hooks([("blocks.1.hook_mlp_out", lambda value, hook: None)])
    with listening, pytest.raises(InvalidArgumentError) as error:
        sweep.run(progress=False)
    assert str(error.value) == (
        "hooks are on the model, which would be called with the rows and positions of batches\n"
        "  where: blocks.1.hook_mlp_out\n"
        "  fix: bridge.reset_hooks(), or background=[...] for what is to be done in every cell"
    )
    bridge.hf_model.train()
    with pytest.raises(InvalidArgumentError, match="runs are compared on a model in evaluation mode"):
        sweep.run(progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid("z", layer=[1]), "a grid has one action"),
        (lambda: grid("z", Zero(), layers=[1]), "a grid cannot have the axis layers=[1]\n  expected: places on layer,"),
        (lambda: grid("z", Zero(), layer=[]), "a grid cannot have the axis layer=[]"),
        (
            lambda: Grid((("layer", (0, 1)),), ((),)),
            "the cells do not fill the axes\n  expected: 2, more than 0\n  got: 1",
        ),
        (
            lambda: Grid.stacked({"a": grid("z", Zero(), layer=[0]), "b": grid("z", Zero(), layer=[0, 1])}),
            "the grid 'b' has other axes\n  expected: (1,)\n  got: (2,)",
        ),
    ],
)  # fmt: skip
def test_grids_that_are_none(make, message):
    with pytest.raises(InvalidArgumentError) as error:
        make()
    assert str(error.value).startswith(message)


def test_grids_are_data():
    stacked = Grid.stacked({"out": grid("z", Zero(), layer=range(2)), "in": grid("q", Scale(2.0), layer=range(2))})
    assert stacked.shape == (2, 2)
    assert Grid.from_json(json.loads(json.dumps(stacked.to_json()))) == stacked
    assert stacked.cells[3] == (Intervention("q", Scale(2.0), layer=1),)
    several = grid(Intervention("z", Mean(), heads=1), position=[(0, 1), 4], layer=(2,))
    assert several.cells[0][0] == Intervention("z", Mean(), layer=2, heads=1, positions=(0, 1))
    assert Grid.from_json(json.loads(json.dumps(several.to_json()))) == several


def test_metrics_name_what_does_not_fit(bridge, tokens):
    with pytest.raises(InvalidArgumentError, match="row 0 has no position of the metric 9"):
        Sweep(bridge, tokens, STREAM, LogitDifference(1, position=9), sources={"clean": tokens}).plan()
    with pytest.raises(InvalidArgumentError, match="the metric's tokens are not one for each row"):
        Sweep(bridge, tokens, STREAM, LogitDifference((1, 2, 3)), sources={"clean": tokens}).run(progress=False)
    with pytest.raises(InvalidArgumentError, match="the metric is not a number for each row"):
        Sweep(bridge, tokens, STREAM, lambda logits: logits[0], sources={"clean": tokens}).run(progress=False)
    with pytest.raises(InvalidArgumentError, match="KLDivergence compares with the run 'other'"):
        Sweep(bridge, tokens, STREAM, KLDivergence("other"), sources={"clean": tokens}).run(progress=False)


def test_the_plan_says_what_it_will_do(embedded):
    tokens = embedded.to_tokens("import os\nimport sys\nimport re\n")
    cells = grid("resid_pre", Scale(0.5), layer=range(5), position=range(tokens.shape[1]))
    sweep = Sweep(embedded, tokens, cells, LogitDifference(5, 6))
    costs = Costs(token=1.0, floor=1e6, start=1e6, join=0.0, most=1024)
    assert str(sweep.plan(memory=10**9, costs=costs)).startswith(f"{len(cells.cells)} cells in 1 batch: the work of ")
    plan = sweep.plan(memory=10**9, costs=replace(costs, floor=0.0, start=0.0))
    lines = str(plan).splitlines()
    assert lines[0].startswith(f"{len(cells.cells)} cells in {len(plan.tiles)} batches: the work of ")
    assert (
        lines[1] == f"input: 1 row of {tokens.shape[1]} positions; logits: 2 tokens at position {tokens.shape[1] - 1}"
    )
    assert lines[2] == "positions: from the first that changes, on the base run's keys and values"
    assert lines[3] == "way: one forward a batch, which cells join at their layers"
    assert lines[4].split() == ["positions", "layers", "cells", "tokens", "forwards", "bytes"]
    assert len(lines) == 5 + len(plan.tiles)


def test_a_mask_of_four_axes_runs_whole_sequences(bridge, tokens):
    mask = torch.ones(7, 7).tril().bool().expand(2, 1, 7, 7)
    cells = grid("resid_pre", Scale(0.5), layer=range(3), position=range(7))
    sweep = Sweep(bridge, tokens, cells, LogitDifference(5), attention_mask=mask)
    assert "whole sequences, since the attention mask is not one of padding" in str(sweep.plan())
    sweep.run(progress=False)
    assert sweep.check(21) < 2e-5


def test_clearspan_names_them():
    assert clearspan.Sweep is Sweep
    assert clearspan.Intervention is Intervention


def test_the_cells_of_a_grid_are_its_intervention_at_each_place():
    template = Intervention("z", Scale(2.0), every_step=True)
    made = grid(template, layer=(0, -1), position=(3, (1, 2)), head=range(2))
    assert made.cells == tuple(
        (template.at(layer=layer, positions=position, heads=head),)
        for layer in (0, -1)
        for position in (3, (1, 2))
        for head in range(2)
    )
    with pytest.raises(InvalidArgumentError, match="columns take the place of positions"):
        grid(Intervention("z", Scale(2.0), columns=1), layer=range(2), position=range(2))


def test_cells_that_share_a_point_an_action_or_positions_are_told_apart(bridge, tokens, others):
    patch, double = Patch(), Scale(2.0)
    cells = {
        f"{layer} {heads} {positions} {action.kind}": Intervention(
            "z", action, layer=layer, heads=heads, positions=positions
        )
        for layer in range(2)
        for heads in (None, 1, (0, 2))
        for positions in (None, 3, slice(2, None), [[1], [4]])
        for action in (patch, double)
    }
    sweep = Sweep(bridge, tokens, Grid.of(cells), LogitDifference(1, 2), sources={"clean": others})
    sweep.run(progress=False)
    assert sweep.check(len(cells)) < 2e-5


def test_places_that_a_point_lacks_raise_behind_cells_that_have_none(bridge, tokens):
    zero = Zero()
    cells = {
        "all": Intervention("resid_pre", zero, layer=0),
        "keys": Intervention("resid_pre", zero, layer=0, key_positions=1),
    }
    with pytest.raises(InvalidArgumentError, match="hook_resid_pre has no key positions"):
        Sweep(bridge, tokens, Grid.of(cells), LogitDifference(1))
