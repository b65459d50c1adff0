"""Whatever is given as an input or a setting of a run: an error of the library's own says what is wrong, or it works.

Every kind of bad value goes to every entry that takes the argument. An entry is accepted where it returns though it
should not; raw where the error is another library's.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.zoo import build
from transformers import GenerationConfig

import clearspan
from clearspan import Batch, FactoredMatrix, TransformerBridge
from clearspan.analysis import SteeringVector
from clearspan.errors import CheckpointError, ClearspanError, InputError
from clearspan.points import get_act_name

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
NAN = float("nan")
Cases = Iterator[tuple[str, Callable[[TransformerBridge, TransformerBridge], object]]]
TABLE = 64
"""Positions of the models here."""


@pytest.fixture(scope="module")
def learned() -> TransformerBridge:
    """A bridge to a model with a table of positions."""
    return clearspan.boot(build("gpt2"))


@pytest.fixture(scope="module")
def rotary() -> TransformerBridge:
    """A bridge to a model that computes positions."""
    return clearspan.boot(build("llama"))


RUNS: dict[str, Callable[..., Any]] = {
    "forward": lambda bridge, *given, **named: bridge(*given, **named),
    "run_with_cache": lambda bridge, *given, **named: bridge.run_with_cache(*given, **named),
    "run_with_hooks": lambda bridge, *given, **named: bridge.run_with_hooks(*given, **named),
}
GENERATIONS: dict[str, Callable[..., Any]] = {
    "generate": lambda bridge, *given, **named: bridge.generate(*given, **{"max_new_tokens": 2, **named}),
    "with cache": lambda bridge, *given, **named: bridge.generate(
        *given, **{"max_new_tokens": 2, "return_cache": True, **named}
    ),
    "generate_stream": lambda bridge, *given, **named: list(
        bridge.generate_stream(*given, **{"max_new_tokens": 2, **named})
    ),
}

INPUTS = {
    "nothing": None,
    "bool ids": torch.ones(1, 4, dtype=torch.bool),
    "float ids": torch.ones(1, 4),
    "complex ids": torch.ones(1, 4, dtype=torch.complex64),
    "meta ids": torch.ones(1, 4, dtype=torch.long, device="meta"),
    "sparse ids": IDS.to_sparse(),
    "nested ids": torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged),
    "no positions": torch.ones(1, 0, dtype=torch.long),
    "no rows": torch.ones(0, 4, dtype=torch.long),
    "one id without axes": torch.tensor(3),
    "ids of three axes": torch.ones(1, 2, 3, dtype=torch.long),
    "negative ids": torch.tensor([[1, -1]]),
    "ids past the vocabulary": torch.tensor([[1, 97]]),
    "an id past int64": [[1, 2**70]],
    "a flat id past int64": [1, 2**70],
    "ragged rows with text": [[1, 2], ["a"]],
    "ragged rows with floats": [[1, 2], [3.5]],
    "ragged rows with None": [[1, 2], [None]],
    "ragged rows with an empty one": [[1, 2], []],
    "ragged rows with bools": [[1, 2, 3], [True, False]],
    "rows too deep": [[[1, 2]], [[3, 4]]],
    "rows of bool tensors": [torch.tensor([True, False])],
    "rows of complex tensors": [torch.tensor([1 + 1j])],
    "rows of meta tensors": [torch.ones(3, dtype=torch.long, device="meta")],
    "rows of sparse tensors": [torch.tensor([1, 2]).to_sparse()],
    "a list of bools": [True, False],
    "a list of floats": [1.0, 2.0],
    "a bool array": np.array([[True, False]]),
    "a float array": np.array([[1.0, 2.0]]),
    "a complex array": np.array([[1j]]),
    "an array of objects": np.array([[None, 1]], dtype=object),
    "an array of dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
    "a structured array": np.array([(1, 2)], dtype=[("a", "i4"), ("b", "i4")]),
    "a set": {1, 2},
    "text without a tokenizer": "text",
    "embeddings in double": torch.zeros(1, 4, 48, dtype=torch.float64),
    "embeddings in half": torch.zeros(1, 4, 48, dtype=torch.float16),
    "embeddings of another width": torch.zeros(1, 4, 47),
    "embeddings without positions": torch.zeros(1, 0, 48),
    "embeddings of two axes": torch.zeros(4, 48),
    "embeddings on meta": torch.zeros(1, 4, 48, device="meta"),
    "sparse embeddings": torch.ones(1, 4, 48).to_sparse(),
    "a mapping without ids": {"mask": IDS},
    "a mapping with text as ids": {"input_ids": "text"},
    "a mapping with a mask of another shape": {"input_ids": IDS, "attention_mask": torch.ones(2, 3)},
    "a mapping with ragged masks of other lengths": {"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1, 1]]},
    "a mapping with a mask that is text": {"input_ids": IDS, "attention_mask": "text"},
    "a mapping with a number as mask": {"input_ids": IDS, "attention_mask": 1},
    "rows of a dataset without ids in one": [{"input_ids": [1, 2]}, {"other": 3}],
}
"""Inputs that no model with 97 tokens, a width of 48 and no tokenizer can take."""

MASKS = {
    "a number": 1,
    "text": "mask",
    "an object": object(),
    "a list of text": [["a"] * 4] * 2,
    "ragged": [[1, 1, 1, 1], [1, 1]],
    "too short": torch.ones(2, 3, dtype=torch.long),
    "too long": torch.ones(2, 5, dtype=torch.long),
    "other rows": torch.ones(3, 4, dtype=torch.long),
    "one row for two": torch.ones(1, 4, dtype=torch.long),
    "one axis": torch.ones(4, dtype=torch.long),
    "three axes": torch.ones(2, 1, 4),
    "five axes": torch.ones(2, 1, 1, 4, 4),
    "twos": torch.full((2, 4), 2),
    "negative": -torch.ones(2, 4, dtype=torch.long),
    "halves": torch.full((2, 4), 0.5),
    "not a number": torch.full((2, 4), NAN),
    "one not a number": torch.tensor([[1.0, 1, 1, NAN], [1, 1, 1, 1]]),
    "infinite": torch.full((2, 4), float("inf")),
    "an empty row": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]),
    "complex": torch.ones(2, 4, dtype=torch.complex64),
    "meta": torch.ones(2, 4, dtype=torch.long, device="meta"),
    "sparse": torch.ones(2, 4, dtype=torch.long).to_sparse(),
    "square of other rows": torch.zeros(3, 1, 4, 4),
    "square of other heads": torch.zeros(2, 3, 4, 4),
    "square of other positions": torch.zeros(2, 1, 4, 5),
    "square of whole numbers": torch.ones(2, 1, 4, 4, dtype=torch.long),
    "square in double": torch.zeros(2, 1, 4, 4, dtype=torch.float64),
    "square of no numbers": torch.full((2, 1, 4, 4), NAN),
}
"""Masks that two rows of four tokens cannot have."""

POSITIONS = {
    "a number": 3,
    "text": "positions",
    "floats": torch.zeros(2, 4),
    "bools": torch.zeros(2, 4, dtype=torch.bool),
    "complex": torch.zeros(2, 4, dtype=torch.complex64),
    "one axis": torch.arange(4),
    "three axes": torch.zeros(1, 2, 4, dtype=torch.long),
    "too short": torch.zeros(2, 3, dtype=torch.long),
    "other rows": torch.zeros(3, 4, dtype=torch.long),
    "meta": torch.zeros(2, 4, dtype=torch.long, device="meta"),
    "sparse": torch.ones(2, 4, dtype=torch.long).to_sparse(),
}
"""Positions that two rows of four tokens cannot have."""
OFF_THE_TABLE = {
    "negative": torch.tensor([[-1, 0, 1, 2]]),
    "one past the table": torch.tensor([[0, 1, 2, TABLE]]),
    "far past the table": torch.full((2, 4), 10**6),
}
"""Positions that a table of 64 does not have."""

SETTINGS = {
    "max_new_tokens": [NAN, -1, 0, True, 1.5, "3", float("inf"), [3], torch.tensor([1, 2])],
    "max_length": [NAN, -1, True, 1.5, "30", [3]],
    "min_new_tokens": [NAN, -1, 1.5, "3"],
    "num_beams": [0, -1, 1.5, "2", NAN],
    "num_return_sequences": [0, -1, 1.5, "2"],
    "temperature": ["hot", -1.0, NAN, [1.0]],
    "top_k": ["many", -1, 1.5],
    "top_p": ["most", -1.0, 2.0, NAN],
    "repetition_penalty": ["some", -1.0],
    "max_new_token": [3],
    "do_samples": [True],
    "nonsense": [1],
    "generation_config": [{"max_new_tokens": 3}, "config", 3],
    "past_key_values": ["cache", 3],
    "stopping_criteria": [3],
    "logits_processor": ["none"],
}
"""Settings of a generation that mean nothing."""
SAMPLED = {"temperature", "top_k", "top_p"}
LAYERS = [-4, 4, 99, 1.5, True, "1", NAN, [1], torch.tensor([0, 1])]
DEVICES = ["cuda", "cuda:7", "nonsense", 3.5, True, b"cpu", torch.device("cuda")]
NAMES = ["nonsense", 3, True, 2.5, b"bytes", [3], [None], ["nonsense"], object(), lambda: True]
HOOKS = [
    None,
    3,
    "hook",
    [3],
    [("blocks.0.hook_resid_post",)],
    [("blocks.0.hook_resid_post", None)],
    [("blocks.0.hook_resid_post", 3)],
    [("blocks.0.hook_resid_post", lambda: None)],
    [(lambda value, hook: None, "blocks.0.hook_resid_post")],
    [(3, lambda value, hook: None)],
    [(None, lambda value, hook: None)],
    [("nonsense", lambda value, hook: None)],
    {"blocks.0.hook_resid_post": lambda value, hook: None},
]


def _runs() -> Cases:
    for (entry, run), (kind, given) in itertools.product({**RUNS, **GENERATIONS}.items(), INPUTS.items()):
        yield f"{entry}: {kind}", lambda learned, rotary, run=run, given=given: run(learned, given)
    for (entry, run), (kind, mask) in itertools.product({**RUNS, **GENERATIONS}.items(), MASKS.items()):
        yield (
            f"{entry}: mask {kind}",
            lambda learned, rotary, run=run, mask=mask: run(learned, IDS, attention_mask=mask),
        )
    for (entry, run), (kind, ids) in itertools.product(RUNS.items(), POSITIONS.items()):
        yield f"{entry}: positions {kind}", lambda learned, rotary, run=run, ids=ids: run(rotary, IDS, position_ids=ids)
    for (entry, run), (kind, ids) in itertools.product(RUNS.items(), (POSITIONS | OFF_THE_TABLE).items()):
        yield (
            f"{entry}: learned positions {kind}",
            lambda learned, rotary, run=run, ids=ids: run(learned, IDS, position_ids=ids),
        )
    for (entry, run), layer in itertools.product(RUNS.items(), LAYERS):
        for name, given in (("stop_at_layer", IDS), ("start_at_layer", torch.zeros(1, 4, 48))):
            yield (
                f"{entry}: {name}={layer!r}",
                lambda learned, rotary, run=run, given=given, name=name, layer=layer: run(
                    learned, given, **{name: layer}
                ),
            )
    for entry, run in RUNS.items():
        yield f"{entry}: past the table", lambda learned, rotary, run=run: run(learned, torch.ones(1, 65).long())
        yield f"{entry}: ids as a residual", lambda learned, rotary, run=run: run(learned, IDS, start_at_layer=1)
        yield (
            f"{entry}: a residual in double",
            lambda learned, rotary, run=run: run(learned, torch.zeros(1, 4, 48).double(), start_at_layer=1),
        )
    for device in DEVICES:
        yield (
            f"run_with_cache: device={device!r}",
            lambda learned, rotary, device=device: learned.run_with_cache(IDS, device=device),
        )
        yield f"to: {device!r}", lambda learned, rotary, device=device: clearspan.boot(learned.hf_model, device=device)
    for name in NAMES:
        yield f"run_with_cache: names={name!r}", lambda learned, rotary, name=name: learned.run_with_cache(IDS, name)
    for hooks, (entry, run) in itertools.product(HOOKS, {**RUNS, **GENERATIONS}.items()):
        if entry != "forward":
            yield (
                f"{entry}: hooks={hooks!r}",
                lambda learned, rotary, run=run, hooks=hooks: run(learned, IDS, fwd_hooks=hooks),
            )


def _generations() -> Cases:
    for (entry, run), (name, values) in itertools.product(GENERATIONS.items(), SETTINGS.items()):
        for value in values:
            given = {name: value, **({"do_sample": True} if name in SAMPLED else {})}
            if name == "max_length":
                given["max_new_tokens"] = None
            yield (
                f"{entry}: {name}={value!r}",
                lambda learned, rotary, run=run, given=given: run(learned, IDS, **given),
            )
    for entry, run in GENERATIONS.items():
        for long in ({"max_new_tokens": TABLE}, {"max_new_tokens": None, "max_length": 200}):
            yield f"{entry}: {long}", lambda learned, rotary, run=run, long=long: run(learned, IDS, **long)


def _written_files(folder: Path) -> dict[str, Path]:
    """Returns checkpoints that are none."""
    whole = folder / "whole"
    if not whole.exists():
        build("gpt2").save_pretrained(whole)
        weights = (whole / "model.safetensors").read_bytes()
        for name, damaged in {
            "truncated": weights[: len(weights) // 2],
            "only a header": weights[:100],
            "empty file": b"",
            "not safetensors": b"nonsense" * 100,
            "without weights": None,
        }.items():
            (folder / name).mkdir()
            (folder / name / "config.json").write_bytes((whole / "config.json").read_bytes())
            if damaged is not None:
                (folder / name / "model.safetensors").write_bytes(damaged)
        for name, config in {"config is no json": "{", "config is a list": "[]", "config is empty": ""}.items():
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(config)
            (folder / name / "model.safetensors").write_bytes(weights)
        (folder / "missing tensors").mkdir()
        (folder / "missing tensors" / "config.json").write_bytes((whole / "config.json").read_bytes())
        save_file(
            {"wte.weight": torch.ones(97, 48)}, folder / "missing tensors" / "model.safetensors", {"format": "pt"}
        )
        (folder / "other shapes").mkdir()
        (folder / "other shapes" / "config.json").write_bytes((whole / "config.json").read_bytes())
        build("gpt2", n_embd=52).save_pretrained(folder / "other")
        other = (folder / "other" / "model.safetensors").read_bytes()
        (folder / "other shapes" / "model.safetensors").write_bytes(other)
        (folder / "empty").mkdir()
        (folder / "a file").write_text("nothing")
    return {one.name: one for one in folder.iterdir() if one.name not in ("whole", "other", "out")}


def _boots(folder: Path) -> Cases:
    for given in (None, 3, 2.5, True, b"gpt2", [], {}, torch.ones(2), torch.nn.Linear(2, 2), object(), "", " "):
        yield f"boot({given!r})"[:60], lambda learned, rotary, given=given: clearspan.boot(given)
    yield "boot(no such folder)", lambda learned, rotary: clearspan.boot(folder / "missing")
    yield "boot(str of no folder)", lambda learned, rotary: clearspan.boot(str(folder / "missing"))
    for name, path in _written_files(folder).items():
        yield f"boot: {name}", lambda learned, rotary, path=path: clearspan.boot(path)
    for name, values in {
        "dtype": ["int32", 3, "nonsense", torch.int32, None],
        "device": DEVICES,
        "tokenizer": ["gpt2", 3, object()],
        "nonsense": [1],
    }.items():
        for value in values:
            for what in ("loaded", "folder"):
                yield (
                    f"boot {what}: {name}={value!r}",
                    lambda learned, rotary, name=name, value=value, what=what: clearspan.boot(
                        build("gpt2") if what == "loaded" else folder / "whole", **{name: value}
                    ),
                )


def _others(folder: Path) -> Cases:
    nowhere = folder / "no" / "such" / "file"
    for path in (nowhere, folder, 3, None, b"file", ""):
        yield (
            f"cache.save({path!r})"[:60],
            lambda learned, rotary, path=path: learned.run_with_cache(IDS)[1].save(path),
        )
        yield (
            f"vector.save({path!r})"[:60],
            lambda learned, rotary, path=path: SteeringVector({"blocks.0.hook_resid_post": torch.ones(48)}).save(path),
        )
    for width in (47, 49, 1, 0):
        vector = SteeringVector({"blocks.0.hook_resid_post": torch.ones(width)}) if width else None
        if vector is not None:
            yield (
                f"steering vector of {width}",
                lambda learned, rotary, vector=vector: learned(IDS, interventions=vector.interventions()),
            )
            yield f"check_fits of {width}", lambda learned, rotary, vector=vector: vector.check_fits(learned)
    for given in (
        *((3,), (None,), ("nonsense",), ("q", -1), ("q", 1.5), ("q", True), ("q", "0"), ("q",), ("scale", 0)),
        *(
            ("q", 0, 3),
            ("q", 0, "nonsense"),
            ("", 0),
            ("scale", 0, "mlp"),
            ("q", NAN),
            ("q", [0]),
            ("pattern", 0, "mlp"),
        ),
    ):
        yield f"get_act_name{given}", lambda learned, rotary, given=given: get_act_name(*given)
    eye = torch.eye(3)
    for a, b in itertools.product(
        (eye, None, 3, "A", [[1.0]], torch.ones(3), eye.bool(), eye.double(), torch.ones(2, 2)), repeat=2
    ):
        kinds = [one.dtype if isinstance(one, torch.Tensor) else None for one in (a, b)]
        if a is not b or kinds[0] in (None, torch.bool) or a.ndim < 2:
            yield f"FactoredMatrix({a!r}, {b!r})"[:70], lambda learned, rotary, a=a, b=b: FactoredMatrix(a, b)
    yield "factors of other batches", lambda learned, rotary: FactoredMatrix(torch.ones(2, 3, 3), torch.ones(4, 3, 3))
    yield "factors of other dtypes", lambda learned, rotary: FactoredMatrix(eye, eye.double()).AB
    yield "factors on other devices", lambda learned, rotary: FactoredMatrix(eye, eye.to("meta"))
    product = FactoredMatrix(torch.ones(2, 3, 3), torch.ones(2, 3, 3))
    for name, wrong in {
        "index": lambda: product[5],
        "index of text": lambda: product["a"],
        "index of a float": lambda: product[1.5],
        "too many": lambda: product[0, 0, 0, 0],
        "row": lambda: product[0, 7],
        "axis": lambda: product.unsqueeze("a"),
        "axis past": lambda: product.unsqueeze(7),
        "@ text": lambda: product @ "a",
        "@ another width": lambda: product @ torch.ones(5),
        "@ a matrix of another width": lambda: product @ torch.ones(5, 2),
        "@ another product": lambda: product @ FactoredMatrix(torch.ones(5, 2), torch.ones(2, 3)),
        "another width @": lambda: torch.ones(5) @ product,
        "* text": lambda: product * "a",
        "* a matrix": lambda: product * torch.ones(3, 3),
        "to nowhere": lambda: product.to("nonsense"),
        "corner": lambda: product.get_corner("a"),
        "negative corner": lambda: product.get_corner(-1),
    }.items():
        yield f"FactoredMatrix {name}", lambda learned, rotary, wrong=wrong: wrong()
    for hook in (None, 3, "hook", lambda: None, lambda value: None, print, lambda a, b, c: None):
        yield (
            f"add_hook({hook!r})"[:40],
            lambda learned, rotary, hook=hook: learned.hook_dict["blocks.0.hook_resid_post"].add_hook(hook),
        )
    for name, values in {
        "dir": ["forward", 3, None, ["fwd"]],
        "is_permanent": ["yes", 3, None],
        "prepend": ["yes", 3, None],
        "name": [3, b"x", ["a"]],
    }.items():
        for value in values:
            yield (
                f"add_hook: {name}={value!r}",
                lambda learned, rotary, name=name, value=value: learned.hook_dict["blocks.0.hook_resid_post"].add_hook(
                    lambda value, hook: None, **{name: value}
                ),
            )
    for given in (
        *((None,), (3,), ("text",), ([[1, 2]],), (torch.ones(2, 3),), (torch.ones(3).long(),), (IDS.bool(),)),
        *((IDS, 3), (IDS, "mask"), (IDS, torch.ones(2, 3))),
        *((IDS, None, torch.ones(2, 4)), (IDS, None, torch.ones(2, 4, 48)), (None, None, torch.ones(2, 4))),
        *((IDS, None, None, torch.ones(2, 4)), (IDS, None, None, None, ("a",)), (IDS, None, None, None, "text")),
        *((IDS, None, None, None, None, "yes"), (torch.ones(0, 3).long(),), (IDS, torch.ones(2, 4) * NAN)),
    ):
        yield f"Batch{given}"[:70].replace("\n", ""), lambda learned, rotary, given=given: Batch(*given)

    for mask in (torch.full((2, 4), 2), torch.zeros(2, 4, dtype=torch.long)):
        yield f"a Batch with a mask of {mask[0]}", lambda learned, rotary, mask=mask: learned(Batch(IDS, mask))
    yield "a Batch past the vocabulary", lambda learned, rotary: learned(Batch(IDS + 97))


def _refused(cases: Cases, learned: TransformerBridge, rotary: TransformerBridge) -> None:
    """Asserts that each case raises an error of the library's own."""
    raw, accepted = [], []
    for what, call in cases:
        try:
            call(learned, rotary)
        except ClearspanError:
            pass
        except Exception as error:  # noqa: BLE001 - all are told at once
            raw.append(f"{what}: {type(error).__name__}: {error}"[:200])
        else:
            accepted.append(what)
    assert (raw, accepted) == ([], [])


