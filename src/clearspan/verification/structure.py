"""What an adapter says of a model's structure, against the modules that are there. It costs no forward."""

import fnmatch
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from itertools import islice

from torch import nn

from clearspan._forward.given import counting
from clearspan.architectures import implied
from clearspan.components import (
    AttentionBridge,
    EmbeddingBridge,
    ExpertsBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    JointGateMLPBridge,
    JointQKVAttentionBridge,
    LatentAttentionBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    RouterBridge,
    SharedKeysAttentionBridge,
    UnembeddingBridge,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import AdapterWarning
from clearspan.hf.adapters import acting
from clearspan.hf.loading import bridge_config
from clearspan.model import Model
from clearspan.tree import module_at
from clearspan.verification.report import Check
from clearspan.verification.trial import FAULTS

SHOWN = 5
"""Findings that a warning names."""
_UNCLAIMED = (
    "No component of the adapter accounts for it, so what it computes is in no point and in no weight, and processing "
    "takes it for absent. The adapter needs a part for it, or an entry in `irrelevant` with the reason."
)


def findings(model: Model) -> Iterator[tuple[str, str]]:
    """Yields what is wrong between an adapter and its model's modules, each with what that means."""
    yield from _claims(model)
    yield from _sizes(model)


def warn_of_structure(model: Model) -> None:
    """Warns if the adapter leaves parts of the model out, or says sizes that these do not have."""
    try:
        wrong = [f"{what}. {why}" for what, why in islice(findings(model), SHOWN)]
    except FAULTS as error:
        wrong = [f"a part is of another kind than its module: {type(error).__name__}: {error}"]
    if wrong:
        said = "\n  ".join(wrong)
        text = f"the adapter does not fit {model.cfg.architecture}; bridge.verify() says more\n  {said}"
        warnings.warn(text, AdapterWarning, stacklevel=3)


def checks(model: Model) -> Iterator[Check]:
    """Yields the checks of structure, and of settings that follow from it."""
    wrong = [*findings(model), *_settings(model)]
    for what, why in wrong:
        yield Check("structure", what, False, explanation=why)
    if not wrong:
        numbers = sum(1 for _ in model.hf_model.named_parameters())
        yield Check("structure", f"all {numbers} parameters are accounted for, with the sizes of the config", True)


# --- claims ----------------------------------------------------------------------------------------------------------


def _claims(model: Model) -> Iterator[tuple[str, str]]:
    """Yields parameters and buffers that no component accounts for, and modules that two do."""
    claimed = Counter(path for part in _parts(model) for path in part.claims())
    for path, count in claimed.items():
        if count > 1:
            parts = [part for part in _parts(model) if path in part.claims()]
            if len({part.call for part in parts} - {None}) == count:  # each is a call of its own
                continue
            owners = [part.path for part in parts]
            yield f"{path} is {' and '.join(owners)}", "Each module is one part: the adapter names it twice."
    irrelevant = model.adapter.irrelevant
    for name in _unclaimed(model.hf_model, "", _at(model.hf_model, claimed)):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in irrelevant):
            yield f"{name} is in no component", _UNCLAIMED


def _parts(model: Model) -> Iterator[GeneralizedComponent]:
    for component in model.components:
        yield from component.walk()


def _at(model: nn.Module, paths: Iterable[str]) -> set[int]:
    """Returns the ids of the modules and parameters at paths, wherever wrappers have moved them.

    A parameter in one of these modules may be one of another module too, and is known there as well.
    """
    ends = (path.rpartition(".") for path in paths)
    there = [getattr(module_at(model, around), name) for around, _, name in ends]
    inside = (parameter for one in there if isinstance(one, nn.Module) for parameter in one.parameters())
    return {id(one) for one in (*there, *inside)}


def _unclaimed(module: nn.Module, path: str, claimed: Container[int]) -> Iterator[str]:
    """Yields parameters and buffers in a module that are not, and are not inside, what is claimed."""
    if id(module) in claimed or id(module := acting(module)) in claimed:
        return
    start = f"{path}." if path else ""
    for own in (module._parameters, module._buffers):
        for name, tensor in own.items():
            if tensor is not None and id(tensor) not in claimed:
                yield start + name
    for name, child in module._modules.items():
        if child is not None:
            yield from _unclaimed(child, start + name, claimed)


# --- sizes -----------------------------------------------------------------------------------------------------------


