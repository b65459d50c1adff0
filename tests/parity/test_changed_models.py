"""Models whose modules are replaced after they were booted: all is as it would be if they were booted now."""

import copy
import warnings

import pytest
import torch
from tests.zoo import MODELS, build
from torch import nn

import clearspan
from clearspan.errors import (
    ClearspanError,
    CompiledModelError,
    EditedEntryError,
    HooksOnModelWarning,
    InvalidArgumentError,
    ModelChangedError,
    UnreadableWeightError,
)

TOKENS = torch.tensor([[5, 9, 2, 40, 7]])


class Halved(nn.Module):
    """A wrapper: the module's first output is halved, and its own parts are handed on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5


def doubled(value, hook):
    return value * 2


def replace(model, path, new):
    around, _, name = path.rpartition(".")
    model.get_submodule(around)._modules[name] = new


def moved(module):
    """Returns a copy with other weights."""
    new = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1).add_(0.01)
    return new


def parts(bridge):
    """Returns the components that have modules of their own."""
    return [part for component in bridge.components for part in component.walk() if part.name]


def found(look_up):
    """Returns a copy of a tensor, or the message of the error where there is none."""
    try:
        return look_up().detach().clone()
    except ClearspanError as error:
        return str(error)


def assert_same(name, one, other):
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert same, (name, one, other)


def weights(bridge):
    """Returns all weights by name; an error's message where there is none."""
    return {
        f"{part.path}.{name}": found(lambda: getattr(part, name))
        for component in bridge.components
        for part in component.walk()
        for name in dir(part)
        if name[:2] in ("W_", "b_") or name in ("w", "b")
    }


