"""Adapters from outside: given to boot, registered, or of an installed package; and what makes an adapter again."""

import copy
import pickle
import sys
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from tests.unit.architectures.own_model import OwnArchitectureAdapter, OwnForCausalLM, own_model
from tests.zoo import GROUPED, IDS, build

import clearspan
from clearspan.architectures import ADAPTERS, ArchitectureAdapter, adapter_class
from clearspan.architectures.llama import Gemma3ArchitectureAdapter, LlamaArchitectureAdapter
from clearspan.errors import AdapterError, InvalidArgumentError, PlugInWarning, UnsupportedArchitectureError

TOKENS = torch.arange(1, 8)[None]


def lines(error):
    return str(error.value).splitlines()


# --- given, registered -----------------------------------------------------------------------------------------------


def test_boot_takes_the_adapter_of_a_model_with_code_of_its_own():
    model = own_model()
    bridge = clearspan.boot(model, adapter=OwnArchitectureAdapter)
    assert (bridge.cfg.d_model, bridge.cfg.n_heads, bridge.cfg.n_layers, bridge.cfg.d_mlp) == (48, 4, 2, 80)
    assert (bridge.cfg.d_vocab, bridge.cfg.n_ctx, bridge.cfg.act_fn) == (97, 64, "relu")
    found = bridge.verify()
    # generate of transformers itself asks this config for num_hidden_layers, which it does not have
    assert {check.group for check in found.failures} == {"generation"}, str(found)


@pytest.mark.filterwarnings("ignore::clearspan.errors.DerivedWarning")
def test_a_name_is_loaded_with_the_adapter_that_is_given(tmp_path):
    class Helium(LlamaArchitectureAdapter):
        pass

    sizes = {**IDS, **GROUPED, "head_dim": 12}
    transformers.HeliumForCausalLM(transformers.HeliumConfig(**sizes)).save_pretrained(tmp_path)
    assert type(clearspan.boot(tmp_path).adapter) is not Helium
    bridge = clearspan.boot(tmp_path, adapter=Helium)
    assert type(bridge.adapter) is Helium
    assert bridge.verify().passed


def test_several_classes_share_an_adapter_until_it_is_undone():
    with clearspan.register(OwnArchitectureAdapter, OwnForCausalLM, "OtherForCausalLM") as registration:
        assert adapter_class("OtherForCausalLM") is adapter_class("OwnForCausalLM") is OwnArchitectureAdapter
        assert type(clearspan.boot(own_model()).adapter) is OwnArchitectureAdapter
        assert repr(registration) == "Registration(OwnArchitectureAdapter for OwnForCausalLM, OtherForCausalLM)"
    assert not {"OwnForCausalLM", "OtherForCausalLM"} & set(ADAPTERS)
    assert repr(registration) == "Registration(OwnArchitectureAdapter for nothing any more)"


def test_a_registration_is_undone_after_an_exception_too():
    with pytest.raises(KeyError), clearspan.register(OwnArchitectureAdapter, "OwnForCausalLM"):
        raise KeyError
    assert "OwnForCausalLM" not in ADAPTERS


def test_a_name_is_replaced_where_that_is_said_and_given_back():
    class Better(LlamaArchitectureAdapter):
        pass

    with pytest.raises(InvalidArgumentError) as error:
        clearspan.register(Better, "LlamaForCausalLM")
    assert lines(error) == [
        "LlamaForCausalLM has an adapter already",
        "  got: LlamaArchitectureAdapter",
        "  fix: clearspan.register(..., replace=True); or clearspan.boot(model, adapter=...) for one model",
    ]
    registration = clearspan.register(Better, "LlamaForCausalLM", replace=True)
    assert type(clearspan.boot(build("llama")).adapter) is Better
    registration.undo()
    assert ADAPTERS["LlamaForCausalLM"] is LlamaArchitectureAdapter
    registration.undo()  # once more does nothing
    assert ADAPTERS["LlamaForCausalLM"] is LlamaArchitectureAdapter


def test_the_same_adapter_can_be_registered_again():
    with clearspan.register(LlamaArchitectureAdapter, "LlamaForCausalLM"):
        pass
    assert ADAPTERS["LlamaForCausalLM"] is LlamaArchitectureAdapter


