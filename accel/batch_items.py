"""Prompt files: one item for each prompt and seed, with its own arguments and its file name."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shlex
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accel.method import AccelError

NAME_TEMPLATE = "{index:05d}_{seed}_{slug}"
LONGEST_LINE = 65_536
LONGEST_NAME = 120
_FLAGS = {
    "n": ("negative_prompt", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("num_inference_steps", int),
    "l": ("guidance_scale", float),
    "f": ("name", str),
}
"""The inline flags of sd-scripts' prompt files."""
_COLUMNS: dict[str, tuple[str, type]] = {
    "prompt": ("prompt", str),
    "steps": ("num_inference_steps", int),
    "num_frames": ("num_frames", int),
    **{name: (name, kind) for name, kind in _FLAGS.values()},
}
_FIELDS = ("prompt", "seed", "name", "negative_prompt")
_RESERVED = {
    *("con", "prn", "aux", "nul"),
    *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(10)),
}


@dataclass(frozen=True)
class Item:
    """One file to make. `call` are the arguments that differ from the run's own; `take` counts the
    seeds of one prompt; `error` says why the line cannot be used."""

    index: int
    line: int
    prompt: str
    seed: int
    take: int = 0
    negative_prompt: str | None = None
    call: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; `Item(**…)` reads it."""
        return asdict(self)


def read(source: str, seeds: tuple[int, ...] = (), base_seed: int = 0) -> list[Item]:
    """The items of a `.txt`, `.jsonl` or `.csv` file, or of standard input for "-".

    An item's seed is its own, or else one of `seeds` (every prompt with each), or else `base_seed`
    plus its index. Raises `AccelError` when the file cannot be read or holds no prompt; a wrong
    line becomes an item with an error.
    """
    items: list[Item] = []
    for line, content in _lines(source):
        known = {"line": line, "prompt": "", **content}
        own = known.pop("seed", None)
        chosen = [own] if own is not None or not seeds else seeds
        for take, seed in enumerate(chosen):
            index = len(items)
            items.append(
                Item(
                    index=index,
                    seed=base_seed + index if seed is None else seed,
                    take=take,
                    **known,
                )
            )
    if not items:
        raise AccelError(f"prompts {source}: no prompt in it")
    return items


def prompt_lines(file: Path, count: int | None = None) -> list[str]:
    """The first `count` prompts, or all, of a file of one a line; `AccelError` as `read` raises."""
    lines = (line.strip() for line in _text(str(file)).splitlines())
    found = [line for line in lines if line][:count]
    if not found:
        raise AccelError(f"prompts {file}: no prompt in it")
    return found


def seed_list(text: str) -> tuple[int, ...]:
    """ "0-3,7" as (0, 1, 2, 3, 7)."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise AccelError(f"--seeds {text!r}: write numbers and ranges such as 0-3,7")
        seeds += range(int(first), int(last or first) + 1)
    if not seeds or len(set(seeds)) != len(seeds):
        raise AccelError(f"--seeds {text!r}: every seed once, and at least one")
    return tuple(seeds)


def named(items: list[Item], template: str = NAME_TEMPLATE, vbench: bool = False) -> list[Item]:
    """The items with their file names (no suffix); a name that is taken becomes an error.

    `template` may use index, line, seed, take and slug. `vbench`: "PROMPT-TAKE" instead. An item
    with an error takes no file's name: it is called "item INDEX", which no file can be.
    """
    _check_template(template)
    taken: dict[str, int] = {}
    result = []
    for item in items:
        name, error = "", item.error
        try:
            if error is None:
                name = _free_name(item, template, vbench, taken)
        except AccelError as problem:
            error = str(problem)
        result.append(replace(item, name=name or f"item {item.index}", error=error))
    return result


def digest_of(prompts: Sequence[str]) -> str:
    """A mark of a list of prompts."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]


def slug(text: str, longest: int = 60) -> str:
    """Lower-case ASCII words joined by "-", and a mark of the text where other letters were left
    out, so that two prompts of the same ASCII words do not share a name."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    name = "-".join(words)[:longest].rstrip("-")
    if text.strip() and (not words or any(c.isalnum() and not c.isascii() for c in text)):
        name += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name.lstrip("-") or "untitled"


def _free_name(item: Item, template: str, vbench: bool, taken: dict[str, int]) -> str:
    """The item's file name, which it now takes; raises `AccelError` when an earlier one has it."""
    name = _name(item, template, vbench)
    first = taken.setdefault(name.casefold(), item.index)
    if first != item.index:
        raise AccelError(f"line {item.line}: the file name {name!r} is that of item {first} too")
    return name