def test_no_run_takes_a_wrong_input(learned, rotary):
    _refused(_runs(), learned, rotary)


def test_no_generation_takes_a_wrong_setting(learned, rotary):
    _refused(_generations(), learned, rotary)


def test_nothing_that_is_no_model_boots(learned, rotary, tmp_path):
    _refused(_boots(tmp_path), learned, rotary)


def test_no_constructor_takes_what_it_cannot_use(learned, rotary, tmp_path):
    _refused(_others(tmp_path), learned, rotary)


WORKS = {
    "ids of bytes": lambda k: k(IDS.to(torch.uint8)),
    "ids of 16 bits": lambda k: k(IDS.to(torch.int16)),
    "an array of unsigned 16 bits": lambda k: k(IDS.numpy().astype(np.uint16)),
    "an array of the other order of bytes": lambda k: k(IDS.numpy().astype(">i4")),
    "a reversed view of an array": lambda k: k(np.flip(np.flip(IDS.numpy(), 1).copy(), 1)),
    "lists": lambda k: k(IDS.tolist()),
    "a batch": lambda k: k(Batch(IDS)),
    "a mask in a list": lambda k: k(IDS, attention_mask=[[1] * 4] * 2),
    "a mask of bools": lambda k: k(IDS, attention_mask=torch.ones(2, 4, dtype=torch.bool)),
    "a mask of floats": lambda k: k(IDS, attention_mask=torch.ones(2, 4)),
    "a square mask": lambda k: k(IDS, attention_mask=torch.full((4, 4), -1e30).triu(1)[None, None]),
    "a square mask of bools": lambda k: k(IDS, attention_mask=torch.ones(4, 4, dtype=torch.bool).tril()[None, None]),
    "positions of 32 bits": lambda k: k(IDS, position_ids=torch.arange(4, dtype=torch.int32)[None]),
    "embeddings": lambda k: k(inputs_embeds=k.W_E[IDS]),
}


