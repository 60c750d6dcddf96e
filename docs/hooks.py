"""For mkdocs: links that leave docs/ (tests, recipes, the README) go to copies in the site.

In the Markdown they are plain relative links, as a code host wants them.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\(([^)#\s:]+)([^)]*)\)")
SOURCE = "source"  # folder of the copies in the site


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to outside docs/, as text."""
    docs = Path(config.docs_dir)
    for file in [each for each in files if each.is_documentation_page()]:
        for target, _ in LINK.findall(Path(file.abs_src_path).read_text()):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(file.src_uri), target))
            outside = docs / path
            if path.startswith("../") and outside.is_file() and not files.get_file_from_path(_copy(path)):
                files.append(File.generated(config, _copy(path), content=outside.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    folder = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if not path.startswith("../"):
            return match[0]
        return f"]({posixpath.relpath(_copy(path), folder or '.')}{match[2]})"

    return LINK.sub(moved, markdown)


def _copy(path: str) -> str:
    return f"{SOURCE}/{path.removeprefix('../')}.txt"
