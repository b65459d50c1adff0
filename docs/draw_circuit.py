"""The picture on the page about circuits: the circuit is found, and kept with its figures and its drawing.

Run as a script it makes both files anew. The tests draw the picture from the figures, and compute the figures again.
"""

import json
from pathlib import Path
from typing import Any

from clearspan import TransformerBridge, boot
from clearspan.analysis import Circuit, DiscoveredCircuit, RepeatedTokens, discover_circuit, repeated_tokens

FIGURES = Path(__file__).parent / "images/induction-circuit.json"
PICTURE = FIGURES.with_suffix(".svg")


def texts(bridge: TransformerBridge, seed: int = 0) -> tuple[RepeatedTokens, RepeatedTokens]:
    """Returns random tokens that stand twice, and the same with another first copy."""
    text = repeated_tokens(bridge, rows=4, period=8, seed=seed)
    other = repeated_tokens(bridge, rows=4, period=8, seed=seed + 1)
    other.tokens[:, -text.period :] = text.tokens[:, -text.period :]
    return text, other


def found(bridge: TransformerBridge) -> DiscoveredCircuit:
    """Returns the circuit of the page."""
    clean, corrupted = texts(bridge)
    return discover_circuit(bridge, clean.tokens, corrupted.tokens, clean.second_copy_loss, target=0.9)


def figures(circuit: DiscoveredCircuit) -> dict[str, Any]:
    """Returns what is kept of it."""
    return {
        "circuit": json.loads(circuit.circuit.to_json()),
        "faithfulness": round(circuit.faithfulness, 3),
        "completeness": round(circuit.completeness, 3),
        "effects": {edge.name: round(effect, 3) for edge, effect in circuit.effects.items()},
    }


def picture(kept: dict[str, Any]) -> str:
    """Returns the drawing of what was kept."""
    circuit = Circuit.from_json(json.dumps(kept["circuit"]))
    return circuit.to_svg({edge: kept["effects"][edge.name] for edge in circuit})


if __name__ == "__main__":
    FIGURES.parent.mkdir(exist_ok=True)
    kept = figures(found(boot("tiny-bigcode")))
    FIGURES.write_text(json.dumps(kept, indent=1) + "\n")
    PICTURE.write_text(picture(kept))
