"""For mkdocs: the README is its first page, what the pages link to outside docs/ is in the site, mathematics is MathML.

In the Markdown all of this is as a code host wants it: relative links, and blocks of `math`.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\(([^)#\s:]+)([^)]*)\)")
ROOT_PAGES = ("README.md", "CONTRIBUTING.md")


def on_files(files: Files, config: Any) -> Files:
    """Add CONTRIBUTING as a page, and tests, recipes and the like as text."""
    docs = Path(config.docs_dir)
    files.append(File.generated(config, "CONTRIBUTING.md", content=_from_root(docs, "CONTRIBUTING.md")))
    for file in [each for each in files if each.is_documentation_page()]:
        text = _from_root(docs, "README.md") if file.src_uri == "README.md" else ""
        for target, _ in LINK.findall(text + file.content_string):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(file.src_uri), target))
            outside = docs / path
            if path.startswith("../") and outside.is_file() and not files.get_file_from_path(_in_site(path)):
                files.append(File.generated(config, _in_site(path), content=outside.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    folder = posixpath.dirname(page.file.src_uri)
    if page.file.src_uri == "README.md":
        markdown = _from_root(Path(config.docs_dir), "README.md") + "\n## Pages\n\n" + markdown.partition("\n\n")[2]

    def moved(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if not path.startswith("../"):
            return match[0]
        return f"]({posixpath.relpath(_in_site(path), folder or '.')}{match[2]})"

    markdown = re.sub(r"^```math\n(.*?)^```", _mathml, markdown, flags=re.M | re.S)
    return LINK.sub(moved, markdown)


def _from_root(docs: Path, name: str) -> str:
    """A page of the repository's root, with its links as from docs/."""
    text = (docs.parent / name).read_text()
    return LINK.sub(lambda match: f"]({posixpath.relpath(match[1], 'docs')}{match[2]})", text)


def _in_site(path: str) -> str:
    name = path.removeprefix("../")
    return name if name in ROOT_PAGES else f"source/{name}.txt"


def _mathml(match: re.Match[str]) -> str:
    lines = [convert(line, display="block") for line in match[1].splitlines() if line.strip()]
    return f'<div class="math">{"".join(lines)}</div>'