@pytest.mark.parametrize("what", WORKS)
def test_what_means_the_same_gives_the_same(what, learned):
    torch.testing.assert_close(WORKS[what](learned), learned(IDS))


SETTLED = {
    "a number of numpy's": {"max_new_tokens": np.int64(3)},
    "a number in a tensor": {"max_new_tokens": torch.tensor(3)},
    "the length of all": {"max_length": 7},
    "a config": {"generation_config": GenerationConfig(max_new_tokens=3)},
}


@pytest.mark.parametrize("what", SETTLED)
def test_a_setting_in_another_form_gives_the_same(what, learned):
    plain = learned.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(learned.generate(IDS, do_sample=False, **SETTLED[what]), plain)


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode", "gptj", "mpt", "opt"])
def test_a_generation_fills_the_table_of_positions_and_no_more(family):
    bridge = clearspan.boot(build(family))
    ids = torch.ones(1, TABLE - 4, dtype=torch.long)
    assert bridge.generate(ids, max_new_tokens=5, eos_token_id=None).shape == (1, TABLE + 1)
    for given in ({"max_new_tokens": 6}, {"max_length": TABLE + 2}):
        with pytest.raises(InputError, match="the generation is longer than the model's context") as error:
            bridge.generate(ids, **given)
        assert "fix: max_new_tokens=5" in str(error.value)
    with pytest.raises(InputError, match="the input is longer than the model's context"):
        bridge(torch.ones(1, TABLE + 1, dtype=torch.long))


