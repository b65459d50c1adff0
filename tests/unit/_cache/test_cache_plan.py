"""Plans of caches, and the comparison with free memory before a run."""

import pytest
import torch
from accelerate import cpu_offload
from tests.zoo import build
from torch import nn
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import clearspan
from clearspan._cache import memory as free_memory
from clearspan._cache import room as cache_room
from clearspan.errors import CacheTooLargeError, InputError, InvalidArgumentError, UnknownPointError, UnplannableError

STREAM = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
PART = [*STREAM, "blocks.1.attn.hook_q", "blocks.1.attn.hook_v", "blocks.1.attn.hook_pattern"]


def test_a_plan_prints_names_axes_and_bytes(bridge):
    plan = bridge.plan_cache((2, 7), PART)
    assert str(plan).splitlines() == [
        "CachePlan: 6 entries, 11.8 KiB kept, 1.5 KiB more by look-ups; batch 2, pos 7",
        "name                          layers  axes                                    kept     look-ups",
        "blocks.{l}.hook_resid_post    0-2     [batch 2, pos 7, d_model 48]            7.9 KiB",
        "blocks.{l}.attn.hook_q        1       [batch 2, pos 7, head 4, d_head 12]     3.9 KiB",
        "blocks.{l}.attn.hook_v        1       [batch 2, pos 7, kv_head 1, d_head 12]  shared",
        "blocks.{l}.attn.hook_pattern  1       [batch 2, head 4, q_pos 7, k_pos 7]     shared   1.5 KiB",
    ]
    assert repr(plan) == str(plan)
    assert plan.total_bytes == (3 * 48 + 72) * 14 * 4
    assert plan.look_up_bytes == 2 * 4 * 7 * 7 * 4
    assert plan.largest(1) == [("blocks.{l}.hook_resid_post", 3 * 48 * 14 * 4)]
    assert plan.largest() == [*plan.largest(1), ("blocks.{l}.attn.hook_q", 72 * 14 * 4)]
    assert plan.fits(plan.total_bytes)
    assert not plan.fits(plan.total_bytes - 1)
    assert bridge.plan_cache(torch.Size((2, 7)), PART) == plan


def test_one_position_has_its_axis(bridge):
    plan = bridge.plan_cache((2, 7), PART, pos_slice=-1)
    lines = str(plan).splitlines()
    assert lines[1].split() == ["name", "layers", "axes", "kept"]
    assert "[batch 2, head 4, q_pos 1, k_pos 7]" in lines[-1]
    assert plan.total_bytes == 2 * (3 * 48 + 72 + 4 * 7) * 4


@pytest.mark.parametrize("shape", [(2,), (2, 7, 48), (0, 3), (2.0, 3), "ab"])
def test_what_is_no_shape(shape, bridge):
    with pytest.raises(InvalidArgumentError) as error:
        bridge.plan_cache(shape)
    assert str(error.value).splitlines() == [
        "cannot plan for this shape",
        "  expected: rows and positions, such as tokens.shape",
        f"  got: {shape!r}",
    ]


def test_what_a_run_refuses_is_refused(bridge):
    with pytest.raises(InputError, match="longer than the model's context"):
        bridge.plan_cache((1, 33))
    with pytest.raises(UnknownPointError):
        bridge.plan_cache((1, 3), "nonsense")
    with pytest.raises(InvalidArgumentError, match="pos_slice names no position"):
        bridge.plan_cache((1, 3), pos_slice=3)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("llama", torch.float64), ("gpt_bigcode", torch.bfloat16), ("gpt_oss", torch.bfloat16), ("bloom", torch.bfloat16)],
)
def test_dtypes(variant, dtype):
    bridge = clearspan.boot(build(variant), dtype=dtype)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.ones(2, 7, dtype=torch.long))
    plan = bridge.plan_cache((2, 7))
    assert plan.total_bytes == cache.nbytes
    for name in cache:
        _ = cache[name]
    assert plan.total_bytes + plan.look_up_bytes == cache.nbytes


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_plan_is_the_same_in_any_mode_and_beside_hooks(context, bridge, tokens):
    seen = []
    expected = bridge.plan_cache(tokens.shape)
    hook = bridge.hf_model.transformer.h[1].register_forward_hook(lambda *_: seen.append("a module's"))
    with context(), bridge.hooks([("blocks.1.attn.hook_pattern", lambda value, hook: seen.append("a point's"))]):
        assert bridge.plan_cache(tokens.shape) == expected
    hook.remove()
    assert not seen


def test_random_numbers_stay_where_they_are():
    bridge = clearspan.boot(build("opt", layerdrop=0.9).train())
    state = torch.get_rng_state()
    bridge.plan_cache((2, 7))
    assert torch.equal(state, torch.get_rng_state())


def test_with_dropout_patterns_are_kept(make_bridge, tokens):
    bridge = make_bridge(attn_pdrop=0.5, resid_pdrop=0.5)
    bridge.hf_model.train()
    plan = bridge.plan_cache(tokens.shape)
    assert plan.look_up_bytes == 0
    assert plan.total_bytes == bridge.run_with_cache(tokens)[1].nbytes