def test_undoing_leaves_what_was_registered_since():
    class Later(LlamaArchitectureAdapter):
        pass

    first = clearspan.register(OwnArchitectureAdapter, "OwnForCausalLM")
    with clearspan.register(Later, "OwnForCausalLM", replace=True):
        first.undo()
        assert ADAPTERS["OwnForCausalLM"] is Later
    ADAPTERS.pop("OwnForCausalLM", None)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: clearspan.register(OwnArchitectureAdapter),
            [
                "OwnArchitectureAdapter is registered for no model",
                "  expected: classes of Hugging Face models, or their names",
                "  fix: clearspan.register(OwnArchitectureAdapter, type(model))",
            ],
        ),
        (
            lambda: clearspan.register(OwnForCausalLM, "OwnForCausalLM"),
            [
                f"{OwnForCausalLM!r} is no adapter",
                "  expected: a subclass of clearspan.architectures.ArchitectureAdapter, or another AdapterSource",
                "  got: the class OwnForCausalLM",
            ],
        ),
        (
            lambda: clearspan.boot(own_model(), adapter="OwnArchitectureAdapter"),
            [
                "'OwnArchitectureAdapter' is no adapter",
                "  expected: a subclass of clearspan.architectures.ArchitectureAdapter, or another AdapterSource",
                "  got: str",
            ],
        ),
        (
            lambda: clearspan.register(LlamaArchitectureAdapter, 3),
            [
                "3 is no class of a model",
                "  expected: classes of Hugging Face models, or their names",
                "  got: int",
            ],
        ),
    ],
)
def test_what_cannot_be_registered(call, said):
    with pytest.raises(InvalidArgumentError) as error:
        call()
    assert lines(error) == said


def test_an_adapter_that_was_made_is_no_source():
    made = clearspan.boot(build("llama")).adapter
    with pytest.raises(InvalidArgumentError) as error:
        clearspan.boot(build("llama"), adapter=made)
    assert lines(error)[-1] == "  fix: the adapter's class itself, or its source"


# --- installed packages ----------------------------------------------------------------------------------------------


def install(folder, package, code, architecture, value):
    """Writes a package that offers an adapter, as an installer leaves it."""
    (folder / f"{package}.py").write_text(code)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[clearspan.architectures]\n{architecture} = {value}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages."""
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(ADAPTERS), set(sys.modules)
    yield tmp_path
    ADAPTERS.clear()
    ADAPTERS.update(before[0])
    for name in set(sys.modules) - before[1]:
        if name.endswith("_plug_in"):
            del sys.modules[name]


WORKING = "from tests.unit.architectures.own_model import OwnArchitectureAdapter as Adapter\n"


def test_an_installed_package_serves_its_models_and_is_imported_for_them_alone(site):
    install(site, "own_plug_in", WORKING, "OwnForCausalLM", "own_plug_in:Adapter")
    clearspan.boot(build("llama"))
    with pytest.raises(UnsupportedArchitectureError) as error:
        adapter_class("OwnForCasualLM")
    assert "own_plug_in" not in sys.modules
    assert lines(error)[2].startswith("  nearest: OwnForCausalLM")
    assert type(clearspan.boot(own_model()).adapter) is OwnArchitectureAdapter
    assert "own_plug_in" in sys.modules
    assert type(pickle.loads(pickle.dumps(clearspan.boot(own_model()))).adapter) is OwnArchitectureAdapter


def test_a_package_does_not_take_a_name_that_is_served(site):
    install(site, "own_plug_in", WORKING, "LlamaForCausalLM", "own_plug_in:Adapter")
    assert adapter_class("LlamaForCausalLM") is LlamaArchitectureAdapter


@pytest.mark.parametrize(
    ("code", "value", "reason"),
    [
        ("import no_such_module\n", "broken_plug_in:Adapter", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0\n", "broken_plug_in:Adapter", "ZeroDivisionError: division by zero"),
        ("Adapter = (\n", "broken_plug_in:Adapter", "SyntaxError: '(' was never closed"),
        ("", "broken_plug_in:Adapter", "AttributeError: module 'broken_plug_in' has no attribute 'Adapter'"),
        ("Adapter = 3\n", "broken_plug_in:Adapter", "InvalidArgumentError: 3 is no adapter"),
    ],
)
def test_a_broken_package_is_named_and_does_not_stand_in_the_way(site, code, value, reason):
    install(site, "broken_plug_in", code, "OwnForCausalLM", value)
    with (
        pytest.warns(PlugInWarning) as warned,
        pytest.raises(UnsupportedArchitectureError, match="no adapter for OwnForCausalLM"),
    ):
        adapter_class("OwnForCausalLM")
    said = str(warned[0].message).splitlines()
    assert said[:2] == [
        "the package broken_plug_in offers an adapter for OwnForCausalLM that cannot be loaded",
        f"  where: {value}",
    ]
    assert said[2].startswith(f"  reason: {reason}")
    install(site, "own_plug_in", WORKING, "OwnForCausalLM", "own_plug_in:Adapter")
    with pytest.warns(PlugInWarning):
        assert adapter_class("OwnForCausalLM") is OwnArchitectureAdapter
    assert type(clearspan.boot(build("llama")).adapter) is LlamaArchitectureAdapter


# --- sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A source that is an object: it knows the sizes itself."""

    paths: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)

    def __call__(self, cfg, /):
        return OfObject(cfg, self)


