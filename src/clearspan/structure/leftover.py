"""What is left of a module when its parts are named: modules and parameters of which only the presence is known."""

from collections.abc import Container, Iterator, Sequence

from torch import nn

from clearspan.components import (
    EmbeddingBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    LateBiasLinearBridge,
    MixerBridge,
    RemainderBridge,
)
from clearspan.structure.algebra import same
from clearspan.structure.trace import Visit


def account_for_all(
    module: nn.Module,
    template: GeneralizedComponent,
    calls: Sequence[Visit],
    path: str = "",
    readers: Sequence[Visit] = (),
    irrelevant: Container[str] = (),
) -> None:
    """Gives a template opaque parts for the modules and parameters that none of its parts accounts for.

    Args:
        module: The template's module.
        template: The template, which gets them among its submodules or those of its parts.
        calls: The calls in the module.
        path: The module's path.
        readers: The calls that read the residual stream, or the norm's output.
        irrelevant: Paths of modules, parameters and buffers that need no part.
    """
    owners = dict(_owners(template, ""))
    claimed = {name for name, part in owners.items() if name and not part.submodules}
    for name, part in owners.items():
        if isinstance(part, MixerBridge):  # which accounts for its own
            own = module.get_submodule(name)
            claimed |= {f"{name}.{key}" for key in (*own._parameters, *own._buffers)}
    claimed |= {f"{name}.sinks".lstrip(".") for name, part in owners.items() if _has_sinks(part)}
    claimed |= {f"{name}.weight" for name, part in owners.items() if isinstance(part, EmbeddingBridge)}
    claimed |= {
        f"{key.rpartition('.')[0]}.{part.late_bias}".lstrip(".")
        for key, part in owners.items()
        if isinstance(part, LateBiasLinearBridge)
    }
    tied = {id(own) for name in claimed for own in _tensors(module, name)}
    for name in _unclaimed(module, "", claimed):
        if name in irrelevant or id(_thing(module, name)) in tied or name.endswith("inv_freq"):
            continue
        around, owner = _innermost(owners, name)
        inner = name.removeprefix(f"{around}.") if around else name
        here = [call for call in calls if call.is_in(f"{path}.{name}".lstrip("."))]
        reads = any(same(call.entered, reader.entered) for call in here for reader in readers)
        is_module = isinstance(_thing(module, name), nn.Module)
        opaque = RemainderBridge(
            inner if is_module else None, parameters=() if is_module else (inner,), reads_stream=reads
        )
        owner.submodules = {**owner.submodules, inner.replace(".", "_"): opaque}


def _owners(part: GeneralizedComponent, around: str) -> Iterator[tuple[str, GeneralizedComponent]]:
    """Yields a template's parts by the paths of their modules in the outermost one."""
    yield around, part
    for inner in part.submodules.values():
        yield from _owners(inner, ".".join(name for name in (around, inner.name) if name))


def _has_sinks(part: GeneralizedComponent) -> bool:
    return isinstance(part, GeneralAttentionBridge) and part.has_sinks


def _innermost(owners: dict[str, GeneralizedComponent], name: str) -> tuple[str, GeneralizedComponent]:
    """Returns the innermost part with parts whose module a thing is in."""
    around = max((one for one in owners if not one or name.startswith(f"{one}.")), key=len)
    return around, owners[around]


def _unclaimed(module: nn.Module, path: str, claimed: set[str]) -> Iterator[str]:
    """Yields the outermost modules without named parts in them, and the parameters and buffers beside such parts."""
    start = f"{path}." if path else ""
    for name in (*module._parameters, *module._buffers):
        there = module._parameters.get(name, module._buffers.get(name))
        if there is not None and start + name not in claimed:
            yield start + name
    for name, child in module._modules.items():
        inner = start + name
        if child is None or inner in claimed or not _holds(child):
            continue
        if any(one.startswith(f"{inner}.") for one in claimed):
            yield from _unclaimed(child, inner, claimed)
        else:
            yield inner


def _tensors(module: nn.Module, path: str) -> Iterator[nn.Parameter]:
    thing = _thing(module, path)
    if isinstance(thing, nn.Module):
        yield from thing.parameters()


def _holds(module: nn.Module) -> bool:
    """Whether a module has parameters, or buffers other than a rotation's frequencies."""
    names = (name for name, _ in module.named_buffers())
    return any(True for _ in module.parameters()) or any(not name.endswith("inv_freq") for name in names)


def _thing(module: nn.Module, path: str) -> object:
    around, _, name = path.rpartition(".")
    return getattr(module.get_submodule(around), name)
