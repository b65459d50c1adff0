"""Several threads on one model: each gets the numbers that it gets alone, whatever the others do meanwhile."""

import _thread
import asyncio
import concurrent.futures
import contextlib
import contextvars
import os
import random
import sys
import threading
import time

import pytest
import torch

import clearspan
from clearspan.errors import ModelBusyError
from clearspan.interventions import Intervention, Patch, Scale
from clearspan.sweep import LogitDifference, Sweep, grid
from tests.conftest import tiny_model
from tests.releases import start_checkpointing
from tests.zoo import build

FAMILIES = ["gpt2", "llama", "bloom", "gemma2", "gptj"]
TOKENS = torch.tensor([[5, 9, 2, 40, 17, 8], [3, 60, 12, 7, 33, 21]])
OTHER = TOKENS.flip(1)


@pytest.fixture(autouse=True)
def _switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def doubled(value, hook):
    return value * 2


def halved(value, hook):
    value /= 2


def positions(seen):
    def note(value, hook):
        seen.append((hook.position, hook.step, value.shape[1]))

    return note


def plain(bridge):
    return bridge(TOKENS)


def bare(bridge):
    return bridge.hf_model(TOKENS, use_cache=False).logits


def hooked_run(bridge):
    return bridge.run_with_hooks(
        TOKENS, fwd_hooks=[("blocks.0.attn.hook_z", doubled), ("blocks.1.hook_attn_out", halved)]
    )


def edited_queries(bridge):
    return bridge.run_with_hooks(
        OTHER, fwd_hooks=[("blocks.1.attn.hook_q", doubled), ("blocks.0.ln1.hook_scale", doubled)]
    )


def pattern_edit(bridge):
    return bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_pattern", halved)])


def patterns(bridge):
    _, cache = bridge.run_with_cache(TOKENS, lambda name: name.endswith("pattern"))
    return torch.stack([cache["pattern", layer] for layer in range(bridge.cfg.n_layers)])


def everything(bridge):
    logits, cache = bridge.run_with_cache(OTHER)
    return torch.cat([logits.flatten(), cache["resid_post", 1].flatten(), cache["q", 1].flatten()])


