"""A derived structure as the text of a Python module with an adapter, as one would write it by hand."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from clearspan.architectures import AdapterSource, ArchitectureAdapter, check_source, parts
from clearspan.architectures.adapter import FRAME_SIZES, SIZES, Size, Sizes, entries
from clearspan.components import (
    BlockBridge,
    EmbeddingBridge,
    GeneralizedComponent,
    LatentAttentionBridge,
    LinearBridge,
    PerLayer,
    PosEmbedBridge,
    UnembeddingBridge,
    WeightsBridge,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import AdapterError
from clearspan.hf.loading import bridge_config, stored, text_config
from clearspan.structure.adapter import EPSILONS, Structure
from clearspan.structure.builders import Builders
from clearspan.structure.entries import Entries
from clearspan.structure.expression import Call, Code, Expression, names_in, written
from clearspan.structure.layers import Statement, layered

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel

_ENDINGS = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|LMHead|Model)$")


def source(structure: Structure, model: "PreTrainedModel", *, checked: str = "", replaces: bool = False) -> str:
    """Returns the text of a module that defines and registers the adapter of a structure.

    The text is formatted. Sizes and factors are named by entries of the config where these have them.

    Args:
        structure: What was derived of the model.
        model: The model.
        checked: A sentence on how the adapter was checked, for the module's docstring.
        replaces: Whether the adapter takes the place of one that serves the class already.

    Example:
        >>> import clearspan
        >>> from clearspan.structure import derive, source
        >>> model = clearspan.zoo.build("helium")
        >>> print(source(derive(model), model).splitlines()[-1])
        clearspan.register(HeliumArchitectureAdapter, "HeliumForCausalLM")
    """
    cfg = structure(bridge_config(model, structure)).cfg
    statements, frame = _mapping(structure, cfg)
    body, used = list(_body(structure, model, cfg)), [frame, *(one.value for one in statements)]
    name = f"{_ENDINGS.sub('', structure.architecture)}ArchitectureAdapter"
    replacing = ", replace=True" if replaces else ""
    lines = [
        *_docstring(structure, checked),
        "",
        *_imports([*(value for _, value in body), *used]),
        "",
        "",
        f"class {name}(ArchitectureAdapter):",
        f'    """{_ENDINGS.sub("", structure.architecture)}."""',
        "",
        *(f"    {start} = {written(value, 4, len(start) + 3)}" for start, value in body),
        "",
        "    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:",
        '        """Returns the parts."""',
        *(f"        {line}" for line in _remarks(structure)),
        *_first_rows(structure),
        *(f"        {one.name} = {written(one.value, 8, len(one.name) + 3)}" for one in statements),
        f"        return {written(frame, 8, 7)}",
        "",
        "",
        f'clearspan.register({name}, "{structure.architecture}"{replacing})',
    ]
    return "\n".join(lines) + "\n"


def _docstring(structure: Structure, checked: str) -> list[str]:
    said = (
        f"Found in a traced forward of {structure.architecture} in transformers {version('transformers')}, by "
        f"`clearspan adapt` of clearspan {version('clearspan')}. {checked}"
    )
    name = _ENDINGS.sub("", structure.architecture)
    return [f'"""{name}, as derived from a model.', "", *textwrap.wrap(said.strip(), 119), '"""']


# --- the mapping -----------------------------------------------------------------------------------------------------

_NAMED = {"embed": EmbeddingBridge, "pos_embed": PosEmbedBridge, "unembed": UnembeddingBridge}
_FRAME = ("embed", "embed_norm", "project_in", "pos_embed", "type_embed", "blocks")
_AFTER = ("ln_final", "head", "project_out", "unembed")


def _mapping(structure: Structure, cfg: TransformerBridgeConfig) -> tuple[list[Statement], Call]:
    """Returns the call that makes the mapping, and the assignments before it."""
    builders = Builders(Entries(cfg))
    blocks = structure.parts["blocks"]
    assert isinstance(blocks, PerLayer), "a structure has the block of each layer"
    calls = [builders.call(one) for one in blocks.templates if isinstance(one, BlockBridge)]
    statements, whole = layered([one for one in calls if isinstance(one, Call)], Entries(cfg))
    there = {key: _outside(builders, key, part) for key, part in structure.parts.items() if key != "blocks"}
    there["blocks"] = Code("blocks", None)
    if there["unembed"] == "lm_head":
        del there["unembed"]
    known = (*_FRAME, *_AFTER)
    kwargs = {key: there[key] for key in known if key in there}
    others = {key: one for key, one in there.items() if key not in known}
    frame = Call(parts.decoder, (), {**kwargs, **({"others": others} if others else {})})
    return [*statements, Statement("blocks", whole)], frame


def _outside(builders: Builders, key: str, part: GeneralizedComponent) -> Expression:
    """Returns a part outside the blocks, by its name alone where that says it all."""
    usual = _NAMED.get(key, LinearBridge)
    call = builders.call(part)
    is_plain = isinstance(call, Call) and not call.kwargs and type(part) is usual
    return part.name if is_plain and key in (*_NAMED, "project_in", "project_out") else call


def _remarks(structure: Structure) -> Iterator[str]:
    """Yields comments on what is not shown."""
    said = [
        re.sub(r"\.\d+\.", ".N.", f"{one.what.rpartition('.')[2]}: {one.how}")
        for one in structure.findings
        if "only the ends are known" in one.how or "no known function" in one.how or "is not what" in one.how
    ]
    for line in dict.fromkeys(said):
        yield from textwrap.wrap(line, 108, initial_indent="# ", subsequent_indent="# ")


def _first_rows(structure: Structure) -> Iterator[str]:
    table = structure.parts.get("pos_embed")
    if isinstance(table, PosEmbedBridge) and table.padding_id is not None:
        yield f"        cfg.n_ctx -= {table.offset}  # the size of the table counts its first rows too"


# --- the class -------------------------------------------------------------------------------------------------------


def _body(
    structure: Structure, model: "PreTrainedModel", cfg: TransformerBridgeConfig
) -> Iterator[tuple[str, Expression]]:
    """Yields the attributes of the class, each as what is assigned to and what is assigned."""
    sizes = _sizes(structure, model, cfg)
    yield "sizes: ClassVar[Sizes]", _as_entries(sizes)
    values: dict[str, Expression] = {"has_table": True} if structure.has_table else {}
    named = [name for name in cfg.hf if name.endswith(EPSILONS)]
    if named and not isinstance(sizes["eps"], tuple):
        values["eps_attr"] = named[0]
    if values:
        yield "config_values: ClassVar[Mapping[str, object]]", values
    if structure.numbers_positions:
        yield "makes_positions_from_mask", True
    irrelevant = dict(_irrelevant(structure))
    if irrelevant:
        yield "irrelevant: ClassVar[Mapping[str, str]]", {**irrelevant}


def _sizes(structure: Structure, model: "PreTrainedModel", cfg: TransformerBridgeConfig) -> dict[str, Size]:
    """Returns where sizes come from: entries of the config where these give what was measured, else the numbers."""
    config, found = text_config(model), dict[str, Size]()
    implied = {"d_head": cfg.d_model // max(cfg.n_heads, 1), "d_mlp": 4 * cfg.d_model, "n_key_value_heads": cfg.n_heads}
    said = _said(model)
    if any(isinstance(part, LatentAttentionBridge) for part in _walk(structure.parts["blocks"])):
        implied |= {field: structure.sizes.get(field) for field in ("d_head", "n_key_value_heads")}
    for field, names in SIZES.items():
        measured = structure.sizes.get(field, names)
        if implied.get(field) == measured and said.get(field) != measured:
            found[field] = ()
        elif isinstance(measured, tuple):
            name = stored(config, measured)
            found[field] = () if name is None else (name,)
        elif stored(config, names) is not None and said.get(field) == measured:
            found[field] = (str(stored(config, names)),)
        else:
            found[field] = () if implied.get(field) == measured else measured
    for field in FRAME_SIZES:
        measured = structure.sizes.get(field)
        if measured is not None and said.get(field) != measured:
            found[field] = measured
    return found


def _said(model: "PreTrainedModel") -> Mapping[str, object]:
    """Returns sizes as the config's usual entries say them; nothing where these are not all there."""
    try:
        return vars(bridge_config(model, ArchitectureAdapter))
    except AdapterError:
        return {}


