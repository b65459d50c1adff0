"""A stream gives what generation gives, takes turns with its user, and leaves nothing behind."""

import threading
from typing import Any

import pytest
import torch

from clearspan.errors import PointNotReachedError, UnknownPointError

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("clearspan")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> object:
    yield
    assert not threads()


@pytest.mark.parametrize("size", [1, 5, 100])
def test_tokens(size, bridge, tokens):
    chunks = list(bridge.generate_stream(tokens, max_tokens_per_yield=size, eos_token_id=None, **OPTIONS))
    assert [chunk.shape[1] for chunk in chunks] == {1: [1] * 12, 5: [5, 5, 2], 100: [12]}[size]
    generated = bridge.generate(tokens, eos_token_id=None, **OPTIONS)
    assert torch.equal(torch.cat([tokens, *chunks], 1), generated)


@pytest.mark.parametrize("size", [1, 3])
def test_text(size, embedded):
    for prompt in ("import o", "def área(self):\n    # naïve café ☕ 漢字"):
        pieces = list(embedded.generate_stream(prompt, max_tokens_per_yield=size, **OPTIONS))
        assert all(pieces)
        assert "".join(pieces) == embedded.generate(prompt, **OPTIONS).removeprefix(prompt)
    prompts = ["import o", "def area(self):\n    return"]
    rows = zip(*embedded.generate_stream(prompts, max_tokens_per_yield=size, **OPTIONS), strict=True)
    assert ["".join(row) for row in rows] == [
        text.removeprefix(prompt) for prompt, text in zip(prompts, embedded.generate(prompts, **OPTIONS), strict=True)
    ]


def forced(bridge, ids):
    """Returns a hook that has the model go on with these tokens."""
    queue = iter(ids)

    def force(value, hook):
        value[:, -1] = 0
        value[:, -1, next(queue)] = 100

    return [("hook_logits", force)]


@pytest.mark.parametrize("text", ["é", "漢字 and 🙂🙂!", "a\ufffdb", "🙂"])
@pytest.mark.parametrize("cut", [0, 1])
def test_characters_of_several_bytes_come_whole(text, cut, embedded):
    """With `cut`, the last character never becomes whole: the text ends within it, or goes on with another."""
    ids = embedded.to_tokens(text, prepend_bos=False)[0].tolist()
    assert len(ids) > len(text.encode()) // 2  # most bytes are tokens of their own
    for prompt, rest in (("x", ids[: len(ids) - cut]), ("x", [*ids[: len(ids) - cut], *embedded.to_tokens("y")[0]])):
        options = {"max_new_tokens": len(rest), "eos_token_id": None, "do_sample": False}
        pieces = list(embedded.generate_stream(prompt, fwd_hooks=forced(embedded, rest), **options))
        whole = embedded.generate(prompt, fwd_hooks=forced(embedded, rest), **options)
        assert "".join(pieces) == whole.removeprefix(prompt)
        assert all("\ufffd" not in piece for piece in pieces[:-1]) or "\ufffd" in whole


def test_sampling_follows_the_seed_and_others_may_draw_between_runs(bridge, tokens):
    options = {"max_new_tokens": 8, "do_sample": True, "eos_token_id": None}
    torch.manual_seed(5)
    generated = bridge.generate(tokens, **options)
    torch.manual_seed(5)
    assert torch.equal(torch.cat(list(bridge.generate_stream(tokens, **options)), 1), generated[:, 7:])


def test_hooks_are_off_between_items_and_know_their_step(bridge, tokens):
    plain = bridge(tokens)
    seen = []

    def to_token_seven(value, hook):
        seen.append((hook.step, hook.position))
        value[..., 7] = 1000

    stream = bridge.generate_stream(tokens, fwd_hooks=[("hook_logits", to_token_seven)], **OPTIONS)
    for count, chunk in enumerate(stream, 1):
        assert (chunk == 7).all()
        assert len(seen) == count  # it does not run ahead
        assert torch.equal(bridge(tokens), plain)
        bridge.run_with_cache(tokens, "hook_embed")
        bridge.generate(tokens, max_new_tokens=2, fwd_hooks=[("hook_embed", lambda value, hook: None)])
    assert seen == [(step, step + 6 if step else 0) for step in range(12)]