@pytest.mark.parametrize("family", ["llama", "falcon", "bloom"])
def test_where_positions_are_computed_there_are_more(family):
    bridge = clearspan.boot(build(family))
    ids = torch.ones(1, TABLE - 4, dtype=torch.long)
    assert bridge.generate(ids, max_new_tokens=9, eos_token_id=None).shape == (1, TABLE + 5)


def test_a_dtype_by_name_and_autocast_decide_what_embeddings_may_be(learned):
    assert clearspan.boot(build("gpt2"), dtype="bfloat16").cfg.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert learned(learned.W_E[IDS].bfloat16()).isfinite().all()


def test_what_a_message_says(learned, tmp_path):
    said = {
        "position_ids are not in the model's table of positions\n  expected: 0 to 63\n  got: 0 to 64": lambda: learned(
            IDS, position_ids=torch.tensor([[0, 1, 2, 64]])
        ),
        "unknown keyword 'max_new_token'": lambda: learned.generate(IDS, max_new_token=3),
        "nearest: max_new_tokens": lambda: learned.generate(IDS, max_new_token=3),
        "input cannot be read\n  expected: a dense tensor\n  got: torch.sparse_coo\n  fix: input.to_dense()": lambda: (
            learned(IDS.to_sparse())
        ),
        "expected: the model's dtype, torch.float32\n  got: torch.float64\n  fix: value.to(torch.float32)": lambda: (
            learned(torch.zeros(1, 4, 48).double())
        ),
        "max_new_tokens=1.5\n  expected: a whole number, max_new_tokens >= 1": lambda: learned.generate(
            IDS, max_new_tokens=1.5
        ),
        "device='cuda:99'": lambda: learned.run_with_cache(IDS, device="cuda:99"),
        "position_ids have no effect on this model\n  where: BloomForCausalLM": lambda: clearspan.boot(build("bloom"))(
            IDS, position_ids=torch.arange(4)[None]
        ),
        "to attention as it is\n  expected: torch.float32: 0, or the least number where it hides": lambda: (
            clearspan.boot(build("llama eager"))(IDS, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
        ),
        "no hook point 'pattern' is in 'mlp'\n  expected: 'attn'": lambda: get_act_name("pattern", 0, "mlp"),
        "cannot multiply this on the right of FactoredMatrix([3, 3] through 3": lambda: (
            FactoredMatrix(torch.eye(3), torch.eye(3)) @ torch.ones(5)
        ),
    }
    for text, call in said.items():
        with pytest.raises(ClearspanError) as error:
            call()
        assert text in str(error.value)


def test_a_checkpoint_without_some_weights_names_them(tmp_path):
    damaged = _written_files(tmp_path)
    with pytest.raises(CheckpointError, match="weights are missing from") as error:
        clearspan.boot(damaged["missing tensors"])
    assert "transformer.h.0.attn.c_attn.bias" in str(error.value)
    with pytest.raises(CheckpointError, match="cannot load the weights of") as error:
        clearspan.boot(damaged["truncated"])
    assert "whole files of weights" in str(error.value)
    assert clearspan.boot(tmp_path / "whole").cfg.n_layers == 3


def test_a_loop_over_a_factored_matrix_ends():
    assert len(list(FactoredMatrix(torch.ones(2, 3, 3), torch.ones(2, 3, 3)))) == 2


@pytest.mark.parametrize("width", [47, 49, 1])
def test_a_steering_vector_of_another_width_is_told_what_is_expected(width, learned):
    vector = SteeringVector({"blocks.0.hook_resid_post": torch.ones(width)})
    for call in (lambda: vector.check_fits(learned), lambda: learned(IDS, interventions=vector.interventions())):
        with pytest.raises(ClearspanError) as error:
            call()
        lines = dict(line.strip().split(": ", 1) for line in str(error.value).splitlines() if ": " in line)
        assert "48" in lines["expected"]
        assert str(width) in lines["got"]
