"""Whatever is given to a public function: it works, or it raises one of the library's own errors."""

import contextlib
import inspect
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.unit.public_calls import CALLS, METHODS, OWN, Kit, call, functions, methods

from clearspan.errors import ClearspanError

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
WORK = {"k", "rows", "count", "samples", "draws", "controls", "steps", "random_subspaces", "random_labels", "batch_size"}
"""Arguments of which 10 ** 9 is much work, and no mistake."""


@pytest.fixture(scope="module")
def kit(embedded, tmp_path_factory):
    return Kit(embedded.tokenizer, tmp_path_factory.mktemp("arguments"))


@pytest.fixture(autouse=True)
def _files_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(kit, name, argument, wrong):
    """Makes a call with one argument wrong, and does with what it returns what a user would."""
    function, given = call(kit, name)
    kinds = {one.name: one.kind for one in inspect.signature(function).parameters.values()}
    given = {**given, argument: wrong}
    several = [given.pop(one) for one, kind in kinds.items() if kind is inspect.Parameter.VAR_POSITIONAL]
    found = function(*several, **given)
    if isinstance(found, contextlib.AbstractContextManager):
        with found:
            pass
    elif isinstance(found, Iterator):
        list(found)


def arguments_of(function, given):
    """Returns the names of a call's arguments."""
    named = (one.name for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD)
    return [one for one in dict.fromkeys([*named, *given]) if one != "max_new_tokens"]


def test_every_public_callable_is_called_here():
    assert {*functions(), *methods()} - {*CALLS, *METHODS} - OWN == set()
    assert {*METHODS} - methods() == set()


@pytest.mark.parametrize("name", [*CALLS, *METHODS])
def test_the_arguments_of_the_table_work(kit, name):
    function, given = call(kit, name)
    some = next(iter(arguments_of(function, given)), None)
    run(kit, name, some, given[some]) if some in given else run(kit, name, *list(given.items())[0]) if given else None


@pytest.mark.parametrize("name", [*CALLS, *METHODS])
def test_a_wrong_argument_raises_an_error_of_the_librarys_own(kit, name):
    raw = []
    for argument in arguments_of(*call(kit, name)):
        for wrong in WRONG:
            if argument in WORK and wrong is BILLION:
                continue
            import time
            t0 = time.time()
            with open("/tmp/args_now.txt", "w") as f:
                f.write(f"{name} {argument}={wrong!r:.40}")
            try:
                run(kit, name, argument, wrong)
            except ClearspanError:
                pass
            except FileNotFoundError:
                assert argument == "path"
            except Exception as error:  # noqa: BLE001 - all are told at once
                if os.environ.get("WHERE"):
                    import traceback
                    tb=[f for f in traceback.extract_tb(error.__traceback__) if "/src/clearspan/" in f.filename]
                    raw.append(f"{argument}={wrong!r:.30}: {type(error).__name__}: {str(error)[:90]!r} @ {' < '.join(f.filename.split('clearspan/')[-1]+':'+str(f.lineno) for f in tb[::-1][:3])}")
                else: raw.append(f"{argument}={wrong!r}: {type(error).__name__}: {error}"[:200])
            finally:
                if time.time() - t0 > 0.25:
                    with open("/tmp/args_slow.txt", "a") as f:
                        f.write(f"{time.time()-t0:.2f} {name} {argument}={wrong!r:.40}\n")
    assert not raw, "\n".join(raw)
