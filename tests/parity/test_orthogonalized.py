"""Directions taken out of weights: the stream has no component along them, as when every addition loses it in a run."""

import hashlib

import pytest
import torch
import transformers
from tests.adapted import adapted
from tests.zoo import MODELS, build

import clearspan
from clearspan import zoo
from clearspan.architectures import find_adapter
from clearspan.errors import InexactProcessingError, InvalidArgumentError, UnreadableWeightError
from clearspan.interventions import Intervention, ProjectOut

pytestmark = pytest.mark.filterwarnings("ignore::clearspan.errors.DerivedWarning")

NORMED = {"gemma2", "gemma3", "olmo2", "bloom"}
"""Variants where a norm comes after sublayers or the embedding."""
NO_SUM = {"opt post-norm", "bloom normed residual"}
"""Variants whose stream is itself normed."""
ZERO = 1e-6
"""Of the stream's largest value; measured at most 3e-7 in all model types of transformers."""
SAME = 1e-4
"""In logits; measured at most 3e-5."""


def randomised(model):
    """Gives norms and biases that are not 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(1))


def directions(bridge, count=2):
    return torch.randn(count, bridge.cfg.d_model, generator=torch.Generator().manual_seed(2))


def additions(bridge):
    """Names of the points of all that is added to the stream."""
    embeddings = [name for name in ("hook_embed", "hook_pos_embed", "hook_type_embed") if name in bridge.hook_dict]
    return embeddings + [sublayer.hook_out for block in bridge.blocks for sublayer in block.sublayers]


def projected(bridge, given, names):
    """Hooks that take directions out of what is added at some points."""
    basis = torch.linalg.qr(given.T).Q

    def project(value, hook):
        columns = basis.to(value)
        return value - value @ columns @ columns.T

    return [(name, project) for name in names]


def largest(bridge, ids, given):
    """The largest component of the stream along directions, at any layer, relative to its largest value."""
    _, cache = bridge.run_with_cache(ids)
    units = (given / given.norm(dim=-1, keepdim=True)).T
    streams = [cache["resid_pre", 0], *(cache["resid_post", layer] for layer in range(bridge.cfg.n_layers))]
    return max(((stream @ units.to(stream)).abs().max() / stream.abs().max()).item() for stream in streams)


def digest(model):
    """A hash of every parameter and buffer."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("variant", sorted({*MODELS} - NORMED - NO_SUM))
@torch.no_grad()
def test_the_stream_has_no_component_as_when_every_addition_loses_it_in_a_run(variant, ids):
    bridge = clearspan.boot(randomised(build(variant)))
    given, before = directions(bridge), digest(bridge.hf_model)
    new = bridge.orthogonalized(given)
    assert largest(bridge, ids, given) > 0.01
    assert largest(new, ids, given) < ZERO
    expected = bridge.run_with_hooks(ids, fwd_hooks=projected(bridge, given, additions(bridge)))
    torch.testing.assert_close(new(ids), expected, rtol=0, atol=SAME)
    assert digest(bridge.hf_model) == before


@pytest.mark.parametrize("name", ["jamba", "qwen3_next", "mamba2"])
@torch.no_grad()
def test_mixers_lose_it_too(name):
    bridge = clearspan.boot(randomised(zoo.build(name)))
    given = directions(bridge)
    ids = torch.randint(3, bridge.cfg.d_vocab, (2, 9), generator=torch.Generator().manual_seed(1))
    new = bridge.orthogonalized(given)
    assert largest(new, ids, given) < ZERO
    expected = bridge.run_with_hooks(ids, fwd_hooks=projected(bridge, given, additions(bridge)))
    torch.testing.assert_close(new(ids), expected, rtol=0, atol=SAME)


@torch.no_grad()
def test_one_direction_equals_interventions(ids):
    bridge = clearspan.boot(randomised(build("gpt2")))
    direction = directions(bridge, 1)[0]
    ablated = bridge(ids, interventions=[Intervention(name, ProjectOut.of(direction)) for name in additions(bridge)])
    torch.testing.assert_close(bridge.orthogonalized(direction)(ids), ablated, rtol=0, atol=SAME)
    torch.testing.assert_close(bridge.orthogonalized(-7 * direction)(ids), ablated, rtol=0, atol=SAME)
    doubled = torch.stack([direction, 2 * direction])
    new = bridge.orthogonalized(doubled)
    torch.testing.assert_close(new(ids), ablated, rtol=0, atol=SAME)
    assert [str(step) for step in new.processing] == ["orthogonalize: 1 direction taken out of what 8 parts write"]


