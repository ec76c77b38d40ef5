"""The code that stands in the documentation: blocks, spans and commands.

A block that cannot run says why in a comment above it: `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SKIPPED = re.compile(r"<!-- not run: (.+) -->")
PROGRAMS = ("accel", "python", "pip", "pytest", "nox", "bash", "torchrun", "mkdocs")
STAND_IN = re.compile(r"…|\b[A-Z][A-Z_]+\b")
"""What a reader has to replace."""


@dataclass(frozen=True)
class Block:
    """A piece of code: its page, line, language ("" is a terminal's) and why it is not run."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Fenced and indented blocks of a page."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").split("\n")
    number, reason, before = 0, None, ""
    while number < len(lines):
        line, start = lines[number], number
        fence = re.fullmatch(r"\s*```(\w*)", line)
        indented = line.startswith("    ") and not before.strip()
        if fence or indented:
            number += bool(fence)
            body = []
            while number < len(lines) and _goes_on(lines[number], bool(fence)):
                body.append(lines[number])
                number += 1
            number += bool(fence)
            text = inspect.cleandoc("\n" + "\n".join(body)).rstrip()
            language = fence[1] if fence else _guessed(text)
            kind = "" if language in ("sh", "bash", "console") else language
            found.append(Block(page, start + 1, kind, text, reason))
            reason, before = None, ""
            continue
        if line.strip():
            told = SKIPPED.fullmatch(line.strip())
            reason = told[1] if told else None
        before = line
        number += 1
    return found


def _goes_on(line: str, fenced: bool) -> bool:
    return not line.lstrip().startswith("```") if fenced else line.startswith("    ") or not line


def _guessed(text: str) -> str:
    return "" if text.split(maxsplit=1)[0] in PROGRAMS else "python"


def spans(page: Path) -> list[str]:
    """Code within the sentences of a page."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    return [text.replace("\n", " ") for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


BLOCKS = [block for page in PAGES for block in blocks(page)]
TYPED = [block for block in BLOCKS if block.language == ""]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def typed(block: Block) -> list[str]:
    """The single commands of a terminal's block."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s&&\s", re.sub(r"\s+#.*$", "", line)):
            if part.strip().split(" ")[0] in PROGRAMS:
                commands.append(part.strip())
    return commands


def commands() -> list[tuple[str, str]]:
    """(where, command) of everything that the documentation tells people to type."""
    found = [(block.id, command) for block in TYPED for command in typed(block)]
    for page in PAGES:
        where = str(page.relative_to(ROOT))
        found += [(where, span) for span in spans(page) if span.split(" ")[0] in PROGRAMS]
    return found
