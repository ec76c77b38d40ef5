"""`accel calibrate` and `accel profile`: from a prompt file to a recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accel.method import AccelError

if TYPE_CHECKING:
    from accel.calibrate_result import Calibration

UNREACHED = 4
"""Exit code when nothing reaches the target."""

Model = Annotated[str, typer.Option("-m", "--model", help="zoo:NAME, a folder or a repository")]
Prompts = Annotated[Path | None, typer.Option("--prompts", help="one prompt a line")]
Arguments = Annotated[
    str, typer.Option("--pipeline-kwargs", help="more arguments of the call, JSON")
]
Steps = Annotated[int | None, typer.Option("--steps", min=2, help="sampling steps")]


def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="the recipe, JSON")],
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(min=1)] = 8,
    steps: Steps = None,
    pipeline_kwargs: Arguments = "{}",
    speedup: Annotated[float | None, typer.Option(help="at least this speed-up")] = None,
    psnr: Annotated[float | None, typer.Option(help="at least this many dB")] = None,
    quality: Annotated[str | None, typer.Option(help="lossless, balanced or fast")] = None,
    budget: Annotated[float | None, typer.Option(help="minutes")] = None,
    folder: Annotated[Path | None, typer.Option(help="keeps every run; resumes")] = None,
    shard: Annotated[str | None, typer.Option(help="I/N, I from 1: a part of the runs")] = None,
    merge: Annotated[list[Path] | None, typer.Option(help="folder of a shard, repeatable")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Search methods for a wanted speed or quality, and write a recipe with its evidence."""
    from accel.calibrate_result import UnreachableError
    from accel.calibrate_search import calibrate as search

    if output.is_dir():
        raise AccelError(f"--output {output}: is a folder; name the recipe's file")
    pipe, call, texts = _loaded(model, prompts, num_prompts, steps, pipeline_kwargs)
    try:
        result = search(
            pipe,
            texts,
            speedup=speedup,
            psnr=psnr,
            quality=quality,
            budget=budget,
            call=call,
            folder=folder,
            shard=_shard(shard),
            merge=merge or (),
            say=_say,
        )
    except UnreachableError as error:
        error.calibration.save(output)
        _say(f"accel: {error}; the best is in {output}")
        raise typer.Exit(UNREACHED) from error
    result.save(output)
    _print(result, output, as_json)


def profile(
    model: Model,
    folder: Annotated[Path, typer.Option("-o", "--output", help="one file a prompt")],
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(min=1)] = 1,
    steps: Steps = None,
    pipeline_kwargs: Arguments = "{}",
) -> None:
    """Record untouched runs, which calibration starts from."""
    from accel.calibrate_profile import profile as record

    pipe, call, texts = _loaded(model, prompts, num_prompts, steps, pipeline_kwargs)
    made = record(pipe, texts, call=call, folder=folder)
    print(json.dumps({"fingerprint": made.fingerprint, "prompts": len(made.prompts)}))


def _loaded(
    model: str, prompts: Path | None, count: int, steps: int | None, more: str
) -> tuple[Any, dict[str, Any], list[str]]:
    """Pipeline, arguments of its call without the prompt, and prompts."""
    from accel import batch_items, generate, model_zoo

    if prompts is None:
        if not model.startswith("zoo:"):
            raise AccelError("--prompts FILE is needed for models outside the zoo")
        prompts = model_zoo.prompts(model.removeprefix("zoo:"), "heldout")
    texts = batch_items.prompt_lines(prompts, count)
    try:
        extra = json.loads(more)
    except json.JSONDecodeError as error:
        raise AccelError(f"--pipeline-kwargs: not JSON ({error})") from error
    if not isinstance(extra, dict):
        raise AccelError("--pipeline-kwargs: must be a JSON object")
    job = generate.Job(model=model, prompt=texts[0], steps=steps, extra=extra)
    pipe, call, _ = generate.load(job)
    return pipe, {key: value for key, value in call.items() if key != "prompt"}, texts


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise AccelError(f"--shard {text!r}: write I/N with 1 ≤ I ≤ N")
    return int(index) - 1, int(count)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print(result: Calibration, output: Path, as_json: bool) -> None:
    chosen = result.recipe.measured[0]
    if as_json:
        print(json.dumps({"generations": result.generations, "recipe": str(output), **chosen}))
        return
    print(f"{chosen['methods']}: {chosen['speedup']:.2f}x, {chosen['psnr']:.1f} dB (medians)")
    print(f"at the cost of {result.generations:.1f} generations; {output}")
