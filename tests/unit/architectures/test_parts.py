"""What follows from the parts of a mapping; and that families do not repeat each other."""

import io
import itertools
import tokenize
from pathlib import Path

import clearspan
from clearspan.architectures import ArchitectureAdapter, parts
from clearspan.components import PerLayer
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import BlockedQKVConversionRule, GroupedQKVConversionRule

FAMILIES = Path(clearspan.__file__).parent / "architectures"


def config(**values):
    return TransformerBridgeConfig(d_model=48, n_heads=4, n_layers=2, n_ctx=32, d_vocab=97, **values)


def adapter(attn, mlp=None, **frame):
    """Returns an adapter of Llama's frame with a given sublayer, of a config that says the contrary of its parts."""

    class Family(ArchitectureAdapter):
        def mapping(self, cfg):
            feed = mlp or parts.mlp("mlp", in_="up", out="down")
            return parts.decoder(
                embed="wte", blocks=parts.block("h", ln1=parts.norm("n"), attn=attn, mlp=feed), **frame
            )

    return Family(config())


def patterns(made):
    return {name: repr(one.tensor_conversion) for name, one in made.weight_processing_conversions.items()}


ATTENTION = parts.attention("attn", q="q", k="k", v="v", o="o")


def test_fields_follow_from_the_parts():
    gated = parts.gated_mlp("mlp", gate="g", in_="u", out="d")
    logits = parts.unembedding("head", scale=0.5, softcap=30.0)
    rotated = parts.attention("attn", q="q", k="k", v="v", o="o", rotary=True)
    cfg = adapter(rotated, gated, ln_final=parts.norm("last", rms=True), unembed=logits).cfg
    assert (cfg.gated_mlp, cfg.final_rms, cfg.uses_rms_norm, cfg.normalization_type) == (True, True, True, "RMS")
    assert (cfg.logit_scale, cfg.output_logits_soft_cap, cfg.positional_embedding_type) == (0.5, 30.0, "rotary")
    cfg = adapter(ATTENTION, ln_final=parts.norm("last"), pos_embed="wpe").cfg
    assert (cfg.gated_mlp, cfg.final_rms, cfg.uses_rms_norm, cfg.normalization_type) == (False, False, False, "LN")
    assert (cfg.logit_scale, cfg.output_logits_soft_cap, cfg.positional_embedding_type) == (1.0, None, "standard")
    assert adapter(ATTENTION).cfg.positional_embedding_type == "none"


def test_heads_follow_from_a_fused_map():
    rule = GroupedQKVConversionRule(n_heads=4, d_head=12, n_kv_heads=2)
    made = adapter(parts.fused_attention("attn", qkv="qkv", o="o", rule=rule, alibi=True))
    assert made.cfg.n_key_value_heads == 2
    assert made.cfg.positional_embedding_type == "alibi"
    assert made.uses_combined_qkv
    assert patterns(made) == {
        "blocks.{i}.attn.q.weight": "RearrangeTensorConversion('g n h m -> (g n) m h', g=2)",
        "blocks.{i}.attn.k.weight": "RearrangeTensorConversion('n h m -> n m h', n=2)",
        "blocks.{i}.attn.v.weight": "RearrangeTensorConversion('n h m -> n m h', n=2)",
        "blocks.{i}.attn.o.weight": "RearrangeTensorConversion('m (n h) -> n h m', n=4)",
    }


def test_layers_that_convert_differently_have_conversions_of_their_own():
    rules = BlockedQKVConversionRule(4, 12, 4), GroupedQKVConversionRule(4, 12, 4)
    made = adapter(PerLayer([parts.fused_attention("attn", qkv="qkv", o="o", rule=rule) for rule in rules]))
    found = patterns(made)
    assert found["blocks.0.attn.q.weight"] == "RearrangeTensorConversion('(n h) m -> n m h', n=4)"
    assert found["blocks.1.attn.q.weight"] == "RearrangeTensorConversion('n h m -> n m h', n=4)"
    assert found["blocks.{i}.attn.o.weight"] == "RearrangeTensorConversion('m (n h) -> n h m', n=4)"


def test_what_a_family_says_counts_before_what_its_parts_imply():
    class Family(ArchitectureAdapter):
        config_values = {"positional_embedding_type": "none"}  # noqa: RUF012

        def mapping(self, cfg):
            return parts.decoder(
                embed="wte",
                pos_embed="wpe",
                blocks=parts.block("h", attn=ATTENTION, mlp=parts.mlp(None, in_="up", act="act", out="down")),
            )

    assert Family(config()).cfg.positional_embedding_type == "none"


def code(path):
    """Returns a file's lines of code without imports and documentation, with `S` for every text and `0` for numbers."""
    lines: dict[int, list[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        match token.type:
            case tokenize.STRING if token.string.startswith('"""'):
                pass
            case tokenize.STRING | tokenize.NUMBER:
                lines.setdefault(token.start[0], []).append("S")
            case tokenize.NAME | tokenize.OP:
                lines.setdefault(token.start[0], []).append(token.string)
    joined = [" ".join(words) for _, words in sorted(lines.items())]
    return [line for line in joined if not line.startswith(("from ", "import "))]


def test_no_two_files_share_six_lines_of_a_shape():
    files = {path.name: code(path) for path in FAMILIES.glob("*.py") if path.name != "__init__.py"}
    shapes = {name: {tuple(lines[at : at + 6]) for at in range(len(lines) - 5)} for name, lines in files.items()}
    for (one, first), (other, second) in itertools.combinations(shapes.items(), 2):
        assert not first & second, (one, other, first & second)


def test_all_adapters_together_are_short():
    assert sum(len(path.read_text().splitlines()) for path in FAMILIES.glob("*.py")) < 3000
