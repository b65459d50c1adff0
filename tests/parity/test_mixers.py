"""Mixers on real tiny models: what points show, what writes do, gradients, padding and cached decoding."""

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.mixers import BY_TYPE, CASES, Live
from tests.releases import on
from torch import Tensor
from torch.nn.functional import softplus

from clearspan.components.mixer_kinds import SELECTIVE_BY_HEAD
from clearspan.errors import NotSeenError, PointNotReachedError, UnwritableError
from clearspan.hf.keywords import KV_CACHE_NAMES
from clearspan.hf.mixers import axis_sizes, mixer_kind
from clearspan.points import HookPoint

TOKENS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
TOLERANCE = 2e-5
"""Of the largest number. Measured up to 2e-6; a wrong axis or a lost write is off by 1e-2 and more."""
FEW = (
    "mamba2",
    "falcon_h1",
    "mamba",
    "qwen3_next",
    "kimi_linear",
    "lfm2",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
    "minimax",
)
"""One type of each kind, or of each way in which a kind is laid out."""


@pytest.fixture(scope="module")
def lives() -> dict[str, Live]:
    return {}


@pytest.fixture
def live(lives: dict[str, Live], request: pytest.FixtureRequest) -> Live:
    name: str = request.param
    if name not in lives:
        lives[name] = Live(BY_TYPE[name])
    return lives[name]


every = pytest.mark.parametrize("live", [case.model_type for case in CASES], indirect=True)
few = pytest.mark.parametrize("live", FEW, indirect=True)


def close(found: Tensor, expected: Tensor) -> bool:
    """Returns whether two tensors are the same but for rounding."""
    assert found.shape == expected.shape
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


# --- what points show ------------------------------------------------------------------------------------------------

Arguments = dict[str, Any]


_MAMBA: dict[str, Callable[[Arguments], Tensor]] = {
    "hook_scan_in": lambda a: a["hidden_states"].transpose(1, 2),
    "hook_dt_proj": lambda a: a["dt"].transpose(1, 2),
    "hook_dt": lambda a: softplus(a["dt"] + a["delta_bias"][:, None]).transpose(1, 2),
    "hook_A": lambda a: a["A"].expand(2, 7, *a["A"].shape),
    "hook_B": lambda a: a["B"].transpose(1, 2),
    "hook_C": lambda a: a["C"].transpose(1, 2),
    "hook_gate": lambda a: a["z"].transpose(1, 2),
    "hook_ssm_out": lambda a: a["return"].transpose(1, 2),
}
_MAMBA2: dict[str, Callable[[Arguments], Tensor]] = {
    "hook_scan_in": lambda a: a["hidden_states"],
    "hook_dt_proj": lambda a: a["dt"],
    "hook_dt": lambda a: softplus(a["dt"] + a["dt_bias"]).clamp(*a["dt_limit"]),
    "hook_A": lambda a: a["A"].expand(2, 7, -1),
    "hook_B": lambda a: a["B"],
    "hook_C": lambda a: a["C"],
    "hook_scan_out": lambda a: a["return"],
}
_DELTA: dict[str, Callable[[Arguments], Tensor]] = {
    "hook_q": lambda a: a["query"],
    "hook_k": lambda a: a["key"],
    "hook_v": lambda a: a["value"],
    "hook_log_decay": lambda a: a["g"],
    "hook_beta": lambda a: a["beta"],
    "hook_recurrence_out": lambda a: a["return"][0],
}
SHOWN: dict[str, dict[str, Callable[[Arguments], Tensor]]] = {
    "causal_conv1d_fn": {"hook_conv": lambda a: a["return"].transpose(1, 2)},
    "mamba_selective_scan": _MAMBA,
    "mamba2_chunk_scan": _MAMBA2,
    "torch_chunk_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "rwkv_linear_attention": {
        "hook_k": lambda a: a["key"],
        "hook_v": lambda a: a["value"],
        "hook_recurrence_out": lambda a: a["return"][0],
    },
}


