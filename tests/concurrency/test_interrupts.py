"""Ctrl-C at random instants: nothing of a run may be left on the model."""

import os
import random
import signal
import time

import pytest
import torch

import clearspan
from clearspan._run import hooks
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Intervention, Patch, Scale, Zero
from clearspan.modes import with_gradients
from clearspan.sweep import LogitDifference, Sweep, grid
from tests.concurrency.cleanliness import Cleanliness
from tests.zoo import build

TOKENS = torch.tensor([[5, 9, 2, 40]])
OTHER = TOKENS.flip(1)
FAMILIES = ["llama", "gpt2", "bloom"]

# Python says so where an interrupt fell into what the collector calls, which drops it, and where a file that was open
# in that moment is closed by the collector.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:pytest.PytestUnraisableExceptionWarning")
    for message in (r"(?s)Exception ignored in.*\nKeyboardInterrupt", "Exception ignored in. <_io.FileIO")
]


def doubled(value, hook):
    return value * 2


def hooked_run(bridge):
    bridge.run_with_hooks(TOKENS, [("blocks.0.attn.hook_z", doubled), ("blocks.1.attn.hook_pattern", doubled)])


def hooked_backward(bridge):
    loss = bridge.run_with_hooks(TOKENS, bwd_hooks=[("blocks.0.hook_resid_post", lambda gradient, hook: None)],
                                 return_type="loss")  # fmt: skip
    torch.autograd.grad(loss, [bridge.embed.W_E], allow_unused=True)


def everything(bridge):
    bridge.run_with_cache(TOKENS)


def gradients(bridge):
    bridge.run_with_cache(TOKENS, ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"], incl_bwd=True)


def edited_cache(bridge):
    bridge.run_with_cache(TOKENS, "blocks.1.attn.hook_attn_scores", interventions=[Intervention("z", Zero(), layer=0)])


def patched(bridge):
    bridge(TOKENS, interventions=[Intervention("resid_post", Patch("other"), layer=0)], sources={"other": OTHER})


def in_a_context(bridge):
    with bridge.hooks(
        [("blocks.0.attn.hook_pattern", doubled)], interventions=[Intervention("z", Scale(2.0), layer=0)]
    ):
        bridge.hf_model(TOKENS, use_cache=False)
        bridge(TOKENS)


def segment(bridge):
    bridge(bridge(TOKENS, stop_at_layer=1), start_at_layer=1)


def generation(bridge):
    bridge.generate(TOKENS, fwd_hooks=[("blocks.0.attn.hook_z", doubled)], max_new_tokens=2, do_sample=False)


def cached_generation(bridge):
    bridge.generate(TOKENS, max_new_tokens=2, do_sample=False, return_cache=True)


def stream(bridge):
    for _ in bridge.generate_stream(TOKENS, fwd_hooks=[("blocks.0.attn.hook_z", doubled)], max_new_tokens=2):
        pass


def sweep(bridge):
    cells = grid("z", Patch("clean"), layer=range(2), head=range(2))
    Sweep(bridge, TOKENS, cells, LogitDifference(3, 7), sources={"clean": OTHER}).run(progress=False)


def positions_sweep(bridge):
    cells = grid("resid_pre", Patch("clean"), layer=range(2), position=range(4))
    Sweep(bridge, TOKENS, cells, LogitDifference(3, 7), sources={"clean": OTHER}).run(progress=False)


def part_alone(bridge):
    bridge.blocks[1].attn(torch.ones(1, 4, bridge.cfg.d_model))


def added(bridge):
    bridge.add_hook(lambda name: name.endswith(("hook_z", "hook_resid_post")), doubled)
    bridge(TOKENS)


def added_to_the_bare_model(bridge):
    bridge.add_hook("blocks.0.hook_resid_post", doubled)
    bridge.add_hook("blocks.0.attn.hook_pattern", doubled)
    # Without a context of ours, what torch's own `no_grad` leaves behind in the model's code is for nobody to mend.
    with_gradients(True, bridge.hf_model, TOKENS, use_cache=False)


JOBS = [hooked_run, hooked_backward, everything, gradients, edited_cache, patched, in_a_context, segment, generation,
        cached_generation, stream, sweep, positions_sweep, part_alone, added,
        added_to_the_bare_model]  # fmt: skip


class Interrupted:
    """Sends an interrupt after some seconds, also where Python computes without a pause."""

    def __enter__(self):
        self.before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        # In a job of the background it is ignored.
        self.interrupt_before = signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def after(self, seconds, job, bridge):
        """Does a job; returns whether it was interrupted."""
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            job(bridge)
        except KeyboardInterrupt:
            return True
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            return True
        return False

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, self.interrupt_before)
        signal.signal(signal.SIGALRM, self.before)


def draw(family, draws, seed):
    """Interrupts jobs at random instants; returns how often it did, and what was not clean afterwards."""
    bridge = clearspan.boot(build(family))
    chance = random.Random(seed)
    interrupted, dirty = 0, []
    lasts = {}
    for job in JOBS:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            job(bridge)
            times.append(time.perf_counter() - start)
            bridge.reset_hooks()
        lasts[job] = min(times)
    with Interrupted() as interrupts:
        clean = Cleanliness(bridge, TOKENS)
        for number in range(draws):
            job = JOBS[number % len(JOBS)]
            hit = interrupts.after(max(1e-6, chance.random() * lasts[job] * 1.1), job, bridge)
            interrupted += hit
            if job is added:  # all of its hooks, or none
                points = [point for point in bridge.index if point.name.endswith(("hook_z", "hook_resid_post"))]
                if len({point.is_listening for point in points}) > 1:
                    dirty.append(f"{job.__name__}: some of its hooks")
            bridge.reset_hooks()
            faults = clean.faults() if hit else []
            if faults:
                dirty.append(f"{job.__name__}: {'; '.join(faults)}")
                bridge = clearspan.boot(build(family))
                clean = Cleanliness(bridge, TOKENS)
    return interrupted, dirty


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no timer")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupt_leaves_nothing(family):
    interrupted, dirty = draw(family, 48, os.environ.get("SEED", "0"))
    assert dirty == []
    assert interrupted > 15


def test_an_interrupt_in_the_moment_in_which_hooks_are_on_takes_them_off(monkeypatch):
    bridge = clearspan.boot(build("llama"))
    clean, plain = Cleanliness(bridge, TOKENS), bridge(TOKENS)

    def interrupted(function):
        function()
        raise KeyboardInterrupt

    monkeypatch.setattr(hooks, "uncompiled", interrupted)
    hooked = bridge.hooks([("blocks.0.attn.hook_z", doubled)])
    with pytest.raises(KeyboardInterrupt), hooked:
        pass
    monkeypatch.undo()
    assert clean.faults() == []
    with hooked:  # it can be used again
        assert not torch.equal(bridge(TOKENS), plain)
        with pytest.raises(InvalidArgumentError, match="these hooks are on already"), hooked:
            pass
        assert not torch.equal(bridge(TOKENS), plain)
    assert torch.equal(bridge(TOKENS), plain)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_three_thousand_interrupts_leave_nothing(family):
    interrupted, dirty = draw(family, 1500, os.environ.get("SEED", "0") + family)
    assert dirty == []
    assert interrupted > 1000
