"""Names of TransformerLens 4.3 for those who bring code along: thin methods, and what is called otherwise here.

`TransformerLensNames` is for the bridge, `HookPointNames` for hook points, `ConfigNames` for `bridge.cfg`. Nothing else
in this library calls these names. A name that means the same does the same; any other raises, and says what to call.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clearspan.checks import check_choice, check_counts, check_flags, check_kind, device_of, number_of, whole
from clearspan.errors import (
    InputError,
    InvalidArgumentError,
    RenamedError,
    RenamedImportError,
    UnknownArgumentError,
)

Hook = Callable[..., Any]
Caching = tuple[dict[str, Tensor], list[tuple[str, Hook]], list[tuple[str, Hook]]]

# --- what is called otherwise ----------------------------------------------------------------------------------------

_LETTERS = "the weights by letter, such as bridge.W_Q and bridge.blocks[0].attn.W_Q"
_HF = "bridge.hf_model, the Hugging Face model itself"
_OF_BRIDGE = {
    "enable_compatibility_mode": "bridge.processed(), which returns a new bridge",
    "process_weights": "bridge.processed(...), which takes the same steps and returns a new bridge",
    "state_dict": "bridge.hf_model.state_dict(), under Hugging Face's names; or " + _LETTERS,
    "load_state_dict": "bridge.hf_model.load_state_dict(...), under Hugging Face's names",
    **dict.fromkeys(("get_params", "tl_parameters", "tl_named_parameters"), _LETTERS),
    "all_composition_scores": "bridge.composition_scores(mode)",
    "hf_generate": "bridge.generate(...), which is Hugging Face's",
    **dict.fromkeys(("cache_all", "cache_some"), "bridge.add_caching_hooks(...) or bridge.run_with_cache(...)"),
    "hook_aliases": "bridge.hook_dict[name].aliases",
    "hook_unembed": "bridge.hook_logits",
    "context_level": "with bridge.hooks(...), which takes its own hooks off",
    "clear_hook_registry": "bridge.reset_hooks(); hook points stay as long as the bridge",
    "close": "del bridge: there is nothing to release",
    "init_weights": "a model that you initialise before clearspan.boot(model)",
    "processor": "transformers.AutoProcessor.from_pretrained(...)",
    "to_sentence_pair_tokens": "bridge.tokenizer(first, second)",
    "real_components": "bridge.components",
    **dict.fromkeys(
        ("diffusion_generate", "encoder_output", "predict_next_sentence", "prepare_multimodal_inputs"), _HF
    ),
}
"""Names of TransformerLens's bridge that are not here, each with what to use."""
_SEEN = "bridge.points(name), which lists a point's axes and place"
_OF_HOOK_POINT = {
    "backward_scale": "a backward hook that returns the gradient times the factor",
    **dict.fromkeys(("enable_reshape", "hook_conversion"), "values come in canonical axes: " + _SEEN),
    "pos_dim": "point.axes.index('pos')",
}
_OF_CONFIG = {
    **dict.fromkeys(("from_dict", "unwrap"), "clearspan.boot(model), which reads the sizes from the model"),
    "attn_implementation": "bridge.hf_model.config._attn_implementation",
    "default_padding_side": "bridge.tokenizer.padding_side",
    **dict.fromkeys(("tokenizer_appends_eos", "tokenizer_prepends_bos"), "bridge.to_tokens(text), which adds one BOS"),
    "layer_norm_folding": "bridge.processing, which says what was done to the weights",
    "parallel_attn_mlp": "bridge.blocks[0].is_parallel",
    "n_devices": "bridge.hf_model.hf_device_map",
    "original_architecture": "bridge.cfg.architecture",
    "use_hook_tokens": "embed.hook_in, which shows the tokens",
}
"""Names of TransformerLens's config that no entry of Hugging Face's has."""
_BOOT = "clearspan.boot(model), of a hub id, a folder, or a loaded model"
_OF_LIBRARY = {
    **dict.fromkeys(("HookedTransformer", "HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder"), _BOOT),
    **dict.fromkeys(("HookedTransformerConfig", "TransformerBridgeConfig"), f"bridge.cfg of {_BOOT}"),
    "HookedSAETransformer": "clearspan.boot(model)",
    "HookedRootModule": _BOOT,
    "SVDInterpreter": "clearspan.analysis.singular_readings",
    **dict.fromkeys(("hook_points", "model_bridge"), "clearspan.HookPoint and clearspan.TransformerBridge"),
    **dict.fromkeys(("utils", "utilities"), "clearspan.get_act_name, clearspan.analysis and clearspan.weights"),
    **dict.fromkeys(("evals", "head_detector", "tools", "train"), "clearspan.analysis"),
    **dict.fromkeys(
        ("TransformerLensKeyValueCache", "HookedTransformerKeyValueCache"),
        "transformers.DynamicCache, past_key_values=",
    ),
}
_OF_GENERATE = {
    "device": "cache.to(device), of the cache that return_cache=True gives",
    "return_input_tokens": "bridge.to_batch(input).tokens",
}
TRANSFORMER_LENS_KEYWORDS = ("freq_penalty", "return_type", "stop_at_eos", "use_past_kv_cache", "verbose")
"""Keywords of TransformerLens's `generate` that Hugging Face's has not, and the bridge's has."""
OF_FORWARD = {
    "return_cache_object": "dict(cache): the cache is a mapping from names to tensors",
    "reset_hooks_end": "bridge.reset_hooks(), or with bridge.hooks(...)",
    "clear_contexts": "bridge.clear_contexts()",
    "remove_batch_dim": "bridge.run_with_cache(..., remove_batch_dim=True), or value[0] in the hook function",
    "decoder_input": _HF,
    "shortformer_pos_embed": _HF,
}
"""Keywords of TransformerLens's runs that are not here, each with what to do instead."""
_OF_MODULE = {name for name in dir(nn.Module) if not name.startswith("_")} | {"T_destination", "dump_patches"}


