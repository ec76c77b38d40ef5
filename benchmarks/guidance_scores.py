"""Scores of zoo models when methods take the guidance branch's place, and what they save.

    python -m benchmarks.guidance_scores benchmarks/results/emoji-video-agd.json \\
        --model emoji-video --rows "AGD()" plain "CfgCache(interval=10)"

The first row is always the untouched guided run, "plain" the same without guidance. Every row has
the scores of demos/zoo/evaluate.py, PSNR against the guided run of the same seeds, the share of
branch calls that ran, and the ratio of CPU seconds of one thread, measured alternately: other jobs
on the machine hardly change it. Rows are added to the file as they come.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

import accel
from accel import metrics, model_zoo, registry
from demos.zoo import evaluate, text

BATCH = 8


def methods(text: str) -> list[Any]:
    """Methods written as "CfgCache(interval=3) + MagCache()"."""
    found = []
    for part in text.split(" + "):
        call = ast.parse(part, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise SystemExit(f"{part!r}: write a method as in Python")
        settings = {each.arg or "": ast.literal_eval(each.value) for each in call.keywords}
        found.append(registry.method(call.func.id)(**settings))
    return found


class Model:
    """A zoo model, its guided call and the captions to draw."""

    def __init__(self, name: str, part: Any, count: int, scale: float | None) -> None:
        self.pipe, self.call, _ = model_zoo.load(name)
        self.scale_name = "true_cfg_scale" if "true_cfg_scale" in self.call else "guidance_scale"
        self.call[self.scale_name] = scale or self.call[self.scale_name]
        lines = model_zoo.prompts(name, part).read_text(encoding="utf-8").splitlines()
        self.captions = (lines * (count // len(lines) + 1))[:count]
        form = self.call["height"], self.call.get("num_frames", 1)
        names = text.known_names(self.pipe)
        self.judge = evaluate.CaptionClassifier(*form, names)
        self.real = evaluate.reference_features(*form, names)

    def arguments(self, row: str) -> dict[str, Any]:
        """The call of a row: without guidance for "plain"."""
        return self.call | ({self.scale_name: 1.0} if row == "plain" else {})

    @contextlib.contextmanager
    def patched(self, row: str) -> Iterator[Any]:
        """The pipeline as a row has it; methods that measure themselves have done so."""
        if row in ("guided", "plain"):
            yield None
            return
        with accel.patched(self.pipe, *methods(row)) as handle:
            if any(getattr(each, "unmeasured", False) for each in handle.methods):
                trained = model_zoo.prompts(self.pipe_name, "train").read_text().splitlines()
                self.run(row, trained[:BATCH], 1000)
            yield handle

    @property
    def pipe_name(self) -> Any:
        """The zoo's name of the model."""
        return Path(self.pipe.config["_name_or_path"]).name

    def run(self, row: str, captions: list[str], seed: int) -> Tensor:
        """Clips (n, frames, 3, h, w) of captions; clip i has seed + i whatever the batch."""
        call = self.arguments(row)
        negative = [call.pop("negative_prompt")] * len(captions)
        generators = [Generator().manual_seed(seed + i) for i in range(len(captions))]
        out = self.pipe(
            **call,
            prompt=captions,
            negative_prompt=negative,
            generator=generators,
            output_type="np",
        )
        array = out.frames if hasattr(out, "frames") else out.images[:, None]
        return torch.from_numpy(np.asarray(array)).permute(0, 1, 4, 2, 3).float()

    def clips(self, row: str) -> tuple[Tensor, float]:
        """All captions' clips, and the share of branch calls that ran."""
        made, shares = [], []
        with self.patched(row) as handle:
            for start in range(0, len(self.captions), BATCH):
                made.append(self.run(row, self.captions[start : start + BATCH], start))
                shares.append(handle.report().share_computed if handle else 1.0)
        return torch.cat(made), 0.5 if row == "plain" else statistics.mean(shares)

    def speedups(self, row: str, batch: int, repeats: int) -> list[float]:
        """Ratios of CPU seconds, guided over this row, alternately."""
        captions = self.captions[:batch]
        ratios = []
        with self.patched(row) as handle:
            for _ in range(repeats):
                fast = self._seconds(row, captions)
                slow = self._untouched_seconds(handle, captions)
                ratios.append(slow / fast)
        return ratios

    def _seconds(self, row: str, captions: list[str]) -> float:
        began = time.process_time()
        self.run(row, captions, 0)
        return time.process_time() - began

    def _untouched_seconds(self, handle: Any, captions: list[str]) -> float:
        if handle is None:
            return self._seconds("guided", captions)
        settled = handle.methods
        handle.remove()
        seconds = self._seconds("guided", captions)
        handle.attach(settled)
        return seconds


def measure(model: Model, row: str, guided: Tensor | None, options: Any) -> tuple[dict, Tensor]:
    """One row."""
    clips, share = model.clips(row)
    result: dict[str, Any] = {"name": row, "share_computed": share}
    result |= evaluate.scores(clips, model.captions, model.judge, model.real)
    if guided is not None:
        values = [metrics.psnr(a, b) for a, b in zip(clips, guided, strict=True)]
        result["psnr_median"] = statistics.median(values)
        for batch in options.timing_batches:
            ratios = model.speedups(row, batch, options.repeats)
            result[f"speedup_batch_{batch}"] = statistics.median(ratios)
            result[f"speedup_batch_{batch}_spread"] = [min(ratios), max(ratios)]
    return result, clips


def main() -> None:
    """Measure the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--part", default="final", choices=["train", "heldout", "final"])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--scale", type=float, help="guidance scale; the model's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timing-batches", type=int, nargs="*", default=[1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Model(options.model, options.part, options.clips, options.scale)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.guidance_scores", *sys.argv[1:]]),
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": 1},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
        "model": options.model,
        "part": options.part,
        "clips": len(model.captions),
        "scale": model.call[model.scale_name],
        "classifier_accuracy_on_real": model.judge.accuracy,
        "rows": [],
    }
    guided: Tensor | None = None
    for row in ("guided", *options.rows):
        found, clips = measure(model, row, guided, options)
        guided = clips if guided is None else guided
        result["rows"].append(found)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
