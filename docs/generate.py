"""Writes what the documents list from the code: the README's table of architectures.

python docs/generate.py
"""

import re
from pathlib import Path

from clearspan.architectures import ADAPTERS

README = Path(__file__).parents[1] / "README.md"
MARKED = re.compile(r"(<!-- generated:architectures -->\n).*?(<!-- /generated:architectures -->)", re.DOTALL)


def with_architectures(readme: str) -> str:
    """Returns the README's text with its table of architectures made anew."""
    rows = ["| Hugging Face class | Adapter | Models |", "|---|---|---|"]
    for name, adapter in sorted(ADAPTERS.items()):
        assert adapter.__doc__, f"{adapter.__name__} says in its docstring which models it serves"
        rows.append(f"| `{name}` | `{adapter.__name__}` | {adapter.__doc__.splitlines()[0]} |")
    table = "\n".join(rows) + "\n"
    return MARKED.sub(lambda found: found[1] + table + found[2], readme)


if __name__ == "__main__":
    README.write_text(with_architectures(README.read_text()))