def assert_as_booted_now(bridge):
    new = clearspan.boot(bridge.hf_model)
    logits, cache = bridge.run_with_cache(TOKENS)
    expected, other = new.run_with_cache(TOKENS)
    assert torch.equal(logits, expected)
    torch.testing.assert_close(logits, bridge.hf_model(TOKENS, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    assert list(cache) == list(other)
    for name in cache:
        assert_same(name, found(lambda: cache[name]), found(lambda: other[name]))
    mine, others = weights(bridge), weights(new)
    assert mine.keys() == others.keys()
    for name, weight in mine.items():
        assert_same(name, weight, others[name])
    assert str(bridge.points()) == str(new.points())
    assert bridge.cfg == new.cfg


@pytest.fixture(params=MODELS)
def bridge(request):
    return clearspan.boot(build(request.param))


@pytest.mark.parametrize("change", [moved, Halved])
def test_replaced_modules_are_seen(bridge, change):
    bridge.run_with_cache(TOKENS)  # what it remembers must not be the old modules
    for path in dict.fromkeys(part.module_path for part in reversed(parts(bridge))):
        module = bridge.hf_model.get_submodule(path)
        if not list(module.children()):
            replace(bridge.hf_model, path, change(module))
    assert_as_booted_now(bridge)


@pytest.mark.parametrize("change", [moved, Halved])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_hooks_that_are_on_come_to_what_is_there_now(family, change):
    bridge = clearspan.boot(build(family))
    names = [f"blocks.1.{name}" for name in ("hook_resid_mid", "attn.hook_q", "attn.hook_pattern", "mlp.hook_pre")]
    seen = {}

    def note(value, hook):
        seen[hook.name] = value.clone()

    for name in names:
        bridge.add_hook(name, note)
    bridge(TOKENS)
    paths = dict.fromkeys(part.module_path for part in reversed(parts(bridge)) if part.path.startswith("blocks.1."))
    for path in paths:
        if change is moved or path != bridge.blocks[1].attn.module_path:  # a wrapper hides the inside of attention
            replace(bridge.hf_model, path, change(bridge.hf_model.get_submodule(path)))
    expected = clearspan.boot(copy.deepcopy(bridge.hf_model)).run_with_cache(TOKENS, names)[1]
    for run in (bridge, lambda tokens: bridge.hf_model(tokens, use_cache=False), bridge.run_with_cache):
        seen.clear()
        run(TOKENS)
        for name in names:
            torch.testing.assert_close(seen[name], expected[name], atol=1e-4, rtol=1e-4)
    bridge.reset_hooks()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bridge.hf_model.modules())


def test_a_part_that_is_called_alone_is_the_one_that_is_there_now():
    bridge = clearspan.boot(build("llama"))
    seen = []
    bridge.add_hook("blocks.1.mlp.hook_out", lambda value, hook: seen.append(value))
    stream = torch.randn(1, 5, bridge.cfg.d_model)
    before = bridge.blocks[1].mlp(stream)
    replace(bridge.hf_model, "model.layers.1.mlp", Halved(bridge.hf_model.model.layers[1].mlp))
    assert torch.equal(bridge.blocks[1].mlp(stream), 0.5 * before)
    assert len(seen) == 2
    assert torch.equal(seen[1], 0.5 * before)


def test_a_resized_vocabulary(bridge):
    bridge.run_with_cache(TOKENS)
    size = bridge.cfg.d_vocab + 7
    bridge.hf_model.resize_token_embeddings(size, mean_resizing=False)
    assert bridge.cfg.d_vocab == size == bridge.blocks[0].attn.cfg.d_vocab
    assert bridge.W_E.shape[0] == bridge.W_U.shape[1] == size
    assert f"d_vocab={size}" in str(bridge.points("hook_logits"))
    assert bridge(torch.full_like(TOKENS, size - 1)).shape[-1] == size
    assert_as_booted_now(bridge)


def test_weights_that_are_cast():
    bridge = clearspan.boot(build("llama"))
    bridge.hf_model.to(torch.float64)
    assert bridge.cfg.dtype == bridge.blocks[0].cfg.dtype == torch.float64
    assert_as_booted_now(bridge)


@pytest.mark.parametrize("path", ["model.layers.1", "model.layers.1.mlp", "model.layers.1.self_attn"])
def test_a_model_with_a_wrapped_container_is_not_processed(path):
    bridge = clearspan.boot(build("llama"))
    assert not any(part.is_wrapped for component in bridge.components for part in component.walk())
    replace(bridge.hf_model, path, Halved(bridge.hf_model.get_submodule(path)))
    with pytest.raises(UnreadableWeightError, match=rf"cannot be processed\n  where: Halved at {path}\n"):
        bridge.processed()
    with pytest.raises(UnreadableWeightError, match=rf"cannot be processed\n  where: Halved at {path}\n"):
        bridge.orthogonalized(torch.ones(48))


@pytest.mark.parametrize("path", ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"])
def test_directions_do_not_leave_a_weight_in_a_wrapper(path):
    bridge = clearspan.boot(build("llama"))
    replace(bridge.hf_model, path, Halved(bridge.hf_model.get_submodule(path)))
    with pytest.raises(UnreadableWeightError, match=r"(?s)the weight of blocks.1.* is not known.*Halved at"):
        bridge.orthogonalized(torch.ones(48))


def test_what_a_cache_computes_with_replaced_weights_is_refused():
    bridge = clearspan.boot(build("gpt2"))
    _, cache = bridge.run_with_cache(TOKENS)
    replace(bridge.hf_model, "transformer.h.1.attn.c_proj", moved(bridge.hf_model.transformer.h[1].attn.c_proj))
    with pytest.raises(EditedEntryError, match=r"blocks.1.attn.hook_result is computed with weights that are not"):
        _ = cache["result", 1]


def test_a_compiled_part_is_refused_by_caches_and_hooks():
    bridge = clearspan.boot(build("llama"))
    bridge.run_with_cache(TOKENS)
    replace(bridge.hf_model, "model.layers.1", torch.compile(bridge.hf_model.model.layers[1], backend="eager"))
    hook = ("blocks.1.attn.hook_z", lambda value, hook: value)
    for run in (lambda: bridge.run_with_cache(TOKENS), lambda: bridge.run_with_hooks(TOKENS, [hook])):
        with pytest.raises(CompiledModelError, match="is compiled"):
            run()


def test_a_model_without_a_block_that_it_had_says_so():
    bridge = clearspan.boot(build("llama"))
    bridge.hf_model.model.layers = bridge.hf_model.model.layers[:2]
    with pytest.raises(
        ModelChangedError, match=r"model.layers.2\S* is not in the model any more\n(.*\n)*  fix: clearspan.boot"
    ):
        bridge.run_with_cache(TOKENS)
    with pytest.raises(ModelChangedError, match="is not in the model any more"):
        _ = bridge.W_O


def test_weights_inside_a_wrapper_are_not_made_up():
    bridge = clearspan.boot(build("llama"))
    replace(
        bridge.hf_model, "model.layers.0.self_attn.o_proj", Halved(bridge.hf_model.model.layers[0].self_attn.o_proj)
    )
    replace(bridge.hf_model, "model.norm", Halved(bridge.hf_model.model.norm))
    _, cache = bridge.run_with_cache(TOKENS)
    for read in (
        lambda: bridge.W_O,
        lambda: cache["result", 0],
        lambda: cache.logit_attrs(cache["resid_post", 0][None], 3),
        bridge.processed,
    ):
        with pytest.raises(UnreadableWeightError, match="it wraps a"):
            read()


def test_boot_warns_of_hooks_of_another_bridge_and_unhook_takes_them_off():
    model = build("llama")
    plain = model(TOKENS, use_cache=False).logits
    bridge = clearspan.boot(model)
    bridge.add_hook("blocks.1.hook_resid_post", lambda value, hook: value * 2, is_permanent=True)
    bridge.add_hook("blocks.0.attn.hook_pattern", lambda value, hook: value * 0.5)
    with pytest.warns(HooksOnModelWarning, match=r"at blocks.0.attn.hook_pattern, blocks.1.hook_resid_post; .*unhook"):
        bridge = clearspan.boot(model)
    assert not torch.equal(bridge(TOKENS), plain)
    clearspan.unhook(model)
    assert torch.equal(bridge(TOKENS), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clearspan.boot(model)
    bridge.add_hook("blocks.1.hook_resid_post", lambda value, hook: value * 2)
    clearspan.unhook(bridge)
    assert torch.equal(bridge(TOKENS), plain)
    with pytest.raises(InvalidArgumentError, match="cannot boot this object"):
        clearspan.unhook("llama")


def test_a_copy_of_a_model_with_hooks_is_plain():
    bridge = clearspan.boot(build("llama"))
    plain = bridge(TOKENS)
    with bridge.hooks([("blocks.1.attn.hook_pattern", lambda value, hook: value * 0), ("embed.hook_out", doubled)]):
        copied = copy.deepcopy(bridge.hf_model)
    assert torch.equal(copied(TOKENS, use_cache=False).logits, plain)
    assert torch.equal(clearspan.boot(copied)(TOKENS), plain)
