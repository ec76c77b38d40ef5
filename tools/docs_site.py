"""What `mkdocs build` adds: pages that lie outside docs/, and the rest of the navigation.

Links are written as they must be in the repository; those to README, CONTRIBUTING and CHANGELOG are
turned to their pages of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
PICTURES = {
    f"zoo/{file.parent.name}/{file.name}": f"img/{file.parent.name}.png"
    for file in ROOT.glob("zoo/*/contact_sheet.png")
}
LINK = re.compile(r"(\]\()([^)#:\s]+)([^)]*\))")


def on_config(config: Any) -> Any:
    """Name the pages that mkdocs.yml does not: every method, then what is left."""
    docs = Path(config.docs_dir)
    named = set(re.findall(r"[\w/-]+\.md", str(config.nav)))
    pages = {file.relative_to(docs).as_posix() for file in docs.rglob("*.md")}
    methods = sorted(page for page in pages if page.startswith("methods/"))
    methods.sort(key=lambda page: page != "methods/README.md")
    config.nav.insert(2, {"Methods": methods})
    others = sorted(pages - named - set(methods)) + [OUTSIDE[name] for name in list(OUTSIDE)[1:]]
    config.nav.append({"More": others})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures that lie outside docs/."""
    from mkdocs.structure.files import File

    for name, page in OUTSIDE.items():
        content = _turned((ROOT / name).read_text(encoding="utf-8"), "")
        files.append(File.generated(config, page, content=content))
    for name, picture in PICTURES.items():
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links of a page of docs/."""
    if page.file.src_uri in OUTSIDE.values():
        return markdown
    return _turned(markdown, posixpath.join("docs", page.file.src_uri))


def _turned(markdown: str, source: str) -> str:
    """`markdown` of the file `source`, with links between docs/ and what lies outside of it."""
    here = posixpath.dirname(source)
    site_here = posixpath.relpath(here, "docs") if here else "."

    def turn(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, link[2]))
        if (ROOT / target).is_dir() and (ROOT / target / "README.md").is_file() and target != ".":
            target = posixpath.join(target, "README.md")
        if target in OUTSIDE or target in PICTURES:
            target = {**OUTSIDE, **PICTURES}[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            return link[0]
        return link[1] + posixpath.relpath(target, site_here) + link[3]

    return LINK.sub(turn, markdown)