def functions(live: Live) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the functions of a mixer's modeling module that this file knows, with that module's globals."""
    names = vars(sys.modules[type(live.mixer.module).__module__])
    yield from ((name, names) for name in SHOWN if name in names)


@pytest.fixture
def seen(live: Live, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Arguments]]:
    """Calls of the model's functions, by plain patches of their module."""
    calls: dict[str, list[Arguments]] = {}

    def recording(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            result = original(*args, **kwargs)
            calls.setdefault(name, []).append({**bound.arguments, "return": result})
            return result

        call.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
        return call

    for name, names in functions(live):
        monkeypatch.setitem(names, name, recording(name, names[name]))
    return calls


@every
def test_points_show_what_the_models_code_has(live: Live, seen: dict[str, list[Arguments]]) -> None:
    with torch.no_grad():
        # Effective attention and states are computed by further calls of these functions.
        found = live.values(*(name for name, point in live.points.items() if not point.is_computed), tokens=TOKENS)
    checked = 0
    for name, calls in seen.items():
        for point, expected in SHOWN[name].items():
            if point in live.points and live.mixer.kind is not SELECTIVE_BY_HEAD:
                # The first call is the first layer's.
                assert torch.allclose(found[point], expected(calls[0]), rtol=1e-6, atol=0), point
                checked += 1
    assert checked or live.case.model_type in ("recurrent_gemma", "xlstm", "minimax", "zamba")
    with torch.no_grad():  # transformers 5.20 repeats queries and keys for all heads before the function
        seen_sizes = (
            axis_sizes(live.mixer.module, live.mixer.kind, lambda: live(TOKENS)) if live.mixer.kind.roles else {}
        )
    for name, value in found.items():
        is_inside = not name.endswith("_pre_conv")
        own = {**live.points[name].sizes, **(seen_sizes if is_inside else {})}
        sizes = {"batch": 2, "pos": 7, "q_pos": 7, "k_pos": 7, **own}
        assert list(value.shape) == [sizes[axis] for axis in live.points[name].axes], name


@every
def test_listening_changes_nothing_and_leaves_nothing(live: Live) -> None:
    module = live.mixer.module
    names = vars(sys.modules[type(module).__module__])
    before = dict(names), set(vars(module)), [set(vars(part)) for part in module.modules()]
    with torch.no_grad():
        bare = live(TOKENS)
        live.values(tokens=TOKENS)
        assert torch.equal(live(TOKENS), bare)
        for point in live.points.values():
            listener = point.add_hook(lambda value, hook: None)
            assert torch.equal(live(TOKENS), bare), point
            point.remove(listener)
    with_graph = live(TOKENS)
    live.values(*(name for name in live.points if name != "hook_effective_attention"), tokens=TOKENS)
    assert torch.equal(with_graph, live(TOKENS))
    assert before == (dict(names), set(vars(module)), [set(vars(part)) for part in module.modules()])


# --- writes ----------------------------------------------------------------------------------------------------------


@every
def test_a_write_is_the_same_edit_of_the_functions_argument(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row and position of each argument is scaled: by a listener, and by hand where the model calls the function."""
    pairs = {
        "hook_scan_in": "hidden_states",
        "hook_dt_proj": "dt",
        "hook_B": "B",
        "hook_C": "C",
        "hook_q": "query",
        "hook_k": "key",
        "hook_v": "value",
        "hook_log_decay": "g",
        "hook_beta": "beta",
    }
    for name, names in functions(live):
        original = names[name]
        parameters = inspect.signature(original).parameters
        for point, argument in pairs.items():
            is_there = point in live.points and argument in parameters and point in SHOWN[name]
            if not is_there:
                continue
            is_last = name == "mamba_selective_scan"

            def by_hand(*args: Any, _name: str = argument, _last: bool = is_last, **kwargs: Any) -> Any:
                bound = inspect.signature(original).bind(*args, **kwargs)
                value = bound.arguments[_name].clone()
                _scale(value[1, ..., 3] if _last else value[1, 3])
                bound.arguments[_name] = value
                monkeypatch.setitem(names, name, original)
                return original(*bound.args, **bound.kwargs)

            by_hand.__signature__ = inspect.signature(original)  # pyright: ignore[reportFunctionMemberAccess]
            with torch.no_grad():
                bare = live(TOKENS)
                monkeypatch.setitem(names, name, by_hand)
                expected = live(TOKENS)
                monkeypatch.setitem(names, name, original)
                found = written(live, point, lambda value: scaled(value))
            assert close(found, expected), point
            assert not close(found[1], bare[1]), point
            assert torch.equal(found[0], bare[0]) or live.case.config.get("num_experts"), point


def scaled(value: Tensor) -> Tensor:
    """Returns a value of which one row's fourth position is scaled, unevenly, so that no norm undoes it."""
    _scale(value[1, 3])
    return value


def _scale(part: Tensor) -> None:
    part.mul_(torch.linspace(0.3, 1.3, part.shape[-1]))


def written(live: Live, name: str, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the logits of a run in which a point is edited."""
    listener = live.points[name].add_hook(lambda value, hook: edit(value))
    try:
        return live(TOKENS)
    finally:
        live.points[name].remove(listener)


@few
def test_a_write_of_a_result_is_what_the_output_projection_reads(live: Live) -> None:
    for name in ("hook_scan_out", "hook_recurrence_out", "hook_conv", "hook_ssm_out"):
        if name not in live.points:
            continue
        bare = live.values("hook_ssm_out", tokens=TOKENS)["hook_ssm_out"]
        seen: list[Tensor] = []
        reader = live.points["hook_ssm_out"].add_hook(lambda value, hook: seen.append(value.clone()))
        with torch.no_grad():
            written(live, name, scaled)
        live.points["hook_ssm_out"].remove(reader)
        changed = (seen[-1] != bare).flatten(2).any(-1) if name != "hook_ssm_out" else None
        if changed is not None and name != "hook_conv":
            assert changed[1].tolist() == [False, False, False, True, False, False, False]
            assert not changed[0].any()


REFERENCES = ("mamba", "jamba", "mamba2", "falcon_h1", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "kimi_linear")


def recurrence(
    values: dict[str, Tensor], rates: Tensor | None, edit: tuple[int, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Returns results and states by the textbook's recurrence, with another A at each position or one edited state."""
    if "hook_beta" in values:
        return _delta(values, edit)
    x, dt, b, c = (values[f"hook_{name}"] for name in ("scan_in", "dt", "B", "C"))
    a = values["hook_A"] if rates is None else rates
    if x.ndim == 4:
        b, c = (one.repeat_interleave(x.shape[2] // one.shape[2], dim=2) for one in (b, c))
        update = (dt[..., None] * x)[..., None] * b[..., None, :]
        decay = (dt * a).exp()[..., None, None]
        skip = values["D"][:, None] * x
        read = "bhdn,bhn->bhd"
    else:
        update = (dt * x)[..., None] * b[:, :, None, :]
        decay = (dt[..., None] * a).exp()
        skip = values["D"] * x
        read = "bdn,bn->bd"
    state, states, results = torch.zeros_like(update[:, 0]), [], []
    for position in range(x.shape[1]):
        state = decay[:, position] * state + update[:, position]
        if edit is not None and edit[0] == position:
            state = edit[1]
        states.append(state)
        results.append(torch.einsum(read, state, c[:, position]) + skip[:, position])
    return torch.stack(results, 1), torch.stack(states, 1)


def _delta(values: dict[str, Tensor], edit: tuple[int, Tensor] | None) -> tuple[Tensor, Tensor]:
    q, k, v, beta, decay = (values[f"hook_{name}"] for name in ("q", "k", "v", "beta", "log_decay"))
    q, k = (one.repeat_interleave(v.shape[2] // one.shape[2], dim=2) for one in (q, k))
    q, k = (one * (one.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for one in (q, k))
    decay = decay.exp()[..., None] if decay.ndim == 4 else decay.exp()[..., None, None]
    state = v.new_zeros(len(v), v.shape[2], k.shape[-1], v.shape[-1])
    states, results = [], []
    for t in range(v.shape[1]):
        state = state * decay[:, t]
        there = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + k[:, t, ..., None] * ((v[:, t] - there) * beta[:, t, :, None])[..., None, :]
        if edit is not None and edit[0] == t:
            state = edit[1]
        states.append(state)
        results.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) / q.shape[-1] ** 0.5)
    return torch.stack(results, 1), torch.stack(states, 1)


@pytest.mark.parametrize("live", REFERENCES, indirect=True)
def test_states_and_rates_are_those_of_the_recurrence(live: Live) -> None:
    out = "hook_scan_out" if "hook_scan_out" in live.points else "hook_recurrence_out"
    with torch.no_grad():
        values = live.values(tokens=TOKENS)
        values["D"] = live.mixer.D if out == "hook_scan_out" else torch.zeros(())
        results, states = recurrence(values, None, None)
        assert close(values[out], results)
        assert close(values["hook_state"], states)

        edited = states[:, 3].clone()
        edited[1] *= -1.5
        after = _seen_with(live, out, "hook_state", lambda value: _set(value, 3, edited))
        assert close(after, recurrence(values, None, (3, edited))[0])
        if "hook_A" in live.points:
            rates = values["hook_A"].clone()
            rates[1, 3] *= 3
            rates[0, 5] *= 0.5
            found = _seen_with(live, out, "hook_A", lambda value: rates)
            assert close(found, recurrence(values, rates, None)[0])
            assert not close(found, results)


def _set(value: Tensor, position: int, new: Tensor) -> Tensor:
    value[:, position] = new
    return value


def _seen_with(live: Live, name: str, edited: str, edit: Callable[[Tensor], Tensor]) -> Tensor:
    seen: list[Tensor] = []
    reader = live.points[name].add_hook(lambda value, hook: seen.append(value.clone()))
    try:
        written(live, edited, edit)
    finally:
        live.points[name].remove(reader)
    return seen[0]


@every
def test_gradients_are_the_slopes_of_writes(live: Live) -> None:
    weights = torch.randn(2, 7, 99, generator=torch.Generator().manual_seed(2))

    def loss(logits: Tensor) -> Tensor:
        return (logits.log_softmax(-1) * weights).sum()

    for name, point in live.points.items():
        if name == "hook_effective_attention":
            continue
        gradients: list[Tensor] = []
        listener = point.add_hook(lambda gradient, hook: gradients.append(gradient.clone()), dir="bwd")
        bare = live(TOKENS)
        loss(bare).backward()
        point.remove(listener)
        live.model.zero_grad()
        value = live.values(name, tokens=TOKENS)[name]
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(3)) * value.abs().mean()
        direction[:, [0, 1, 2, 4, 5, 6]] = 0
        direction[0] = 0
        slopes = []
        for size in (2e-3, 1e-3):
            with torch.no_grad():
                up, down = (
                    loss(written(live, name, lambda value, by=by: value + by * direction).double())
                    for by in (size, -size)
                )
            slopes.append(((up - down) / (2 * size)).item())
        expected = (gradients[0] * direction).sum().item()
        nearest = min(slopes, key=lambda slope: abs(slope - expected))
        assert abs(nearest - expected) <= 0.05 * abs(expected) + 0.05, name


# --- effective attention ---------------------------------------------------------------------------------------------

ATTENDING = ("mamba2", "falcon_h1", "qwen3_next", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "xlstm")


@pytest.mark.parametrize("live", ATTENDING, indirect=True)
def test_effective_attention_times_values_is_the_result(live: Live) -> None:
    longer = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        values = live.values(tokens=longer)
    is_scan = "hook_scan_out" in values
    carried = values["hook_scan_in" if is_scan else "hook_v"]
    result = torch.einsum("bhqk,bkhd->bqhd", values["hook_effective_attention"], carried)
    if is_scan:
        result = result + live.mixer.D[:, None] * carried
    assert close(values["hook_scan_out" if is_scan else "hook_recurrence_out"], result.detach())
    assert not values["hook_effective_attention"].triu(1).any()


@pytest.mark.parametrize("live", ["mamba2"], indirect=True)
def test_effective_attention_of_mamba_2_is_the_textbooks(live: Live) -> None:
    with torch.no_grad():
        values = live.values(tokens=TOKENS)
        b, c = (values[name].repeat_interleave(2, dim=2) for name in ("hook_B", "hook_C"))
        log = (values["hook_dt"] * live.mixer.A_log.exp().neg()).cumsum(1)
        decay = (log[:, :, None] - log[:, None]).permute(0, 3, 1, 2).exp().tril()
        expected = torch.einsum("bqhn,bkhn->bhqk", c, b) * decay * values["hook_dt"].transpose(1, 2)[:, :, None]
    assert close(values["hook_effective_attention"], expected)


@pytest.mark.parametrize("live", ["mamba2"], indirect=True)
def test_effective_attention_refuses_what_would_be_lost(live: Live) -> None:
    point = live.points["hook_effective_attention"]
    with torch.no_grad(), pytest.raises(UnwritableError) as error:
        written(live, "hook_effective_attention", lambda value: value * 2)
    assert str(error.value) == (
        "this value can be read, but not written\n"
        "  where: blocks.0.mixer.hook_effective_attention\n"
        "  reason: the model does not compute with it: it is computed of what the model uses\n"
        "  fix: write the points that it is computed of"
    )
    listener = point.add_hook(lambda gradient, hook: None, dir="bwd")
    with pytest.raises(PointNotReachedError, match="the model does not compute with this value"):
        live(TOKENS)
    point.remove(listener)
    with torch.no_grad():
        past = on(live.model, cache_of(live.model(TOKENS[:, :4], use_cache=True)))
        listener = point.add_hook(lambda value, hook: None)
        with pytest.raises(NotSeenError) as unseen:
            live.model(TOKENS[:, 4:], use_cache=True, **past)
        point.remove(listener)
    assert str(unseen.value) == (
        "effective attention cannot be reached here\n"
        "  where: mamba2_chunk_scan\n"
        "  reason: a KV cache holds the state that earlier tokens left, not what each of them added to it\n"
        "  fix: run the whole sequence without a KV cache"
    )


# --- cached decoding and padding -------------------------------------------------------------------------------------


def cache_of(output: Any) -> Any:
    """Returns the KV cache that a forward gives back, under whichever name."""
    return next(output[name] for name in KV_CACHE_NAMES if name in output)


def pieces(live: Live, cuts: tuple[int, ...] = (0, 4, 5, 6, 7)) -> Iterator[tuple[int, Tensor]]:
    """Yields where each piece of a sequence ends, and its logits: a prompt, and single tokens on a cache."""
    past: dict[str, Any] = {}
    for start, end in itertools.pairwise(cuts):
        output = live.model(TOKENS[:, start:end], use_cache=True, **past)
        past = on(live.model, cache_of(output))
        yield end, output.logits


CACHED = [case.model_type for case in CASES if case.cached]
WRONG_CACHED = {"bamba", "nemotron_h", "zamba2", "minimax"}
"""Whose own logits on a cache are not those of a whole run: of later layers, or of step sizes that are not limited."""


@pytest.mark.parametrize("live", CACHED, indirect=True)
def test_decoding_on_a_cache_shows_what_a_whole_run_shows(live: Live) -> None:
    names = [name for name in live.points if name != "hook_effective_attention"]
    with torch.no_grad():
        whole = live.values(*names, tokens=TOKENS)
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        listeners = [
            (
                live.points[name],
                live.points[name].add_hook(lambda value, hook, to=found[name]: to.append(value.clone())),
            )
            for name in names
        ]
        bare = torch.cat([logits for _, logits in pieces(live)], dim=1)
        for point, listener in listeners:
            point.remove(listener)
        assert torch.equal(bare, torch.cat([logits for _, logits in pieces(live)], dim=1))
    if live.case.model_type in WRONG_CACHED:
        assert not close(bare, live(TOKENS))
    for name in names:
        value = torch.cat(found[name], dim=1)
        if live.case.model_type in ("nemotron_h", "zamba2") and name not in ("hook_in_proj", "hook_conv", "hook_B"):
            assert value.shape == whole[name].shape
        else:
            assert close(value, whole[name]), name


@pytest.mark.parametrize("live", [name for name in CACHED if name not in WRONG_CACHED], indirect=True)
def test_a_write_on_a_cache_is_one_in_a_whole_run(live: Live) -> None:
    for name, point in live.points.items():
        if name == "hook_effective_attention":
            continue
        columns = (
            (2,) if name == "hook_state" else (2, 5)
        )  # a state that follows from an edited one is edited once more
        start = 0

        def edit(value: Tensor, hook: HookPoint, columns: tuple[int, ...] = columns) -> None:
            for column in columns:
                if start <= column < start + value.shape[1]:
                    _scale(value[1, column - start])

        with torch.no_grad():
            listener = point.add_hook(edit)
            expected, parts = live(TOKENS), []
            for end, logits in pieces(live):
                parts.append(logits)
                start = end
            point.remove(listener)
        assert close(torch.cat(parts, dim=1), expected), name


@pytest.mark.parametrize("live", [case.model_type for case in CASES if case.padding], indirect=True)
def test_padded_rows_show_what_the_row_alone_shows(live: Live) -> None:
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    takes = inspect.signature(type(live.model).forward).parameters
    more = {"position_ids": positions} if "position_ids" in takes else {}
    with torch.no_grad():
        alone = live.values(tokens=TOKENS)
        found = live.values(tokens=padded, attention_mask=mask, **more)
    for name, value in found.items():
        kept = value[..., 3:, 3:] if name == "hook_effective_attention" else value[:, 3:]
        if live.case.model_type == "minimax" and name in ("hook_q", "hook_k", "hook_v"):
            continue  # it masks these after they are shown
        assert close(kept, alone[name]), name


@pytest.mark.parametrize("live", ["mamba"], indirect=True)
def test_positions_are_counted_while_hooks_are_on(live: Live) -> None:
    point, found = live.points["hook_conv"], list[int]()
    with torch.no_grad():
        listener = point.add_hook(lambda value, hook: found.append(hook.position))
        list(pieces(live))
        point.remove(listener)
        assert found == [0, 4, 5, 6]
        past = on(live.model, cache_of(live.model(TOKENS[:, :4], use_cache=True)))
        listener = point.add_hook(lambda value, hook: found.append(hook.position))
        with pytest.raises(Exception, match="it is not known how many tokens came before this forward"):
            live.model(TOKENS[:, 4:], use_cache=True, **past)
        point.remove(listener)


# --- who sees it -----------------------------------------------------------------------------------------------------


@few
def test_a_forward_inside_a_hook_sees_nothing(live: Live) -> None:
    name = next(name for name in ("hook_scan_in", "hook_q", "hook_k", "hook_conv") if name in live.points)
    inside: list[Tensor] = []

    def edit(value: Tensor) -> Tensor:
        inside.append(live(TOKENS))
        return scaled(value)

    with torch.no_grad():
        bare = live(TOKENS)
        changed = written(live, name, edit)
    assert len(inside) == 1
    assert torch.equal(inside[0], bare)
    assert not close(changed, bare)


@pytest.mark.parametrize("live", ["mamba2"], indirect=True)
def test_what_cannot_be_seen_raises(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return type(live.mixer.module).forward(live.mixer.module, *args, **kwargs)

    vars(live.mixer.module)["forward"] = Kernel()
    with torch.no_grad(), pytest.raises(NotSeenError) as error:
        live.values("hook_dt", tokens=TOKENS)
    del vars(live.mixer.module)["forward"]
    assert str(error.value) == (
        "the functions that a module's forward calls cannot be reached here\n"
        "  expected: a forward that is a Python function\n"
        "  got: Kernel"
    )


# --- found from the module -------------------------------------------------------------------------------------------


@every
def test_kind_and_sizes_are_found_from_the_module(live: Live) -> None:
    mixer, module = live.mixer, live.mixer.module
    expected = None if live.case.model_type == "minimax" else mixer.kind
    assert mixer_kind(module) is expected
    assert mixer_kind(live.model) is None
    if expected is not None and mixer.kind.roles:
        with torch.no_grad():
            found = axis_sizes(module, mixer.kind, lambda: live(TOKENS))
        known = {axis: size for axis, size in mixer.dims.items() if axis in found}
        if "qk_head" in found and found["qk_head"] == found["head"]:
            known["qk_head"] = found["qk_head"]
        assert found == known
        assert set(mixer.dims) - set(found) <= {"d_inner"}