def gradients(bridge):
    _, cache = bridge.run_with_cache(TOKENS, ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"], incl_bwd=True)
    return torch.cat([cache["blocks.0.hook_resid_post_grad"].flatten(), cache["blocks.1.attn.hook_z_grad"].flatten()])


def backward_hooks(bridge):
    seen = []
    loss = bridge.run_with_hooks(
        TOKENS, bwd_hooks=[("blocks.0.hook_resid_post", lambda grad, hook: seen.append(grad * 3))], return_type="loss"
    )
    torch.autograd.grad(loss, [next(bridge.hf_model.parameters())], allow_unused=True)
    return seen[0]


def patched(bridge):
    patch = Intervention("resid_post", Patch("other"), layer=0, positions=2)
    return bridge(TOKENS, interventions=[patch], sources={"other": OTHER})


def in_a_context(bridge):
    with bridge.hooks(
        fwd_hooks=[("blocks.0.hook_mlp_out", doubled)], interventions=[Intervention("z", Scale(3.0), layer=1)]
    ):
        return torch.cat([bridge(TOKENS), bridge.hf_model(OTHER, use_cache=False).logits, hooked_run(bridge)])


def segment(bridge):
    residual = bridge(TOKENS, stop_at_layer=1)
    return torch.cat([bridge(residual, start_at_layer=1).flatten(), residual.flatten()])


def generation(bridge):
    seen = []
    hooks = [("blocks.0.attn.hook_z", doubled), ("blocks.1.hook_resid_post", positions(seen))]
    new = bridge.generate(TOKENS, fwd_hooks=hooks, max_new_tokens=4, do_sample=False, eos_token_id=None)
    return torch.cat([new.flatten(), torch.tensor([list(map(int, one)) for one in seen]).flatten()]).double()


def cached_generation(bridge):
    new, cache = bridge.generate(OTHER, max_new_tokens=3, do_sample=False, eos_token_id=None, return_cache=True)
    return torch.cat([new.flatten().double(), cache["resid_post", 1].flatten().double()])


def stream(bridge):
    hooks = [("blocks.0.attn.hook_z", halved)]
    parts = bridge.generate_stream(TOKENS, fwd_hooks=hooks, max_new_tokens=4, do_sample=False, eos_token_id=None)
    return torch.cat(list(parts), 1).double()


def sweep(bridge):
    cells = grid("resid_pre", Patch("clean"), layer=range(bridge.cfg.n_layers), position=range(6))
    found = Sweep(bridge, TOKENS, cells, LogitDifference(3, 7), sources={"clean": OTHER}).run()
    return torch.stack(list(found.values.values()))


def part_alone(bridge):
    return bridge.blocks[1].attn(torch.ones(2, 5, bridge.cfg.d_model))


JOBS = [plain, bare, hooked_run, edited_queries, pattern_edit, patterns, everything, gradients, backward_hooks, patched,
        in_a_context, segment, generation, cached_generation, stream, sweep, part_alone]  # fmt: skip
EXACT = 1e-5


def at_once(jobs, threads):
    """Runs pairs of a bridge and a job in several threads at a time; returns what they return, in order."""
    start = threading.Barrier(threads)
    rest = list(enumerate(jobs))
    found, lock = [None] * len(jobs), threading.Lock()

    def work():
        start.wait()
        while True:
            with lock:
                if not rest:
                    return
                index, (bridge, job) = rest.pop()
            try:
                found[index] = job(bridge)
            except Exception as error:  # noqa: BLE001 - it is compared below
                found[index] = error

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive()
    return found


def wrong(jobs, found, alone):
    """Returns the names of jobs that gave something else than alone."""
    names = []
    for (_, job), got in zip(jobs, found, strict=True):
        expected = alone[job]
        is_right = isinstance(got, torch.Tensor) and got.shape == expected.shape
        if not is_right or not torch.allclose(got.detach(), expected.detach(), rtol=EXACT, atol=EXACT, equal_nan=True):
            names.append(f"{job.__name__}: {got!r}"[:300] if isinstance(got, Exception) else job.__name__)
    return names


def assert_clean(bridge, base):
    assert not any(point.is_listening for point in bridge.index)
    assert not bridge.taps._installed
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bridge.hf_model.modules())
    assert not any("forward" in vars(module) for module in bridge.hf_model.modules())
    torch.testing.assert_close(bridge(TOKENS), base, rtol=0, atol=0)


