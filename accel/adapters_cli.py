"""`accel adapters train`: teach one branch to do guidance."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Adapters that make one branch do guidance.")


@app.callback()
def adapters() -> None:
    """Adapters that make one branch do guidance."""


@app.command()
def train(
    model: Annotated[str, typer.Option("-m", "--model", help="zoo:NAME, a folder or a repository")],
    prompts: Annotated[Path, typer.Option(help="one prompt a line")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder")] = Path("adapters"),
    variant: Annotated[str, typer.Option(help="low_rank, cross or offset")] = "low_rank",
    width: Annotated[int, typer.Option(help="rank, or channels inside the adapters")] = 16,
    minutes: Annotated[float, typer.Option(help="of training, after the guided runs")] = 10.0,
    trajectories: Annotated[int, typer.Option(help="guided runs of the frozen model")] = 128,
    scales: Annotated[str, typer.Option(help="lowest,highest guidance scale")] = "1,8",
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 2e-3,
    batch: Annotated[int, typer.Option(help="states in an update, prompts in a run")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    start: Annotated[str | None, typer.Option(help="adapters to learn on from; a folder")] = None,
    keep_length: Annotated[
        bool, typer.Option(help="compare with guidance by length and angle; no: least squares")
    ] = True,
    work: Annotated[
        Path | None, typer.Option(help="where guided runs and state are kept; OUTPUT/work")
    ] = None,
) -> None:
    """Train guidance adapters of a frozen model; goes on where an earlier run stopped."""
    import torch

    from accel import adapter_training

    if threads is not None:
        torch.set_num_threads(threads)
    plan = adapter_training.Training(
        variant=variant,
        width=width,
        minutes=minutes,
        trajectories=trajectories,
        scales=adapter_training.read_scales(scales),
        lr=lr,
        batch=batch,
        seed=seed,
        device=device,
        start=start,
        keep_length=keep_length,
    )
    result = adapter_training.train(model, prompts, output, plan, _say, work)
    print(json.dumps(result))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