def _missing(one: object, name: str, what: str, fixes: Mapping[str, str], of_module: str) -> Any:
    """Raises for an attribute that `one` lacks: with what to use, where TransformerLens has it."""
    fix = fixes.get(name) or (of_module if name in _OF_MODULE else None)
    if fix is not None:
        raise RenamedError(f"{what} has no {name!r}", fix=fix)
    return object.__getattribute__(one, name)  # raises, also what a property raised that led here


def missing_from_library(name: str) -> None:
    """Raises for a name of TransformerLens's that `clearspan` is asked for; does nothing for any other name.

    An AttributeError would not be shown by `from clearspan import ...`.
    """
    if name in _OF_LIBRARY:
        raise RenamedImportError(f"clearspan has no {name!r}", fix=_OF_LIBRARY[name])


class _Renamed:
    """A name of a class that raises, and says what to use.

    Args:
        fix: What.
    """

    def __init__(self, fix: str) -> None:
        self._fix = fix

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, one: object, owner: type) -> NoReturn:
        raise RenamedError(f"clearspan.{owner.__name__} has no {self._name!r}", fix=self._fix)


def check_no_level(level: object) -> None:
    """Raises InvalidArgumentError unless TransformerLens's level of a hook is None."""
    if level is not None:
        raise InvalidArgumentError(
            f"level={level!r}: hooks have no levels", fix="with bridge.hooks(...), which takes its own hooks off"
        )


# --- generation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrequencyPenalty:
    """A logits processor of `generate` that makes a token less likely by how often the sequence has it.

    `logits / temperature - penalty * count`, as TransformerLens has it. Hugging Face divides by the temperature later.

    Attributes:
        penalty: What each occurrence takes, in logits.
        temperature: Of the sampling.
    """

    penalty: float
    temperature: float = 1.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the logits `[row, d_vocab]`, of which the penalty for the tokens `[row, pos]` is taken."""
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
        return scores - self.penalty * self.temperature * counts


def hugging_face_keywords(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of a generation, TransformerLens's as Hugging Face's.

    Args:
        given: The keywords.
        settings: The model's settings of generation, where these say nothing.

    Raises:
        UnknownArgumentError: A keyword of TransformerLens's that is not here.
        InvalidArgumentError: A value that means nothing, or what two keywords say differently.
    """
    keywords = dict(given)
    if keywords.get("custom_generate") is not None:  # which has keywords of its own
        return keywords
    for name in keywords.keys() & _OF_GENERATE.keys():
        raise UnknownArgumentError(f"generate does not take {name!r}", fix=_OF_GENERATE[name])
    flags = {name: keywords.pop(name) for name in ("verbose", "stop_at_eos", "use_past_kv_cache") if name in keywords}
    check_flags(**flags)
    if not flags.get("stop_at_eos", True):
        _put(keywords, "eos_token_id", None, "stop_at_eos=False")
    if "use_past_kv_cache" in flags:
        _put(keywords, "use_cache", flags["use_past_kv_cache"], f"use_past_kv_cache={flags['use_past_kv_cache']}")
    if keywords.get("output_logits"):
        keywords.setdefault("return_dict_in_generate", True)
    penalty = number_of("freq_penalty", keywords.pop("freq_penalty", 0))
    if penalty:
        keywords["logits_processor"] = [*(keywords.get("logits_processor") or ()), _penalty(penalty, settings)]
    return keywords


