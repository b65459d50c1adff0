"""A derived structure as the text of a Python module with an adapter, as one would write it by hand."""

import fnmatch
import re
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

from clearspan.architectures import AdapterSource, ArchitectureAdapter, check_source, parts
from clearspan.components import (
    BlockBridge,
    EmbeddingBridge,
    GeneralizedComponent,
    LinearBridge,
    PerLayer,
    PosEmbedBridge,
    UnembeddingBridge,
    WeightsBridge,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.hf.loading import bridge_config
from clearspan.structure.adapter import EPSILONS, Structure
from clearspan.structure.builders import Builders
from clearspan.structure.entries import Entries
from clearspan.structure.expression import Call, Code, Expression, written
from clearspan.structure.imports import imports_of
from clearspan.structure.layers import Statement, layered
from clearspan.structure.sizes import as_entries, sizes_of, walk

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
        *imports_of([*(value for _, value in body), *used]),
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


def adapter_of(text: str) -> AdapterSource:
    """Returns the adapter that a module's text defines, without registering it.

    Args:
        text: What `source` returned.
    """
    definitions, _, registered = text.rpartition("\n\n\nclearspan.register(")
    names: dict[str, object] = {"__name__": "adapted"}
    exec(compile(definitions, "<adapter>", "exec"), names)  # the text was made here, of a model that runs here
    return check_source(names[registered.partition(",")[0]])


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
    said = [f"{one.part}: {one.reason}" for one in structure.unshown()]
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
    sizes = sizes_of(structure, model, cfg)
    yield "sizes: ClassVar[Sizes]", as_entries(sizes)
    values: dict[str, Expression] = {"has_table": True} if structure.has_table else {}
    named = [name for name in cfg.hf if name.endswith(EPSILONS)]
    if named and not isinstance(sizes["eps"], tuple):
        values["eps_attr"] = named[0]
    if values:
        yield "config_values: Mapping[str, object]", values
    if structure.numbers_positions:
        yield "makes_positions_from_mask", True
    for name in ("whole_forwards", "no_generation"):
        if vars(structure)[name] is not None:
            yield name, vars(structure)[name]
    irrelevant = dict(_irrelevant(structure))
    if irrelevant:
        usual, buffers = ArchitectureAdapter.irrelevant, [name for name, _ in model.named_buffers()]
        irrelevant |= {one: reason for one, reason in usual.items() if fnmatch.filter(buffers, one)}
        yield "irrelevant: Mapping[str, str]", {**irrelevant}


def _irrelevant(structure: Structure) -> Iterator[tuple[str, str]]:
    """Yields patterns of what no part accounts for, for any number of layers."""
    whole = list(walk(structure.parts["blocks"]))
    shown = [part.name for part in whole if isinstance(part, WeightsBridge)]
    lists = {part.name for part in whole if isinstance(part, BlockBridge)}
    for pattern, reason in structure.irrelevant.items():
        path = pattern.removesuffix(".*")
        if path.rpartition(".")[0] in lists:
            yield pattern, reason  # a block that a text passes by, and no other
        elif path.rpartition(".")[2] not in shown:
            yield re.sub(r"\.\d+\.", ".*.", pattern), reason
