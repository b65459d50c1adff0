"""Names of TransformerLens's bridge."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clearspan.checks import check_choice, check_counts, check_flags, check_kind, device_of, whole
from clearspan.errors import ClearspanError, InputError, InvalidArgumentError
from clearspan.transformer_lens.hook_point import check_no_level, listeners_of
from clearspan.transformer_lens.renamed import BOOT, OF_BRIDGE, Hook, Renamed, missing

Caching = tuple[dict[str, Tensor], list[tuple[str, Hook]], list[tuple[str, Hook]]]
"""A dictionary, and the hooks that fill it: of values and of gradients, each with the point's name."""


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

    boot_transformers = Renamed(BOOT)
    boot_native = Renamed(BOOT)
    boot_tl_legacy = Renamed(BOOT)
    from_pretrained = Renamed(BOOT)
    from_pretrained_no_processing = Renamed(BOOT)
    list_supported_models = Renamed("clearspan.architectures, and the list in the README")
    check_model_support = Renamed("clearspan.boot(model), which raises for what it does not know")
    compatibility_mode: ClassVar[bool] = False
    """There is no such mode: `processed` returns a new bridge."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return missing(self, name, "a clearspan.TransformerBridge", OF_BRIDGE, f"bridge.hf_model.{name}")

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

    def close(self) -> None:
        """Does nothing: there is nothing to release."""

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
        if not (reshape_fn is None or callable(reshape_fn)):
            raise InvalidArgumentError(f"reshape_fn={reshape_fn!r}"[:80], expected="a function of a tensor, or None")
        having = [(layer, block) for layer, block in enumerate(self.blocks) if submodule in block.submodules]
        if not having:
            raise InvalidArgumentError(f"no layer has {submodule!r}", fix="bridge.layer_types() lists what layers have")
        try:
            found = [attrgetter(attr_path)(block) for _, block in having]
        except ClearspanError:
            raise
        except AttributeError as error:
            raise InvalidArgumentError(f"attr_path={attr_path!r} is no weight of a block", reason=str(error)) from None
        found = [reshape_fn(one) for one in found] if reshape_fn else found
        check_kind(Tensor, **{"reshape_fn(weight)" if reshape_fn else "attr_path": found[0]})
        return [layer for layer, _ in having], torch.stack(found)

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
        if default_padding_side is not None and tokenizer is not None:
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
            name: [one for one in listeners_of(point, dir) if including_permanent or not one.is_permanent]
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
    found = bridge.index.matching(lambda name: True, with_gradient=with_gradient)
    return [(point, point.name) for point, _ in found if not point.is_computed]


def _block(bridge: _Bridge, layer: int) -> Any:
    n_layers = len(bridge.blocks)
    check_counts(0, layer_idx=layer)
    if layer >= n_layers:
        raise InvalidArgumentError(f"layer_idx={layer} is no layer", expected=f"0 to {n_layers - 1}")
    return bridge.blocks[layer]


def _head_labels(layers: Iterable[int], n_heads: int) -> list[str]:
    return [f"L{layer}H{head}" for layer in layers for head in range(n_heads)]
