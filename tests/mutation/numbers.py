"""All that a bridge shows, as numbers: what two adapters are compared by."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from clearspan import TransformerBridge
from clearspan.components.weights import Weight
from clearspan.points import Derived
from clearspan.verification.writes import changed

Numbers = Mapping[str, object]
LENGTH = 9
ROWS = 48
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def numbers(bridge: TransformerBridge) -> dict[str, object]:
    """Returns sizes, axes, values, effects of writes, gradients, weights, and what processing makes of them."""
    found: dict[str, object] = {}
    for part in (_settings, _values, _writes, _gradients, _weights, _parts, _runs, _processed):
        for name, look in part(bridge):
            found[name] = _looked(look)
    return found


def differ(found: object, expected: object, tolerance: float = 1e-4) -> bool:
    """Whether two of these numbers are others."""
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return True
        if not found.numel():
            return False
        scale = expected.double().abs().max().clamp(min=1e-6)
        return not bool((found.double() - expected.double()).abs().max() <= tolerance * scale)
    return type(found) is not type(expected) or found != expected


def first_difference(found: Numbers, expected: Numbers) -> str | None:
    """Returns the name of a number that is another, or None."""
    if found.keys() != expected.keys():
        return ", ".join(sorted(found.keys() ^ expected.keys())[:3])
    return next((name for name in expected if differ(found[name], expected[name])), None)


def _looked(look: Callable[[], object]) -> object:
    try:
        seen = look()
    except FAULTS as error:
        return f"raises {type(error).__name__}"
    return seen.detach().clone() if isinstance(seen, Tensor) else seen


def _ids(bridge: TransformerBridge, rows: int = 2) -> Tensor:
    ids = torch.randint(1, 90, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids if rows == 2 else ids[:1].expand(rows, -1)


Looks = Iterator[tuple[str, Callable[[], object]]]


def _settings(bridge: TransformerBridge) -> Looks:
    for field in dataclasses.fields(bridge.cfg):
        if field.name != "hf":
            yield f"cfg.{field.name}", lambda name=field.name: getattr(bridge.cfg, name)
    for name, point in bridge.hook_dict.items():
        yield f"{name} axes", lambda point=point: (point.axes, tuple(sorted(point.sizes.items())))
    for name in ("whole_sequences", "uses_combined_qkv"):
        yield name, lambda name=name: getattr(bridge.adapter, name)


def _values(bridge: TransformerBridge) -> Looks:
    with torch.no_grad():
        cache = _looked(lambda: bridge.run_with_cache(_ids(bridge))[1])
    heard: dict[str, Tensor] = {}

    def hear(value: Tensor, hook: object) -> None:
        heard[hook.name] = value.clone()

    names = [(point.name, hear) for point in bridge.index]
    yield "heard", lambda: bool(bridge.run_with_hooks(_ids(bridge), fwd_hooks=names).sum() * 0 == 0)
    for name, point in bridge.hook_dict.items():
        yield f"{name} cached", lambda name=name: cache[name]
        yield f"{name} heard", lambda point=point: heard[point.name]


def _writes(bridge: TransformerBridge) -> Looks:
    beside = [
        point
        for point in bridge.index
        if isinstance(point.access, Derived) and not point.access.derivation.is_in_series
    ]
    rest = [point for point in bridge.index if point not in beside]
    for some in [chunk[first : first + ROWS] for chunk in (rest, beside) for first in range(0, len(chunk), ROWS)]:
        rows = {point.name: row for row, point in enumerate(some)}

        def write(value: Tensor, hook, rows=rows) -> Tensor:
            edited = value.clone()
            edited[rows[hook.name]] = changed(value[rows[hook.name]], hook)
            return edited

        def run(some=some, write=write) -> Tensor:
            with torch.no_grad():
                return bridge.run_with_hooks(_ids(bridge, len(some)), fwd_hooks=[(point.name, write) for point in some])

        logits = _looked(run)
        for row, point in enumerate(some):
            for name in (point.name, *point.aliases):
                yield f"{name} written", lambda row=row, logits=logits: logits[row]


def _gradients(bridge: TransformerBridge) -> Looks:
    cache = _looked(lambda: bridge.run_with_cache(_ids(bridge), incl_bwd=True, return_type="loss")[1])
    for name in bridge.hook_dict:
        yield f"{name} gradient", lambda name=name: cache[f"{name}_grad"]


def _weights(bridge: TransformerBridge) -> Looks:
    live = [part for component in bridge.components for part in component.walk()]
    for part in live:
        for name in sorted(
            {key for kind in type(part).__mro__ for key, one in vars(kind).items() if isinstance(one, Weight)}
        ):
            yield f"{part.path}.{name}", lambda part=part, name=name: getattr(part, name)
    for name in ("W_E", "W_pos", "W_U", "b_U"):
        yield name, lambda name=name: getattr(bridge, name)


def _parts(bridge: TransformerBridge) -> Looks:
    with torch.no_grad():
        cache = _looked(lambda: bridge.run_with_cache(_ids(bridge))[1])
    for component in bridge.components:
        for part in component.walk():
            if f"{part.path}.hook_in" in bridge.hook_dict and part.name is not None:
                yield f"{part.path} alone", lambda part=part: part(cache[f"{part.path}.hook_in"])
    for block in bridge.blocks:
        split = getattr(block.attn, "split_qkv_matrix", None)
        if split is not None:
            yield f"{block.path} split", lambda split=split, block=block: split(block.attn.module)[0].weight
        if block.mlp.name is None:
            yield f"{block.path}.mlp alone", lambda block=block: block.mlp(cache[f"{block.path}.hook_mlp_in"])


def _runs(bridge: TransformerBridge) -> Looks:
    ids = _ids(bridge)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        cache = _looked(lambda: bridge.run_with_cache(ids, "blocks.1.hook_resid_pre")[1])
    names = [f"{block.attn.path}.hook_rot_q" for block in bridge.blocks if block.attn.has_rotary][:1]
    for name in names:
        yield (
            f"{name} padded",
            lambda name=name: bridge.run_with_cache(ids, name, attention_mask=mask)[1][name][mask.bool()],
        )
    yield "from layer 1", lambda: bridge(cache["blocks.1.hook_resid_pre"], start_at_layer=1)
    yield "to layer 1", lambda: bridge(ids, stop_at_layer=1)
    yield "padded", lambda: bridge(ids, attention_mask=mask)[mask.bool()]
    yield "too long", lambda: bridge(torch.ones(1, 65, dtype=torch.long)).shape
    generated = _looked(lambda: bridge.generate(ids[:, :5], max_new_tokens=3, do_sample=False, return_cache=True)[1])
    for name in bridge.hook_dict:
        if name.startswith(("blocks.1.", "hook_", "ln_final", "unembed")):
            yield f"{name} generated", lambda name=name: generated[name]


STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")


def _processed(bridge: TransformerBridge) -> Looks:
    ids = _ids(bridge)
    for step in STEPS:
        for asked in (True, None):

            def run(step=step, asked=asked) -> Tensor:
                with torch.no_grad():
                    return bridge.processed(**{**dict.fromkeys(STEPS, False), step: asked})(ids).log_softmax(-1)

            yield f"processed {step}={asked}", run
