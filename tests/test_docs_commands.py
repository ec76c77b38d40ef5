"""The commands that the documentation tells people to type: known to the parser, and run."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import signal
import sys

import pytest
import typer.main
from doc_blocks import ROOT, STAND_IN, TYPED, commands, typed

from accel import cli, generate, model_zoo, registry

FEW = {
    "generate": ["--steps", "4"],
    "batch": ["--steps", "2"],
    "bench": ["--steps", "6", "--num-prompts", "1", "--repeats", "1", "--methods", "plaincycle"],
    "calibrate": ["--steps", "8", "--num-prompts", "1", "--budget", "0"],
}
"""Options that make a command of the documentation short."""
REAL_RUNS = {"generate", "batch", "bench", "calibrate", "recipe", "doctor"}


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
        generate.asked(list(given.get("method") or []), settings, None)
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
def test_commands_run_on_the_zoo(where, command, tmp_path, monkeypatch, capsys) -> None:
    """In this process, for time; a benchmark on the smallest model, clips of nine frames."""
    words = [word for word in shlex.split(command)[1:] if word != "--peers"]
    if words[0] == "generate" and "zoo:emoji-video" in words:
        words += ["--num-frames", "9"]
    if words[0] == "bench":
        words = [word.replace("zoo:emoji-video", "zoo:emoji-unet") for word in words]
    words += FEW.get(words[0], [])
    (tmp_path / "zoo").symlink_to(model_zoo.folder())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["accel", *words])
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        monkeypatch.setenv(f"{library}_VERBOSITY", "error")
    before = signal.getsignal(signal.SIGTERM)  # which `accel batch` sets
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    unmet = words[0] == "calibrate" and "was not reached" in said  # eight steps are few
    assert ended.value.code == 0 or unmet, said[-2000:]
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
