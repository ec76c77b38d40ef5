"""What the documentation tells people to type exists, and what runs on the zoo is run.

A block that cannot run says why in a comment above it: `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main

import accel
from accel import cli, generate, model_zoo, registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SKIPPED = re.compile(r"<!-- not run: (.+) -->")
PROGRAMS = ("accel", "python", "pip", "pytest", "nox", "bash", "torchrun", "mkdocs")
STAND_IN = re.compile(r"…|\b[A-Z][A-Z_]+\b")
"""What a reader has to replace."""
FEW = {
    "generate": ["--steps", "4"],
    "batch": ["--steps", "2"],
    "bench": ["--steps", "6", "--num-prompts", "1", "--repeats", "1", "--methods", "plaincycle"],
    "calibrate": ["--steps", "8", "--num-prompts", "1", "--budget", "0"],
}
"""Options that make a command of the documentation short."""
REAL_RUNS = {"generate", "batch", "bench", "calibrate", "recipe", "doctor"}


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


# --- the command line ----------------------------------------------------------------------------


def parse(command: str) -> dict[str, object]:
    """The arguments that accel's own parser reads in a command; none for `--help`."""
    words = shlex.split(command)[1:]
    group = typer.main.get_command(cli.app)
    context = group.make_context("accel", words)
    while hasattr(group, "commands"):
        rest = [*context._protected_args, *context.args]
        name, group, rest = group.resolve_command(context, rest)
        try:
            context = group.make_context(name, rest, parent=context)
        except typer.Exit:
            return {}
    return context.params


def _leaf(words: list[str]):
    """The (sub)command that the first words name."""
    group = typer.main.get_command(cli.app)
    for word in words:
        if not hasattr(group, "commands"):
            break
        group = group.commands[word]
    return group


def check(command: str, sentence: bool = False) -> None:
    """Raise when accel would not take a command; in a `sentence` it may leave options out."""
    words = shlex.split(command)[1:]
    if all(re.fullmatch(r"[a-z]+", word) for word in words):
        assert _leaf(words)
        return
    try:
        given = parse(re.sub(r"\bN\b", "1", command.replace("…", "")))
    except Exception as error:
        if not (sentence and "Missing parameter" in str(error)):
            raise
        options = {flag for each in _leaf(words).params for flag in each.opts + each.secondary_opts}
        assert {word for word in words if word.startswith("-")} <= options, command
        return
    if given.get("method") or given.get("settings"):
        settings = cli._pairs(given.get("settings") or [])
        generate.methods(list(given.get("method") or []), settings, None)
    if given.get("methods") not in (None, "all"):
        for name in given["methods"].split(","):
            registry.method(name)
    models = given.get("model") or ""
    for model in [models] if isinstance(models, str) else models:
        if model.startswith("zoo:"):
            model_zoo.path(model.removeprefix("zoo:"))


ACCEL = sorted({(where, each) for where, each in commands() if each.startswith("accel ")})


@pytest.mark.parametrize(("where", "command"), ACCEL, ids=[f"{a}:{b[:40]}" for a, b in ACCEL])
def test_commands_are_taken_by_the_command_line(where, command) -> None:
    check(command, sentence=":" not in where)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("generat -m zoo:emoji-video", "No such command 'generat'"),
        ("bench --models zoo:emoji-video -o x.json", "No such option: --models"),
        ("generate -m zoo:emoji-film -p x", "unknown zoo model 'emoji-film'"),
        ("generate -m zoo:emoji-video -p x --steps many", "valid integer"),
        ("generate -m zoo:emoji-video", "Missing parameter: prompt"),
        ("generate -m zoo:emoji-video -p x --method nocache", "unknown method"),
        ("generate -m zoo:emoji-video -p x --method teacache --set treshold=1", "treshold"),
        ("bench -m zoo:emoji-video -o x.json --methods plaincyle", "unknown method"),
        ("recipe shw zoo:emoji-video", "No such command 'shw'"),
    ],
)
def test_wrong_commands_are_found(wrong, message) -> None:
    with pytest.raises(Exception, match=re.escape(message)):
        check(f"accel {wrong}")


def test_other_programs_are_given_files_and_modules_that_exist() -> None:
    for where, command in commands():
        words = command.split()
        if words[0] == "python" and words[1] == "-m" and words[2] not in ("venv", "build"):
            name = words[2].split("[")[0]
            assert importlib.util.find_spec(name), f"{where}: {command}"
        elif words[0] in ("python", "bash") and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), f"{where}: {command}"
        elif words[0] == "pytest":
            for word in words[1:]:
                assert not word.startswith("tests") or (ROOT / word).exists(), f"{where}: {command}"


