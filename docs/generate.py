"""Writes what the documents list from the code: architectures, the vocabulary, and which points which architecture has.

python docs/generate.py
"""

import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.zoo import MODELS, build  # noqa: E402 (the tests' models are not installed)

import clearspan  # noqa: E402
from clearspan import TransformerBridge  # noqa: E402
from clearspan.architectures import ADAPTERS  # noqa: E402
from clearspan.architectures.adapter import name_of  # noqa: E402
from clearspan.points import RAW_ENDS, VOCABULARY, Entry  # noqa: E402
from clearspan.verification import Verification  # noqa: E402


def architectures() -> str:
    """Returns the README's list of architectures."""
    served = []
    for name, adapter in sorted(ADAPTERS.items(), key=lambda item: item[0].lower()):
        assert adapter.__doc__, f"{name_of(adapter)} says in its docstring which models it serves"
        served.append(f"{adapter.__doc__.splitlines()[0].rstrip('.')} (`{name}`)")
    return textwrap.fill("; ".join(served) + ".", 120, break_long_words=False, break_on_hyphens=False) + "\n"


def vocabulary() -> str:
    """Returns the table of the names that architectures share."""
    rows = ["| name | axes | value | a write changes |", "|---|---|---|---|"]
    for entry in (*VOCABULARY, *RAW_ENDS):
        name = entry.name.replace("*.", "<component>.")
        rows.append(f"| `{name}` | {' '.join(entry.axes)} | {_sentence(entry.value)} | {_sentence(entry.write)} |")
    return "\n".join(rows) + "\n"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text[0] != "`" else f"{text}."


Verify = Callable[[str], Verification]


def in_full(variant: str) -> Verification:
    """Returns the full verification of a model of the zoo."""
    return clearspan.boot(build(variant)).verify("full")


class Presence:
    """Which points one architecture has, as a full verification of a tiny random model found them.

    Args:
        variant: The model's name in the zoo.
        verify: Gives its full verification.
    """

    def __init__(self, variant: str, verify: Verify) -> None:
        self.bridge: TransformerBridge = clearspan.boot(build(variant))
        self.found = verify(variant)

    @property
    def architecture(self) -> str:
        """Class of the Hugging Face model."""
        return self.bridge.cfg.architecture

    def cell(self, entry: Entry, note: Callable[[str], str]) -> str:
        """Returns a cell of the table: reads and writes as marks, and the number of a reason where a layer lacks it."""
        layers = range(self.bridge.cfg.n_layers)
        names = dict.fromkeys(entry.name.replace("{l}", str(layer)) for layer in layers)
        reasons = dict.fromkeys(reason for name in names if (reason := self.bridge.why_absent(name)) is not None)
        present = [name for name in names if name in self.bridge.hook_dict]
        marks = f"{self._mark('reads', present)}{self._mark('writes', present)}" if present else ""
        return " ".join([*([marks] if marks else []), *(f"[{note(reason)}]" for reason in reasons)])

    def _mark(self, group: str, names: Iterable[str]) -> str:
        held: dict[str, bool] = {}
        for check in self.found.checks:
            if check.group == group:
                name = check.what.partition(",")[0]
                held[name] = held.get(name, True) and check.passed
        canonical = {self.bridge.hook_dict[name].name for name in names}
        return "✓" if all(held.get(name, False) for name in canonical) else "✗"


def points_by_architecture(verify: Verify = in_full) -> str:
    """Returns the table of architectures by points, with the reasons for what is absent."""
    models = {variant: Presence(variant, verify) for variant in MODELS}
    first: dict[str, Presence] = {}
    for presence in models.values():
        first.setdefault(presence.architecture, presence)
    shown = dict(sorted(first.items()))
    reasons: dict[str, str] = {}

    def note(reason: str) -> str:
        return reasons.setdefault(reason, str(len(reasons) + 1))

    titles = [name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") for name in shown]
    rows = [f"| | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for entry in VOCABULARY:
        cells = [presence.cell(entry, note) for presence in shown.values()]
        rows.append(f"| `{entry.name}` | {' | '.join(cells)} |")
    listed = [f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in reasons.items()]
    variants = [
        f"- {variant} (`{presence.architecture}`): "
        + (f"{failed} checks fail" if (failed := len(presence.found.failures)) else "every check holds")
        for variant, presence in models.items()
    ]
    return "\n".join([*rows, "", "Why a point is absent:", "", *listed, "", "Verified in full:", "", *variants]) + "\n"


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"architectures": architectures},
    "docs/hook-points.md": {"vocabulary": vocabulary},
    "docs/points-by-architecture.md": {"points": points_by_architecture},
}
"""Each page's generated parts, which lie between two marks."""


def current(page: str, verify: Verify = in_full) -> str:
    """Returns a page's text with its generated parts made anew."""
    text = (ROOT / page).read_text()
    for part, make in PAGES[page].items():
        marked = re.compile(rf"(<!-- generated:{part} -->\n).*?(<!-- /generated:{part} -->)", re.DOTALL)
        made = points_by_architecture(verify) if make is points_by_architecture else make()
        text = marked.sub(lambda found, made=made: found[1] + made + found[2], text)
    return text


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(current(page))
