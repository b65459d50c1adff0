"""What the site of these pages needs beside them: pages that lie elsewhere in the repository, and the lists of folders.

mkdocs calls the functions that begin with `on_`; `mkdocs.yml` names this file.
"""

import posixpath
import re
from collections.abc import Iterator
from doctest import DocTestParser, Example
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ELSEWHERE = "repository"
"""The folder of the site for pages from outside `docs/`."""
_FENCE = re.compile(r"^```python\n(.*?)^```\n", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^):#\s]+)(?P<place>#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of a folder in the folder's place in the navigation."""
    config.nav = [{title: _in_folder(there) for title, there in entry.items()} for entry in config.nav or ()]
    return config


def _in_folder(entry: Any) -> Any:
    folder = ROOT / "docs" / entry if isinstance(entry, str) else ROOT / "none"
    return sorted(f"{entry}/{page.name}" for page in folder.glob("*.md")) if folder.is_dir() else entry


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from elsewhere in the repository that pages link to, and those that these link to."""
    waiting = [page for page in files.documentation_pages() if page.src_uri.endswith(".md")]
    while waiting:
        page = waiting.pop()
        for source in _linked(page.src_uri, page.content_string):
            added = _on_site(source)
            if source.endswith(".md") and (ROOT / source).is_file() and files.get_file_from_path(added) is None:
                there, level = str(ROOT / source), InclusionLevel.NOT_IN_NAV
                waiting.append(File.generated(config, added, abs_src_path=there, inclusion=level))
                files.append(waiting[-1])
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Has links lead to where pages are on the site, and examples without prompts, as they are copied.

    A link to what is not there becomes its text.
    """

    def moved(link: re.Match[str]) -> str:
        target = _on_site(_source(page.file.src_uri, link["target"]))
        if files.get_file_from_path(target) is None:
            return link["text"]
        way = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"[{link['text']}]({way}{link['place'] or ''})"

    return _LINK.sub(moved, _FENCE.sub(lambda fence: _unprompted(fence[1]) or fence[0], markdown))


def _unprompted(block: str) -> str:
    """Returns code that stands after prompts without them, in one block up to each output, which has a block too."""
    found, code = "", ""
    for example in DocTestParser().parse(block):
        if isinstance(example, Example):
            code += example.source
            if example.want or example.exc_msg:
                found, code = f"{found}```python\n{code}```\n\n```text\n{example.want}```\n\n", ""
    return found + (f"```python\n{code}```\n" if code else "")


def _linked(page: str, markdown: str) -> Iterator[str]:
    """Yields the files that a page links to, from the root of the repository."""
    return (_source(page, link["target"]) for link in _LINK.finditer(markdown))


def _source(page: str, target: str) -> str:
    """Returns the file that a link of a page means, from the root of the repository."""
    own = page.removeprefix(f"{ELSEWHERE}/") if page.startswith(f"{ELSEWHERE}/") else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(own), target))


def _on_site(source: str) -> str:
    """Returns where a file of the repository is on the site."""
    return source.removeprefix("docs/") if source.startswith("docs/") else f"{ELSEWHERE}/{source}"
