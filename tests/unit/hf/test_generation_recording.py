"""A recording of several forwards, read as one."""

import torch
from tests.releases import on
from transformers import DynamicCache

from clearspan._run.caching import choose
from clearspan.hf.generation import GenerationRecording


def test_a_forward_more_than_the_sequence_needs_is_cut_off(bridge, tokens):
    """So does a device on which generation looks a step late whether it is over."""
    choice, past = choose(bridge, None), DynamicCache()
    recording = GenerationRecording(choice.points, len(tokens))
    with (
        torch.no_grad(),
        bridge.taps.run(),
        bridge.taps.record(choice.points.values(), choice.plan, recording),
        recording.following(bridge.hf_model, lambda: False, {}),
    ):
        for part in tokens.split([5, 1, 1], 1):
            bridge.hf_model(input_ids=part, **on(bridge.hf_model, past))
    recording.close(6)
    _, expected = bridge.run_with_cache(tokens[:, :6])
    for place in choice.plan.places:
        torch.testing.assert_close(recording.raw(place), expected._recording.raw(place), rtol=1e-5, atol=1e-5)


def test_what_was_written_since_it_was_kept_is_known(bridge, tokens):
    _, cache = bridge.generate(tokens, return_cache=True, max_new_tokens=3, eos_token_id=None)
    recording, place = cache._recording, bridge.hook_embed.place
    assert not recording.was_edited(place.key)
    recording._pieces[place.key][0].tensor.mul_(2)
    assert recording.was_edited(place.key)
    other = bridge.blocks[0].mlp.hook_post.place
    recording.raw(other).mul_(2)
    assert recording.was_edited(other.key)


def test_scores_know_of_writes_to_the_queries_that_they_are_computed_from(bridge, tokens):
    _, cache = bridge.generate(tokens, return_cache=True, max_new_tokens=3, eos_token_id=None)
    recording, place = cache._recording, bridge.blocks[1].attn.hook_attn_scores.place
    assert not recording.was_edited(place.key)
    recording._pieces[f"{place.module}:query"][0].tensor.mul_(2)
    assert recording.was_edited(place.key)