def _put(keywords: dict[str, Any], name: str, value: object, said: str) -> None:
    if keywords.get(name, value) != value:
        raise InvalidArgumentError(f"{said} and {name}={keywords[name]!r} say different things", fix="one of them")
    keywords[name] = value


def _penalty(penalty: float, settings: Mapping[str, Any]) -> FrequencyPenalty:
    if penalty < 0:
        raise InvalidArgumentError(f"freq_penalty={penalty!r}", expected="0 or more")
    if not settings.get("do_sample"):
        raise InvalidArgumentError(
            "freq_penalty changes how tokens are sampled, and none are",
            got="do_sample=False",
            fix="generate(..., do_sample=True, freq_penalty=...), or repetition_penalty=",
        )
    return FrequencyPenalty(penalty, number_of("temperature", settings.get("temperature") or 1.0))


# --- hook points and config ------------------------------------------------------------------------------------------


class _Point(Protocol):
    """What of a hook point is asked for."""

    ctx: dict[str, Any]

    def listeners(self, dir: Literal["fwd", "bwd"]) -> tuple[Any, ...]: ...
    def add_hook(self, hook: Any, dir: Literal["fwd", "bwd"] = ..., is_permanent: bool = ...) -> Any: ...


class HookPointNames:
    """Names of TransformerLens's hook points."""

    @property
    def fwd_hooks(self: _Point) -> list[Any]:
        """The listeners of values, in order: `function`, `is_permanent`."""
        return list(self.listeners("fwd"))

    @property
    def bwd_hooks(self: _Point) -> list[Any]:
        """The listeners of gradients, in order."""
        return list(self.listeners("bwd"))

    def has_hooks(
        self: _Point,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
        level: int | None = None,
    ) -> bool:
        """Returns whether functions are on the point.

        Args:
            dir: Of which direction.
            including_permanent: Whether permanent ones count.
            level: None: hooks have no levels.
        """
        check_flags(including_permanent=including_permanent)
        check_no_level(level)
        return any(including_permanent or not one.is_permanent for one in _listeners(self, dir))

    def add_perma_hook(self: _Point, hook: Hook, dir: Literal["fwd", "bwd"] = "fwd") -> Any:
        """Puts a function on the point that `reset_hooks` leaves there, as `add_hook(..., is_permanent=True)`."""
        return self.add_hook(hook, dir, is_permanent=True)

    def clear_context(self: _Point) -> None:
        """Empties `ctx`."""
        self.ctx.clear()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return _missing(
                self, name, "a hook point", _OF_HOOK_POINT, "hook points are no modules; bridge.hf_model has these"
            )


def _listeners(point: _Point, dir: Literal["fwd", "bwd", "both"]) -> list[Any]:
    check_choice(("fwd", "bwd", "both"), dir=dir)
    directions: tuple[Literal["fwd", "bwd"], ...] = ("fwd", "bwd") if dir == "both" else (dir,)
    return [one for direction in directions for one in point.listeners(direction)]


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
        n_params: Weights in the blocks, without norms and biases.
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
            raise RenamedError(f"bridge.cfg has no {name!r}", fix=_OF_CONFIG.get(name, entry))


# --- the bridge ------------------------------------------------------------------------------------------------------