@pytest.mark.parametrize(("family", "bridges"), [("gpt2", 1), ("bloom", 2)])
def test_jobs_at_once_give_what_each_gives_alone(family, bridges):
    check_jobs_at_once(family, bridges, 4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bridges", [1, 2])
def test_many_jobs_at_once_give_what_each_gives_alone(family, bridges):
    check_jobs_at_once(family, bridges, 12)


def check_jobs_at_once(family, bridges, times):
    """Runs each kind of job so many times, in three threads, in an order drawn at random."""
    model = build(family)
    of_model = [clearspan.boot(model) for _ in range(bridges)]
    alone = {job: job(of_model[0]) for job in JOBS}
    jobs = [(bridge, job) for job in JOBS for bridge in of_model for _ in range(times // bridges)]
    random.Random(family).shuffle(jobs)
    assert wrong(jobs, at_once(jobs, 3), alone) == []
    for bridge in of_model:
        assert_clean(bridge, alone[plain])


# --- whose hooks are seen where --------------------------------------------------------------------------------------


@pytest.fixture
def bridge():
    return clearspan.boot(tiny_model())


def in_thread(function, *args, context=None):
    """Runs a function in another thread; returns what it returns, or raises what it raises."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return (
            pool.submit(context.run, function, *args).result(60) if context else pool.submit(function, *args).result(60)
        )


DOUBLED = [("blocks.0.hook_mlp_out", doubled)]


def test_hooks_of_a_context_are_seen_by_its_own_runs_alone(bridge):
    base = bridge(TOKENS)
    edited = bridge.run_with_hooks(TOKENS, fwd_hooks=DOUBLED)
    with bridge.hooks(fwd_hooks=DOUBLED):
        for job in (plain, bare):
            assert torch.equal(job(bridge), edited)
            assert torch.equal(in_thread(job, bridge), base)
            assert torch.equal(in_thread(job, bridge, context=contextvars.copy_context()), edited)
        assert torch.equal(in_thread(hooked_run, bridge), in_thread(hooked_run, bridge))
        other = clearspan.boot(bridge.hf_model)
        assert torch.equal(other(TOKENS), edited)  # its forward is one of this context
        assert torch.equal(in_thread(plain, other), base)
    assert_clean(bridge, base)


def test_hooks_that_were_added_are_seen_by_every_thread(bridge):
    edited = bridge.run_with_hooks(TOKENS, fwd_hooks=DOUBLED)
    in_thread(bridge.add_hook, *DOUBLED[0])
    assert torch.equal(bridge(TOKENS), edited)
    assert torch.equal(in_thread(bare, bridge), edited)
    in_thread(bridge.reset_hooks)
    assert not torch.equal(bridge(TOKENS), edited)


def test_hooks_that_stay_after_their_run_are_seen_by_every_thread(bridge):
    edited = bridge.run_with_hooks(TOKENS, fwd_hooks=DOUBLED, reset_hooks_end=False)
    assert torch.equal(in_thread(plain, bridge), edited)
    bridge.reset_hooks()


def test_hooks_of_another_thread_are_not_taken_off(bridge):
    base, edited = bridge(TOKENS), bridge.run_with_hooks(TOKENS, fwd_hooks=DOUBLED)
    with bridge.hooks(fwd_hooks=DOUBLED):
        in_thread(lambda: bridge.reset_hooks(including_permanent=True))
        assert torch.equal(bridge(TOKENS), edited)
        bridge.reset_hooks()
        assert torch.equal(bridge(TOKENS), base)
    assert_clean(bridge, base)


def test_hooks_of_a_thread_that_has_ended_are_taken_off(bridge):
    base = bridge(TOKENS)
    in_thread(bridge.hooks(fwd_hooks=DOUBLED).__enter__)
    assert torch.equal(bridge(TOKENS), base)
    bridge.reset_hooks()
    assert_clean(bridge, base)


def test_contexts_that_end_in_another_order_than_they_began_keep_their_hooks(bridge):
    base = bridge(TOKENS)
    first, second = bridge.hooks(fwd_hooks=DOUBLED), bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", doubled)])
    alone = bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_mlp_out", doubled)])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(bridge(TOKENS), alone)
    second.__exit__(None, None, None)
    assert_clean(bridge, base)


def test_a_function_may_have_hooks_each_time_it_is_called(bridge):
    base, edited = bridge(TOKENS), bridge.run_with_hooks(TOKENS, fwd_hooks=DOUBLED)

    @bridge.hooks(fwd_hooks=DOUBLED)
    def decorated(depth):
        return bridge(TOKENS) if depth == 0 else (bridge(TOKENS), decorated(depth - 1))[0]

    assert torch.equal(decorated(0), edited)
    assert torch.equal(decorated(1), edited)
    assert torch.equal(bridge(TOKENS), base)


def test_tasks_have_hooks_of_their_own(bridge):
    names = [f"blocks.{layer}.hook_mlp_out" for layer in range(bridge.cfg.n_layers)]
    alone = [bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, doubled)]) for name in names]

    async def task(index):
        with bridge.hooks(fwd_hooks=[(names[index], doubled)]):
            found = []
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(bridge(TOKENS))
                found.append(await asyncio.to_thread(plain, bridge))
            return all(torch.equal(logits, alone[index]) for logits in found)

    async def executor(index):
        def run():
            return bridge.run_with_hooks(TOKENS, fwd_hooks=[(names[index], doubled)])

        return torch.equal(await asyncio.get_running_loop().run_in_executor(None, run), alone[index])

    async def both():
        return await asyncio.gather(*map(task, range(len(names))), *(executor(i % len(names)) for i in range(12)))

    assert all(asyncio.run(both()))
    assert_clean(bridge, bridge(TOKENS))


# --- turns -----------------------------------------------------------------------------------------------------------


class Gate:
    """A hook function that waits until it is let go, and says when it was reached."""

    def __init__(self):
        self.reached, self.is_open = threading.Event(), threading.Event()

    def __call__(self, value, hook):
        self.reached.set()
        assert self.is_open.wait(60)


@contextlib.contextmanager
def a_run_inside_a_hook(bridge, job=None):
    """While the context is open, a thread named 'first' is inside a hook function on `blocks.1.hook_resid_post`."""
    gate, found = Gate(), []
    hooks = [("blocks.1.hook_resid_post", gate)]

    def run():
        found.append((job or bridge.run_with_hooks)(TOKENS, fwd_hooks=hooks))

    thread = threading.Thread(target=run, name="first")
    thread.start()
    assert gate.reached.wait(60)
    try:
        yield found
    finally:
        gate.is_open.set()
        thread.join(60)
    assert found


def test_a_run_waits_for_the_one_before_it(bridge):
    base, done = bridge(TOKENS), threading.Event()
    found = []

    def second():
        found.append(bridge.run_with_cache(OTHER, "blocks.0.hook_resid_pre")[0])
        done.set()

    with a_run_inside_a_hook(bridge) as first:
        thread = threading.Thread(target=second)
        thread.start()
        assert not done.wait(0.3)
    thread.join(60)
    assert torch.equal(first[0], base)
    assert torch.equal(found[0], bridge(OTHER))


def test_the_model_called_bare_is_the_plain_one_while_another_thread_runs_it_changed(bridge):
    base = bridge(TOKENS)
    residual = bridge(TOKENS, stop_at_layer=1)
    jobs = {
        "hooks": lambda tokens, fwd_hooks: bridge.run_with_hooks(tokens, [*DOUBLED, *fwd_hooks]),
        "segment": lambda _, fwd_hooks: bridge.run_with_hooks(residual * 2, fwd_hooks, start_at_layer=1),
        "stop": lambda tokens, fwd_hooks: bridge.run_with_hooks(tokens, fwd_hooks, stop_at_layer=2),
        "cache": lambda tokens, fwd_hooks: bridge.run_with_cache(tokens, fwd_hooks=[*DOUBLED, *fwd_hooks]),
        "generation": lambda tokens, fwd_hooks: bridge.generate(tokens, fwd_hooks=fwd_hooks, max_new_tokens=2),
        "pattern": lambda tokens, fwd_hooks: bridge.run_with_hooks(
            tokens, [("blocks.2.attn.hook_pattern", doubled), *fwd_hooks]
        ),
    }
    for job in jobs.values():
        with a_run_inside_a_hook(bridge, job):
            assert torch.equal(bare(bridge), base)
    assert_clean(bridge, base)


def test_a_hook_that_waits_for_another_run_is_told_so(bridge):
    base = bridge(TOKENS)
    bridge.patience = 0.2
    seconds = [
        plain,
        hooked_run,
        patterns,
        generation,
        lambda bridge: bridge.add_hook(*DOUBLED[0]),
        lambda bridge: bridge.reset_hooks(),
        lambda bridge: bridge.hooks(fwd_hooks=DOUBLED).__enter__(),
    ]
    for second in seconds:
        with a_run_inside_a_hook(clearspan.boot(bridge.hf_model)):
            started = time.monotonic()
            with pytest.raises(ModelBusyError) as raised:
                second(bridge)
            assert time.monotonic() - started > 0.2
        message = str(raised.value)
        assert "blocks.1.hook_resid_post, in thread 'first'" in message
        assert f"a run in thread {threading.current_thread().name!r}" in message
    assert_clean(bridge, base)


def test_a_long_run_without_a_hook_that_blocks_is_waited_for(bridge):
    bridge.patience, found = 0.05, []

    def slow(value, hook):
        time.sleep(0.02)

    hooks = [(lambda name: name.endswith(("hook_resid_post", "hook_resid_pre")), slow)]
    thread = threading.Thread(target=lambda: found.append(bridge.generate(TOKENS, fwd_hooks=hooks, max_new_tokens=6)))
    thread.start()
    time.sleep(0.05)
    assert torch.equal(bridge(TOKENS), bridge(TOKENS))
    thread.join(60)
    assert found


def test_models_do_not_wait_for_one_another(bridge):
    other = clearspan.boot(build("gpt2"))
    base = other(TOKENS)
    with a_run_inside_a_hook(bridge):
        assert torch.equal(other(TOKENS), base)
        other.run_with_cache(TOKENS)


def test_a_stream_holds_the_model_for_its_turns_alone(bridge):
    hooks = [("blocks.0.attn.hook_z", halved)]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone, base = bridge.generate(TOKENS, fwd_hooks=hooks, **settings), bridge(TOKENS)
    stream_of_tokens = bridge.generate_stream(TOKENS, fwd_hooks=hooks, **settings)
    parts = []
    for index in range(6):
        parts.append(in_thread(next, stream_of_tokens) if index % 2 else next(stream_of_tokens))
        assert torch.equal(in_thread(plain, bridge), base)
        assert torch.equal(bridge(TOKENS), base)
    assert torch.equal(torch.cat([TOKENS, *parts], 1), alone)
    assert_clean(bridge, base)


def test_a_stream_belongs_to_the_hooks_of_whoever_asks(bridge):
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    seen = []
    stream_of_tokens = bridge.generate_stream(TOKENS, **settings)
    next(stream_of_tokens)
    with bridge.hooks(fwd_hooks=[("hook_embed", positions(seen))]):
        next(stream_of_tokens)
    next(stream_of_tokens)
    assert seen == [(6, 1, 1)]


def test_backward_hooks_in_a_thread_of_another_are_inside_their_run(bridge):
    base, seen = bridge(TOKENS), []

    def run_inside(gradient, hook):
        seen.append((hook.position, torch.equal(bridge(TOKENS), base)))

    loss = bridge.run_with_hooks(TOKENS, bwd_hooks=[("blocks.1.hook_resid_post", run_inside)], return_type="loss")
    in_thread(loss.backward)
    with bridge.hooks(bwd_hooks=[("blocks.1.hook_resid_post", run_inside)]):
        bridge.run_with_cache(TOKENS, "hook_embed", incl_bwd=True)
    assert seen == [(0, True), (0, True)]
    assert_clean(bridge, base)


def test_a_forward_that_autograd_makes_again_sees_the_hooks_of_its_context(bridge):
    """A thread that Python did not start stands for autograd's, which a model on a GPU has."""
    model = bridge.hf_model.train()
    start_checkpointing(model)
    weight = model.transformer.h[0].mlp.c_fc.weight
    name = "blocks.0.mlp.hook_post"

    def gradient(backward):
        weight.grad = None
        with bridge.hooks(fwd_hooks=[(name, doubled)]):
            backward(bridge(TOKENS, return_type="loss"))
        return weight.grad

    def elsewhere(loss):
        done = threading.Event()
        errors = []

        def work():
            try:
                loss.backward()
            except Exception as error:  # noqa: BLE001
                errors.append(error)
            done.set()

        _thread.start_new_thread(work, ())
        assert done.wait(60)
        if errors:
            raise errors[0]

    expected = gradient(lambda loss: loss.backward())
    torch.testing.assert_close(gradient(elsewhere), expected)
    with pytest.raises(clearspan.errors.UnwritableError, match="hook that wrote in the forward is gone"):
        gradient(lambda loss: in_thread(loss.backward))
    entered = threading.Event(), threading.Event()

    def another():
        with bridge.hooks(fwd_hooks=[(name, halved)]):
            entered[0].set()
            entered[1].wait(60)

    thread = threading.Thread(target=another)
    thread.start()
    assert entered[0].wait(60)
    try:
        with pytest.raises(clearspan.errors.UnwritableError, match="may be any of theirs"):
            gradient(elsewhere)
    finally:
        entered[1].set()
        thread.join(60)


def test_a_hook_that_raises_in_a_thread_leaves_the_model_to_the_others(bridge):
    base = bridge(TOKENS)

    def fail(value, hook):
        raise RuntimeError("on purpose")

    def job(bridge):
        with pytest.raises(RuntimeError, match="on purpose"):
            bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_pattern", fail)])
        return bridge(TOKENS)

    jobs = [(bridge, job) for _ in range(30)]
    assert wrong(jobs, at_once(jobs, 3), {job: base}) == []
    assert_clean(bridge, base)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_process_goes_on_without_the_threads_of_the_first(bridge):
    base = bridge(TOKENS)
    stream_of_tokens = bridge.generate_stream(TOKENS, max_new_tokens=4)
    next(stream_of_tokens)
    with a_run_inside_a_hook(bridge):
        child = os.fork()
        if child == 0:
            ok = torch.equal(bridge(TOKENS), base)
            try:
                next(stream_of_tokens)
                ok = False
            except clearspan.errors.ClearspanError as error:
                ok = ok and "another process" in str(error)
            os._exit(0 if ok else 1)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
        else:
            os.kill(child, 9)
            pytest.fail("the child hangs")
    assert status == 0
