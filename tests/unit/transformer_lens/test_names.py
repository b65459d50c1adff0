"""Every public name of TransformerLens's bridge, hook points and config is here, or says what to use."""

import pytest
from tests.unit.transformer_lens.names import BRIDGE, CONFIG, HOOK_POINT
from torch import nn

import clearspan
from clearspan.errors import MissingWeightError, RenamedError, RenamedImportError

# Of torch's: transformers adds a name of its own, once it has loaded a model.
MODULE = [name for name in dir(nn.Module) if not name.startswith("_") and name != "smart_apply"]


def outcome(owner, name):
    """Returns whether an object has a name, or says what to use in its place."""
    try:
        getattr(owner, name)
    except RenamedError as error:
        return "renamed" if "\n  fix: " in str(error) else "lost"
    except MissingWeightError:  # the model has no such weight, and says so
        assert name == "W_gate"
    return "here"


@pytest.mark.parametrize("name", [*BRIDGE, *MODULE])
def test_names_of_the_bridge(name, embedded):
    assert outcome(embedded, name) in ("here", "renamed")


@pytest.mark.parametrize("name", [*HOOK_POINT, *MODULE])
def test_names_of_hook_points(name, embedded):
    assert outcome(embedded.hook_embed, name) in ("here", "renamed")


@pytest.mark.parametrize("name", CONFIG)
def test_names_of_the_config(name, embedded):
    assert outcome(embedded.cfg, name) in ("here", "renamed")


def test_names_that_scripts_use_are_here(embedded):
    here = [name for name in [*BRIDGE, *MODULE] if outcome(embedded, name) == "here"]
    assert not {"to_tokens", "loss_fn", "cpu", "list_hooks", "add_perma_hook", "n_params_total"} - {*here}


def test_what_is_called_otherwise_says_so(embedded):
    with pytest.raises(AttributeError) as error:
        embedded.enable_compatibility_mode(fold_ln=False)
    assert str(error.value) == (
        "a clearspan.TransformerBridge has no 'enable_compatibility_mode'\n"
        "  fix: bridge.processed(), which returns a new bridge"
    )
    with pytest.raises(RenamedError, match=r"fix: bridge\.hf_model\.register_forward_hook"):
        embedded.register_forward_hook(print)
    with pytest.raises(RenamedError, match=r"hook points are no modules"):
        embedded.hook_embed.parameters()
    with pytest.raises(RenamedError, match=r"fix: bridge\.cfg\.hf\['n_inner'\]"):
        _ = embedded.cfg.n_inner
    with pytest.raises(
        RenamedError, match=r"clearspan\.TransformerBridge has no 'boot_transformers'\n  fix: clearspan"
    ):
        clearspan.TransformerBridge.boot_transformers("gpt2")


def test_other_names_raise_what_python_raises(embedded):
    for owner in (embedded, embedded.hook_embed):
        with pytest.raises(AttributeError, match="object has no attribute 'nonsense'"):
            _ = owner.nonsense
        assert not hasattr(owner, "_nonsense")
    with pytest.raises(AttributeError, match="module 'clearspan' has no attribute 'nonsense'"):
        _ = clearspan.nonsense


def test_a_name_of_the_library_says_so_when_it_is_imported():
    with pytest.raises(
        RenamedImportError, match=r"clearspan has no 'HookedTransformer'\n  fix: clearspan\.boot\(model\)"
    ):
        from clearspan import HookedTransformer  # noqa: F401, PLC0415 - that is what is tested
    with pytest.raises(ImportError, match=r"clearspan\.analysis"):
        _ = clearspan.evals


@pytest.mark.parametrize("name", ["LanguageModel", "StandardizedTransformer", "IntervenableModel", "from_pretrained"])
def test_what_newcomers_try_first_says_what_to_call(name):
    with pytest.raises(RenamedImportError, match=r"fix: clearspan\.boot\(model\)"):
        getattr(clearspan, name)


@pytest.mark.parametrize(
    ("name", "fix"),
    [("trace", "run_with_cache"), ("layers", "bridge.blocks"), ("lm_head", "bridge.unembed"), ("config", "bridge.cfg")],
)
def test_what_other_libraries_call_the_parts_says_what_they_are_called_here(embedded, name, fix):
    with pytest.raises(RenamedError, match=f"has no '{name}'\n  fix: .*{fix}"):
        getattr(embedded, name)
