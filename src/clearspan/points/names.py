"""Names of hook points: short names, nearest names, and selections by name, list or predicate."""

import builtins
import difflib
import dis
import functools
import inspect
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from types import CodeType, FunctionType
from typing import cast

from clearspan.checks import check_counts
from clearspan.errors import InvalidArgumentError, UnknownPointError
from clearspan.points.catalogue import VOCABULARY, unnumbered

NamesFilter = str | Sequence[str] | re.Pattern[str] | Callable[[str], bool] | None

_SHORT_OF = {entry.name: entry.leaf.removeprefix("hook_") for entry in VOCABULARY}


def _shorts_in(component: str) -> tuple[str, ...]:
    """Returns the short names of a component's own points."""
    return tuple(_SHORT_OF[entry.name] for entry in VOCABULARY if entry.component == component)


_ENDS = ("in", "out")
"""Short names of the points that a block and each component have."""
_OUTSIDE_BLOCKS = _shorts_in("")
_IN_BLOCK = _shorts_in("blocks.{l}")
_IN_ATTENTION = _shorts_in("blocks.{l}.attn")
_IN_MLP = _shorts_in("blocks.{l}.mlp")
_IN_NORM = _shorts_in("ln_final")
_KNOWN = (*_OUTSIDE_BLOCKS, *_IN_NORM, *_IN_ATTENTION, *_IN_MLP, *_IN_BLOCK)
_COMPONENTS = {"a": "attn", "attention": "attn", "m": "mlp", "b": None, "block": None, "blocks": None}
_SHORT = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}


def get_act_name(name: str, layer: int | None = None, layer_type: str | None = None) -> str:
    """Returns the full name of a hook point from its short name.

    Args:
        name: Short name (`"q"`, `"resid_pre"`, `"scale"`), or a full name, which is returned as it is.
        layer: Layer from 0, for a point in a block. A norm's point without a layer is `ln_final`'s.
        layer_type: Component, for a point that several have (`"ln1"`, `"ln2"`).

    Raises:
        UnknownPointError: No point has the short name.
        InvalidArgumentError: The layer, or which of a block's norms, is missing; or the layer or component is none.

    Example:
        >>> get_act_name("q", 3)
        'blocks.3.attn.hook_q'
        >>> get_act_name("normalized", 0, "ln2")
        'blocks.0.ln2.hook_normalized'
        >>> get_act_name("out", 2), get_act_name("in", 2, "mlp")
        ('blocks.2.hook_out', 'blocks.2.mlp.hook_in')
        >>> get_act_name("embed")
        'hook_embed'
    """
    check_name(name)
    if not isinstance(layer_type, str | None):
        raise InvalidArgumentError(f"layer_type={layer_type!r}"[:80], expected="a component, such as 'ln1'")
    if layer is not None:
        check_counts(0, layer=layer)
    if ("." in name or name.startswith("hook_")) and layer is None:
        return name
    match = re.fullmatch(r"([a-z_]+?)(\d+)([a-z]*\d?)", name)
    if layer is None and match and not name.startswith("ln"):
        short, number, kind = match.groups()  # TransformerLens's "q3" and "scale2ln1"
        return get_act_name(short, int(number), kind or layer_type)
    name = _SHORT.get(name, name)
    layer_type = _COMPONENTS.get(layer_type or "", layer_type)
    if name in _ENDS and (layer is not None or layer_type is not None):
        return ".".join([*([] if layer is None else [f"blocks.{layer}"]), *filter(None, [layer_type]), f"hook_{name}"])
    if name in _IN_NORM and layer is None:
        return f"ln_final.hook_{name}"
    if name in _OUTSIDE_BLOCKS:
        return f"hook_{name}"
    if layer is not None and name not in _KNOWN and unnumbered(f"blocks.{{l}}.hook_{name}") in _SHORT_OF:
        return f"blocks.{layer}.hook_{name}"  # of a further sublayer, such as "mlp2_out"
    if name not in (*_IN_NORM, *_IN_ATTENTION, *_IN_MLP, *_IN_BLOCK):
        raise UnknownPointError(f"no hook point has the short name {name!r}", nearest=nearest(name, _KNOWN))
    if layer is None:
        raise InvalidArgumentError(f"the point {name!r} is in a block", fix=f"get_act_name({name!r}, layer)")
    if name in _IN_NORM and layer_type is None:
        raise InvalidArgumentError(
            f"several norms of a block have {name!r}", fix=f"get_act_name({name!r}, {layer}, 'ln1')"
        )
    component = layer_type or ("attn" if name in _IN_ATTENTION else "mlp" if name in _IN_MLP else None)
    prefix = ".".join(["blocks.{l}", *([component] if component else [])])
    if f"{prefix}.hook_{name}" not in _SHORT_OF:
        homes = [full.split(".")[-2] for full, short in _SHORT_OF.items() if short == name and full.count(".") == 3]
        raise UnknownPointError(
            f"no hook point {name!r} is in {component!r}", expected=" or ".join(map(repr, homes)) or None
        )
    return ".".join([f"blocks.{layer}", *([component] if component else []), f"hook_{name}"])


