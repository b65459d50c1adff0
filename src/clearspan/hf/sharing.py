"""A second model on the same tensors: its modules are its own, its parameters and buffers are the first one's."""

import copy
import itertools
from typing import TYPE_CHECKING, Any

from clearspan.errors import UnreadableWeightError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sharing_copy(model: "PreTrainedModel") -> "PreTrainedModel":
    """Returns a model with modules and a configuration of its own, and the very parameters and buffers of the first.

    torch hooks of the user are copied with the modules; this library's are not.

    Raises:
        UnreadableWeightError: Modules are offloaded, so that their parameters are not there to be shared.
    """
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    if any(tensor.is_meta for tensor in tensors):
        raise UnreadableWeightError(
            "an offloaded model cannot be processed",
            reason="its weights are in memory only while a module runs",
            fix="load it without offloading",
        )
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
    return copied


def _is_ours(hook: object) -> bool:
    return str(vars(hook).get("__module__", getattr(hook, "__module__", ""))).startswith("clearspan.")


def untie(model: "PreTrainedModel") -> None:
    """Has a model whose embeddings are no longer tied know it, so that saving and loading do not tie them again."""
    model.config.tie_word_embeddings = False
    vars(model)["all_tied_weights_keys"] = {}
