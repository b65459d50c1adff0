import gzip
import hashlib
import re

import pytest

from clearspan.view import scripts
from clearspan.view.scripts import DRAWINGS, VENDOR, packages, script


def test_packages_are_those_that_were_published():
    for package in packages().values():
        content = (VENDOR / package.file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == package.sha256, package.file
        assert f"@{package.version}/" in package.origin


def test_every_file_has_an_entry_and_a_license():
    assert {path.name for path in VENDOR.glob("*.js")} == {package.file for package in packages().values()}
    licenses = VENDOR / "licenses"
    assert {path.name for path in licenses.iterdir()} == {package.license_file for package in packages().values()}
    words = {
        "MIT": "MIT License",
        "ISC": "Permission to use, copy",
        "BSD-3-Clause": "Redistribution",
        "Apache-2.0": "Apache",
    }
    for package in packages().values():
        assert words[package.license] in (licenses / package.license_file).read_text(encoding="utf-8"), package


def test_the_script_is_small_and_holds_all_it_uses():
    text = script(DRAWINGS / "report.js")
    assert len(gzip.compress(text.encode(), 9)) <= 90_000
    asked = set(re.findall(r'\brequire\("([^"]+)"\)', text))
    held = set(re.findall(r'^"([^"]+)"\(require, module, exports\) \{', text, re.MULTILINE))
    assert asked == held
    assert "sourceMappingURL" not in text
    assert "</script" not in text


def test_every_package_is_used():
    text = script(DRAWINGS / "report.js")
    assert all(f'"{name}"(require' in text for name in packages())


@pytest.mark.parametrize(
    "line",
    [
        'import * as d3 from "d3-scale";',
        "export default function draw() {}",
        'export { draw } from "./draw.js";',
        'import "./draw.js";',
    ],
)
def test_forms_that_are_not_read(line, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts, "ROOT", tmp_path)
    (tmp_path / "one.js").write_text(f"const a = 1;\n{line}\n")
    with pytest.raises(SyntaxError, match=r"one\.js: .* is no import or export"):
        script(tmp_path / "one.js")
