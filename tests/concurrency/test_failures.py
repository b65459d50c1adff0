"""An exception anywhere in a forward, in every kind of run, comes out, and leaves nothing of the run on the model."""

import itertools

import pytest

import clearspan
from clearspan.errors import HookFailedError, HooksOnModelWarning
from clearspan.hf.observers import observed
from clearspan.hf.torch_hooks import StandIn, after
from tests.concurrency.cleanliness import Cleanliness
from tests.concurrency.test_interrupts import JOBS, OTHER, TOKENS, doubled
from tests.zoo import build

FAMILIES = ["gpt2", "llama", "bloom", "falcon", "mixtral", "gemma2"]


class PlainError(Exception):
    """What a test raises."""


class BareError(KeyboardInterrupt):
    """The same, where no `except Exception` catches it."""


def fired(bridge, job, module, error, on_exit):
    """Runs a job while a module raises at its input or its output; returns whether it came to that."""
    calls = []

    def fail(*_):
        calls.append(error)
        raise error

    register = module.register_forward_hook if on_exit else module.register_forward_pre_hook
    handle = register(fail)
    try:
        job(bridge)
    except error:
        return True
    finally:
        handle.remove()
        bridge.reset_hooks()
    assert not calls, f"{job.__name__} went on after {error.__name__}"
    return False


def matrix(family, stride):
    """Returns how many cells of the matrix raised, and what was not clean after them."""
    bridge = clearspan.boot(build(family))
    clean, count, dirty = Cleanliness(bridge, TOKENS), 0, []
    cells = itertools.product(bridge.hf_model.named_modules(), JOBS, (PlainError, BareError), (False, True))
    for (name, module), job, error, on_exit in itertools.islice(cells, 0, None, stride):
        if fired(bridge, job, module, error, on_exit):
            count += 1
            dirty += [f"{job.__name__}, {error.__name__} at {name}: {fault}" for fault in clean.faults()]
    return count, dirty


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_an_exception_leaves_nothing(family):
    count, dirty = matrix(family, 41)
    assert dirty == []
    assert count > 15


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_exceptions_at_a_seventh_of_all_places_leave_nothing(family):
    count, dirty = matrix(family, 7)
    assert dirty == []
    assert count > 110


@pytest.mark.parametrize("error", [PlainError, BareError, StopIteration, StopAsyncIteration, GeneratorExit])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_hooks_that_raise_leave_nothing_at_any_point(family, error):
    bridge = clearspan.boot(build(family))
    clean = Cleanliness(bridge, TOKENS)
    expected = HookFailedError if error in (StopIteration, StopAsyncIteration, GeneratorExit) else error

    def fail(value, hook):
        raise error

    for point in list(bridge.index)[::6]:
        beside = [("blocks.0.attn.hook_pattern", doubled), ("blocks.0.hook_resid_pre", doubled), (point.name, fail)]
        with pytest.raises(expected):
            bridge.run_with_hooks(TOKENS, beside)
        assert clean.faults() == []
        with pytest.raises(expected):
            bridge.run_with_cache(OTHER, fwd_hooks=beside)
        assert clean.faults() == []
    with pytest.raises(expected):
        list(bridge.generate_stream(TOKENS, fwd_hooks=beside, max_new_tokens=3))
    assert clean.faults() == []


def test_hooks_that_cannot_all_be_put_on_leave_none():
    """Such as where a compiled module comes after others."""
    bridge = clearspan.boot(build("llama"))
    clean = Cleanliness(bridge, TOKENS)
    module = bridge.blocks[2].attn.module
    module.compile(backend="eager")
    everywhere = lambda name: name.endswith("hook_z")  # noqa: E731
    tries = [
        lambda: bridge.add_hook(everywhere, doubled),
        lambda: bridge.run_with_hooks(TOKENS, [(everywhere, doubled)]),
        lambda: bridge.hooks([(everywhere, doubled)]).__enter__(),
        lambda: bridge.run_with_cache(TOKENS, everywhere),
        lambda: bridge.run_with_cache(TOKENS, everywhere, incl_bwd=True),
        lambda: bridge.generate(TOKENS, fwd_hooks=[(everywhere, doubled)], max_new_tokens=1),
    ]
    for attempt in tries:
        with pytest.raises(clearspan.errors.CompiledModelError):
            attempt()
        assert clean.state() == clean.before


def test_what_is_lost_on_a_model_is_found_and_taken_off():
    """Hooks of a bridge that is gone, and whatever else a run that was torn apart could leave."""
    model = build("bloom")
    lost = clearspan.boot(model)
    clean = Cleanliness(clearspan.boot(model), TOKENS)
    lost.add_hook("blocks.0.attn.hook_pattern", doubled, is_permanent=True)
    lost.add_hook("blocks.1.hook_resid_post", doubled)
    del lost
    with pytest.warns(HooksOnModelWarning, match="blocks.0.attn.hook_pattern, blocks.1.hook_resid_post"):
        bridge = clearspan.boot(model)
    module = bridge.blocks[1].module
    after(module, lambda *_: None)
    observation = observed({bridge.blocks[2].attn.module: lambda call: call.run()})
    observation.__enter__()
    StandIn(module.mlp, lambda run, *args: run(*args) * 2)
    users = module.register_forward_hook(lambda *_: None)
    kept = []
    bridge.add_hook("blocks.2.hook_resid_post", lambda value, hook: kept.append(1), is_permanent=True)
    bridge.reset_hooks()
    bridge.run_with_hooks(TOKENS)
    assert kept
    bridge.reset_hooks(including_permanent=True)
    assert users.id in module._forward_hooks
    users.remove()
    assert clean.faults() == []
