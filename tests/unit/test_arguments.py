"""Whatever is given to a public function: it works, or it raises one of the library's own errors."""

import contextlib
import inspect
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tests.unit.public_calls import CALLS, GIVEN_BACK, METHODS, OWN, Kit, call, constructors, functions, methods

from clearspan import grid
from clearspan.analysis import bootstrap_interval, lens_readings, singular_readings, steering_sweep
from clearspan.errors import ClearspanError, InvalidArgumentError, TokenRangeError
from clearspan.interventions import Intervention, Patch, Scale, Zero
from clearspan.patching import activation_patching
from clearspan.sweep import LogitDifference, Probability, Sweep

BILLION = 10**9
WRONG = (
    None,
    True,
    0,
    -1,
    2.5,
    BILLION,
    float("nan"),
    "nonsense",
    b"bytes",
    object(),
    [],
    (),
    {},
    [None],
    ["", 3],
    [[]],
    {"a": 1},
    print,
    torch.tensor([]),
    torch.tensor([0.5]),
    torch.ones(1, 2, 3),
    torch.tensor([[10**6]]),
    np.array(["x"]),
    range(0),
)
"""Values of every type that somebody may give by mistake."""
WORK = {
    *("k", "rows", "count", "samples", "draws", "controls", "steps", "random_subspaces", "random_labels", "batch_size"),
    *("n_layers",),
}
"""Arguments of which 10 ** 9 is much work, and no mistake."""
HUGGING_FACE = {"max_new_tokens"}
"""Arguments that go to the model's own code as they are."""
NO_BRIDGE = {"analysis.draw_interchanges", "circuits.Circuit"}
"""Callables of which `model` is something else."""


WORDS = {
    "input": ("text", "token", "embeddings", "ids", "row"),
    "texts": ("token", "embeddings", "ids"),
    "data": ("intervention", "action", "json", "effects"),
    "text": ("circuit", "experiment", "json", "token"),
    "what": ("action", "point"),
    "answered": ("answer",),
    "resid": ("stream",),
    "names_filter": ("hook point",),
    "name_filter": ("hook point",),
    "clean": ("the two inputs",),
    "clean_cache": ("the source 'clean'", "sources, 'clean'", "the source run 'clean'"),
    "corrupted_tokens": ("the run that is changed",),
    "values": ("rows",),
    "differences": ("rows",),
    "early": ("position",),
    "late": ("position",),
    "edges": ("node",),
    "senders": ("node",),
    "receivers": ("node",),
    "grid": ("intervention", "cells"),
    "background": ("intervention",),
    "interventions": ("cells",),
    "by": ("axes",),
    "sizes": ("edges",),
    "base": ("the input '",),
    "source": ("the input '",),
    "setting": ("the input '",),
    "correct": ("text",),
    "incorrect": ("text",),
    "share": ("quantile",),
    "path": ("effects", "experiment"),
    "logits": ("vocabulary",),
    "saes": ("autoencoder",),
}
"""What messages call an argument, where it has no name of its own there: the only one of its kind in the call."""


def is_named(message, argument, wrong):
    """Whether a message says which argument it is about: by its name or the last word of it, or by the value."""
    words = {argument, argument.rstrip("s"), argument.replace("_", " ").strip(), argument.split("_")[-1].rstrip("s")}
    said = {
        repr(wrong)[:12],
        str(wrong)[:12],
        type(wrong).__name__,
        *(str(list(wrong.shape)) for _ in [0] if hasattr(wrong, "shape")),
    }
    if isinstance(wrong, list | tuple | set | range | torch.Tensor | np.ndarray):  # one of its values
        said |= {repr(one)[:12] for one in wrong}
    return any(one and one in message for one in {*words, *WORDS.get(argument, ()), *said})


@pytest.fixture(scope="module")
def kit(embedded, tmp_path_factory):
    return Kit(embedded.tokenizer, tmp_path_factory.mktemp("arguments"))


@pytest.fixture(autouse=True)
def _files_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def used(function, given):
    """Makes a call, and does with what it returns what a user would."""
    kinds = {one.name: one.kind for one in inspect.signature(function).parameters.values()}
    several = [given[one] for one, kind in kinds.items() if kind is inspect.Parameter.VAR_POSITIONAL and one in given]
    named = {name: value for name, value in given.items() if kinds.get(name) is not inspect.Parameter.VAR_POSITIONAL}
    found = function(*several, **named)
    if isinstance(found, contextlib.AbstractContextManager):
        with found:
            pass
    elif isinstance(found, Iterator):
        list(found)


def arguments_of(function, given):
    """Returns the names of a call's arguments."""
    named = (one.name for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD)
    return [one for one in dict.fromkeys([*named, *given]) if one not in HUGGING_FACE]


def test_every_public_callable_is_in_the_table():
    assert (functions() | constructors() | methods()) - OWN == {*CALLS, *METHODS, *GIVEN_BACK}


@pytest.mark.parametrize("name", [*CALLS, *METHODS])
def test_the_arguments_of_the_table_work(kit, name):
    called, drawn = call(kit, name), torch.get_rng_state()
    used(*called)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CALLS, *METHODS])