@pytest.mark.parametrize("variant", sorted(NORMED))
@torch.no_grad()
def test_after_a_norm_it_is_refused_or_the_rest_is_normed_anew(variant, ids):
    bridge = clearspan.boot(randomised(build(variant)))
    given = directions(bridge)
    with pytest.raises(InexactProcessingError, match="norms its output, and the weights before it cannot keep"):
        bridge.orthogonalized(given)
    new = bridge.orthogonalized(given, rescale=True)
    assert largest(new, ids, given) < ZERO
    assert "normed anew" in str(new.processing[-1])
    norms = {name for name, _ in bridge.hf_model.named_parameters() if "norm" in name and name.endswith("weight")}
    assert norms
    assert all(new.hf_model.get_parameter(name) is bridge.hf_model.get_parameter(name) for name in norms)


@pytest.mark.parametrize("variant", sorted(NO_SUM))
def test_a_stream_that_is_normed_is_refused(variant):
    bridge = clearspan.boot(build(variant))
    with pytest.raises(InexactProcessingError, match=r"(?s)where: blocks.0.attn.*the stream after the block is not"):
        bridge.orthogonalized(directions(bridge), parts="attn", rescale=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("xglm", r"where: pos_embed in XGLM.*computed for each position, and has no weights"),
        ("diffllama", r"where: blocks.0.mixer in DiffLlama.*not known to come from linear maps"),
        ("gemma3n_text", r"where: blocks.0.attn in Gemma3n.*the stream after the block is not"),
        ("inkling_text", r"where: embed in Inkling.*its own module does more to a token's row: norm"),
    ],
)
def test_what_weights_cannot_be_without_is_refused_by_name(name, reason):
    bridge = clearspan.boot(zoo.build(name))
    with pytest.raises(InexactProcessingError, match=rf"(?s)cannot be taken out.*{reason}.*fix: .*ProjectOut"):
        bridge.orthogonalized(directions(bridge), rescale=True)


@pytest.mark.parametrize(
    ("parts", "layers", "names"),
    [
        ("mlp", None, ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out"]),
        (["attn", "mlp"], -1, ["blocks.2.hook_attn_out", "blocks.2.hook_mlp_out"]),
        (None, [0], ["blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"]),
        ("embed", None, ["hook_embed", "hook_pos_embed"]),
    ],
)
@torch.no_grad()
def test_chosen_parts_alone_lose_it(parts, layers, names, ids):
    bridge = clearspan.boot(randomised(build("gpt2")))
    given = directions(bridge)
    new = bridge.orthogonalized(given, parts=parts, layers=layers)
    expected = bridge.run_with_hooks(ids, fwd_hooks=projected(bridge, given, names))
    torch.testing.assert_close(new(ids), expected, rtol=0, atol=SAME)
    _, cache = new.run_with_cache(ids)
    for name in additions(bridge):
        assert ((cache[name] @ given.T).abs().max() < 1e-4) == (name in names), name
    assert bool(new.tied) == ("hook_embed" not in names)


def test_what_does_not_change_is_shared():
    bridge = clearspan.boot(randomised(build("gpt2")))
    own = {id(parameter) for parameter in bridge.hf_model.parameters()}
    new = bridge.orthogonalized(directions(bridge))
    changed = {name for name, parameter in new.hf_model.named_parameters() if id(parameter) not in own}
    writers = ("wte", "wpe", "attn.c_proj", "mlp.c_proj")
    assert changed == {name for name, _ in bridge.hf_model.named_parameters() if any(part in name for part in writers)}
    assert new.W_U.data_ptr() == bridge.W_U.data_ptr(), "the unembedding, once tied to the embedding, is kept"


@pytest.mark.parametrize("name", ["gpt2", "llama", "megatron-bert", "opt"])
@torch.no_grad()
def test_it_saves_and_loads_as_it_is(name, tmp_path):
    bridge = clearspan.boot(randomised(zoo.build(name)))
    new = bridge.orthogonalized(directions(bridge))
    assert new.tied == {}
    new.hf_model.save_pretrained(tmp_path)
    loaded = getattr(transformers, type(bridge.hf_model).__name__).from_pretrained(tmp_path).eval()
    ids = torch.randint(3, bridge.cfg.d_vocab, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(ids).logits, new(ids))


@torch.no_grad()
def test_what_an_adapter_writes_loses_it_too(ids):
    bridge = clearspan.boot(adapted("llama"))
    given = directions(bridge)
    new = bridge.orthogonalized(given)
    assert largest(new, ids, given) < ZERO
    expected = bridge.run_with_hooks(ids, fwd_hooks=projected(bridge, given, additions(bridge)))
    torch.testing.assert_close(new(ids), expected, rtol=0, atol=SAME)


@torch.no_grad()
def test_in_bfloat16_it_is_zero_to_the_rounding_of_the_weights(ids):
    bridge = clearspan.boot(randomised(build("llama")).bfloat16())
    given = directions(bridge)
    new = bridge.orthogonalized(given)
    assert new.W_O.dtype is torch.bfloat16
    assert largest(new, ids, given) < 0.02 < 0.05 < largest(bridge, ids, given)


def test_gradients_reach_the_new_weights_alone(ids):
    bridge = clearspan.boot(randomised(build("gpt2")))
    new = bridge.orthogonalized(directions(bridge))
    new(ids, return_type="loss").backward()
    assert new.blocks[0].attn.o.module.weight.grad is not None
    assert bridge.blocks[0].attn.o.module.weight.grad is None


def test_after_processing_it_is_the_same(ids):
    bridge = clearspan.boot(randomised(build("gpt2")))
    given = directions(bridge)
    new = bridge.processed(fold_value_biases=True, center_writing_weights=False, center_unembed=False)
    found = new.orthogonalized(given)
    assert [step.name for step in found.processing] == ["fold_ln", "fold_value_biases", "orthogonalize"]
    with torch.no_grad():
        torch.testing.assert_close(found(ids), bridge.orthogonalized(given)(ids), rtol=0, atol=SAME)


def test_an_offloaded_model_is_refused():
    bridge = clearspan.boot(build("gpt2"))
    bridge.blocks[0].attn.o.module.to("meta")
    with pytest.raises(UnreadableWeightError, match="offloaded model cannot be processed"):
        bridge.orthogonalized(directions(bridge))


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (torch.ones(47), {}, r"no directions of the residual stream\n  expected: \[48\] or \[k, 48\]\n  got: \[47\]"),
        (torch.ones(0, 48), {}, "no directions of the residual stream"),
        (torch.zeros(48), {}, "a direction is zero, infinite or NaN"),
        (torch.full((48,), torch.nan), {}, "a direction is zero, infinite or NaN"),
        ("up", {}, "directions='up'"),
        (torch.ones(48), {"parts": "mlps"}, r"parts='mlps'\n  expected: some of 'embed', 'attn', 'mixer', 'mlp'"),
        (torch.ones(48), {"parts": []}, r"parts=\[\]"),
        (torch.ones(48), {"layers": 3}, r"no layer 3\n  expected: -3 to 2"),
        (torch.ones(48), {"layers": "all"}, "layers='all'"),
        (torch.ones(48), {"parts": "mixer"}, "no part of these kinds"),
        (torch.ones(48), {"rescale": "yes"}, "rescale='yes'"),
    ],
)
def test_wrong_arguments(given, settings, message):
    bridge = clearspan.boot(build("gpt2"))
    with pytest.raises(InvalidArgumentError, match=message):
        bridge.orthogonalized(given, **settings)