LONG = torch.ones(1, 1100, dtype=torch.long)
"""Longer than what a rehearsal computes: the mask of a sliding window has over a million numbers."""


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_long_masks(implementation):
    bridge = clearspan.boot(build("mistral", num_hidden_layers=2, attn_implementation=implementation))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(LONG)
    assert bridge.plan_cache(LONG.shape).total_bytes == cache.nbytes


@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")  # transformers calls flex attention so
def test_under_flex_attention_the_mask_is_no_tensor():
    by_sdpa, by_flex = (
        clearspan.boot(build("mistral", num_hidden_layers=2, attn_implementation=name)).plan_cache(LONG.shape)
        for name in ("sdpa", "flex_attention")
    )
    assert by_sdpa.total_bytes - by_flex.total_bytes == 1100 * 1100


def test_no_kernel_of_attention_is_called():
    def refuse(module, query, key, value, mask, **kwargs):
        raise AssertionError("a kernel was called")

    ALL_ATTENTION_FUNCTIONS.register("refusing", refuse)
    ALL_MASK_ATTENTION_FUNCTIONS.register("refusing", sdpa_mask)
    model = build("llama")
    expected = clearspan.boot(model).plan_cache((2, 7))
    model.set_attn_implementation("refusing")
    bridge = clearspan.boot(model)
    assert bridge.plan_cache((2, 7)) == expected
    assert bridge.plan_cache((2, 7), "blocks.1.hook_resid_post").total_bytes == 2 * 7 * 48 * 4
    with pytest.raises(AssertionError, match="a kernel was called"):
        bridge(torch.ones(1, 2, dtype=torch.long))


@pytest.mark.parametrize("variant", ["llama", "gpt_bigcode", "mixtral", "deepseek_v3"])
def test_of_an_offloaded_model(variant):
    model = build(variant)
    expected = clearspan.boot(model).plan_cache((2, 7))
    cpu_offload(model, execution_device="cpu")
    assert clearspan.boot(model).plan_cache((2, 7)) == expected
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["torchao", "4 bit", "8 bit"])
@pytest.mark.filterwarnings("ignore")  # both libraries say at import what they cannot use on this machine
def test_of_a_quantised_model(kind):
    from tests.parity.test_quantisation import by_bitsandbytes, by_torchao  # noqa: PLC0415 (it takes long)

    model = build("llama")
    expected = clearspan.boot(model).plan_cache((2, 7))
    {"torchao": by_torchao, "4 bit": by_bitsandbytes(4), "8 bit": by_bitsandbytes(8)}[kind](model)
    bridge = clearspan.boot(model)
    plan = bridge.plan_cache((2, 7))
    assert [entry.shape for entry in plan.entries] == [entry.shape for entry in expected.entries]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.ones(2, 7, dtype=torch.long))
    assert plan.total_bytes == cache.nbytes


class Asking(nn.GELU):
    """What it computes depends on numbers."""

    def forward(self, value):
        return value if value.sum() > 0 else super().forward(value)


def test_a_forward_that_asks_for_numbers_cannot_be_planned(bridge):
    bridge.hf_model.transformer.h[1].mlp.act = Asking()
    with pytest.raises(UnplannableError) as error:
        bridge.plan_cache((2, 7))
    assert str(error.value).splitlines() == [
        "the shapes of this model's forward are not known without running it",
        "  where: GPTBigCodeForCausalLM",
        "  reason: Tensor.item() cannot be called on meta tensors",
    ]


# --- before a run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def leave_free(monkeypatch):
    """Has so many bytes be free, and every cache be worth the question."""

    def leave(count):
        monkeypatch.setattr(cache_room, "free_bytes", lambda device: count)
        monkeypatch.setattr(cache_room, "CHECKED_FROM", 0)

    return leave


def test_a_cache_that_does_not_fit_raises_before_the_run(bridge, tokens, leave_free):
    ran = []
    bridge.hf_model.register_forward_pre_hook(lambda *_: ran.append(True))
    needed = bridge.plan_cache(tokens.shape).total_bytes
    leave_free(needed - 1)
    with pytest.raises(CacheTooLargeError) as error:
        bridge.run_with_cache(tokens)
    assert str(error.value).splitlines() == [
        "the cache does not fit in memory; nothing was run",
        "  expected: at most 144.6 KiB, which is free on cpu",
        "  got: 144.6 KiB for batch 2, pos 7",
        "  reason: the largest are blocks.{l}.mlp.hook_pre (31.5 KiB), blocks.{l}.mlp.hook_post (31.5 KiB),"
        " blocks.{l}.attn.hook_q (11.8 KiB)",
        "  fix: keep fewer points with names_filter, or fewer positions with pos_slice",
    ]
    assert isinstance(error.value, MemoryError)
    assert not ran
    leave_free(needed)
    assert bridge.run_with_cache(tokens)[1].nbytes == needed


