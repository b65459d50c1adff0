"""Sessions: a folder in which everything that was finished is kept, one file for each answer.

There is no index: the answers' files are the history, and each is written whole or not at all. So a server that is
killed loses nothing that was finished, and two servers may use one folder.
"""

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import safetensors

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_fields, check_kind
from clearspan.errors import InvalidArgumentError
from clearspan.files import read_tensors, write_tensors, write_text
from clearspan.interventions import Intervention
from clearspan.sweep.experiment import ModelIdentity, versions
from clearspan.workbench.views import Answer, View, parse_view

FORMAT = "clearspan workbench answer 1"
_FINISHED, _BEGUN = "answers", "begun"


@dataclass(frozen=True)
class Entry:
    """One line of the history.

    Attributes:
        view: The request.
        made: When the answer was written: UTC, in ISO 8601.
        seconds: How long it took.
        is_finished: Whether it is all there; what was broken off goes on when it is asked again.
    """

    view: View
    made: str
    seconds: float
    is_finished: bool


@dataclass(frozen=True)
class Chip:
    """An intervention that can be switched off."""

    intervention: Intervention
    is_on: bool = True


@dataclass(frozen=True)
class Desk:
    """What lies on the page: two texts and the interventions.

    Attributes:
        clean: The text.
        corrupted: Another to compare it with; may be empty.
        chips: Interventions, on or off.
    """

    clean: str = ""
    corrupted: str = ""
    chips: tuple[Chip, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        chips = [{"intervention": one.intervention.to_json(), "is_on": one.is_on} for one in self.chips]
        return {"clean": self.clean, "corrupted": self.corrupted, "chips": chips}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Returns it of its plain data.

        Raises:
            InvalidArgumentError: It is something else.
        """
        check_fields("page", data, "clean", "corrupted", "chips")
        check_kind(str, clean=data["clean"], corrupted=data["corrupted"])
        check_kind(list, chips=data["chips"])
        chips = []
        for chip in data["chips"]:
            check_fields("chip", chip, "intervention", "is_on")
            check_kind(bool, is_on=chip["is_on"])
            chips.append(Chip(Intervention.from_json(chip["intervention"]), chip["is_on"]))
        return cls(data["clean"], data["corrupted"], tuple(chips))


def default_folder(identity: ModelIdentity) -> Path:
    """Returns the folder of a model's session: one for each model's weights, in the user's state folder."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    name = "".join(letter if letter.isalnum() else "-" for letter in Path(identity.name).name)
    return Path(home) / "clearspan" / f"{name}-{identity.fingerprint[:12]}"


class Session:
    """A folder of answers of one model.

    Args:
        folder: Where; made if it is not there. By default that of the model's weights.
        bridge: The model. Answers of other weights, or other versions of the libraries, are left alone.
    """

    def __init__(self, folder: Path | None, bridge: TransformerBridge) -> None:
        identity = ModelIdentity.of(bridge)
        self.folder = default_folder(identity) if folder is None else folder
        self._model = json.dumps({**asdict(identity), **versions(), "name": ""}, sort_keys=True)
        for kind in (_FINISHED, _BEGUN):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)

    def key(self, view: View) -> str:
        """Returns a name for a request's answer: a digest of the model's weights, the tokens and the request."""
        request = json.dumps(_without_text(view.to_json()), sort_keys=True)
        return hashlib.blake2b(f"{self._model}\n{request}".encode(), digest_size=16).hexdigest()

    def history(self) -> dict[str, Entry]:
        """Returns what was finished or begun with this model, by key, the oldest first.

        A file that cannot be read is left out, and left alone.
        """
        found = {**dict(self._entries(_BEGUN)), **dict(self._entries(_FINISHED))}
        return dict(sorted(found.items(), key=lambda item: item[1].made))

    def _entries(self, kind: str) -> Iterator[tuple[str, Entry]]:
        for path in (self.folder / kind).glob("[0-9a-f]*.safetensors"):
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    metadata = file.metadata() or {}
                if metadata.get("format") == FORMAT and metadata["model"] == self._model:
                    view, seconds = parse_view(json.loads(metadata["request"])), float(metadata["seconds"])
                    yield path.stem, Entry(view, metadata["made"], seconds, kind == _FINISHED)
            except (OSError, safetensors.SafetensorError, KeyError, ValueError):
                continue

    def content(self, key: str) -> bytes | None:
        """Returns the bytes of an answer: the finished one, else what was begun, else None."""
        for kind in (_FINISHED, _BEGUN, _FINISHED):  # what was begun may be finished meanwhile
            with contextlib.suppress(FileNotFoundError):
                return (self.folder / kind / f"{key}.safetensors").read_bytes()
        return None

    def begun(self, key: str) -> Answer | None:
        """Returns what was kept of a request that was broken off; None where nothing was."""
        path = self.folder / _BEGUN / f"{key}.safetensors"
        if not path.is_file():
            return None
        tensors, metadata = read_tensors(path, FORMAT, what="answer", written_by="the workbench")
        return Answer(json.loads(metadata["facts"]), tensors)

    def keep(self, view: View, answer: Answer, seconds: float, *, is_finished: bool) -> Entry:
        """Writes an answer, all of it or what is there so far."""
        key, made = self.key(view), datetime.datetime.now(datetime.UTC).isoformat()
        metadata = {
            "model": self._model,
            "request": json.dumps(view.to_json()),
            "facts": json.dumps(answer.facts, allow_nan=False),
            "made": made,
            "seconds": str(seconds),
        }
        path = self.folder / (_FINISHED if is_finished else _BEGUN) / f"{key}.safetensors"
        write_tensors(path, FORMAT, answer.tensors, metadata)
        if is_finished:
            (self.folder / _BEGUN / path.name).unlink(missing_ok=True)
        return Entry(view, made, seconds, is_finished)

    @property
    def desk(self) -> Desk:
        """What lay on the page last."""
        path = self.folder / "page.json"
        try:
            return Desk.from_json(json.loads(path.read_text()))
        except (FileNotFoundError, InvalidArgumentError, ValueError):
            return Desk()

    @desk.setter
    def desk(self, desk: Desk) -> None:
        write_text(self.folder / "page.json", json.dumps(desk.to_json()))


def _without_text(request: Any) -> Any:
    """Returns a request without what its prompts were as text: tokens alone are read."""
    match request:
        case {"tokens": tokens, "text": _}:
            return {"tokens": tokens}
        case dict():
            return {name: _without_text(value) for name, value in request.items()}
    return request
