"""`clearspan generate`: what a model writes, plain and steered."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clearspan.cli.endings import misused
from clearspan.cli.inputs import read
from clearspan.cli.models import measured
from clearspan.cli.options import AsJson, File, Model, Text, Tokens, Verbose, utf8
from clearspan.cli.outputs import check_out, deliver, json_of, told

if TYPE_CHECKING:
    from clearspan import TransformerBridge
    from clearspan.analysis import SteeringVector
    from clearspan.interventions import Intervention

_STEER = "POINT:LAYER:FILE:SCALE, as resid_post:2:vector.safetensors:4"
_AT = "POINT or POINT:LAYER, as resid_post:2"


@dataclass(frozen=True)
class _Steering:
    """A vector that is added: one of a file, or the way from one prompt to another.

    Attributes:
        point: Short name of the hook point.
        layer: Its layer; None for the middle one.
        scale: The factor.
        source: A file that `SteeringVector.save` wrote, or the prompts from and to which the vector leads.
    """

    point: str
    layer: int | None
    scale: float
    source: Path | tuple[str, str]

    def vector(self, bridge: "TransformerBridge") -> "SteeringVector":
        """Returns the vector, at its one point."""
        from clearspan.analysis import SteeringVector, fit_steering_vector
        from clearspan.analysis.activations import points_of

        layer = bridge.cfg.n_layers // 2 if self.layer is None else self.layer
        match self.source:
            case Path() as file:
                (name,) = points_of(bridge, self.point, layer)
                return SteeringVector.load(file, bridge).at(name)
            case start, end:
                return fit_steering_vector(bridge, end, start, layers=layer, name=self.point)


@dataclass(frozen=True)
class _Written:
    """What a model wrote behind a prompt.

    Attributes:
        prompt: What was continued.
        plain: What the model adds to it.
        steered: What it adds with the vectors; None without any.
        steerings: The vectors, each with its factor.
    """

    prompt: str
    plain: str
    steered: str | None
    steerings: "tuple[tuple[SteeringVector, float], ...]"

    def to_json(self) -> dict[str, object]:
        """Returns it as plain data."""
        added = [
            {"point": name, "scale": scale, "norm": norm, "made_by": vector.made_by}
            for vector, scale in self.steerings
            for name, norm in vector.norms.items()
        ]
        return {"prompt": self.prompt, "plain": self.plain, "steered": self.steered, "steering": added}


def generate(
    model: Model,
    text: Text = None,
    file: File = None,
    tokens: Tokens = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="How many tokens are added at most.")
    ] = 20,
    steer: Annotated[
        list[str] | None, typer.Option("--steer", help=f"Add a vector that was saved, at all positions: {_STEER}.")
    ] = None,
    steer_from: Annotated[
        str | None,
        typer.Option("--steer-from", callback=utf8, help="Add the way from what the model makes of this text ..."),
    ] = None,
    steer_to: Annotated[
        str | None, typer.Option("--steer-to", callback=utf8, help="... to what it makes of this one.")
    ] = None,
    steer_at: Annotated[
        str, typer.Option("--steer-at", help=f"Where that is read and added: {_AT}; by default the middle layer.")
    ] = "resid_post",
    scale: Annotated[float, typer.Option("--scale", help="How much of that way is added.")] = 1.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the texts (.json), or the vector of --steer-from (.safetensors)."),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt, and continue it once more with the model steered.

    Each token is the likeliest one, so that the texts differ by the steering alone.

    Example: `clearspan generate tiny-bigcode "print(" --steer-from "x = 'a'" --steer-to 'x = "a"' --scale 2`
    """
    given = read(text, file, tokens)
    steerings = [_saved(one) for one in steer or ()]
    if steer_from is not None and steer_to is not None:
        steerings.append(_between(steer_at, scale, steer_from, steer_to))
    elif steer_from is not None or steer_to is not None:
        misused("a vector leads from one text to another", expected="--steer-from and --steer-to")
    check_out(out, "text", [".json", *([".safetensors"] if steer_from is not None and len(steerings) == 1 else [])])
    found = measured(model, lambda bridge: _written(bridge, given, max_new_tokens, steerings), verbose=verbose)
    is_vector = out is not None and out.suffix.lower() == ".safetensors"
    forms = {".json": lambda: json_of(found.to_json())}
    deliver(forms, None if is_vector else out, lambda: _show(found), as_json=as_json)
    if out is not None and is_vector:
        found.steerings[0][0].save(out)
        told(out)


def _saved(steer: str) -> _Steering:
    """Returns the steering that `POINT:LAYER:FILE:SCALE` names."""
    where, _, factor = steer.rpartition(":")
    point, layer, file = (*where.split(":", 2), "", "")[:3]
    if not file or not _is_whole(layer):
        misused(f"--steer {steer}", expected=_STEER)
    if not Path(file).is_file():
        misused(f"--steer {steer}: there is no file {file}", fix="SteeringVector.save, or --out vector.safetensors")
    return _Steering(point, int(layer), _factor("--steer", factor), Path(file))


def _between(steer_at: str, scale: float, start: str, end: str) -> _Steering:
    """Returns the steering from one text to another, at `POINT:LAYER`."""
    point, separator, layer = steer_at.partition(":")
    if separator and not _is_whole(layer):
        misused(f"--steer-at {steer_at}", expected=_AT)
    return _Steering(point, int(layer) if separator else None, _factor("--scale", str(scale)), (start, end))


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _factor(option: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        misused(f"{option}: the scale {text!r} is no number", expected="a number, as 4 or -1.5")
    return found


def _written(
    bridge: "TransformerBridge", given: str | list[int], max_new_tokens: int, steerings: Sequence[_Steering]
) -> _Written:
    ids = bridge.to_batch(given).ids
    vectors = tuple((one.vector(bridge), one.scale) for one in steerings)
    added = [each for vector, scale in vectors for each in vector.interventions(scale)]

    def continued(*interventions: "Intervention") -> str:
        found = bridge.generate(ids, max_new_tokens, interventions=interventions, do_sample=False)
        return _text(bridge, found[0, ids.shape[1] :].tolist())

    prompt = given if isinstance(given, str) else _text(bridge, given)
    return _Written(prompt, continued(), continued(*added) if added else None, vectors)


def _text(bridge: "TransformerBridge", ids: Sequence[int]) -> str:
    """Returns the text of tokens, or their ids where the model has no tokenizer."""
    if bridge.tokenizer is None:
        return " ".join(map(bridge.text.label, ids))
    return str(bridge.to_string(list(ids)))


def _show(found: _Written) -> None:
    from rich.console import Console

    from clearspan.view import show_generations

    texts = {"plain": found.plain}
    if found.steered is not None:
        where = ", ".join(f"{scale:+g} x {' and '.join(vector.names)}" for vector, scale in found.steerings)
        texts[f"steered  {where}"] = found.steered
    show_generations(found.prompt, texts, Console())
