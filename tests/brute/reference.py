"""The reference: a Hugging Face model in eager attention, read and written by plain torch hooks, one forward a run.

It knows nothing of clearspan. Its points have the names and meanings of the hook points' vocabulary, and each is
defined here once more, by what it is in the model's source. It is slow and simple on purpose:

- The residual stream between the sublayers is written by changing what attention adds: `stream + attn_out == mid`.
- A head's own query, key or value input is written by running norm and projection again on that input.
- Scores and patterns are the input and output of the softmax that runs inside the attention module.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .families import Family, feature_index
from .rows import Rows

Function = Callable[[Tensor], Tensor]
"""From a value at a point, in the point's axes, to what takes its place."""
Edit = tuple[str, Function]
"""A point's name, and what becomes of its value."""

ATTENTION = ("q", "k", "v", "attn_scores", "pattern", "z", "result")
MLP = ("pre", "pre_linear", "post")


def full_name(point: str, layer: int | None = None) -> str:
    """Returns a point's full name, such as `blocks.1.attn.hook_z` for `z` in layer 1."""
    part, _, leaf = point.rpartition(".")
    part = {"q": "attn", "": ""}.get(part, part)
    if layer is None:
        return f"{part}.hook_{leaf}" if part else f"hook_{leaf}"
    if leaf in ATTENTION:
        part = "attn"
    elif leaf in MLP:
        part = "mlp"
    return f"blocks.{layer}.{part}.hook_{leaf}" if part else f"blocks.{layer}.hook_{leaf}"


@dataclass
class Run:
    """What a forward gave.

    Attributes:
        logits: `[row, column, d_vocab]`.
        values: What was kept, by the point's full name.
    """

    logits: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)


class Reference:
    """A copy of a model that is read and written by hooks.

    Args:
        model: The model. It is copied.
        family: Where its parts are.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.model.config._attn_implementation = family.attention  # read at each call; Falcon has no method for it
        self.family = family
        config = self.model.config
        self.blocks = list(self.model.get_submodule(family.blocks))
        self.n_layers = len(self.blocks)
        self.n_heads: int = config.num_attention_heads
        self.d_head, self.n_groups = self._head_sizes()
        self.multiplier = float(getattr(config, "residual_multiplier", 1.0))
        self.d_model: int = config.hidden_size
        self.d_vocab: int = config.vocab_size
        self.dtype: torch.dtype = self.model.dtype

    def _head_sizes(self) -> tuple[int, int]:
        out = self._weight(self.blocks[0].get_submodule(self.family.o))  # [in, out]
        d_head = out.shape[0] // self.n_heads
        features = [
            self._weight(self.blocks[0].get_submodule(path)).shape[1] for path in self.family.projections.values()
        ]
        total = features[0] if self.family.layout else sum(features)
        return d_head, (total // d_head - self.n_heads) // 2

    @property
    def group_size(self) -> int:
        """Query heads for each key and value head."""
        return self.n_heads // self.n_groups

    # --- runs --------------------------------------------------------------------------------------------------------

    def run(
        self, rows: Rows, edits: Sequence[Edit] = (), keep: Sequence[str] = (), embeds: Tensor | None = None
    ) -> Run:
        """Returns one forward with values edited, each at its place in the model's order.

        Args:
            rows: The input.
            edits: What is changed; those of one point in this order.
            keep: Points whose values are kept, after the edits there.
            embeds: Embeddings that stand for the ids.
        """
        run = _Hooked(self, edits, keep, rows.size[0])
        given: dict[str, Any] = {"input_ids": rows.ids} if embeds is None else {"inputs_embeds": embeds}
        if rows.is_padded:
            given["attention_mask"] = rows.mask
            if self.family.positions and "position_ids" in inspect.signature(self.model.forward).parameters:
                given["position_ids"] = (rows.mask.cumsum(-1) - 1).clamp(min=0)
        with run.attached():
            logits = self.model(**given, use_cache=False).logits
        return Run(run.at("hook_logits", logits), run.kept)

    # --- parts -------------------------------------------------------------------------------------------------------

    def module(self, layer: int, path: str) -> nn.Module:
        """Returns a part of a block."""
        return self.blocks[layer].get_submodule(path)

    def features(self, letter: str) -> Tensor:
        """Returns the features of a projection that are a query, key or value, by head."""
        return feature_index(self.family.layout, letter, self.n_heads, self.n_groups, self.d_head)

    @staticmethod
    def _weight(linear: nn.Module) -> Tensor:
        """Returns a linear map's weight as `[in, out]`."""
        weight = linear.weight
        return weight if type(linear).__name__ == "Conv1D" else weight.T

    def output_weight(self, layer: int) -> Tensor:
        """Returns `W_O` as `[head, d_head, d_model]`."""
        return self._weight(self.module(layer, self.family.o)).view(self.n_heads, self.d_head, -1)

    def normed(self, path: str | None, layer: int, stream: Tensor) -> Tensor:
        """Returns what a norm makes of a stream; the stream itself where there is no norm."""
        return stream if path is None else self.module(layer, path).forward(stream)

    def projected(self, layer: int, letter: str, inputs: Tensor) -> Tensor:
        """Returns each head's query, key or value from its own input `[row, column, head, d_model]`."""
        module = self.module(layer, self.family.projections[letter])
        out = module.forward(self.normed(self.family.ln1, layer, inputs))
        index = self.features(letter)
        return torch.stack([out[:, :, head, features] for head, features in enumerate(index)], dim=2)


