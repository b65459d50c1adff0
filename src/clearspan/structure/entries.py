"""Numbers of a structure as the model's config says them: by a size's name, or by the entry that has the value."""

import math
from collections.abc import Iterator, Mapping

from clearspan.config import TransformerBridgeConfig
from clearspan.structure.expression import Code, Expression

WORDS: Mapping[str, tuple[str, ...]] = {
    "heads": ("value_head", "_n_heads", "num_heads"),
    "qk_heads": ("key_head",),
    "d_head": ("head_dim", "d_head"),
    "d_head_qk": ("key_head", "qk_head"),
    "d_head_v": ("value_head", "v_head"),
    "d_head_nope": ("nope",),
    "d_head_rope": ("rope",),
    "groups": ("n_groups", "num_groups"),
    "state": ("state",),
    "d_inner": ("expand", "inner", "lru_width"),
    "padding_id": ("pad_token",),
    "dense": ("dense",),
    "d_mlp": ("decoder_ffn", "ffn", "intermediate"),
    "n_ctx": ("max_target", "max_position", "max_seq"),
    "scale": ("logit",),
    "softcap": ("softcap",),
    "linear_limit": ("limit", "clamp"),
    "input_scale": ("width_multiplier", "logit"),
    "n_logits": ("unpadded", "vocab"),
}
"""What entries are called that have the numbers of an adapter, by the builders' keywords; the best word first."""


class Entries:
    """The entries of a model's config, for what an adapter says in numbers.

    Many entries have a width or a count by chance, so one is taken only if its name says so too; a factor is taken from
    the one entry that has its value, of several the one whose name says so, or the one that is a fraction.

    Args:
        cfg: The model's sizes.
    """

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        self._cfg = cfg
        self._numbers = {
            name: value for name, value in cfg.hf.items() if isinstance(value, int | float) and type(value) is not bool
        }

    def size(self, field: str, value: int) -> Expression:
        """Returns a size by its field of `cfg`, where that has the value, or else the number."""
        return Code(f"cfg.{field}", value) if getattr(self._cfg, field) == value else value

    def kv_heads(self, value: int) -> Expression:
        """Returns the number of key and value heads."""
        if (self._cfg.hf.get("num_key_value_heads")) == value:
            return Code("cfg.n_key_value_heads or cfg.n_heads", value)
        return self.size("n_heads", value)

    def named(self, keyword: str, value: object) -> str | None:
        """Returns the entry that has a width or a count and whose name fits the keyword, or None."""
        for word in WORDS.get(keyword, (keyword,)):
            found = [name for name, there in self._numbers.items() if word in name and there == value]
            if len(found) == 1:
                return found[0]
        return None

    def count(self, keyword: str, value: int) -> Expression:
        """Returns a width or a count by the entry that has it, where its name fits the keyword."""
        words, name = WORDS.get(keyword, (keyword,)), self.named(keyword, value)
        if name is not None:
            return Code(f'cfg.hf["{name}"]', value)
        expand = [name for name in self._numbers if "expand" in name and "expand" in words]
        if len(expand) == 1 and self._numbers[expand[0]] * self._cfg.d_model == value:
            return Code(f'cfg.hf["{expand[0]}"] * cfg.d_model', value)
        return self.size("d_model", value) if keyword == "d_inner" else value

    def factor(self, keyword: str, value: float) -> Expression:
        """Returns a factor by the one entry that has it, or whose inverse it is, or as a root of the width."""
        if value in (0, 1):
            return value
        for text, power in (('cfg.hf["{}"]', 1), ('1 / cfg.hf["{}"]', -1)):
            fits = {
                name: one
                for name, there in self._numbers.items()
                if there and _close(one := float(there) ** power, value)
            }
            words = WORDS.get(keyword, (keyword,))
            named = [name for name in fits if any(word in name for word in words)]
            fractions = [name for name in fits if isinstance(self._numbers[name], float)]
            for names in (named, fractions, list(fits)):
                if len(names) == 1:
                    return Code(text.format(names[0]), fits[names[0]])
        root = self._cfg.d_model**0.5
        return Code("cfg.d_model**0.5", root) if _close(root, value) else value

    def by_layer(self, n_layers: int, word: str) -> Iterator[tuple[str, list[object]]]:
        """Yields entries that are lists with an element for each layer, those with a word in their name first."""
        for name, value in sorted(self._cfg.hf.items(), key=lambda entry: word not in entry[0]):
            if isinstance(value, list) and len(value) == n_layers:
                yield name, value


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-5)