def _name(item: Item, template: str, vbench: bool) -> str:
    if vbench:
        name = f"{item.prompt}-{item.take}"
        allowed = all(c.isprintable() and c not in '/\\:*?"<>|' for c in name)
    else:
        values = asdict(item) | {"slug": slug(item.prompt)}
        name = item.name if item.name is not None else template.format(**values)
        allowed = all(c.isascii() and (c.isalnum() or c in "._-") for c in name)
    size = len(name.encode())
    reserved = name.split(".")[0].lower() in _RESERVED
    if not allowed or reserved or name[:1] in ("", ".") or size > LONGEST_NAME:
        raise AccelError(
            f"line {item.line}: {name!r} cannot be a file name; accepted: A-Z a-z 0-9 . _ - (with "
            f'--vbench-names all but / \\ : * ? " < > |), at most {LONGEST_NAME} bytes'
        )
    return name


def _check_template(template: str) -> None:
    accepted = ("index", "line", "seed", "take", "slug")
    try:
        used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if not set(used) <= set(accepted):
            raise ValueError(f"unknown field among {', '.join(used)}")
        template.format(index=0, line=1, seed=0, take=0, slug="a")
    except (ValueError, KeyError, IndexError) as error:
        raise AccelError(
            f"--name-template {template!r}: {error}; accepted fields: {', '.join(accepted)}"
        ) from error


def _lines(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and content of every line that is no comment and not empty."""
    text = _text(source)
    suffix = Path(source).suffix.lower()
    if source != "-" and suffix not in (".txt", ".jsonl", ".csv"):
        raise AccelError(f"prompts {source}: accepted are .txt, .jsonl, .csv and - (stdin)")
    if suffix == ".csv":
        try:
            yield from _rows(source, text)
        except csv.Error as error:
            raise AccelError(f"prompts {source}: not CSV ({error})") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        parse = _from_json if suffix == ".jsonl" or (source == "-" and line[0] == "{") else _flags
        yield number, _safely(number, line, parse)


def _rows(source: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    if "prompt" not in (reader.fieldnames or ()):
        raise AccelError(f"prompts {source}: the first line must name a column prompt")
    unknown = sorted(set(reader.fieldnames or ()) - set(_COLUMNS))
    if unknown:
        raise AccelError(
            f"prompts {source}: unknown column {', '.join(unknown)}; accepted: "
            f"{', '.join(sorted(_COLUMNS))}"
        )
    for row in reader:
        filled = {key: value for key, value in row.items() if key and value}
        yield reader.line_num, _safely(reader.line_num, filled, _converted)


def _safely(number: int, content: Any, parse: Any) -> dict[str, Any]:
    try:
        if isinstance(content, str) and (len(content) > LONGEST_LINE or "\0" in content):
            raise ValueError(f"longer than {LONGEST_LINE} characters, or holds a NUL")
        found: dict[str, Any] = parse(content)
        if not found.get("prompt", "").strip():
            raise ValueError("no prompt")
    except (ValueError, RecursionError) as error:
        return {"error": f"line {number}: {error}"}
    return found


def _text(source: str) -> str:
    import sys

    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise AccelError(f"prompts {source}: cannot be read ({error.strerror})") from error
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise AccelError(
            f"prompts {source}: not UTF-8 (line {line}, byte {error.start})"
        ) from error


def _flags(line: str) -> dict[str, Any]:
    """A prompt with sd-scripts' inline flags, such as `a cat --w 512 --d 3 --n blurry`."""
    prompt, *flags = f" {line}".split(" --")
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for text in flags:
        flag, _, value = text.strip().partition(" ")
        if flag not in _FLAGS:
            raise ValueError(f"unknown flag --{flag}; accepted: --{', --'.join(_FLAGS)}")
        value = value.strip()
        quoted = value[:1] in ("'", '"')
        values[_FLAGS[flag][0]] = shlex.split(value)[0] if quoted else value
    return _converted(values)


def _from_json(line: str) -> dict[str, Any]:
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    json.dumps(content, ensure_ascii=False).encode()  # raises for half a surrogate pair
    return _converted(content)


def _converted(content: dict[str, Any]) -> dict[str, Any]:
    """Known fields, checked; what is no field of an item goes into its call."""
    unknown = sorted(set(content) - set(_COLUMNS))
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}; accepted: {', '.join(sorted(_COLUMNS))}")
    found: dict[str, Any] = {"call": {}}
    for key, value in content.items():
        name, kind = _COLUMNS[key]
        converted = _number(key, value, kind) if kind is not str else value
        if not isinstance(converted, kind):
            raise ValueError(f"{key} must be a text")
        (found if name in _FIELDS else found["call"])[name] = converted
    return found


def _number(key: str, value: Any, kind: type) -> Any:
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{key} must be a number, not {value!r}") from error
    least = 0 if key == "seed" or kind is float else 1
    exact = not isinstance(value, bool) and (not isinstance(value, float) or number == value)
    if not exact or not least <= number < 2**63:
        raise ValueError(f"{key} must be at least {least}, not {value!r}")
    return number