def check_name(name: object) -> None:
    """Raises InvalidArgumentError unless something is text, as the names of hook points are."""
    if not isinstance(name, str):
        raise InvalidArgumentError("a hook point is given by its name", got=repr(name)[:80])


def check_predicate(predicate: Callable[..., object]) -> None:
    """Raises InvalidArgumentError unless a function can be called with a name alone."""
    try:
        signature = inspect.signature(predicate)
    except ValueError:  # a function of C that does not tell
        return
    try:
        signature.bind("hook_embed")
    except TypeError as error:
        raise InvalidArgumentError(
            "a predicate of names cannot be called with a name",
            expected="names=lambda name: ...",
            got=f"a function of {signature}"[:80],
            reason=str(error),
        ) from None


def answers_of(predicate: object) -> Hashable:
    """Returns what the answers of a function of names follow from, where that is known; or None.

    A function written at a call is another object each time, but of the same code. Its answers follow from its code,
    what it closes over, its defaults and the globals that it reads, if these are texts, whole numbers or functions of
    Python's own that do nothing else.
    """
    if not isinstance(predicate, FunctionType) or predicate.__kwdefaults__:
        return None
    names = _globals_read(predicate.__code__)
    if names is None:
        return None
    there, built_in = predicate.__globals__, vars(builtins)
    try:
        cells = [cell.cell_contents for cell in predicate.__closure__ or ()]
    except ValueError:  # a variable that has no value yet
        return None
    read = (*cells, *(predicate.__defaults__ or ()), *(there.get(name, built_in.get(name)) for name in names))
    if not all(map(_is_constant, read)):
        return None
    return predicate.__code__, tuple((type(value), value) for value in read)


def _is_constant(value: object) -> bool:
    if type(value) is tuple:
        return all(type(one) is str for one in cast("tuple[object, ...]", value))
    return value is None or type(value) in (str, int, bool) or any(value is one for one in _PURE)


@functools.lru_cache(256)
def _globals_read(code: CodeType) -> tuple[str, ...] | None:
    """Returns the globals that code reads, with the functions in it; None where it does more than to read them."""
    names: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            names.append(step.argval)
        elif step.opname in _ACTS:
            return None
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            read = _globals_read(inner)
            if read is None:
                return None
            names += read
    return tuple(dict.fromkeys(names))


_PURE = (all, any, bool, int, isinstance, len, list, max, min, range, set, sorted, str, sum, tuple)
"""Functions of Python's that a predicate may call."""
_ACTS = frozenset(
    {
        *("IMPORT_NAME", "LOAD_BUILD_CLASS", "LOAD_FROM_DICT_OR_DEREF", "LOAD_FROM_DICT_OR_GLOBALS", "LOAD_NAME"),
        *("DELETE_ATTR", "DELETE_DEREF", "DELETE_GLOBAL", "STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL"),
    }
)
"""Steps of code whose effect is not the answer alone, or that read what is not known."""


def is_short_name(name: str) -> bool:
    """Returns whether `get_act_name` makes a full name of it."""
    return name in _KNOWN or name in _SHORT


def nearest(name: object, names: Iterable[str], count: int = 3) -> list[str]:
    """Returns the names most similar to the given one, best first; none for what is no name."""
    return difflib.get_close_matches(name, list(names), n=count, cutoff=0.5) if isinstance(name, str) else []
