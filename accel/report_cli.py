"""`accel report`: run prompts patched and untouched, and write the page about it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    model: Annotated[str, typer.Option("-m", "--model", help="zoo:NAME, a folder or a repository")],
    prompt: Annotated[list[str], typer.Option("-p", "--prompt", help="repeatable")],
    method: Annotated[list[str] | None, typer.Option(help="a method by name, repeatable")] = None,
    recipe: Annotated[Path | None, typer.Option(help="a recipe file")] = None,
    speedup: Annotated[float | None, typer.Option(help="choose from the recipe's front")] = None,
    quality: Annotated[str | None, typer.Option(help="lossless, balanced or fast")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    bench: Annotated[
        list[Path] | None, typer.Option(help="results of accel bench, for the plot")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("report.html"),
) -> None:
    """Write one HTML page: speed, quality, what was computed, pictures side by side."""
    from accel import generate, html_report
    from accel.choosing import choose
    from accel.known_recipes import known_recipe
    from accel.method import AccelError
    from accel.recipe import Recipe

    if output.is_dir():
        raise AccelError(f"--output {output}: is a folder; a file such as report.html is accepted")
    asked = generate.asked(method or [], {}, recipe)
    pipe, call, _ = generate.load(generate.Job(model=model, prompt=prompt[0], steps=steps))
    by_name = asked.methods if asked is not None and method else ()
    given = None if method else asked
    methods, valid_for = choose(pipe, by_name, given, speedup, quality)
    used = generate.settle(
        pipe,
        Recipe.of(methods, valid_for=valid_for),
        lambda: generate.make(pipe, call | {"prompt": prompt[0]}, 0),
    )
    known = given or known_recipe(pipe)
    if known is not None and not method:
        used = used.model_copy(update={"front": known.front, "measured": known.measured})
    runs = html_report.measure(pipe, call, prompt, used)
    command = " ".join(["accel", *sys.argv[1:]])
    print(html_report.write(output, f"accel on {model}", used, runs, bench or [], command))