class OfObject(OwnArchitectureAdapter):
    def __init__(self, cfg, source):
        self._source = source
        super().__init__(cfg)

    @property
    def source(self):
        return self._source

    def mapping(self, cfg):
        mapping = super().mapping(cfg)
        mapping["blocks"].name = self._source.paths["blocks"]
        return mapping


def test_a_source_that_is_an_object_makes_the_adapters_of_all_copies():
    sizes = {"d_model": 48, "n_heads": 4, "n_layers": 2, "d_vocab": 97, "n_ctx": 64, "d_mlp": 80, "act_fn": "relu"}
    source = Measured({"blocks": "stack"}, {**sizes, "eps": ()})
    bridge = clearspan.boot(own_model(), adapter=source)
    logits = bridge(TOKENS)
    for other in (copy.deepcopy(bridge), pickle.loads(pickle.dumps(bridge)), copy.copy(bridge), bridge.processed()):
        assert isinstance(other.adapter, OfObject)
        assert other.adapter.source == source
        torch.testing.assert_close(other(TOKENS).log_softmax(-1), logits.log_softmax(-1), rtol=1e-4, atol=1e-4)
    found = bridge.verify()
    assert {check.group for check in found.failures} == {"generation"}, str(found)
    with clearspan.register(source, OwnForCausalLM):
        assert clearspan.boot(own_model()).adapter.source is source


def test_a_config_that_lacks_what_must_be_known():
    class Short(OwnArchitectureAdapter):
        sizes = {key: size for key, size in OwnArchitectureAdapter.sizes.items() if key != "d_model"}  # noqa: RUF012

    with pytest.raises(AdapterError) as error:
        clearspan.boot(own_model(), adapter=Short)
    assert lines(error) == [
        "the config of OwnForCausalLM has no d_model",
        "  expected: one of the entries hidden_size",
        "  where: Short.sizes",
        "  fix: sizes = {'d_model': (entry,), ...} in the adapter",
    ]


def test_no_adapter_is_made_but_by_its_source():
    bridge = clearspan.boot(build("qwen3"))
    assert bridge.adapter.source is type(bridge.adapter)
    with pytest.raises(NotImplementedError):
        ArchitectureAdapter(bridge.cfg)


# --- nested configs --------------------------------------------------------------------------------------------------


class WithImages(Gemma3ArchitectureAdapter):
    irrelevant = {  # noqa: RUF012
        **Gemma3ArchitectureAdapter.irrelevant,
        "model.vision_tower.*": "images",
        "model.multi_modal_projector.*": "images",
    }

    def mapping(self, cfg):
        mapping = super().mapping(cfg)
        for key in ("embed", "blocks", "ln_final"):
            mapping[key].name = mapping[key].name.replace("model.", "model.language_model.")
        return mapping


def with_images():
    text = {**IDS, **GROUPED, "head_dim": 16, "sliding_window": 4}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = {**vision, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_sizes_of_a_nested_config_are_those_of_its_text_model():
    bridge = clearspan.boot(with_images(), adapter=WithImages)
    assert (bridge.cfg.d_model, bridge.cfg.n_heads, bridge.cfg.n_layers, bridge.cfg.d_vocab) == (48, 4, 3, 97)
    assert (bridge.cfg.n_key_value_heads, bridge.cfg.n_ctx, bridge.cfg.d_mlp) == (2, 64, 80)
    found = bridge.verify()
    assert found.passed, str(found)
    bridge.hf_model.resize_token_embeddings(101)
    assert bridge.cfg.d_vocab == bridge.cfg.hf["vocab_size"] == 101
    assert bridge(TOKENS).shape[-1] == 101