def _sizes(model: Model) -> Iterator[tuple[str, str]]:
    """Yields parts whose weights have other sizes than the adapter says."""
    cfg = model.cfg
    shown = {block.module_path for block in model.blocks}  # a block may be called several times
    lists = dict.fromkeys(path.rpartition(".")[0] for path in sorted(shown))
    blocks = (f"{path}.{name}" for path in lists for name in module_at(model.hf_model, path)._modules)
    there = sum(f"{path}.*" not in model.adapter.irrelevant for path in blocks)  # a text passes by some
    if there != len(shown):
        yield f"cfg.n_layers is {len(model.blocks)}", f"{' and '.join(lists)} has {there} blocks."
    for part in _parts(model):
        for what, expected, got in _widths(part, cfg):
            if expected != got:
                yield f"{what} is {got}", f"By the adapter and the config it should be {expected}."


Width = tuple[str, object, object]


def _widths(part: GeneralizedComponent, cfg: TransformerBridgeConfig) -> Iterator[Width]:
    """Yields what the weights of a part should be like, and are like."""
    match part:
        case GeneralAttentionBridge():
            yield from _of_attention(part, cfg)
        case MLPBridge():
            yield from _of_mlp(part, cfg)
        case RouterBridge():
            yield f"the inputs of {part.path}", cfg.d_model, part.shape("weight")[-1]
        case ExpertsBridge():
            yield from _of_experts(part, cfg)
        case NormalizationBridge() if part.path.rpartition(".")[2].startswith("ln"):
            yield from _of_norm(part, cfg)
        case EmbeddingBridge():
            yield "the rows of the token embedding", max(cfg.d_vocab, part.n_tokens), part.n_tokens
        case PosEmbedBridge(table=str() as table):
            positions, width = part.shape(table)
            yield "the positions of the position embedding", cfg.n_ctx, positions - part.offset
            if not part.ends_in_embed:  # a projection may follow
                yield "the width of the position embedding", cfg.d_model, width
        case UnembeddingBridge():
            yield "the outputs of the unembedding", cfg.d_vocab, part.n_logits or part.widths[1]


def _of_norm(norm: NormalizationBridge, cfg: TransformerBridgeConfig) -> Iterator[Width]:
    yield f"axes of {norm.path}", "batch pos d_model", norm.axes
    if norm.has("weight"):
        yield f"the width of {norm.path}", cfg.d_model, norm.shape("weight")[-1]


def _of_attention(attention: GeneralAttentionBridge, cfg: TransformerBridgeConfig) -> Iterator[Width]:
    d_model, d_head = cfg.d_model, attention.head_width
    queries, keys = attention.n_heads * d_head, attention.n_kv_heads * d_head
    match attention:
        case JointQKVAttentionBridge():
            maps = {"qkv": (d_model, queries + 2 * keys), "o": (queries, d_model)}
        case AttentionBridge():
            asked = 2 * queries if attention.gate_in_queries else queries
            wide = attention.d_head_v or d_head
            values, made = attention.n_kv_heads * wide, attention.n_heads * wide
            maps = {"q": (d_model, asked), "k": (d_model, keys), "v": (d_model, values), "o": (made, d_model)}
            if "gate" in attention.submodules:
                maps["gate"] = (d_model, attention.n_heads if attention.gate_is_of_head else queries)
        case LatentAttentionBridge():
            maps = _of_latent(attention, cfg)
        case SharedKeysAttentionBridge():
            maps = {"q": (d_model, queries), "o": (attention.n_heads * (attention.d_head_v or d_head), d_model)}
        case _:
            maps = {}
    for key, (wide, width) in maps.items():
        if key == "v" and "v_norm" in attention.submodules and "v" not in attention.submodules:
            continue  # values are the map of keys
        widths = (attention.d_input if key not in ("o", "kv_b", "q_b") and attention.d_input else wide, width)
        linear = attention.submodules[key]
        assert isinstance(linear, LinearBridge), f"{key} is a linear map"
        yield f"{linear.path} (inputs, outputs)", widths, linear.widths


