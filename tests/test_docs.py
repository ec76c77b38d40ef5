"""The pages: recipes, quotations, tables of methods and families, and the site that is built."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import BLOCKS, PAGES, ROOT, SKIPPED

import accel
from accel import registry


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "json"], ids=lambda block: block.id
)
def test_json_is_a_recipe(block) -> None:
    accel.Recipe.read(json.loads(block.text))


def sentences() -> str:
    """Every text of the sources, what is filled in written as …."""
    texts = []
    for part in ("accel", "caches", "samplers", "kernels", "pipelines"):
        for file in (ROOT / part).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(re.sub(r"%[srdg]|%\.\d[fg]", "…", node.value))
    return "\n".join(texts)


def test_what_accel_is_said_to_say_is_in_its_source() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r'^accel says: "(.+)"$', page, re.MULTILINE)
    known = re.sub(r"%\.\d[fg]", "…", sentences())
    assert len(quoted) > 10
    assert not [each for each in quoted if each not in known]


def test_every_method_and_family_is_in_the_tables() -> None:
    methods = (ROOT / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    for place in registry.METHODS.values():
        name = place.split(":")[1]
        row = re.search(rf"^\| {name} \|.*\[[\w ]+\]\((\w+\.md)\)", methods, re.MULTILINE)
        assert row is not None, name
        page = (ROOT / "docs" / "methods" / row[1]).read_text(encoding="utf-8")
        assert name in page, f"{row[1]} does not name {name}"
    families = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert not [name for name in registry.FAMILIES if f"| {name}" not in families]


def test_every_reason_is_a_reason() -> None:
    for block in BLOCKS:
        assert block.reason is None or len(block.reason) > 10, block.id
    told = [found for page in PAGES for found in SKIPPED.findall(page.read_text(encoding="utf-8"))]
    assert len(told) == sum(block.reason is not None for block in BLOCKS)


def build_site(folder: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Not `--quiet`: that hides warnings from `--strict` too."""
    pytest.importorskip("material", reason="mkdocs-material is of the extra dev")
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


def test_the_site_builds_without_warnings(tmp_path) -> None:
    done = build_site(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs").with_suffix(".html")
        place = place.parent / "index.html" if page.name == "README.md" else place
        assert (tmp_path / place).is_file(), place
    for page in ("index", "contributing", "changelog"):
        assert (tmp_path / f"{page}.html").is_file()


@pytest.mark.parametrize(
    ("page", "text", "message"),
    [
        ("docs/demo.md", "[x](nothing.md)", "nothing.md"),
        ("docs/demo.md", "[x](recipes.md#nowhere)", "nowhere"),
        ("README.md", "[x](docs/nothing.md)", "nothing.md"),
    ],
)
def test_broken_links_stop_the_build(page, text, message, tmp_path) -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    with (tmp_path / page).open("a") as file:
        file.write(f"\n{text}\n")
    done = build_site(tmp_path / "site", tmp_path)
    assert done.returncode == 1 and message in done.stderr
