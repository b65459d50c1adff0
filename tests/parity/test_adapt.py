"""The text of a derived adapter: what it defines is what was derived, and it reads as if written by hand."""

import subprocess
import sys

import pytest
import torch
from tests.structures import tiny
from tests.unit.architectures.own_model import OwnConfig, SquashedForCausalLM
from tests.zoo import IDS
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import clearspan
from clearspan.architectures import ADAPTERS
from clearspan.cli import app
from clearspan.errors import ClearspanError
from clearspan.structure import adapter_of, derive, source

WEIGHTS = ("W_E", "W_U", "W_in", "W_out", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_O")
QUICK = ("helium", "bert", "qwen3_next", "deepseek_v3", "cohere2", "bloom")
TYPES = (
    *QUICK,
    "jamba",
    "granite",
    "opt",
    "gemma3_text",
    "mixtral",
    "mamba2",
    "gpt_neox",
    "gpt_oss",
    "lfm2",
    "roberta",
    "xglm",
)


def assert_same(written, derived):
    """Asserts that two bridges of a model have the same points in the same places, values and weights."""
    assert set(written.index.by_name) == set(derived.index.by_name)
    for name, point in derived.index.by_name.items():
        other = written.index.by_name[name]
        assert (type(other.access), other.aliases) == (type(point.access), point.aliases)
        assert repr(other.place) == repr(point.place)  # the functions of a mixer's kind are compared by identity
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (_, found), (_, expected) = (bridge.run_with_cache(tokens) for bridge in (written, derived))
        assert torch.equal(written(tokens), written.hf_model(tokens, use_cache=False).logits)
    assert set(found) == set(expected)
    for name in expected:  # factors are estimated to six digits, and the config has all
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
    for name in WEIGHTS:
        one, other = weight(written, name), weight(derived, name)
        assert one == other if isinstance(one, str) else torch.equal(one, other), name
    for field in ("n_ctx", "d_head", "d_mlp", "act_fn", "eps", "n_key_value_heads", "has_table", "eps_attr"):
        assert getattr(written.cfg, field) == getattr(derived.cfg, field), field


def weight(bridge, name):
    try:
        return torch.as_tensor(getattr(bridge, name))
    except (ClearspanError, AttributeError) as error:
        return type(error).__name__


@pytest.fixture(scope="module")
def texts():
    """Returns the text of the adapter derived of a type of the zoo, with the model; made once."""
    known = {}

    def of(model_type):
        if model_type not in known:
            model = clearspan.zoo.build(model_type)
            known[model_type] = source(derive(model), model), model
        return known[model_type]

    return of


@pytest.mark.parametrize("model_type", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in TYPES])
def test_what_is_written_is_what_was_derived(model_type, texts):
    text, model = texts(model_type)
    before = dict(ADAPTERS)
    written = clearspan.boot(model, adapter=adapter_of(text))
    assert before == ADAPTERS
    assert_same(written, clearspan.boot(model, adapter=derive(model)))


