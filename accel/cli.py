"""The command `accel`. Help loads no torch; stdout carries results, stderr everything else."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from accel import adapters_cli, calibrate_cli, recipe_cli, report_cli, stream_cli
from accel.method import AccelError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Faster diffusers pipelines.",
    rich_markup_mode=None,
)

app.add_typer(recipe_cli.app, name="recipe")
app.add_typer(adapters_cli.app, name="adapters")
app.command()(report_cli.report)
app.command()(stream_cli.stream)
app.command()(calibrate_cli.calibrate)
app.command()(calibrate_cli.profile)


class Format(str, Enum):
    """How results are printed."""

    human = "human"
    json = "json"


class OnError(str, Enum):
    """What a failed item does to a batch."""

    go_on = "continue"
    stop = "stop"


Model = Annotated[str, typer.Option("-m", "--model", help="zoo:NAME, a folder or a repository")]
Steps = Annotated[
    int | None, typer.Option("--steps", "--num-inference-steps", min=1, help="sampling steps")
]
Output = Annotated[Format, typer.Option("--format", help="human or json")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt")],
    negative_prompt: Annotated[str | None, typer.Option()] = None,
    steps: Steps = None,
    guidance_scale: Annotated[float | None, typer.Option()] = None,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    width: Annotated[int | None, typer.Option(min=1)] = None,
    num_frames: Annotated[int | None, typer.Option(min=1)] = None,
    fps: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "auto",
    device: Annotated[str, typer.Option()] = "auto",
    variant: Annotated[str | None, typer.Option(help="of the weights, e.g. fp16")] = None,
    revision: Annotated[str | None, typer.Option(help="of the repository")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="file, folder, repository or JSON; repeatable")
    ] = None,
    cpu_offload: Annotated[str | None, typer.Option(help="model or group")] = None,
    attention_backend: Annotated[str | None, typer.Option(help="of diffusers")] = None,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling")] = False,
    compile_blocks: Annotated[bool, typer.Option("--compile", help="by region")] = False,
    video_format: Annotated[str, typer.Option(help="mp4, gif or png")] = "mp4",
    pipeline_kwargs: Annotated[str, typer.Option(help="more arguments of the call, JSON")] = "{}",
    method: Annotated[list[str] | None, typer.Option(help="a method by name, repeatable")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the method")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="a recipe file")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="also run untouched")] = False,
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("out"),
    output_format: Output = Format.human,
) -> None:
    """Make one picture or video, faster."""
    from accel import generate as maker
    from accel.loading import Loading

    job = maker.Job(
        model=model,
        prompt=prompt,
        seed=seed,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        num_frames=num_frames,
        fps=fps,
        video_format=video_format,
        loading=Loading(
            dtype=dtype,
            device=device,
            variant=variant,
            revision=revision,
            lora=tuple(lora or []),
            cpu_offload=cpu_offload,
            attention_backend=attention_backend,
            vae_tiling=vae_tiling,
            compile=compile_blocks,
        ),
        extra=_object(pipeline_kwargs, "--pipeline-kwargs"),
    )
    chosen = maker.asked(method or [], _pairs(settings or []), recipe)
    result = maker.generate(job, chosen, output, compare)
    _print(result, output_format)


@app.command()
def bench(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file")],
    methods: Annotated[str, typer.Option(help="names with commas, or all")] = "all",
    prompts: Annotated[Path | None, typer.Option(help="one prompt a line")] = None,
    num_prompts: Annotated[int, typer.Option(min=1)] = 32,
    steps: Steps = 50,
    repeats: Annotated[int, typer.Option(min=1, help="timing pairs")] = 5,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="also diffusers', cache-dit's and ParaAttention's caches"),
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="also the points of a calibrated recipe's front")
    ] = None,
    output_format: Output = Format.human,
) -> None:
    """Measure speed-up and quality of methods against the untouched pipeline."""
    from accel import bench as measuring

    plan = measuring.Plan(
        model=model,
        methods=methods,
        prompts=prompts,
        num_prompts=num_prompts,
        steps=steps or 50,
        repeats=repeats,
        peers=peers,
        recipe=recipe,
    )
    result = measuring.run(plan, output, command=" ".join(["accel", *sys.argv[1:]]), say=_say)
    print(json.dumps(result) if output_format is Format.json else measuring.table(result))


@app.command()
def doctor(output_format: Output = Format.human) -> None:
    """Examine this machine and the installed packages."""
    from accel.doctor import examine

    result = examine()
    _print(result, output_format)
    if result["problems"]:
        raise typer.Exit(3)


@app.command()
def demo(
    model: Annotated[
        list[str] | None, typer.Option("-m", "--model", help="offered beside the zoo, repeatable")
    ] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="the first free one from 7860 on")] = None,
    auth: Annotated[
        Path | None, typer.Option(help="file of user:password lines; needed for other hosts")
    ] = None,
    queue_size: Annotated[int, typer.Option(min=1, help="visitors who may wait")] = 8,
    pipeline_kwargs: Annotated[str, typer.Option(help="more arguments of the calls, JSON")] = "{}",
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "auto",
    device: Annotated[str, typer.Option()] = "auto",
    cpu_offload: Annotated[str | None, typer.Option(help="model or group")] = None,
) -> None:
    """Open a page in the browser: generate, compare, see what is reused."""
    from accel import demo_server
    from accel.loading import Loading

    options = demo_server.Options(
        models=tuple(model or []),
        host=host,
        port=port,
        auth=demo_server.read_auth(auth) if auth is not None else (),
        queue_size=queue_size,
        extra=_object(pipeline_kwargs, "--pipeline-kwargs"),
        loading=Loading(dtype=dtype, device=device, cpu_offload=cpu_offload),
    )
    demo_server.serve(options)


@app.command()
def batch(
    prompts: Annotated[str, typer.Argument(help=".txt, .jsonl or .csv, or - for standard input")],
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder")] = Path("out"),
    negative_prompt: Annotated[str | None, typer.Option()] = None,
    steps: Steps = None,
    guidance_scale: Annotated[float | None, typer.Option()] = None,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    width: Annotated[int | None, typer.Option(min=1)] = None,
    num_frames: Annotated[int | None, typer.Option(min=1)] = None,
    fps: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int, typer.Option(min=0, help="of item 0; item i gets seed + i")] = 0,
    seeds: Annotated[str | None, typer.Option(help="every prompt with each, e.g. 0-3,7")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts in one call")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first items")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: part i of n")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--overwrite", help="keep finished files, or redo all")
    ] = True,
    retry: Annotated[int, typer.Option(min=0, help="more tries for an item")] = 0,
    on_error: Annotated[OnError, typer.Option()] = OnError.go_on,
    oom_fallback: Annotated[
        bool, typer.Option("--oom-fallback", help="smaller batch, VAE tiling, offload")
    ] = False,
    name_template: Annotated[str, typer.Option()] = "{index:05d}_{seed}_{slug}",
    vbench_names: Annotated[bool, typer.Option("--vbench-names", help="PROMPT-i.mp4")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the files only")] = False,
    workers: Annotated[int, typer.Option(min=1, help="processes or Ray actors")] = 1,
    gpus: Annotated[str | None, typer.Option(help="all, or numbers with commas")] = None,
    ray: Annotated[str | None, typer.Option(help="a cluster's address, or local")] = None,
    deadline: Annotated[float | None, typer.Option(help="seconds; see --prices")] = None,
    prices: Annotated[str | None, typer.Option(help="of a second of each worker")] = None,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "auto",
    device: Annotated[str, typer.Option()] = "auto",
    variant: Annotated[str | None, typer.Option(help="of the weights, e.g. fp16")] = None,
    revision: Annotated[str | None, typer.Option(help="of the repository")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="as in generate")] = None,
    cpu_offload: Annotated[str | None, typer.Option(help="model or group")] = None,
    attention_backend: Annotated[str | None, typer.Option(help="of diffusers")] = None,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling")] = False,
    compile_blocks: Annotated[bool, typer.Option("--compile", help="by region")] = False,
    video_format: Annotated[str, typer.Option(help="mp4, gif or png")] = "mp4",
    pipeline_kwargs: Annotated[str, typer.Option(help="more arguments of the call, JSON")] = "{}",
    method: Annotated[list[str] | None, typer.Option(help="a method by name, repeatable")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the method")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="a recipe file")] = None,
    output_format: Output = Format.human,
) -> None:
    """Make a file for every prompt, going on where an earlier run stopped."""
    from accel import batch_command

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = {key: value for key, value in locals().items() if key != "batch_command"}
    options["pipeline_kwargs"] = _object(pipeline_kwargs, "--pipeline-kwargs")
    options["settings"] = _pairs(settings or [])
    options["on_error"] = on_error.value
    code = batch_command.run(options, output_format is Format.json, _say)
    raise typer.Exit(code)


@app.command()
def show(
    file: Path,
    rerun: Annotated[bool, typer.Option("--rerun", help="make it again and compare")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="of --rerun; default: beside the file")
    ] = None,
    output_format: Output = Format.human,
) -> None:
    """Print the metadata of a picture or video that accel wrote, or make it again."""
    if not rerun:
        from accel.media import read_metadata

        _print(read_metadata(file), output_format)
        return
    from accel.batch_rerun import rerun as make_again

    result = make_again(file, output)
    _print(result, output_format)
    if not result["identical"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point; errors become one line and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.ERROR)
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        app()
    except AccelError as error:
        _say(f"accel: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print(result: dict[str, Any], output_format: Format) -> None:
    if output_format is Format.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:<18} {_readable(value)}")


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_readable(item) for item in value)
    if isinstance(value, dict):
        return "".join(f"\n  {key:<20} {_readable(item)}" for key, item in value.items())
    return str(value)


def _pairs(settings: list[str]) -> dict[str, Any]:
    found = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise AccelError(f"--set {setting!r}: write key=value")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def _object(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise AccelError(f"{option}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise AccelError(f"{option}: must be a JSON object")
    return value