def test_a_wrong_argument_raises_an_error_of_the_librarys_own_that_names_it(kit, name):
    raw, unnamed = [], []
    for argument in arguments_of(*call(kit, name)):
        for wrong in WRONG:
            if argument in WORK and wrong is BILLION:
                continue
            function, given = call(kit, name)
            try:
                used(function, {**given, argument: wrong})
            except ClearspanError as error:
                if not is_named(str(error), argument, wrong):
                    unnamed.append(f"{argument}={wrong!r}: {error}"[:200])
            except FileNotFoundError:
                assert argument == "path"
            except Exception as error:  # noqa: BLE001 - all are told at once
                raw.append(f"{argument}={wrong!r}: {type(error).__name__}: {error}"[:200])
    assert not raw, "\n".join(raw)
    assert not unnamed, "\n".join(unnamed)


@pytest.mark.parametrize("name", [*CALLS, *METHODS])
def test_a_model_in_place_of_a_bridge_is_named(kit, name):
    function, given = call(kit, name)
    bridges = {"bridge"} if name in NO_BRIDGE else {"bridge", "model"}
    for argument in bridges & {*arguments_of(function, given)}:
        for wrong in (kit.bridge.hf_model, None, "gpt2", object()):
            with pytest.raises(InvalidArgumentError, match="this needs a bridge") as error:
                used(function, {**given, argument: wrong})
            assert f"got: {type(wrong).__name__}\n" in str(error.value)
            assert "fix: bridge = clearspan.boot(model)" in str(error.value)


ONE = np.int64(1)
RIGHT = {
    "a layer of numpy's": lambda k: Intervention("z", Zero(), layer=ONE) == Intervention("z", Zero(), layer=1),
    "a layer in a tensor": lambda k: Patch(layer=torch.tensor(1)) == Patch(layer=1),
    "a factor of numpy's": lambda k: Scale(np.float32(2)) == Scale(torch.tensor(2.0)) == Scale(2.0),
    "one intervention": lambda k: torch.equal(
        k.bridge("import os", interventions=k.zero), k.bridge("import os", interventions=[k.zero])
    ),
    "tokens in tensors": lambda k: LogitDifference(np.int64(3), torch.tensor([5])) == LogitDifference(3, (5,)),
    "one axis": lambda k: list(activation_patching(**k.pair, by="layer", progress=False).axes) == ["layer"],
    "one layer": lambda k: activation_patching(**k.pair, layer=0, progress=False).axes["layer"] == (0,),
    "one place": lambda k: grid("z", Zero(), layer=0, head=ONE) == grid("z", Zero(), layer=[0], head=range(1, 2)),
    "a look-up by numpy's": lambda k: torch.equal(k.cache["z", ONE], k.cache["z", 1]),
    "a position of numpy's": lambda k: torch.equal(k.cache.apply_slice_to_pos_dim(ONE)["z", 0], k.cache["z", 0][:, 1]),
    "positions in an array": lambda k: torch.equal(
        k.cache.apply_slice_to_pos_dim(np.array([0, 2]))["z", 0], k.cache["z", 0][:, [0, 2]]
    ),
    "positions as tensors": lambda k: (
        lens_readings(k.bridge, "x", positions=[torch.tensor(1), ONE]).places[0] == (0, 1)
    ),
    "places in an array": lambda k: torch.equal(
        k.effects.select(layer=ONE, head=np.array([0])).of(), k.effects.select(layer=1, head=[0]).of()
    ),
    "a head of numpy's": lambda k: singular_readings(k.bridge, "OV", layer=ONE, head=ONE).head == 1,
    "ids in an array": lambda k: k.bridge.to_string(np.array([5, 6])) == k.bridge.to_string([5, 6]),
    "ids in a list": lambda k: k.bridge.to_str_tokens([5, 6]) == k.bridge.to_str_tokens(torch.tensor([5, 6])),
    "texts in a tuple": lambda k: torch.equal(k.bridge.to_tokens(("a", "b")), k.bridge.to_tokens(["a", "b"])),
    "one strength": lambda k: (
        steering_sweep(k.bridge, k.vector, "x", k.metric, strengths=0.5, controls=0, progress=False).axes["strength"]
        == (0.5,)
    ),
    "values in a list": lambda k: bootstrap_interval([1.0, 2.0, 3.0]).mean == 2,
}


@pytest.mark.parametrize("what", RIGHT)
def test_what_can_only_mean_one_thing_works(kit, what):
    assert RIGHT[what](kit)


@pytest.mark.parametrize("metric", [LogitDifference(10**6), LogitDifference(-1), Probability(10**6)])
def test_a_metric_of_a_token_that_is_not_there_raises(kit, metric):
    with pytest.raises(TokenRangeError, match="outside the vocabulary"):
        metric(kit.logits)
    with pytest.raises(TokenRangeError, match="outside the vocabulary"):
        Sweep(kit.bridge, "import os", {"zero": kit.zero}, metric).run(progress=False)