class _Bridge(Protocol):
    """What of a bridge is asked for."""

    tokenizer: Any

    @property
    def hf_model(self) -> Any: ...
    @property
    def cfg(self) -> Any: ...
    @property
    def blocks(self) -> Sequence[Any]: ...
    @property
    def components(self) -> Sequence[Any]: ...
    @property
    def index(self) -> Any: ...
    @property
    def hook_dict(self) -> Mapping[str, Any]: ...

    def forward(self, input: Any, *, stop_at_layer: int) -> Any: ...
    def to(self, where: Any) -> Any: ...
    def to_batch(self, input: Any, *args: Any) -> Any: ...
    def to_single_token(self, string: str) -> int: ...
    def layers_with(self, part: str) -> list[int]: ...
    def add_hook(self, name: Any, hook: Hook, dir: Literal["fwd", "bwd"] = ..., is_permanent: bool = ...) -> None: ...
    def reset_hooks(
        self, clear_contexts: bool, direction: Literal["fwd", "bwd", "both"], including_permanent: bool
    ) -> None: ...


Bridge = TypeVar("Bridge", bound=_Bridge)


class TransformerLensNames:
    """Names of TransformerLens's bridge."""

    boot_transformers = _Renamed(_BOOT)
    boot_native = _Renamed(_BOOT)
    boot_tl_legacy = _Renamed(_BOOT)
    from_pretrained = _Renamed(_BOOT)
    list_supported_models = _Renamed("clearspan.architectures, and the list in the README")
    check_model_support = _Renamed("clearspan.boot(model), which raises for what it does not know")
    compatibility_mode: ClassVar[bool] = False
    """There is no such mode: `processed` returns a new bridge."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return _missing(self, name, "a clearspan.TransformerBridge", _OF_BRIDGE, f"bridge.hf_model.{name}")

    # --- the model ---------------------------------------------------------------------------------------------------

    @property
    def original_model(self: _Bridge) -> nn.Module:
        """The Hugging Face model: `hf_model`."""
        return self.hf_model

    @property
    def training(self: _Bridge) -> bool:
        """Whether the model is in training mode."""
        return self.hf_model.training

    @property
    def n_params_total(self: _Bridge) -> int:
        """The model's parameters, tied ones once."""
        return sum(one.numel() for one in self.hf_model.parameters())

    def modules(self: _Bridge) -> Iterator[nn.Module]:
        """Yields the Hugging Face model's modules."""
        return self.hf_model.modules()

    def named_modules(self: _Bridge) -> Iterator[tuple[str, nn.Module]]:
        """Yields the Hugging Face model's modules with their paths."""
        return self.hf_model.named_modules()

    def buffers(self: _Bridge) -> Iterator[Tensor]:
        """Yields the Hugging Face model's buffers."""
        return self.hf_model.buffers()

    def named_buffers(self: _Bridge) -> Iterator[tuple[str, Tensor]]:
        """Yields the Hugging Face model's buffers with their names."""
        return self.hf_model.named_buffers()

    def cpu(self: Bridge) -> Bridge:
        """Moves the model to the CPU."""
        return self.to("cpu")

    def cuda(self: Bridge, device: int | str | torch.device | None = None) -> Bridge:
        """Moves the model to a GPU: the current one, that of a number, or a device."""
        return self.to("cuda" if device is None else f"cuda:{device}" if isinstance(device, int) else device)

    def mps(self: Bridge) -> Bridge:
        """Moves the model to Apple's GPU."""
        return self.to("mps")

    def half(self: Bridge) -> Bridge:
        """Casts the model to float16."""
        return self.to(torch.float16)

    def bfloat16(self: Bridge) -> Bridge:
        """Casts the model to bfloat16."""
        return self.to(torch.bfloat16)

    def float(self: Bridge) -> Bridge:
        """Casts the model to float32."""
        return self.to(torch.float32)

    def double(self: Bridge) -> Bridge:
        """Casts the model to float64."""
        return self.to(torch.float64)

    @property
    def mod_dict(self: _Bridge) -> dict[str, Any]:
        """Every component and every hook point, by name."""
        parts = {part.path: part for component in self.components for part in component.walk()}
        return {**parts, **self.hook_dict}

    # --- layers and heads --------------------------------------------------------------------------------------------

    @property
    def all_head_labels(self: _Bridge) -> list[str]:
        """`L0H0`, `L0H1`, ... of every layer."""
        return _head_labels(range(self.cfg.n_layers), self.cfg.n_heads)

    @property
    def attn_head_labels(self: _Bridge) -> list[str]:
        """`L0H0`, `L0H1`, ... of the layers with attention."""
        return _head_labels(self.layers_with("attn"), self.cfg.n_heads)

    def composition_layer_indices(self: _Bridge) -> list[int]:
        """Returns the layers with attention."""
        return self.layers_with("attn")

    def blocks_with(self: _Bridge, submodule: str) -> list[tuple[int, Any]]:
        """Returns the layers that have a part of some name, such as `"attn"` or `"ln2"`, each with its block."""
        check_kind(str, submodule=submodule)
        return [(layer, block) for layer, block in enumerate(self.blocks) if submodule in block.submodules]

    def block_submodules(self: _Bridge, layer_idx: int) -> list[str]:
        """Returns the names of a block's parts."""
        return list(_block(self, layer_idx).submodules)

    def block_hooks(self: _Bridge, layer_idx: int) -> list[str]:
        """Returns the names of a block's hook points without the block's, sorted."""
        prefix = f"{_block(self, layer_idx).path}."
        return sorted(name.removeprefix(prefix) for name in self.hook_dict if name.startswith(prefix))

    def stack_params_for(
        self: _Bridge, submodule: str, attr_path: str, reshape_fn: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[list[int], Float[Tensor, "layer ..."]]:
        """Returns the layers that have a part, and one of its weights in each, stacked: a copy.

        Args:
            submodule: The part's name.
            attr_path: The weight's path in the block, such as `"attn.W_O"`.
            reshape_fn: Applied to each before they are stacked.

        Raises:
            InvalidArgumentError: No layer has the part.
            MissingWeightError: A layer has the part without the weight.
        """
        check_kind(str, submodule=submodule, attr_path=attr_path)
        check_kind(Callable, type(None), reshape_fn=reshape_fn)
        having = [(layer, block) for layer, block in enumerate(self.blocks) if submodule in block.submodules]
        if not having:
            raise InvalidArgumentError(f"no layer has {submodule!r}", fix="bridge.layer_types() lists what layers have")
        found = [attrgetter(attr_path)(block) for _, block in having]
        check_kind(Tensor, **{attr_path: found[0]})
        return [layer for layer, _ in having], torch.stack([reshape_fn(one) if reshape_fn else one for one in found])

    # --- weights ------------------------------------------------------------------------------------------------------

    def accumulated_bias(
        self: _Bridge, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, "d_model"]:
        """Returns the sum of what output biases have added to the residual stream when it enters a layer.

        Args:
            layer: The layer; `n_layers` for all.
            mlp_input: Whether those of the layer's own attention or mixer are added too.
            include_mlp_biases: Whether those of MLPs are.

        Raises:
            InvalidArgumentError: No such layer.
            MissingWeightError: A bias goes through a norm on its way, so that what it adds depends on the input.
        """
        check_flags(mlp_input=mlp_input, include_mlp_biases=include_mlp_biases)
        check_counts(0, layer=layer)
        if layer > len(self.blocks) - mlp_input:
            raise InvalidArgumentError(f"layer={layer} is no layer", expected=f"0 to {len(self.blocks) - mlp_input}")
        before = [one for block in self.blocks[:layer] for one in block.sublayers]
        counted = [one for one in before if include_mlp_biases or one.kind != "mlp"]
        if mlp_input:
            counted += [one for one in self.blocks[layer].sublayers if one.kind != "mlp"]
        start = torch.zeros(self.cfg.d_model, dtype=self.cfg.dtype, device=self.cfg.device)
        return sum((one.bias.to(start) for one in counted if one.bias is not None), start)

    # --- tokens ------------------------------------------------------------------------------------------------------

    def set_tokenizer(
        self: _Bridge, tokenizer: Any, default_padding_side: Literal["left", "right"] | None = None
    ) -> None:
        """Sets the tokenizer, and the side on which it fills shorter rows."""
        if default_padding_side is not None:
            check_choice(("left", "right"), default_padding_side=default_padding_side)
        self.tokenizer = tokenizer
        if default_padding_side is not None:
            self.tokenizer.padding_side = default_padding_side

    def get_token_position(
        self: _Bridge,
        single_token: str | int | Tensor,
        input: Any,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> int:
        """Returns the position of a token in an input of one row.

        Args:
            single_token: Its id, or its text.
            input: As for `to_batch`.
            mode: Which occurrence.
            prepend_bos: As for `forward`.
            padding_side: As for `forward`.

        Raises:
            InputError: The token does not occur, or there are several rows.

        Example:
            >>> import clearspan
            >>> clearspan.boot("tiny-bigcode").get_token_position(" os", "import os")
            2
        """
        check_choice(("first", "last"), mode=mode)
        batch = self.to_batch(input, None, prepend_bos, padding_side)
        token = self.to_single_token(single_token) if isinstance(single_token, str) else whole(single_token)
        if token is None:
            raise InputError(f"single_token={single_token!r}"[:80], expected="one token's text, or its id")
        if batch.tokens is None or batch.rows != 1:
            raise InputError("a position is looked for in one row of tokens", got=f"an input of {batch.rows} rows")
        places = (batch.tokens[0] == token).nonzero()[:, 0].tolist()
        if not places:
            raise InputError(f"single_token={single_token!r} does not occur in the input", got=repr(input)[:80])
        return places[0 if mode == "first" else -1]

    def input_to_embed(
        self: _Bridge,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Tensor | None, None, Tensor | None]:
        """Returns the residual stream entering the first block, the tokens, None, and the padding mask.

        The third is TransformerLens's place for a positional stream. `forward(residual, start_at_layer=0)` goes on.

        Args:
            input: As for `forward`.
            prepend_bos: As for `forward`.
            padding_side: As for `forward`.
            attention_mask: As for `forward`.
        """
        batch = self.to_batch(input, attention_mask, prepend_bos, padding_side)
        return self.forward(batch, stop_at_layer=0), batch.tokens, None, batch.mask

    # --- hooks -------------------------------------------------------------------------------------------------------

    def hook_points(self: _Bridge) -> Iterator[Any]:
        """Yields the hook points."""
        return iter(self.index)

    def get_hook_point(self: _Bridge, hook_name: str) -> Any:
        """Returns the hook point of a name, or None."""
        check_kind(str, hook_name=hook_name)
        return self.hook_dict.get(hook_name)

    def list_hooks(
        self: _Bridge,
        name_filter: Any = None,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
    ) -> dict[str, list[Any]]:
        """Returns the listeners by hook point, where there are any.

        Args:
            name_filter: As `names_filter` of `run_with_cache`.
            dir: Of which direction.
            including_permanent: Whether permanent ones count.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> bridge.add_hook("blocks.0.hook_resid_post", lambda value, hook: None)
            >>> list(bridge.list_hooks())
            ['blocks.0.hook_resid_post']
        """
        check_flags(including_permanent=including_permanent)
        points = _named(self, name_filter)
        found = {
            name: [one for one in _listeners(point, dir) if including_permanent or not one.is_permanent]
            for point, name in points
        }
        return {name: there for name, there in found.items() if there}

    def add_perma_hook(self: _Bridge, name: Any, hook_fn: Hook, dir: Literal["fwd", "bwd"] = "fwd") -> None:
        """Puts a function on points that `reset_hooks` leaves there, as `add_hook(..., is_permanent=True)`."""
        self.add_hook(name, hook_fn, dir, is_permanent=True)

    def check_hooks_to_add(
        self: _Bridge,
        hook_point: Any,
        hook_point_name: str,
        hook: Hook,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Raises UnknownPointError if there is no such point. Runs do not call it: all points are always there."""
        del hook_point, hook, dir, is_permanent, prepend
        self.index.find(hook_point_name)

    def remove_all_hook_fns(
        self: _Bridge,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Takes hooks off all points, as `reset_hooks(clear_contexts=False)`.

        Args:
            direction: Which hooks.
            including_permanent: Whether permanent ones go too.
            level: None: hooks have no levels.
        """
        check_no_level(level)
        self.reset_hooks(False, direction, including_permanent)

    def clear_contexts(self: _Bridge) -> None:
        """Empties every point's `ctx`."""
        for point in self.index:
            point.ctx.clear()

    def get_caching_hooks(
        self: _Bridge,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> Caching:
        """Returns a dictionary, and hooks for `hooks` or `run_with_hooks` that fill it: of values and of gradients.

        `run_with_cache` keeps without copies; these copy each value.

        Args:
            names_filter: As for `run_with_cache`.
            incl_bwd: Whether to keep gradients too, as `<name>_grad`.
            device: Where to keep it.
            remove_batch_dim: Whether a first axis of 1 goes.
            cache: The dictionary; by default a new one.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> cache, forward, backward = bridge.get_caching_hooks("blocks.0.hook_resid_post", incl_bwd=True)
            >>> with bridge.hooks(forward, backward):
            ...     bridge("import os", return_type="loss").backward()
            >>> list(cache)
            ['blocks.0.hook_resid_post', 'blocks.0.hook_resid_post_grad']
        """
        check_flags(incl_bwd=incl_bwd, remove_batch_dim=remove_batch_dim)
        check_kind(dict, type(None), cache=cache)
        kept = {} if cache is None else cache
        where = None if device is None else device_of(device)

        def keep(value: Tensor, hook: Any, *, suffix: str) -> None:
            copy = value.detach().clone() if where is None else value.detach().to(where, copy=True)
            kept[hook.name + suffix] = copy[0] if remove_batch_dim and len(copy) == 1 else copy

        names = [name for _, name in _named(self, names_filter)]
        graded = [name for _, name in _named(self, names_filter, with_gradient=True)] if incl_bwd else []
        forward: list[tuple[str, Hook]] = [(name, partial(keep, suffix="")) for name in names]
        return kept, forward, [(name, partial(keep, suffix="_grad")) for name in graded]

    def add_caching_hooks(
        self: "_Caching",
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Puts the hooks of `get_caching_hooks` on until `reset_hooks`, and returns the dictionary that they fill.

        Args:
            names_filter: As for `get_caching_hooks`.
            incl_bwd: As for `get_caching_hooks`.
            device: As for `get_caching_hooks`.
            remove_batch_dim: As for `get_caching_hooks`.
            cache: As for `get_caching_hooks`.
        """
        kept, forward, backward = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for name, hook in forward:
            self.add_hook(name, hook)
        for name, hook in backward:
            self.add_hook(name, hook, "bwd")
        return kept

    def set_use_attn_result(self, use_attn_result: bool = True) -> None:
        """Does nothing: `hook_result` is always there."""
        check_flags(use_attn_result=use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool = True) -> None:
        """Does nothing: `hook_q_input`, `hook_k_input` and `hook_v_input` are always there."""
        check_flags(use_split_qkv_input=use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool = True) -> None:
        """Does nothing: `hook_attn_in` is always there."""
        check_flags(use_attn_in=use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool = True) -> None:
        """Does nothing: `hook_mlp_in` is always there."""
        check_flags(use_hook_mlp_in=use_hook_mlp_in)


class _Caching(_Bridge, Protocol):
    def get_caching_hooks(self, *args: Any) -> Caching: ...


def _named(bridge: _Bridge, names: Any, with_gradient: bool = False) -> list[tuple[Any, str]]:
    """Returns points with the names by which they were asked for; with None, all that a cache keeps by default."""
    if names is not None:
        return bridge.index.matching(names, with_gradient=with_gradient)
    found = bridge.index.matching(lambda name: True, with_gradient=with_gradient)  # noqa: ARG005
    return [(point, point.name) for point, _ in found if not point.is_computed]


def _block(bridge: _Bridge, layer: int) -> Any:
    n_layers = len(bridge.blocks)
    check_counts(0, layer_idx=layer)
    if layer >= n_layers:
        raise InvalidArgumentError(f"layer_idx={layer} is no layer", expected=f"0 to {n_layers - 1}")
    return bridge.blocks[layer]


def _head_labels(layers: Iterable[int], n_heads: int) -> list[str]:
    return [f"L{layer}H{head}" for layer in layers for head in range(n_heads)]