def adapter_of(text: str) -> AdapterSource:
    """Returns the adapter that a module's text defines, without registering it.

    Args:
        text: What `source` returned.
    """
    definitions, _, registered = text.rpartition("\n\n\nclearspan.register(")
    names: dict[str, object] = {"__name__": "adapted"}
    exec(compile(definitions, "<adapter>", "exec"), names)  # the text was made here, of a model that runs here
    return check_source(names[registered.partition(",")[0]])


def _as_entries(sizes: Sizes) -> Expression:
    names = {field: name[0] if name else None for field, name in sizes.items() if isinstance(name, tuple)}
    if len(names) == len(sizes) and names["n_ctx"] is not None and names["eps"] is not None:
        order = ("n_ctx", "eps", "act_fn", "d_mlp", "d_head", "n_key_value_heads")
        return Call(entries, (), {field: names[field] for field in order if names[field] is not None})
    return {**sizes}


def _irrelevant(structure: Structure) -> Iterator[tuple[str, str]]:
    """Yields patterns of what no part accounts for, for any number of layers."""
    shown = [part.name for part in _walk(structure.parts["blocks"]) if isinstance(part, WeightsBridge)]
    for pattern, reason in structure.irrelevant.items():
        if pattern.removesuffix(".*").rpartition(".")[2] not in shown:
            yield re.sub(r"\.\d+\.", ".*.", pattern), reason


def _walk(part: GeneralizedComponent) -> Iterator[GeneralizedComponent]:
    yield part
    for inner in (*part.submodules.values(), *(part.templates if isinstance(part, PerLayer) else ())):
        yield from _walk(inner)


# --- imports ---------------------------------------------------------------------------------------------------------

_PUBLIC = ("clearspan.components.mixer_kinds", "clearspan.components", "clearspan.conversions", "clearspan.points")


def _imports(used: Iterable[Expression]) -> Iterator[str]:
    """Yields the imports of a module's names, in their order."""
    found: dict[str, set[str]] = {
        "clearspan.architectures": {"ArchitectureAdapter", "Sizes"},
        "clearspan.components": {"GeneralizedComponent"},
        "clearspan.config": {"TransformerBridgeConfig"},
    }
    for one in used:
        for module, name in names_in(one):
            found.setdefault(_home(module), set()).add(name)
    yield "from collections.abc import Mapping"
    yield "from typing import ClassVar"
    yield ""
    yield "import clearspan"
    for module in sorted(found):
        yield _import(module, sorted(found[module], key=_order))


def _home(module: str) -> str:
    if module.startswith("clearspan.architectures.adapter"):
        return "clearspan.architectures"
    return next((one for one in _PUBLIC if module.startswith(one)), module)


def _order(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def _import(module: str, names: list[str]) -> str:
    flat = f"from {module} import {', '.join(names)}"
    return flat if len(flat) <= 120 else "\n".join([f"from {module} import (", *(f"    {one}," for one in names), ")"])