def sharing(variant):
    """A bridge whose first two MLPs have one output weight."""
    model = randomised(build(variant))
    first, second = (model.get_submodule(f"model.layers.{layer}.mlp.down_proj") for layer in range(2))
    second.weight = first.weight
    return clearspan.boot(model)


@torch.no_grad()
def test_layers_that_share_a_weight_share_the_new_one(ids):
    bridge = sharing("llama")
    given = directions(bridge)
    new = bridge.orthogonalized(given)
    first, second = (new.hf_model.get_submodule(f"model.layers.{layer}.mlp.down_proj") for layer in range(2))
    assert first.weight is second.weight
    assert first.weight is not bridge.hf_model.model.layers[0].mlp.down_proj.weight
    assert largest(new, ids, given) < ZERO
    with pytest.raises(
        InexactProcessingError, match=r"parts alone(.|\n)*blocks.0.mlp and blocks.1.mlp share a parameter"
    ):
        bridge.orthogonalized(given, layers=0)


def test_a_shared_weight_that_two_norms_read_is_refused():
    bridge = sharing("gemma2")
    with pytest.raises(
        InexactProcessingError, match=r"where: weight of Linear(.|\n)*what they make of its output differs"
    ):
        bridge.orthogonalized(directions(bridge), rescale=True)


def by_channel(scale):
    """A bridge whose blocks multiply each channel of what sublayers add by a parameter of their own."""
    model = randomised(build("granite"))
    for layer in model.model.layers:
        layer.residual_multiplier = torch.nn.Parameter(scale.clone())

    class ByChannel(find_adapter("GraniteForCausalLM")):
        def mapping(self, cfg):
            mapping = super().mapping(cfg)
            mapping["blocks"].residual_multiplier = "residual_multiplier"
            return mapping

    return clearspan.boot(model, adapter=ByChannel)


@torch.no_grad()
def test_a_multiplier_of_each_channel_is_accounted_for(ids):
    bridge = by_channel(0.2 + torch.rand(48, generator=torch.Generator().manual_seed(3)))
    given = directions(bridge)
    new = bridge.orthogonalized(given)
    assert largest(new, ids, given) < ZERO
    expected = bridge.run_with_hooks(ids, fwd_hooks=projected(bridge, given, additions(bridge)))
    torch.testing.assert_close(new(ids), expected, rtol=0, atol=SAME)


def test_a_channel_that_is_multiplied_by_zero_is_refused():
    bridge = by_channel((torch.arange(48) > 0).float())
    with pytest.raises(InexactProcessingError, match="multiplies some channels of its output by zero"):
        bridge.orthogonalized(directions(bridge))