def test_where_it_is_kept_is_asked(bridge, tokens, monkeypatch):
    monkeypatch.setattr(cache_room, "free_bytes", lambda device: 2**40 if device.type == "cpu" else 1000)
    monkeypatch.setattr(cache_room, "CHECKED_FROM", 0)
    bridge.run_with_cache(tokens)
    with pytest.raises(CacheTooLargeError) as error:
        bridge.run_with_cache(tokens, device="meta")
    assert "  expected: at most 1000 B, which is free on meta" in str(error.value).splitlines()
    assert str(error.value).endswith("with pos_slice, or keep it in main memory with device='cpu'")


def test_fewer_names_or_positions_fit(bridge, tokens, leave_free):
    leave_free(9000)
    for names, terms in ((STREAM, {}), (PART, {"pos_slice": -1}), (PART, {"pos_slice": [0, 2]})):
        needed = bridge.plan_cache(tokens.shape, names, **terms).total_bytes
        assert bridge.run_with_cache(tokens, names, **terms)[1].nbytes == needed <= 9000
    with pytest.raises(CacheTooLargeError):
        bridge.run_with_cache(tokens, PART)


def test_the_run_itself_is_planned(leave_free):
    """Padding, embeddings and a start at a layer are those of the run, and a KV cache is left alone."""
    bridge = clearspan.boot(build("opt post-norm"))
    tokens = torch.ones(2, 7, dtype=torch.long)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    _, whole = bridge.run_with_cache(tokens)
    runs = [
        ((tokens,), {"attention_mask": mask}),
        ((whole["embed.hook_out"],), {}),
        ((whole["resid_pre", 1],), {"start_at_layer": 1}),
    ]
    for given, kwargs in runs:
        needed = bridge.run_with_cache(*given, **kwargs)[1].nbytes
        leave_free(needed)
        assert bridge.run_with_cache(*given, **kwargs)[1].nbytes == needed
        leave_free(needed - 1)
        with pytest.raises(CacheTooLargeError):
            bridge.run_with_cache(*given, **kwargs)
    past = DynamicCache(config=bridge.hf_model.config)
    with pytest.raises(CacheTooLargeError):
        bridge.run_with_cache(tokens, past_key_values=past)
    assert past.get_seq_length() == 0


def test_a_plan_is_made_once_for_a_choice_and_a_shape(bridge, tokens, leave_free, monkeypatch):
    leave_free(bridge.plan_cache(tokens.shape).total_bytes)
    made = []
    rehearse = cache_room.rehearse
    monkeypatch.setattr(cache_room, "rehearse", lambda *args: made.append(1) or rehearse(*args))
    for _ in range(3):
        bridge.run_with_cache(tokens)
    assert len(made) == 1
    bridge.run_with_cache(tokens[:1], STREAM)
    assert len(made) == 1, "a bound that fits is enough"


def test_a_small_cache_is_not_compared_with_anything(bridge, tokens, monkeypatch):
    monkeypatch.setattr(cache_room, "free_bytes", lambda device: pytest.fail("asked"))
    bridge.run_with_cache(tokens)


def test_what_is_not_known_does_not_stop_a_run(bridge, tokens, leave_free):
    leave_free(None)
    bridge.run_with_cache(tokens)
    leave_free(0)
    with torch.autocast("cpu"):
        bridge.run_with_cache(tokens)
    bridge.hf_model.transformer.h[1].mlp.act = Asking()
    bridge.run_with_cache(tokens)


# --- free memory -----------------------------------------------------------------------------------------------------


def linux(root, *, limit="max", group="job/step", swap=0):
    """Writes what Linux says of its memory."""
    files = {
        "proc/meminfo": f"MemTotal: 9000 kB\nMemAvailable:    5000 kB\nSwapFree: {swap} kB\nHugePages_Total: 0\n",
        "proc/self/cgroup": f"3:cpuset:/\n0::/{group}\n",
        "sys/fs/cgroup/job/memory.max": f"{limit}\n",
        "sys/fs/cgroup/job/memory.current": "1500000\n",
        "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 500000\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
    }
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.mark.parametrize(
    ("how", "free"),
    [
        ({}, 5000 * 1024),
        ({"swap": 1000}, 6000 * 1024),
        ({"limit": "3000000"}, 2000000),
        ({"limit": "1000000"}, 0),
        ({"limit": "3000000", "group": ""}, 5000 * 1024),
    ],
    ids=str,
)
def test_free_memory_on_linux(how, free, tmp_path, monkeypatch):
    linux(tmp_path, **how)
    monkeypatch.setattr(free_memory, "ROOT", tmp_path)
    assert free_memory.free_bytes(torch.device("cpu")) == free


def test_free_memory_where_nobody_says(tmp_path, monkeypatch):
    monkeypatch.setattr(free_memory, "ROOT", tmp_path)
    assert free_memory.free_bytes(torch.device("cpu")) is None
    assert free_memory.free_bytes(torch.device("meta")) is None
