"""Ties: weights that are one parameter."""

from collections.abc import Iterable

from torch import Tensor

from clearspan.components import GeneralizedComponent

_LETTERS = {"embed.weight": "W_E", "pos_embed.weight": "W_pos", "unembed.weight": "W_U", "unembed.bias": "b_U"}


def weights_of(components: Iterable[GeneralizedComponent]) -> dict[int, list[str]]:
    """Returns the canonical names of each parameter, by its `id`."""
    names: dict[int, dict[str, None]] = {}
    for component in components:
        for part in component.walk():
            if part.name is not None:
                for key, parameter in part.module._parameters.items():
                    if parameter is not None:
                        name = f"{part.path}.{key}"
                        names.setdefault(id(parameter), {})[_LETTERS.get(name, name)] = None
    return {key: list(found) for key, found in names.items()}


def ties(components: Iterable[GeneralizedComponent]) -> dict[str, tuple[str, ...]]:
    """Returns each tied weight's name with the names of the others that are the same parameter."""
    groups = [names for names in weights_of(components).values() if len(names) > 1]
    return {name: tuple(other for other in names if other != name) for names in groups for name in names}


def sharing(components: Iterable[GeneralizedComponent], parameter: Tensor) -> list[str]:
    """Returns the canonical names of the weights that are this parameter."""
    return weights_of(components).get(id(parameter), [])