class _Hooked:
    """The hooks of one run.

    Args:
        reference: The model.
        edits: What is changed.
        keep: What is kept.
        rows: Rows of the run.
    """

    def __init__(self, reference: Reference, edits: Sequence[Edit], keep: Sequence[str], rows: int) -> None:
        self.reference = reference
        self.rows = rows
        self.family = reference.family
        self.edits: dict[str, list[Function]] = {}
        for name, function in edits:
            self.edits.setdefault(name, []).append(function)
        self.kept: dict[str, Tensor] = {}
        self.wanted = {*self.edits, *keep}
        self.keep = set(keep)
        self.fired: set[str] = set()
        self.streams: dict[int, Tensor] = {}
        self.mids: dict[int, Tensor] = {}
        self.attending: int | None = None

    def at(self, name: str, value: Tensor) -> Tensor:
        """Returns what a value becomes at a point."""
        if name not in self.wanted:
            return value
        self.fired.add(name)
        for function in self.edits.get(name, ()):
            value = function(value)
        if name in self.keep:
            self.kept[name] = value.clone()
        return value

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Has the hooks on the model, and the softmax watched."""
        softmax = nn.functional.softmax
        with ExitStack() as stack:
            for layer in range(self.reference.n_layers):
                self._attach_block(layer, stack)
            self._attach_ends(stack)
            nn.functional.softmax = lambda *args, **kwargs: self._softmax(softmax, *args, **kwargs)
            try:
                yield
            finally:
                nn.functional.softmax = softmax
        missed = self.wanted - self.fired - {"hook_logits"}
        assert not missed, f"the reference has no {sorted(missed)}"

    def _attach_ends(self, stack: ExitStack) -> None:
        model, family = self.reference.model, self.family
        if family.pos_embed is not None:
            self._after(stack, model.get_submodule(family.pos_embed), self._position_embedding)
            self._after(stack, model.get_submodule(family.embed), lambda value: self.at("hook_embed", value))
        self._attach_norm(stack, model.get_submodule(family.ln_final), "ln_final.hook_")

    def _position_embedding(self, value: Tensor) -> Tensor:
        """A position embedding is of one row where nothing is padded; each row has its own at the point."""
        name = "hook_pos_embed"
        return self.at(name, value.expand(self.rows, -1, -1)) if name in self.wanted else value

    def _attach_block(self, layer: int, stack: ExitStack) -> None:
        reference, family = self.reference, self.family
        block = reference.blocks[layer]

        def point(name: str) -> str:
            return full_name(name, layer)

        def entering(stream: Tensor) -> Tensor:
            if layer == 0 and family.pos_embed is None:
                stream = self.at("hook_embed", stream)
            self.streams[layer] = stream = self.at(point("resid_pre"), stream)
            self.mids[layer] = stream
            return stream

        self._before(stack, block, entering)
        if family.ln1 is not None:
            self._attach_norm(stack, reference.module(layer, family.ln1), f"blocks.{layer}.ln1.hook_")
        for letter in "qkv":
            self._attach_projection(stack, layer, letter)
        attention = reference.module(layer, family.attn)
        stack.callback(attention.register_forward_pre_hook(lambda *_: setattr(self, "attending", layer)).remove)
        stack.callback(attention.register_forward_hook(lambda *_: setattr(self, "attending", None)).remove)
        self._attach_heads(stack, layer)
        if family.attn_out is not None:
            norm = reference.module(layer, family.attn_out)
            self._attach_norm(stack, norm, f"blocks.{layer}.ln1_post.hook_")
        self._after(stack, reference.module(layer, family.attn_out or family.attn), self._attention_adds(layer))
        self._attach_mlp(stack, layer)
        self._after(stack, block, lambda stream: self.at(point("resid_post"), stream))

    def _attention_adds(self, layer: int) -> Function:
        residual = self.family.attn_has_residual

        def write(out: Tensor) -> Tensor:
            stream, times = self.streams[layer], self.reference.multiplier
            before = (out - stream if residual else out) * times
            added = self.at(full_name("attn_out", layer), before)
            if not self.family.is_parallel:
                middle = self.at(full_name("resid_mid", layer), stream + added)
                self.mids[layer] = middle
                if full_name("resid_mid", layer) in self.wanted:
                    added = middle - stream
            if added is before:
                return out
            return added / times + stream if residual else added / times

        return write

    def _attach_projection(self, stack: ExitStack, layer: int, letter: str) -> None:
        reference, index = self.reference, self.reference.features(letter)
        own, entering = full_name(letter, layer), full_name(f"{letter}_input", layer)
        together = full_name("attn_in", layer)
        times = reference.group_size if letter == "q" else 1

        def write(out: Tensor) -> Tensor:
            if not self.wanted & {own, entering, together}:
                return out
            value = out[..., index]
            if entering in self.wanted or together in self.wanted:
                groups = self.streams[layer].unsqueeze(2).expand(-1, -1, reference.n_groups, -1)
                inputs = self.at(together, groups).repeat_interleave(times, 2)
                inputs = self.at(entering, inputs)
                value = reference.projected(layer, letter, inputs)
            value = self.at(own, value)
            return out.index_copy(-1, index.flatten(), value.flatten(-2).to(out))

        self._after(stack, reference.module(layer, self.family.projections[letter]), write)

    def _attach_heads(self, stack: ExitStack, layer: int) -> None:
        reference = self.reference
        module, name = reference.module(layer, self.family.o), full_name("result", layer)

        def entering(z: Tensor) -> Tensor:
            by_head = z.unflatten(-1, (reference.n_heads, reference.d_head))
            return self.at(full_name("z", layer), by_head).flatten(-2)

        def leaving(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            if name not in self.wanted:
                return None
            by_head = args[0].unflatten(-1, (reference.n_heads, reference.d_head))
            results = torch.einsum("bphd,hdm->bphm", by_head, reference.output_weight(layer))
            return out + (self.at(name, results) - results).sum(2)

        self._before(stack, module, entering)
        stack.callback(module.register_forward_hook(leaving).remove)

    def _attach_mlp(self, stack: ExitStack, layer: int) -> None:
        reference, family = self.reference, self.family
        name = full_name("mlp_in", layer)

        def unflat(value: Tensor) -> Tensor:
            return value.view(self.rows, -1, value.shape[-1])  # OPT has rows and columns in one axis

        def entering(value: Tensor) -> Tensor:
            if name not in self.wanted:
                return value
            stream = self.at(name, self.mids[layer])
            return (stream if has_own_norm else reference.normed(family.ln2, layer, stream)).view(value.shape)

        has_own_norm = family.ln2 is not None and family.ln2 != family.ln1
        first = reference.module(layer, str(family.ln2) if has_own_norm else family.mlp)
        self._before(stack, first, entering)
        if has_own_norm:
            self._attach_norm(stack, first, f"blocks.{layer}.ln2.hook_")
        if family.pre is not None and family.post is not None:

            def half(which: str) -> Callable[[Tensor], Tensor]:
                def write(value: Tensor) -> Tensor:
                    if family.pre != family.pre_linear:
                        return self.at(full_name(which, layer), unflat(value)).view(value.shape)
                    halves = list(value.chunk(2, -1))
                    side = ("pre", "pre_linear").index(which)
                    halves[side] = self.at(full_name(which, layer), halves[side])
                    return torch.cat(halves, -1)

                return write

            self._after(stack, reference.module(layer, family.pre), half("pre"))
            if family.pre_linear is not None:
                self._after(stack, reference.module(layer, family.pre_linear), half("pre_linear"))
            self._before(
                stack,
                reference.module(layer, family.post),
                lambda value: self.at(full_name("post", layer), unflat(value)).view(value.shape),
            )
        if family.mlp_out is not None and family.mlp_out != family.post:
            self._attach_norm(stack, reference.module(layer, family.mlp_out), f"blocks.{layer}.ln2_post.hook_")

        def leaving(out: Tensor) -> Tensor:
            added = unflat(out - self.mids[layer] if family.mlp_has_residual else out) * reference.multiplier
            new = self.at(full_name("mlp_out", layer), added)
            if new is added:
                return out
            new = new / reference.multiplier
            return (new + self.mids[layer] if family.mlp_has_residual else new).view(out.shape)

        self._after(stack, reference.module(layer, family.mlp_out or family.mlp), leaving)

    # --- norms and the softmax ---------------------------------------------------------------------------------------

    def _attach_norm(self, stack: ExitStack, module: Any, prefix: str) -> None:
        """Has a norm's scale and normalised value as points."""
        kind = type(module).__name__
        epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon

        def leaving(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            if not self.wanted & {f"{prefix}scale", f"{prefix}normalized"}:
                return None
            value = args[0].view(self.rows, -1, args[0].shape[-1])
            centred = value if "RMS" in kind else value - value.mean(-1, keepdim=True)
            scale = self.at(f"{prefix}scale", (centred.pow(2).mean(-1, keepdim=True) + epsilon).sqrt())
            found = self.at(f"{prefix}normalized", centred / scale)
            weight = 1 + module.weight if kind.startswith("Gemma") else module.weight
            bias = getattr(module, "bias", None)
            return (found * weight + (0 if bias is None else bias)).view(out.shape)

        stack.callback(module.register_forward_hook(leaving).remove)

    def _softmax(self, softmax: Callable[..., Tensor], scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.attending is None:
            return softmax(scores, *args, **kwargs)
        layer, family = self.attending, self.family
        names = full_name("attn_scores", layer), full_name("pattern", layer)
        kwargs["dtype"] = self.reference.dtype
        if not family.has_sinks:
            return self.at(names[1], softmax(self.at(names[0], scores), *args, **kwargs))
        # The model subtracts each row's maximum, of the sink too: the sink's parameter says what that was.
        sink = self.reference.module(layer, family.attn).sinks.view(1, -1, 1, 1)
        own = self.at(names[0], scores[..., :-1] + (sink - scores[..., -1:]))
        found = softmax(torch.cat([own, sink.expand_as(scores[..., -1:])], -1), *args, **kwargs)
        return torch.cat([self.at(names[1], found[..., :-1]), found[..., -1:]], -1)

    # --- torch hooks -------------------------------------------------------------------------------------------------

    @staticmethod
    def _before(stack: ExitStack, module: nn.Module, function: Function) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (function(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"])}

        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    @staticmethod
    def _after(stack: ExitStack, module: nn.Module, function: Function) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            return (function(out[0]), *out[1:]) if isinstance(out, tuple) else function(out)

        stack.callback(module.register_forward_hook(hook).remove)
