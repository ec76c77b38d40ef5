"""The Python that the documentation shows names what exists, and runs on the zoo."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import re

import pytest
from doc_blocks import PAGES, PYTHON, ROOT, spans

import accel
from accel import model_zoo, registry


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
    """With `pipe` and `prompts` of the zoo where the block makes none; eight steps, few frames."""
    monkeypatch.chdir(tmp_path)
    name = "emoji-unet" if re.search("unet|stream", block.text.lower()) else "emoji-video"
    pipe, call, _ = model_zoo.load(name)
    call |= {"num_frames": 9} if "num_frames" in call else {}  # the shortest it was trained at
    texts = model_zoo.prompts(name, "heldout").read_text(encoding="utf-8").splitlines()
    given = {"accel": accel, "pipe": pipe, "call": call, "prompts": texts[:1]}
    short = re.sub(r'(num_inference_steps"\]?( =|:) )\d+', r"\g<1>8", block.text)
    exec(compile(short, block.id, "exec"), given)