def test_two_streams_take_turns(bridge, tokens):
    expected = [bridge.generate(rows, eos_token_id=None, **OPTIONS)[:, 7:] for rows in (tokens[:1], tokens[1:])]
    streams = [bridge.generate_stream(rows, eos_token_id=None, **OPTIONS) for rows in (tokens[:1], tokens[1:])]
    pairs = list(zip(*streams, strict=True))
    for index in (0, 1):
        assert torch.equal(torch.cat([pair[index] for pair in pairs], 1), expected[index])


@pytest.mark.parametrize("how", ["close", "drop", "break", "raise"])
def test_an_abandoned_stream_ends_the_generation(how, bridge, tokens):
    calls = []
    stream = bridge.generate_stream(
        tokens, fwd_hooks=[("hook_embed", lambda value, hook: calls.append(hook.step))], **OPTIONS
    )
    next(stream)
    next(stream)
    assert threads()
    match how:
        case "close":
            stream.close()
        case "drop":
            pass
        case "break":
            for _ in stream:
                break
        case "raise":
            with pytest.raises(ZeroDivisionError):
                for _ in stream:
                    raise ZeroDivisionError
    del stream
    assert not threads()
    assert len(calls) == (2 if how in ("close", "drop") else 3)
    assert not any(point.is_listening for point in bridge.index)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bridge.hf_model.modules())


def test_what_a_hook_raises_is_raised_where_the_stream_is_read(bridge, tokens):
    def fail(value, hook):
        if hook.step == 3:
            raise ZeroDivisionError("in step three")

    stream = bridge.generate_stream(tokens, fwd_hooks=[("blocks.1.hook_resid_mid", fail)], **OPTIONS)
    assert [next(stream).shape for _ in range(3)] == [(2, 1)] * 3
    with pytest.raises(ZeroDivisionError, match="in step three"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert not any(point.is_listening for point in bridge.index)


def test_the_modes_are_those_of_the_caller(bridge, tokens):
    def modes(stream):
        seen.clear()
        list(stream)
        return seen[0]

    seen = []

    def note(value, hook):
        seen.append((torch.is_inference_mode_enabled(), value.dtype))

    hooks = [("blocks.0.attn.hook_q", note)]
    assert modes(bridge.generate_stream(tokens, fwd_hooks=hooks, **OPTIONS)) == (False, torch.float32)
    with torch.inference_mode():
        assert modes(bridge.generate_stream(tokens, fwd_hooks=hooks, **OPTIONS)) == (True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert modes(bridge.generate_stream(tokens, fwd_hooks=hooks, **OPTIONS)) == (False, torch.bfloat16)


def test_several_sequences_a_row(embedded):
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(1)
    texts = embedded.generate("import o", **options)
    torch.manual_seed(1)
    rows = zip(*embedded.generate_stream("import o", **options), strict=True)
    assert ["import o" + "".join(row) for row in rows] == texts


def test_unknown_names_raise_at_once_and_hooks_that_never_fire_at_the_end(bridge, tokens):
    with pytest.raises(UnknownPointError):
        bridge.generate_stream(tokens, fwd_hooks=[("blocks.9.hook_resid_mid", lambda value, hook: None)], **OPTIONS)
    bridge.blocks[1].module.attn.forward = lambda *args, **kwargs: (torch.zeros_like(args[0]), None)
    hooks = [
        ("blocks.0.hook_resid_mid", lambda value, hook: None),
        ("blocks.1.attn.hook_q", lambda value, hook: None),
    ]
    with pytest.raises(PointNotReachedError, match=r"the hook on blocks\.1\.attn\.hook_q did not fire"):
        list(bridge.generate_stream(tokens, fwd_hooks=hooks, **OPTIONS))


def test_beams_are_refused_by_hugging_face(bridge, tokens):
    with pytest.raises(ValueError, match="streamer"):
        list(bridge.generate_stream(tokens, num_beams=2, **OPTIONS))
