"""The drawings' modules as one script, which needs no network and no bundler.

A module of ours is an ECMAScript module that uses three forms alone: `import { a, b as c } from "./name.js"`,
`import a from "package"`, and `export` before a `function`, a `class` or a `const`. Here each becomes a function that
runs when another module first asks for it. Packages lie in `drawings/vendor/` as they were published.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DRAWINGS = Path(__file__).parent / "drawings"
VENDOR = DRAWINGS / "vendor"
ROOT = Path(__file__).parents[1]

_NAMED = re.compile(r'^import \{([^}]*)\} from "([^"]+)";$', re.MULTILINE)
_WHOLE = re.compile(r'^import (\w+) from "([^"]+)";$', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?function|class|const) (\w+)", re.MULTILINE)
_OTHER = re.compile(r"^(?:import|export)\b.*", re.MULTILINE)
_ASKED = re.compile(r'\brequire\("([^"]+)"\)')
_SOURCE_MAP = re.compile(r"//# sourceMappingURL=\S+\s*$")

_SCRIPT = """\
"use strict";
(() => {
const sources = {
%(sources)s
};
const modules = {};
function require(name) {
  if (!(name in modules)) {
    const module = modules[name] = { exports: {} };
    sources[name](require, module, module.exports);
  }
  return modules[name].exports;
}
require(%(start)s);
})();
"""


@dataclass(frozen=True)
class Package:
    """A library that the drawings use.

    Attributes:
        name: As modules import it.
        version: As published.
        license: Its identifier.
        license_file: Its text, in `vendor/licenses/`.
        origin: Package, version and path that the file was copied from.
        file: In `vendor/`, as published.
        sha256: Of the file.
    """

    name: str
    version: str
    license: str
    license_file: str
    origin: str
    file: str
    sha256: str


@cache
def packages() -> dict[str, Package]:
    """Returns the packages of `vendor/packages.json`, by name."""
    table = json.loads((VENDOR / "packages.json").read_text(encoding="utf-8"))
    return {name: Package(name, **entry) for name, entry in table.items()}


@cache
def script(start: Path) -> str:
    """Returns one classic script: a module and all that it imports.

    Args:
        start: The module that runs. It may lie in any folder of the library, and import from others.

    Raises:
        SyntaxError: A module imports or exports in a form that is not read here.
        FileNotFoundError: A module imports one that is not there.
    """
    sources: dict[str, str] = {}
    name = _add(start.resolve(), sources)
    written = ",\n".join(f"{json.dumps(key)}(require, module, exports) {{\n{text}\n}}" for key, text in sources.items())
    return _SCRIPT % {"sources": written, "start": json.dumps(name)}


def _add(path: Path, sources: dict[str, str]) -> str:
    """Adds a module, and first what it imports; returns its name in the script."""
    name = path.relative_to(ROOT).as_posix()
    if name not in sources:
        sources[name] = ""  # for modules that import one another
        text = _as_function(path)
        sources[name] = _ASKED.sub(lambda asked: f'require("{_resolved(asked[1], path, sources)}")', text)
    return name


def _resolved(asked: str, by: Path, sources: dict[str, str]) -> str:
    """Returns the name, in the script, of what a module imports, and adds it there."""
    if asked.startswith("."):
        return _add((by.parent / asked).resolve(), sources)
    if asked not in sources:
        text = _SOURCE_MAP.sub("", (VENDOR / packages()[asked].file).read_text(encoding="utf-8"))
        sources[asked] = text
        for needed in _ASKED.findall(text):
            _resolved(needed, by, sources)
    return asked


def _as_function(path: Path) -> str:
    """Returns a module's text with its imports as calls of `require` and its exports kept at the end."""
    text = path.read_text(encoding="utf-8")
    text = _NAMED.sub(lambda found: f'const {{{found[1].replace(" as ", ": ")}}} = require("{found[2]}");', text)
    text = _WHOLE.sub(r'const \1 = require("\2");', text)
    exported = ", ".join(found[2] for found in _EXPORT.finditer(text))
    text = _EXPORT.sub(r"\1 \2", text)
    if other := _OTHER.search(text):
        raise SyntaxError(f"{path.name}: {other[0]!r} is no import or export of the forms that scripts.py reads")
    return f"{text}\nObject.assign(exports, {{ {exported} }});"