def _of_latent(attention: LatentAttentionBridge, cfg: TransformerBridgeConfig) -> dict[str, tuple[int, int]]:
    heads, values = attention.n_heads, attention.value_width
    rank = attention.kv_b.widths[0]
    last = "q_b" if "q_b" in attention.submodules else "q"
    query_inputs = attention.submodules["q_a"].shape("weight")[0] if last == "q_b" else cfg.d_model
    query_inputs *= 2 if attention.joins_query_latent else 1
    made = attention.d_head_qk + (values if attention.gate_in_queries else 0)
    return {
        last: (query_inputs, heads * made),
        "kv_a": (cfg.d_model, rank + attention.d_head_rope),
        "kv_b": (rank, heads * (attention.d_head_nope + values)),
        "o": (heads * values, cfg.d_model),
    }


def _of_mlp(mlp: MLPBridge, cfg: TransformerBridgeConfig) -> Iterator[Width]:
    out = mlp.submodules["out"]
    assert isinstance(out, LinearBridge), "out is a linear map"
    d_mlp, d_model = out.widths
    yield f"the outputs of {out.path}", cfg.d_model, d_model
    if mlp.path.endswith(".mlp") and not _has_mixtures(cfg):
        yield f"the inputs of {out.path}", cfg.d_mlp, d_mlp
    for key in ("in", "gate", "gate_up"):
        linear = mlp.submodules.get(key)
        if isinstance(linear, LinearBridge):
            times = 2 if isinstance(mlp, JointGateMLPBridge) else 1
            yield f"{linear.path} (inputs, outputs)", (cfg.d_model, times * d_mlp), linear.widths


def _has_mixtures(cfg: TransformerBridgeConfig) -> bool:
    """Whether MLPs may have several widths, of which the config's may be one."""
    return any("expert" in name for name in cfg.hf)


def _of_experts(experts: ExpertsBridge, cfg: TransformerBridgeConfig) -> Iterator[Width]:
    maps = [(each, "in_axis") for each in experts.reads()] + [(each, "out_axis") for each in experts.adds()]
    for each, axis in maps:
        held = (part._parameters.get(each.weight) for part in each.module.modules())  # a wrapper's is in what it wraps
        weight = next((parameter for parameter in held if parameter is not None), None)
        if weight is None:
            yield f"whether {experts.path} has {each.weight}", True, False
        elif weight.ndim == 3 and not experts.is_narrow:
            yield f"d_model in {experts.path}.{each.weight}", cfg.d_model, weight.shape[getattr(each, axis)]


# --- settings --------------------------------------------------------------------------------------------------------


def _settings(model: Model) -> Iterator[tuple[str, str]]:
    """Yields settings of the adapter that its own parts, or the model's config, contradict."""
    cfg = model.cfg
    for name, expected in _expected(model):
        got = getattr(cfg, name)
        if got != expected:
            yield f"cfg.{name} is {got!r}", f"By the model's config and the adapter's parts it should be {expected!r}."
    for block in model.blocks:
        ways = [name for name in ("is_parallel", "norms_the_sum", "residual_is_normed") if getattr(block, name)]
        if len(ways) > 1:
            yield f"{block.path} is {' and '.join(ways)}", "A block is wired in one of these ways."


def _expected(model: Model) -> Iterator[tuple[str, object]]:
    """Yields what fields of the config should be."""
    own = bridge_config(model.hf_model, model.adapter.source)
    counted = counting(model)  # whose config counts rows of the table, those before the first position too
    yield "n_ctx", own.n_ctx - (0 if counted is None else counted.offset)
    for name in ("d_model", "n_heads", "n_layers", "d_vocab", "d_mlp", "act_fn", "dtype", "architecture"):
        yield name, getattr(own, name)
    frame = {part.path: part for part in model.components if part not in model.blocks}
    yield from implied(frame, model.blocks, own).items()
    norms = [part for part in _parts(model) if isinstance(part, NormalizationBridge)]
    of_stream = [norm for norm in norms if norm.path.rpartition(".")[2].startswith("ln")]
    if of_stream:
        yield "eps", of_stream[0].eps
    if any(isinstance(part, PosEmbedBridge) and part.table is not None for part in model.components):
        yield "has_table", False  # of rotations or biases
    yield "eps_attr", _eps_attr(model)


def _eps_attr(model: Model) -> str:
    """Returns what the config calls the norms' epsilon: as the adapter says, where the config has that or none.

    An entry with another number than the norms have is none that the model's code reads.
    """
    named = model.cfg.eps_attr
    norms = [one.eps for one in _parts(model) if isinstance(one, NormalizationBridge)]
    known = [name for name, value in model.cfg.hf.items() if name.endswith(("eps", "epsilon")) and value in norms]
    return named if named in known or not known else known[0]
