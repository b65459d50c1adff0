"""Names of TransformerLens's config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from clearspan.errors import RenamedError
from clearspan.transformer_lens.renamed import OF_CONFIG


class _Config(Protocol):
    """What of a config is asked for."""

    d_vocab: int
    d_head: int
    hf: Mapping[str, Any]


class _Entry:
    """An entry of the Hugging Face config: the first of some names that is set, or None."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __get__(self, cfg: _Config | None, owner: type) -> Any:
        return self if cfg is None else next((cfg.hf[one] for one in self._names if cfg.hf.get(one) is not None), None)


@dataclass(kw_only=True)
class ConfigNames:
    """What TransformerLens's config has besides sizes; the model sets it.

    `use_attn_result` and its like are True: the points are always there.

    Attributes:
        device: Where inputs go, as text.
        n_params: Weights in the blocks as they are stored, without norms and biases.
        attn_scale: What scores are divided by in the first attention; None where the model does not say.
        tokenizer_name: What the tokenizer was loaded from, or None.
    """

    device: str = "cpu"
    n_params: int = 0
    attn_scale: float | None = None
    tokenizer_name: str | None = None

    use_attn_result: ClassVar[bool] = True
    use_split_qkv_input: ClassVar[bool] = True
    use_attn_in: ClassVar[bool] = True
    use_hook_mlp_in: ClassVar[bool] = True
    bos_token_id: ClassVar = _Entry("bos_token_id")
    eos_token_id: ClassVar = _Entry("eos_token_id")
    decoder_start_token_id: ClassVar = _Entry("decoder_start_token_id")
    initializer_range: ClassVar = _Entry("initializer_range")
    tie_word_embeddings: ClassVar = _Entry("tie_word_embeddings")
    num_experts: ClassVar = _Entry("num_local_experts", "num_experts", "n_routed_experts")
    experts_per_token: ClassVar = _Entry("num_experts_per_tok")

    @property
    def d_vocab_out(self: _Config) -> int:
        """Logits of a position: `d_vocab`."""
        return self.d_vocab

    @property
    def head_dim(self: _Config) -> int:
        """Width of a head: `d_head`."""
        return self.d_head

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a new dictionary."""
        return dict(vars(self))

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                return object.__getattribute__(self, name)
            entry = f"bridge.cfg.hf[{name!r}]" if name in self.hf else "bridge.cfg.hf has the config's own entries"
            raise RenamedError(f"bridge.cfg has no {name!r}", fix=OF_CONFIG.get(name, entry))