def runs_on_the_zoo() -> list[tuple[str, str]]:
    """Commands of blocks that need nothing but the zoo."""
    found = []
    for block in TYPED:
        for command in typed(block):
            words = shlex.split(command)
            real = words[0] == "accel" and words[1] in REAL_RUNS
            if real and block.reason is None and not STAND_IN.search(command):
                found.append((block.id, command))
    return list({command: (where, command) for where, command in found}.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "command"), runs_on_the_zoo(), ids=[f"{a}:{b[:30]}" for a, b in runs_on_the_zoo()]
)
def test_commands_run_on_the_zoo(where, command, tmp_path) -> None:
    words = [word for word in shlex.split(command)[1:] if word != "--peers"]
    (tmp_path / "zoo").symlink_to(model_zoo.folder())
    words += FEW.get(words[0], [])
    done = subprocess.run(
        [sys.executable, "-m", "accel", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    unmet = words[0] == "calibrate" and "was not reached" in done.stderr  # eight steps are few
    assert done.returncode == 0 or unmet, done.stderr[-2000:]
    if "-o" in words:
        assert (tmp_path / words[words.index("-o") + 1]).exists()


def test_blocks_that_are_not_run_say_why() -> None:
    run = {command for _, command in runs_on_the_zoo()}
    for block in TYPED:
        ours = [command for command in typed(block) if command.startswith("accel ")]
        assert set(ours) <= run or block.reason is not None, f"{block.id}: {ours}"


def test_what_is_run_is_not_nothing() -> None:
    kinds = {shlex.split(command)[1] for _, command in runs_on_the_zoo()}
    assert {"generate", "bench", "calibrate", "recipe", "batch"} <= kinds


# --- Python --------------------------------------------------------------------------------------


def known_names() -> dict[str, object]:
    """What a reader has who did `from accel import *`, and the package itself."""
    return {name: getattr(accel, name) for name in accel.__all__} | {"accel": accel}


def examine(tree: ast.Module) -> None:
    """Raise unless the imports, attributes, settings and keywords of accel in `tree` exist."""
    names = known_names() | imports(tree)
    own = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names = {name: value for name, value in names.items() if name not in own}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _root(node) == "accel":
            _evaluate(node, names)
        elif isinstance(node, ast.Call):
            _examine_call(node, names)


def imports(tree: ast.Module) -> dict[str, object]:
    """What the imports of a block make known; they are really made."""
    names: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                names[alias.asname or alias.name] = module
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = _member(node.module or "", alias.name)
    return names


def _member(module: str, name: str) -> object:
    found = getattr(importlib.import_module(module), name, None)
    return importlib.import_module(f"{module}.{name}") if found is None else found


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _evaluate(node: ast.expr, names: dict[str, object]) -> object:
    if isinstance(node, ast.Attribute) and _root(node.value) == "accel":
        with contextlib.suppress(ImportError):
            importlib.import_module(ast.unparse(node))
    return eval(compile(ast.Expression(node), "documentation", "eval"), dict(names))


def _examine_call(node: ast.Call, names: dict[str, object]) -> None:
    """Settings of methods are made; keywords of our functions are compared with their names."""
    if _root(node.func) not in names:
        return
    called = _evaluate(node.func, names)
    if not getattr(called, "__module__", "").startswith("accel"):
        return
    if dataclasses.is_dataclass(called) and not _is_open(node, names):
        _evaluate(node, names)
        return
    accepted = inspect.signature(called).parameters  # type: ignore[arg-type]
    options = any(each.kind is each.VAR_KEYWORD for each in accepted.values())
    for keyword in node.keywords:
        known = accepted if not options else inspect.signature(accel.patch).parameters
        assert keyword.arg is None or keyword.arg in known, f"{ast.unparse(node)}: {keyword.arg}"


def _is_open(node: ast.expr, names: dict[str, object]) -> bool:
    """Whether a reader's own variables occur in it."""
    inside = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return bool(inside - names.keys()) or "..." in ast.unparse(node)


@pytest.mark.parametrize("block", PYTHON, ids=[block.id for block in PYTHON])
def test_python_names_what_exists(block) -> None:
    examine(ast.parse(block.text))


@pytest.mark.parametrize(
    "wrong",
    [
        "accel.path(pipe)",
        "from accel.stream_session import Sesion",
        "import accel.caches.magcache",
        "accel.patch(pipe, accel.TeaCache(treshold=0.2))",
        "accel.patch(pipe, accel.TeaCache(threshold=-1))",
        "accel.patch(pipe, speed=2)",
        "with accel.patched(pipe, gaurd=True): pass",
    ],
)
def test_wrong_python_is_found(wrong) -> None:
    with pytest.raises((AttributeError, ImportError, TypeError, AssertionError, ValueError)):
        examine(ast.parse(wrong))


def named_methods() -> list[tuple[str, str]]:
    """(page, code) of the settings of methods that stand in sentences and tables."""
    classes = [place.split(":")[1] for place in registry.METHODS.values()]
    begins = re.compile(rf"(accel\.)?({'|'.join(classes)}|patch|patched|calibrate|profile)\(.*\)")
    return sorted(
        {
            (str(page.relative_to(ROOT)), span)
            for page in PAGES
            for span in spans(page)
            if begins.fullmatch(span) and "…" not in span
        }
    )


def test_settings_in_sentences_can_be_made() -> None:
    """Shorthand such as `TaylorSeer(7, lite)`, with a setting's bare name, is not code."""
    wrong = []
    for page, span in named_methods():
        try:
            examine(ast.parse(span))
        except SyntaxError:
            wrong.append(f"{page}: {span}: not Python")
        except Exception as error:
            wrong.append(f"{page}: {span}: {error}")
    assert not wrong, "\n".join(wrong)
    assert len(named_methods()) > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [b for b in PYTHON if b.reason is None], ids=lambda block: block.id
)
def test_python_runs_on_the_zoo(block, tmp_path, monkeypatch) -> None:
    """With a `pipe` and `prompts` of the zoo where the block makes none itself, and eight steps."""
    monkeypatch.chdir(tmp_path)
    name = "emoji-unet" if re.search("unet|stream", block.text.lower()) else "emoji-video"
    pipe, call, _ = model_zoo.load(name)
    texts = model_zoo.prompts(name, "heldout").read_text(encoding="utf-8").splitlines()
    given = {"accel": accel, "pipe": pipe, "call": call, "prompts": texts[:1]}
    short = re.sub(r'(num_inference_steps"\]?( =|:) )\d+', r"\g<1>8", block.text)
    exec(compile(short, block.id, "exec"), given)


# --- recipes and quotations ----------------------------------------------------------------------


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
