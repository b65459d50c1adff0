"""A model without a tokenizer: every public call works on token ids, and every one that is given text says so."""

import pytest
import torch
from tests.unit import public_calls
from tests.unit.public_calls import CALLS, METHODS, Kit, call
from tests.unit.test_arguments import used
from tests.zoo import build

import clearspan
from clearspan.analysis import fit_steering_vector, report
from clearspan.errors import NoTokenizerError

IDS = {"TEXT": [5, 9, 11], "OTHER": [5, 9, 12], "TEXTS": [[5, 9, number] for number in range(4)]}
"""Token ids in place of the texts of the table of calls."""
OTHER_ARGUMENTS = {"sweep.answered": {"answers": [[7, 8]]}}
"""Arguments besides those texts, where the table gives text."""
TEXT_ONLY = {
    "analysis.evaluate_choices",
    "analysis.ioi_prompts",
    "analysis.evaluate_ioi",
    "IOIPrompts.select",
    "LogitDifference.between",
    "TransformerBridge.to_tokens",
    "TransformerBridge.to_single_token",
    "TransformerBridge.to_string",
    "TransformerBridge.to_str_tokens",
    "TransformerBridge.to_single_str_token",
}
"""What makes text or is made of it, by its name."""
ON_IDS = [name for name in (*CALLS, *METHODS) if name not in TEXT_ONLY]
READING = [
    *("analysis.ablate_heads", "analysis.ablate_layers", "analysis.ablate_neurons", "analysis.causal_effect"),
    *("analysis.detect_heads", "analysis.direct_logit_attribution", "analysis.fit_steering_vector"),
    *("analysis.lens_divergence", "analysis.lens_readings", "analysis.logit_lens", "analysis.loss_by_position"),
    *("analysis.max_activating_examples", "analysis.predictions", "analysis.report", "analysis.steering_sweep"),
    *("analysis.train_probe", "analysis.train_tuned_lens", "circuits.attribution_patch", "circuits.discover_circuit"),
    *("circuits.edge_attribution", "circuits.evaluate_circuits", "circuits.patch_edges", "circuits.path_patching"),
    *("patching.activation_patching", "sweep.Sweep", "sweep.answered", "Pair.of", "TransformerBridge.forward"),
    *("TransformerBridge.run_with_hooks", "TransformerBridge.run_with_cache", "TransformerBridge.generate"),
    *("TransformerBridge.generate_stream", "TransformerBridge.to_batch"),
]
"""What reads an input, at the least."""


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """What the table's calls are made with, on a model without a tokenizer, and on token ids."""
    with pytest.MonkeyPatch.context() as patched:
        for name, ids in IDS.items():
            patched.setattr(public_calls, name, ids)
        yield Kit(None, tmp_path_factory.mktemp("ids"))


@pytest.fixture(autouse=True)
def _files_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ON_IDS)
def test_every_call_works_on_token_ids(kit, name):
    function, given = call(kit, name)
    used(function, {**given, **OTHER_ARGUMENTS.get(name, {})})


@pytest.mark.parametrize("name", sorted(TEXT_ONLY))
def test_what_is_of_text_says_that_there_is_no_tokenizer(kit, name):
    with pytest.raises(NoTokenizerError, match="this bridge has no tokenizer, so it takes no text"):
        used(*call(kit, name))


def takers(kit, name):
    """Returns the arguments of a call that are inputs."""
    _, given = call(kit, name)
    return [argument for argument, value in given.items() if value in [*IDS.values(), [IDS["TEXT"]], [IDS["OTHER"]]]]


def test_every_call_that_is_given_text_says_that_there_is_no_tokenizer(kit):
    asked = {name: found for name in ON_IDS if (found := takers(kit, name))}
    assert set(READING) <= set(asked)
    for name, arguments in asked.items():
        function, given = call(kit, name)
        for argument in arguments:
            for text in ("import os", ["import os"], [{"role": "user", "content": "import os"}]):
                with pytest.raises(NoTokenizerError):
                    used(function, {**given, **OTHER_ARGUMENTS.get(name, {}), argument: text})


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere2"])
def test_a_model_of_a_folder_without_a_tokenizer_is_read_and_steered_on_ids(tmp_path, family):
    build(family).save_pretrained(tmp_path)
    bridge = clearspan.boot(tmp_path)
    found = report(bridge, [5, 3, 9], progress=False)
    assert (found.text, found.tokens) == ("", ("#5", "#3", "#9"))
    assert found.to_dict()["tokens"][1]["text"] == "#3"
    vector = fit_steering_vector(bridge, [[5, 3, 9]], [[5, 3, 8]], layers=1)
    assert all(values.norm() > 0 for values in vector.vectors.values())
    tokens = torch.tensor([[5, 3, 9]])
    generated = bridge.generate(tokens, max_new_tokens=2, do_sample=False)
    streamed = list(bridge.generate_stream(tokens, max_new_tokens=2, do_sample=False))
    assert torch.equal(generated[:, 3:], torch.cat(streamed, 1))
