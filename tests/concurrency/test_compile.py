"""An outer `torch.compile`: what calls a bridge runs as it is, or raises; no hook is dropped without a word."""

import pytest
import torch
import torch._dynamo

import clearspan
from clearspan.sweep import LogitDifference, Sweep, grid
from tests.zoo import build

TOKENS = torch.tensor([[5, 9, 2, 40]])
NAME = "blocks.0.hook_mlp_out"


def doubled(value, hook):
    return value * 2


HOOKS = [(NAME, doubled)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Dynamo"),
    pytest.mark.filterwarnings("ignore:The .grad"),
]


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # as it is in a new process
    yield
    torch._dynamo.reset()


@pytest.fixture
def bridge():
    return clearspan.boot(build("gpt2"))


def in_a_context(bridge, tokens):
    with bridge.hooks(HOOKS):
        return bridge(tokens)


def bare_in_a_context(bridge, tokens):
    with bridge.hooks(HOOKS):
        return bridge.hf_model(tokens, use_cache=False).logits


def after_a_graph_break(bridge, tokens):
    tokens = tokens * 1
    torch._dynamo.graph_break()
    return bridge.run_with_hooks(tokens, HOOKS) + 0


RUNS = {
    "plain": lambda bridge, tokens: bridge(tokens) * 1,
    "hooks": lambda bridge, tokens: bridge.run_with_hooks(tokens, HOOKS),
    "a context": in_a_context,
    "a context around the bare model": bare_in_a_context,
    "after a graph break": after_a_graph_break,
    "cache": lambda bridge, tokens: bridge.run_with_cache(tokens, NAME)[1][NAME],
    "hooked cache": lambda bridge, tokens: bridge.run_with_cache(tokens, fwd_hooks=HOOKS)[1]["resid_post", 1],
    "generation": lambda bridge, tokens: bridge.generate(tokens, fwd_hooks=HOOKS, max_new_tokens=2, do_sample=False),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_in_a_compiled_function_is_the_eager_one(kind, bridge):
    run = RUNS[kind]
    expected = run(bridge, TOKENS)
    compiled = torch.compile(lambda tokens: run(bridge, tokens), backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(TOKENS), expected)
    assert not any(point.is_listening for point in bridge.index)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_must_be_one_graph_raises(kind, bridge):
    run = RUNS[kind]
    compiled = torch.compile(lambda tokens: run(bridge, tokens), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"disable|graph_break"):
        compiled(TOKENS)
    assert not any(point.is_listening for point in bridge.index)


@pytest.mark.parametrize("is_bare", [True, False])
def test_hooks_that_come_after_the_function_was_compiled_are_called(is_bare, bridge):
    run = (lambda tokens: bridge.hf_model(tokens, use_cache=False).logits) if is_bare else bridge
    base, edited = bridge(TOKENS), bridge.run_with_hooks(TOKENS, HOOKS)
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    compiled = torch.compile(lambda tokens: run(tokens), backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(TOKENS), base)
        with bridge.hooks(HOOKS):
            assert torch.equal(compiled(TOKENS), edited)
    bridge.add_hook(*HOOKS[0])
    assert torch.equal(compiled(TOKENS), edited)
    bridge.reset_hooks()
    assert torch.equal(compiled(TOKENS), base)


def test_hooks_that_come_to_what_was_compiled_as_one_graph_raise(bridge):
    run = lambda tokens: bridge.hf_model(tokens, use_cache=False).logits  # noqa: E731
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    base = compiled(TOKENS)
    with bridge.hooks(HOOKS), pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(TOKENS)
    assert torch.equal(compiled(TOKENS), base)


def test_hooks_on_the_second_model_of_a_compiled_class_are_called(bridge):
    other = clearspan.boot(build("gpt2"))
    compiled = torch.compile(lambda model, tokens: model(tokens, use_cache=False).logits, backend="eager")
    base = compiled(bridge.hf_model, TOKENS)
    with other.hooks(HOOKS):
        edited = compiled(other.hf_model, TOKENS)
    assert torch.equal(edited, other.run_with_hooks(TOKENS, HOOKS))
    assert not torch.equal(edited, base)


def test_a_sweep_in_a_compiled_function_is_the_eager_one(bridge):
    cells = grid("z", clearspan.interventions.Zero(), layer=range(2), head=range(4))

    def sweep(tokens):
        found = Sweep(bridge, tokens, cells, LogitDifference(3, 7)).run(progress=False)
        return torch.stack(list(found.values.values()))

    expected = sweep(TOKENS)
    assert torch.equal(torch.compile(sweep, backend="eager")(TOKENS), expected)