WIDER = {**IDS, "vocab_size": 97, "hidden_size": 60, "num_attention_heads": 6, "max_position_embeddings": 40}
GROUPED = {**WIDER, "intermediate_size": 52, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 10}
LATENT = {
    **{key: value for key, value in GROUPED.items() if key != "head_dim"},
    "num_key_value_heads": 6,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "kv_lora_rank": 12,
    "q_lora_rank": 18,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "qk_nope_head_dim": 10,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
KINDS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
FACTORS = {"embedding_multiplier": 5.0, "residual_multiplier": 0.3, "logits_scaling": 3.0, "attention_multiplier": 0.2}


@pytest.mark.parametrize(
    ("model_type", "name", "settings"),
    [
        ("helium", "Helium", GROUPED),
        ("granite", "Granite", {**{k: v for k, v in GROUPED.items() if k != "head_dim"}, **FACTORS}),
        ("granite", "Granite", {**GROUPED, "head_dim": 14, **FACTORS}),  # the config that it was written from has none
        ("cohere2", "Cohere2", {**GROUPED, "layer_types": KINDS, "sliding_window": 4, "logit_scale": 0.3}),
        ("deepseek_v3", "DeepseekV3", LATENT),
        ("bloom", "Bloom", {**IDS, "vocab_size": 97, "hidden_size": 60, "n_head": 6, "n_layer": 3}),
    ],
)
def test_an_adapter_of_one_model_serves_another_of_its_class(model_type, name, settings, texts):
    text, _ = texts(model_type)
    model = tiny(name, **settings)
    assert_same(clearspan.boot(model, adapter=adapter_of(text)), clearspan.boot(model, adapter=derive(model)))


@pytest.mark.parametrize("model_type", QUICK)
def test_a_formatter_and_a_linter_leave_the_text_as_it_is(model_type, texts, tmp_path):
    text, _ = texts(model_type)
    file = tmp_path / "adapter.py"
    file.write_text(text, encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--isolated", "--line-length", "120", "--target-version", "py311"]
    for command in (["format", "--check"], ["check", "--select", "E,W,F,I,D1,UP,C4,RUF"]):
        done = subprocess.run([*ruff, *command, *rules, str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_text_reads_as_if_written_by_hand(texts):
    text, _ = texts("cohere2")
    definition = text[text.index("    def mapping") : text.index("\n\n\nclearspan.register")]
    assert definition.splitlines() == [
        "    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:",
        '        """Returns the parts."""',
        "        attns = {",
        '            "sliding_attention": attention('
        '"self_attn", q="q_proj", k="k_proj", v="v_proj", o="o_proj", rotary=True),',
        '            "full_attention": attention("self_attn", q="q_proj", k="k_proj", v="v_proj", o="o_proj"),',
        "        }",
        "        blocks = block(",
        '            "model.layers",',
        '            ln1=norm("input_layernorm"),',
        '            attn=PerLayer([attns[kind] for kind in cfg.hf["layer_types"]]),',
        '            mlp=gated_mlp("mlp", gate="gate_proj", in_="up_proj", out="down_proj"),',
        "            parallel=True,",
        "        )",
        "        return decoder(",
        '            embed="model.embed_tokens",',
        "            blocks=blocks,",
        '            ln_final=norm("model.norm"),',
        '            unembed=unembedding("lm_head", scale=cfg.hf["logit_scale"]),',
        "        )",
    ]


def saved(model_type, folder):
    clearspan.zoo.build(model_type).save_pretrained(folder)
    return str(folder)


def run(*arguments):
    return CliRunner().invoke(app, ["adapt", *arguments])


def error_of(result):
    """Returns the lines of a command's message, after the progress of loading weights."""
    return result.stderr[result.stderr.index("error: ") :].splitlines()


def test_the_command_prints_an_adapter_and_says_how_it_is_known(tmp_path):
    result = run(saved("helium", tmp_path))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith('"""Helium, as derived from a model.')
    assert result.stdout.endswith('clearspan.register(HeliumArchitectureAdapter, "HeliumForCausalLM")\n')
    said = result.stderr.splitlines()
    assert "hook_embed: model.embed_tokens is the stream that enters the blocks" in said
    sentence = next(line for line in said if line.startswith("All "))
    assert sentence.endswith("checks of `bridge.verify()` hold for it on this model.")
    assert sentence in result.stdout.replace("\n", " ")


def test_a_file_that_was_written_serves_the_class_when_it_is_imported(tmp_path):
    folder, file = saved("helium", tmp_path / "model"), tmp_path / "helium.py"
    result = run(folder, "--out", str(file))
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines()[-1] == f"wrote {file}"
    before = dict(ADAPTERS)
    try:
        exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), {"__name__": "helium"})
        assert type(clearspan.boot(folder).adapter).__name__ == "HeliumArchitectureAdapter"
    finally:
        ADAPTERS.clear()
        ADAPTERS.update(before)


def test_a_class_with_an_adapter_is_refused():
    result = run("tiny-bigcode")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert error_of(result) == [
        "error: GPTBigCodeForCausalLM has an adapter already: GPTBigCodeArchitectureAdapter",
        "  where: clearspan.architectures.gpt_bigcode",
        "  fix: --anyway derives one all the same",
    ]


@pytest.mark.slow
def test_a_class_with_an_adapter_is_derived_anyway():
    result = run("tiny-bigcode", "--anyway")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith('"GPTBigCodeForCausalLM", replace=True)\n')


def test_a_model_whose_structure_is_not_found_is_refused(tmp_path):
    AutoConfig.register("own", OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, SquashedForCausalLM, exist_ok=True)
    SquashedForCausalLM(OwnConfig()).save_pretrained(tmp_path)
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = error_of(result)
    assert lines[0] == "error: no adapter for SquashedForCausalLM, and its structure was not found"
    assert any(line.startswith("  reason: ") for line in lines)


def test_an_adapter_that_fails_is_written_with_what_fails_and_exits_one(tmp_path):
    result = run(saved("bart", tmp_path))  # which is wrong on rows padded on the left, without this library too
    assert result.exit_code == 1
    assert "checks of `bridge.verify()` fail for it on this model: padding." in result.stdout.replace("\n", " ")
    assert "failed: padding: row of 9 tokens padded on the left to 12" in result.stderr.splitlines()
    assert result.stdout.splitlines()[-1].startswith("clearspan.register(")


def test_a_folder_is_no_file(tmp_path):
    result = run("tiny-bigcode", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert f"--out {tmp_path} is a folder; name a file, for instance {tmp_path / 'adapter.py'}" in result.stderr
