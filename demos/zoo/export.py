"""Write a trained zoo model as a plain diffusers folder, and contact sheets of what it makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from demos.zoo import train


def export(
    name: str, pipe: DiffusionPipeline, call: dict[str, Any], output: Path, fps: int | None
) -> None:
    """fp16 safetensors by `save_pretrained`, `call.json`, the loss curve and a contact sheet."""
    from demos.zoo import text

    contact_sheet(
        pipe, text.sheet_prompts(video=fps is not None), call, output / "contact_sheet.png"
    )
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.half()
    pipe.save_pretrained(output, safe_serialization=True)
    settings = {"call": call, "fps": fps, "negative_prompt": ""}
    (output / "call.json").write_text(json.dumps(settings, indent=2) + "\n")
    curve = train.CHECKPOINTS / f"{name}.csv"
    if curve.exists():
        lines = curve.read_text().splitlines()
        every = max(len(lines) // 200, 1)
        (output / "loss.csv").write_text("\n".join(["step,minutes,loss", *lines[::every]]) + "\n")


def contact_sheet(
    pipe: DiffusionPipeline, prompts: list[str], call: dict[str, Any], file: Path, zoom: int = 2
) -> None:
    """One row of frames for each prompt (videos), or a square of pictures, as a PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(index)
        out = pipe(prompt=prompt, generator=generator, output_type="np", **call)
        if hasattr(out, "frames"):
            rows.append(np.concatenate(list(out.frames[0][::2]), axis=1))
        else:
            rows.append(out.images[0])
    if rows[0].shape[0] == rows[0].shape[1]:
        side = int(len(rows) ** 0.5)
        rows = [np.concatenate(rows[i : i + side], axis=1) for i in range(0, side * side, side)]
    sheet = Image.fromarray((np.concatenate(rows) * 255).round().clip(0, 255).astype(np.uint8))
    sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST).save(file)
