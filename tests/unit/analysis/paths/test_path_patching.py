import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan.analysis.paths.path_patching import path_patching
from clearspan.errors import InvalidArgumentError
from clearspan.sweep import LogitDifference

VARIANTS = [
    "gpt_bigcode",
    "gpt_bigcode multi-head",
    "llama",
    "gemma2",
    "gpt_neox",
    "granite",
    "opt",
    "mixtral",
    "falcon grouped",
    "cohere2",
]
METRIC = LogitDifference(3, 5)


@pytest.fixture(params=VARIANTS, scope="module")
def bridge(request):
    return clearspan.boot(build(request.param))


@pytest.fixture(scope="module")
def runs():
    return torch.randint(1, 97, (2, 2, 6), generator=torch.Generator().manual_seed(8))


def _set(value, hook):
    """Returns a hook that writes one value."""
    return lambda given, hook: value


def _frozen_streams(bridge, base, cache, sender, written, names, frozen):
    """Returns the streams when a sender writes something else and later parts are frozen, by one whole run."""
    seen = {}

    def keep(value, hook):
        seen[hook.name] = value.clone()

    layer, point, head = sender
    hooks = []
    if point == "embed":
        hooks.append(("blocks.0.hook_resid_pre", _set(written, None)))
    elif point == "mlp":
        hooks.append((f"blocks.{layer}.hook_mlp_out", _set(written, None)))
    else:

        def write(value, hook):
            value[:, :, head] = written[:, :, head]

        hooks.append((f"blocks.{layer}.attn.hook_z", write))
    for later in range(bridge.cfg.n_layers):
        if later > layer:
            hooks.append((f"blocks.{later}.hook_attn_out", _set(cache["attn_out", later], None)))
        if frozen == "all" and (later > layer or (later == layer and point == "z")):
            hooks.append((f"blocks.{later}.hook_mlp_out", _set(cache["mlp_out", later], None)))
    bridge.run_with_hooks(base, fwd_hooks=[*hooks, *((name, keep) for name in names)])
    return seen


SENDERS = {"embed": (-1, "embed", None), "L0H2": (0, "z", 2), "L0.mlp": (0, "mlp", None), "L1H1": (1, "z", 1)}


@torch.no_grad()
@pytest.mark.parametrize("freeze", ["all", "attention"])
def test_each_path_is_what_frozen_runs_give(bridge, runs, freeze):
    clean, corrupted = runs
    receivers = ["L2H1.q", "L2H3.k", "L1H0.v", "L1.mlp", "logits"]
    found = path_patching(bridge, clean, corrupted, METRIC, list(SENDERS), receivers, freeze=freeze, progress=False)
    _, source = bridge.run_with_cache(clean)
    values = {"embed": source["resid_pre", 0], "mlp": source["mlp_out", 0]}
    streams = {
        "L2H1.q": ("blocks.2.hook_resid_pre", "blocks.2.hook_q_input", 1),
        "L2H3.k": ("blocks.2.hook_resid_pre", "blocks.2.hook_k_input", 3),
        "L1H0.v": ("blocks.1.hook_resid_pre", "blocks.1.hook_v_input", 0),
        "L1.mlp": ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_in", None),
        "logits": ("blocks.2.hook_resid_post", "blocks.2.hook_resid_post", None),
    }
    before = METRIC(bridge(corrupted))
    _, base = bridge.run_with_cache(corrupted)
    names = list(dict.fromkeys(stream for stream, _, _ in streams.values()))
    for row, (name, sender) in enumerate(SENDERS.items()):
        written = values.get(sender[1], source["z", max(sender[0], 0)])
        seen = _frozen_streams(bridge, corrupted, base, sender, written, names, freeze)
        for column, (reader, (stream, point, head)) in enumerate(streams.items()):
            carried = seen[stream]
            reaches = sender[0] < int(reader[1]) if reader != "logits" else True
            if reader == "L1.mlp" and name == "L1H1":
                reaches = not bridge.blocks[0].is_parallel

            def write(value, hook, carried=carried, head=head):
                if head is None:
                    return carried
                group = (
                    value.shape[2] * head // bridge.cfg.n_heads if hook.name.endswith(("k_input", "v_input")) else head
                )
                value[:, :, group] = carried
                return value

            expected = METRIC(bridge.run_with_hooks(corrupted, fwd_hooks=[(point, write)])) if reaches else before
            close = {"rtol": 1e-3, "atol": 2e-3 * float(before.abs().max() + 1)}
            torch.testing.assert_close(found.of()[row, column], expected, **close, msg=f"{name}->{reader}")


@torch.no_grad()
def test_neurons_send_too(runs):
    bridge = clearspan.boot(build("llama"))
    clean, corrupted = runs
    found = path_patching(bridge, clean, corrupted, METRIC, ["L0N7", "L1N3"], ["logits", "L2.mlp"], progress=False)
    _, source = bridge.run_with_cache(clean)
    _, base = bridge.run_with_cache(corrupted)
    for row, (layer, neuron) in enumerate([(0, 7), (1, 3)]):
        change = source["post", layer][..., neuron] - base["post", layer][..., neuron]
        added = change[..., None] * bridge.blocks[layer].mlp.W_out[neuron]
        expected = METRIC(bridge.read_out(base["resid_post", 2] + added))
        torch.testing.assert_close(found.of()[row, 0], expected, rtol=1e-4, atol=1e-4)


def test_the_two_directions_start_from_the_two_runs(runs):
    bridge = clearspan.boot(build("gpt_bigcode"))
    clean, corrupted = runs
    denoised = path_patching(bridge, clean, corrupted, METRIC, ["L0H1"], ["logits"], progress=False)
    noised = path_patching(bridge, clean, corrupted, METRIC, ["L0H1"], ["logits"], direction="noising", progress=False)
    torch.testing.assert_close(denoised.base["logit_difference"], METRIC(bridge(corrupted)).detach())
    torch.testing.assert_close(noised.base["logit_difference"], METRIC(bridge(clean)).detach())
    assert denoised.axes == {"sender": ("L0H1",), "receiver": ("logits",)}


@pytest.mark.parametrize(
    ("senders", "receivers", "settings", "message"),
    [
        (["L0H9"], ["logits"], {}, "there is no node 'L0H9'"),
        (["logits"], ["logits"], {}, "'logits' writes nothing to the residual stream"),
        (["L0N999"], ["logits"], {}, "there is no neuron 'L0N999'"),
        (["L0H0"], ["embed"], {}, "'embed' reads no residual stream"),
        (["L0H0"], ["L7H1.q"], {}, "there is no node 'L7H1.q'"),
        (["L0H0"], ["logits"], {"freeze": "mlp"}, "unknown freeze='mlp'"),
    ],
)
def test_mistakes_are_named(runs, senders, receivers, settings, message):
    bridge = clearspan.boot(build("gpt_bigcode"))
    with pytest.raises(InvalidArgumentError, match=message):
        path_patching(bridge, *runs, METRIC, senders, receivers, progress=False, **settings)


def test_a_stream_that_is_no_sum_is_refused(runs):
    bridge = clearspan.boot(build("opt post-norm"))
    with pytest.raises(InvalidArgumentError, match="is not the sum of what its parts write"):
        path_patching(bridge, *runs, METRIC, ["L0H0"], ["logits"], progress=False)
